"""Every operator once, small, forward and backward, against its plain-PyTorch reference: quick enough for
compute-sanitizer (``benchmarks/gpu_check.sh sanitizer``), which makes a kernel some hundred times slower."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from d2net import ops
from d2net.errors import InputError
from d2net.info import operator_names
from d2net.ops import use_backend
from d2net.ops.loss import d2net_loss
from d2net.ops.loss_ref import LossInputs, LossSettings
from d2net.ops.network import network
from d2net.ops.network_ref import NetworkInputs, NetworkSettings

B, T, C, D, N = 3, 70, 5, 33, 90  # no multiple of a warp
OFFSETS = [0, 72, 75, 117]  # of recordings of T, 0 and 37 snippets, with gaps of 2, 3 and 5 rows
ROWS = OFFSETS[-1] + 4  # of the packed batch


def uniform(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def lengths() -> Tensor:
    return torch.tensor([T, 0, 37])


def packed(x: Tensor) -> Tensor:
    """The first ``ROWS`` numbers or vectors as a packed batch; what gap rows hold must not matter."""
    x = x.clone()
    for b, length in enumerate(lengths().tolist()):
        x[OFFSETS[b] + length : [*OFFSETS[1:-1], ROWS][b]] = torch.nan
    return x


def segments() -> tuple[Tensor, Tensor]:
    x = uniform(N, 3)
    return torch.stack((50 * x[:, 0], 50 * x[:, 0] + 0.5 + 10 * x[:, 1]), 1), x[:, 2].contiguous()


LOSS = LossSettings(
    classify=True, separate=True, gamma=0.3, embed=True, mean_embeddings=True, background_threshold=0.3, update=True,
    score=True, snippet=True, alpha_snippet=0.2, own_classes=True, bg_threshold=0.4, video=True, alpha_video=0.3,
    peak_share=0.2,
)  # fmt: skip


def loss(tcam: Tensor, embeddings: Tensor, n: Tensor, y: Tensor, x_ref: Tensor, partner: Tensor) -> list[Tensor]:
    batch = LossInputs(tcam, embeddings, n, y, x_ref, partner=partner, source=torch.arange(B, device=n.device))
    return list(d2net_loss(batch, LOSS)[:-1])


def packed_loss(*x: Tensor) -> list[Tensor]:
    *inputs, partner, offsets = x
    batch = LossInputs(*inputs, partner=partner, offsets=offsets)
    return list(d2net_loss(batch, LOSS, T)[:-1])


def rows_of_the_network(k: int) -> Tensor:
    """(N,) bool: recordings of T, 0 and 37 snippets with gaps of a row, in a number of rows for kernels of ``k``."""
    n = T + 37 + 4
    mask = torch.zeros(n + -(n + 1) % k, dtype=torch.bool)
    mask[1 : 1 + T] = mask[T + 3 : T + 3 + 37] = True
    return mask


def streams(k: int, of_classifier: int, width: int) -> list[Tensor]:
    """Features of two streams, 0 in gaps, and the weights of their convolutions."""
    gaps, sizes = ~rows_of_the_network(k)[:, None], ((D, width, k), (D, D, k), (C, D, of_classifier))
    features = (uniform(2, len(gaps), width) - 0.5).masked_fill(gaps, 0)
    weights = [(0.2 * (uniform(2, *size) - 0.5), uniform(2, size[0]) - 0.5) for size in sizes]
    return [*features, *(x[s] for s in range(2) for layer in weights for x in layer)]


def run_streams(settings: NetworkSettings, apart: bool = False) -> Callable[..., list[Tensor]]:
    def run(x_a: Tensor, x_b: Tensor, *rest: Tensor) -> list[Tensor]:
        weights, (mask, *of_dropout) = rest[:12], rest[12:]
        return [*network(NetworkInputs(mask, x_a, x_b, *(of_dropout or [None])), weights, settings, apart=apart)]

    return run


RELEASE = NetworkSettings(residual=True, dropout=0.7, dropout_embeddings=True)

# Every case: the operator on differentiable inputs (the first list) and others (the second).
Case = tuple[Callable, list[Tensor], list[Tensor]]
CASES: dict[str, Case] = {
    "attention_pool": (ops.attention_pool, [uniform(B, T, D), uniform(B, T)], [lengths()]),
    "attention_pool by mean": (
        lambda x, a, n: ops.attention_pool(x, a, n, reduction="mean"),
        [uniform(B, T, D), uniform(B, T)],
        [lengths()],
    ),
    "attention_pool packed": (
        lambda x, a, n, at: ops.attention_pool(x, a, n, reduction="mean", offsets=at, max_length=T),
        [packed(uniform(ROWS, D)), packed(uniform(ROWS))],
        [lengths(), torch.tensor(OFFSETS)],
    ),
    "batched_nms_1d": (lambda *x: ops.batched_nms_1d(*x, 0.5), [], [*segments(), torch.arange(N) % 4]),
    "bottom_up_attention": (ops.bottom_up_attention, [uniform(B, T, D) - 0.5, uniform(D) - 0.5], [lengths()]),
    "bottom_up_attention packed": (
        lambda x, r, n, at: ops.bottom_up_attention(x, r, n, offsets=at, max_length=T),
        [packed(uniform(ROWS, D) - 0.5), uniform(D) - 0.5],
        [lengths(), torch.tensor(OFFSETS)],
    ),
    "extract_proposals": (
        lambda x, classes, n: ops.extract_proposals(x, classes, n, thresholds=(0.2, 0.4, 0.6, 0.8)),
        [],
        [uniform(B, T, C), uniform(B, C) > 0.3, lengths()],
    ),
    "iou_1d": (ops.iou_1d, [segments()[0], segments()[0][:40] + 0.25], []),
    "joint_log_condition_number": (ops.joint_log_condition_number, [uniform(2, C, 9), uniform(2, 9, C)], []),
    "log_condition_number": (ops.log_condition_number, [uniform(4, 7, 9)], []),
    "log_condition_number of 2 x 2": (ops.log_condition_number, [uniform(B, 2, 2)], []),
    "network": (run_streams(NetworkSettings()), streams(3, 3, 8), [rows_of_the_network(3)]),
    "network apart": (
        run_streams(NetworkSettings(residual=True), apart=True),
        streams(3, 3, D),
        [rows_of_the_network(3)],
    ),
    "network by release": (
        run_streams(RELEASE),
        streams(3, 1, D),
        [rows_of_the_network(3), torch.tensor([1]), torch.arange(len(rows_of_the_network(3))).flip(0)],
    ),
    "nms_1d": (lambda *x: ops.nms_1d(*x, 0.5), [], list(segments())),
    "snippet_pdmi": (lambda a, s, n: ops.snippet_pdmi(a, s, n), [uniform(B, T)], [uniform(B, T, 1)[..., 0], lengths()]),
    "snippet_pdmi packed": (
        lambda a, s, n, at: ops.snippet_pdmi(a, s, n, offsets=at, max_length=T),
        [packed(uniform(ROWS))],
        [packed(uniform(ROWS, 1)[..., 0]), lengths(), torch.tensor(OFFSETS)],
    ),
    "soft_nms_1d": (
        lambda *x: ops.soft_nms_1d(*x, iou_threshold=0.3, sigma=0.5, min_score=0.05, method="gaussian"),
        [],
        list(segments()),
    ),
    "d2net_loss": (
        loss,
        [uniform(B, T, C), uniform(B, T, D) - 0.5],
        [lengths(), (uniform(B, C) > 0.5).float(), uniform(D) - 0.5, torch.tensor([[1, 2, 0], [2, 0, 1], [0, 2, 1]])],
    ),
    "d2net_loss packed": (
        packed_loss,
        [packed(uniform(ROWS, C)), packed(uniform(ROWS, D) - 0.5)],
        [
            lengths(),
            (uniform(B, C) > 0.5).float(),
            uniform(D) - 0.5,
            torch.tensor([[1, 2, 0], [2, 0, 1], [0, 2, 1]]),
            torch.tensor(OFFSETS),
        ],
    ),
    "tcam_pool": (ops.tcam_pool, [uniform(B, T, C)], [lengths()]),
    "tcam_pool packed": (
        lambda x, n, at: ops.tcam_pool(x, n, offsets=at, max_length=T),
        [packed(uniform(ROWS, C))],
        [lengths(), torch.tensor(OFFSETS)],
    ),
    "topk_pool": (ops.topk_pool, [uniform(B, T, C)], [lengths()]),
    "topk_pool packed": (
        lambda x, n, at: ops.topk_pool(x, n, offsets=at, max_length=T),
        [packed(uniform(ROWS, C))],
        [lengths(), torch.tensor(OFFSETS)],
    ),
}


def strided(x: Tensor) -> Tensor:
    """The same values as a view that is not contiguous: every second element of a larger tensor."""
    place = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1) if x.ndim else x.new_zeros(3)
    view = place[..., 1::2] if x.ndim else place[1]
    return view.copy_(x)


def misaligned(x: Tensor) -> Tensor:
    """The same values, contiguous, but from an address on that is only a multiple of an element's size."""
    return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)


def results(case: Case, device: torch.device, place: Callable[[Tensor], Tensor] = Tensor.clone) -> list[Tensor]:
    """Outputs and gradients, on the CPU; of inputs as ``place`` puts them into memory."""
    function, differentiable, others = case
    leaves = [place(x.detach().to(device)).requires_grad_() for x in differentiable]
    out = function(*leaves, *(place(x.to(device)) for x in others))
    out = [out] if isinstance(out, Tensor) else list(out)
    smooth = [x for x in out if x.requires_grad]
    weights = [1 + uniform(*x.shape).to(x) for x in smooth]
    grads = torch.autograd.grad(smooth, leaves, weights) if leaves else ()
    return [x.detach().cpu() for x in (*out, *grads)]


@pytest.fixture(autouse=True)
def float32_in_products(monkeypatch):
    """The network's products follow PyTorch's setting for convolutions, which is TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


# On a GPU PyTorch may choose other products for other addresses; these are sums of up to N terms, up to 250 in all.
ABSOLUTE = {("network", "cuda"): 1e-3}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, device):
    found = results(CASES[name], torch.device(device))
    with use_backend("reference"):
        expected = results(CASES[name], torch.device("cpu"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("place", [strided, misaligned])
@pytest.mark.parametrize("name", CASES)
def test_inputs_may_lie_anywhere(name, place, device):
    device = torch.device(device)
    found, expected = results(CASES[name], device, place), results(CASES[name], device)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=ABSOLUTE.get((name.split()[0], device.type), 1e-6))


def test_no_operator_is_left_out():
    assert {name.split()[0] for name in CASES} == {*operator_names(), "d2net_loss", "network"}


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="this torch has no 8-bit floats")
def test_8_bit_floats_are_refused_in_one_line():
    x = torch.zeros(2, 8, 3).to(torch.float8_e4m3fn)
    for call in (
        lambda: ops.topk_pool(x),
        lambda: ops.tcam_pool(x),
        lambda: ops.attention_pool(x, torch.zeros(2, 8)),
        lambda: ops.bottom_up_attention(x, torch.zeros(3)),
        lambda: ops.log_condition_number(x),
        lambda: ops.joint_log_condition_number(x, x.transpose(1, 2)),
        lambda: ops.snippet_pdmi(x[..., 0], x[..., 0]),
        lambda: ops.iou_1d(x[0, :, :2], x[0, :, :2]),
        lambda: ops.nms_1d(x[0, :, :2], x[0, :, 0], 0.5),
        lambda: ops.extract_proposals(x, torch.ones(2, 3, dtype=torch.bool), thresholds=[0.5]),
    ):
        with pytest.raises(InputError, match="float"):
            call()
