"""Every operator, forward and backward, where there is nothing: no recordings, snippets, classes or columns; and on the
meta device, where there are no values."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from d2net import ops
from d2net.info import operator_names
from d2net.ops import use_backend
from d2net.ops.loss import d2net_loss
from d2net.ops.loss_ref import LossInputs, LossSettings
from d2net.ops.network import network
from d2net.ops.network_ref import NetworkInputs, NetworkSettings

SIZES = list(itertools.product((0, 2), (0, 3), (0, 4), (0, 5)))
WAIT = ("nms_1d", "batched_nms_1d", "soft_nms_1d", "extract_proposals")


LOSS = LossSettings(
    classify=True, separate=True, embed=True, update=True, score=True, snippet=True, alpha_snippet=0.2, video=True,
    alpha_video=0.3,
)  # fmt: skip
MORE = LOSS._replace(
    mean_over_classes=True, balanced=True, mean_embeddings=True, lowest_attention=True, own_classes=True,
    skip_unlabelled=True, peak_share=0.5, video_per_class=True,
)  # fmt: skip


def cases(b: int, t: int, c: int, d: int):
    """By name: a function, its differentiable inputs, and its other inputs."""
    generator = torch.Generator().manual_seed(0)

    def x(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    mask = torch.cat([torch.tensor([0]), torch.cat([torch.ones(t), torch.zeros(1)]).repeat(b)]).bool()  # gaps of a row
    lengths, labels = torch.full((b,), t), (x(b, c) > 0.5).double()
    partner = ((torch.arange(b) + 1) % max(b, 1)).expand(3, b).clone()
    return {
        "topk_pool": (ops.topk_pool, [x(b, t, c)], [lengths]),
        "topk_pool without lengths": (ops.topk_pool, [x(b, t, c)], []),
        "tcam_pool": (ops.tcam_pool, [x(b, t, c)], [lengths]),
        "attention_pool": (ops.attention_pool, [x(b, t, d), x(b, t)], [lengths]),
        "attention_pool by mean": (
            lambda x, a, n: ops.attention_pool(x, a, n, reduction="mean"),
            [x(b, t, d), x(b, t)],
            [lengths],
        ),
        "bottom_up_attention": (ops.bottom_up_attention, [x(b, t, d), x(d)], [lengths]),
        "network": (  # none has layers without width
            lambda x, mask, *w: network(NetworkInputs(mask, x, None, None), w, NetworkSettings())[2:],
            [x(len(mask), d + 1).masked_fill(~mask[:, None], 0)],
            [mask, *(y for size in ((5, d + 1, 3), (5, 5, 3), (c + 1, 5, 3)) for y in (x(*size), x(size[0])))],
        ),
        "log_condition_number": (ops.log_condition_number, [x(b, t, c)], []),
        "joint_log_condition_number": (ops.joint_log_condition_number, [x(d, c, b), x(d, b, c)], []),
        "snippet_pdmi": (ops.snippet_pdmi, [x(b, t)], [x(b, t), lengths]),
        "iou_1d": (ops.iou_1d, [x(b, 2), x(t, 2)], []),
        "nms_1d": (lambda *x: ops.nms_1d(*x, 0.5), [], [x(t, 2), x(t)]),
        "batched_nms_1d": (lambda *x: ops.batched_nms_1d(*x, 0.5), [], [x(t, 2), x(t), torch.arange(t)]),
        "soft_nms_1d": (
            lambda *x: ops.soft_nms_1d(*x, iou_threshold=0.5, sigma=0.5, min_score=0.1),
            [],
            [x(t, 2), x(t)],
        ),
        "extract_proposals": (
            lambda *x: ops.extract_proposals(*x, thresholds=[0.5]),
            [],
            [x(b, t, c), x(b, c) > 0.3, lengths],
        ),
        **{
            name: (
                lambda t, e, n, y, r, p, settings=settings: d2net_loss(LossInputs(t, e, n, y, r, partner=p), settings)[
                    :-1
                ],
                [x(b, t, c), x(b, t, d)],
                [lengths, labels, x(d), partner],
            )
            for name, settings in (("d2net_loss", LOSS), ("d2net_loss by release", MORE))
        },
        "d2net_loss without embeddings": (
            lambda t, n, y: d2net_loss(LossInputs(t, None, n, y), LossSettings(classify=True, video=True))[:-1],
            [x(b, t, c)],
            [lengths, labels],
        ),
    }


class Called(TorchDispatchMode):
    """Records the names of d2net's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "d2net":
            self.names.add(function._schema.name.removeprefix("d2net::"))
        return function(*args, **(kwargs or {}))


def results(case, device: str = "cpu") -> list[Tensor]:
    """Outputs and gradients."""
    function, differentiable, others = case
    leaves = [x.to(device).requires_grad_() for x in differentiable]
    out = function(*leaves, *(x.to(device) for x in others))
    out = [out] if isinstance(out, Tensor) else list(out)
    smooth = [x for x in out if x.requires_grad]
    grads = torch.autograd.grad(smooth, leaves, [torch.ones_like(x) for x in smooth]) if leaves else ()
    return [x.detach() for x in (*out, *grads)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kernels", ["cpu", "simt"])
def test_nothing_gives_what_the_reference_gives(kernels, sizes, request):
    if kernels == "simt":
        request.getfixturevalue("simt_kernels")
    found = {name: results(case) for name, case in cases(*sizes).items()}
    for name, case in cases(*sizes).items():
        with use_backend("reference"):
            expected = results(case)
        assert [x.dtype for x in found[name]] == [x.dtype for x in expected], name
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: name + text)
        assert all(x.isfinite().all() for x in found[name]), name


def test_no_operator_is_left_out():
    names = {name.split()[0] for name in cases(0, 0, 0, 0)}
    assert names == {*operator_names(), "d2net_loss", "network"}


@pytest.mark.parametrize("sizes", [(2, 3, 4, 5), (0, 3, 4, 5), (2, 0, 0, 0)], ids=str)
def test_meta_tensors_give_meta_tensors(sizes):
    """Meta tensors run the fake kernels, forward and backward, not the plain-PyTorch references."""
    for name, case in cases(*sizes).items():
        if name in WAIT:
            continue
        with Called() as called:
            found = results(case, "meta")
        assert name.split()[0] in called.names
        expected = results(case)
        assert all(x.is_meta for x in found), name
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected], name


@pytest.mark.parametrize("name", WAIT)
def test_how_many_results_there_are_meta_tensors_do_not_tell(name):
    with pytest.raises(RuntimeError, match="data-dependent shape"):
        results(cases(2, 3, 4, 5)[name], "meta")
