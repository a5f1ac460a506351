"""What docs/numbers.md promises about bits: the same for every number of threads, and alone or in a batch.

The sizes are such that every operator shares its work among threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from d2net import ops
from d2net.info import operator_names
from d2net.localization import Localizer
from d2net.losses import D2NetLoss
from d2net.model import D2Net
from d2net.ops.loss import d2net_loss
from d2net.ops.loss_ref import LossInputs, LossSettings
from d2net.recipes import load_recipe


@pytest.fixture(autouse=True)
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def drawn_lengths(b: int, t: int) -> Tensor:
    """Among them 0 and t."""
    return (drawn(b) * (t + 1)).long().index_fill_(0, torch.tensor([0]), t).index_fill_(0, torch.tensor([b - 1]), 0)


# The operator, inputs with a gradient, and others.
Case = tuple[Callable, list[Tensor], list[Tensor]]


def per_recording(b: int, t: int, c: int, d: int) -> dict[str, Case]:
    """Operators of recordings that do not know of each other: all inputs are (B, ...)."""
    lengths, scores = [drawn_lengths(b, t)], drawn(b, t, 1)[..., 0]
    x_ref = drawn(d) - 0.5
    return {
        "attention_pool": (ops.attention_pool, [drawn(b, t, d), drawn(b, t)], lengths),
        "attention_pool mean": (
            lambda *x: ops.attention_pool(*x, reduction="mean"),
            [drawn(b, t, d), drawn(b, t)],
            lengths,
        ),
        "bottom_up_attention": (
            lambda x, n: ops.bottom_up_attention(x, x_ref, n),
            [drawn(b, t, d) - 0.5],
            lengths,
        ),
        "extract_proposals": (
            lambda x, classes, n: ops.extract_proposals(x, classes, n, thresholds=(0.2, 0.4, 0.6, 0.8)),
            [],
            [drawn(b, t, c), drawn(b, c) > 0.3, *lengths],
        ),
        "snippet_pdmi": (ops.snippet_pdmi, [drawn(b, t)], [scores, *lengths]),
        "tcam_pool": (ops.tcam_pool, [drawn(b, t, c)], lengths),
        "topk_pool": (ops.topk_pool, [drawn(b, t, c)], lengths),
        "log_condition_number": (ops.log_condition_number, [drawn(b, 7, 9)], []),
        "log_condition_number of 2 x 2": (ops.log_condition_number, [drawn(b, 2, 2)], []),
        "joint_log_condition_number": (ops.joint_log_condition_number, [drawn(b, c, 9), drawn(b, 9, c)], []),
    }


def every_operator(b: int, t: int, c: int, d: int, n: int) -> dict[str, Case]:
    x, lengths = drawn(n, 3), drawn_lengths(b, t)
    segments, scores = torch.stack((n * x[:, 0], n * x[:, 0] + 10 * x[:, 1]), 1), x[:, 2].contiguous()
    labels, partner = (drawn(b, c) > 0.5).float(), torch.arange(b).roll(1).expand(3, b)
    soft = {"iou_threshold": 0.3, "sigma": 0.5, "min_score": 0.05}
    return {
        **per_recording(b, t, c, d),
        "bottom_up_attention of an x_ref": (
            ops.bottom_up_attention,
            [drawn(b, t, d) - 0.5, drawn(d) - 0.5],
            [lengths],
        ),
        "log_condition_number of 60 x 70": (ops.log_condition_number, [drawn(8, 60, 70)], []),
        "nms_1d": (lambda *x: ops.nms_1d(*x, 0.5), [], [segments, scores]),
        "batched_nms_1d": (lambda *x: ops.batched_nms_1d(*x, 0.5), [], [segments, scores, torch.arange(n) % 37]),
        "soft_nms_1d": (lambda *x: ops.soft_nms_1d(*x, **soft), [], [segments, scores]),
        "iou_1d": (ops.iou_1d, [segments[:300], segments[-900:]], []),
        "iou_1d of one segment": (ops.iou_1d, [torch.tensor([[0.0, n]]), segments], []),
        "d2net_loss": (
            lambda x, y: d2net_loss(LossInputs(x, y, lengths, labels, drawn(d), partner=partner), LOSS)[:-1],
            [drawn(b, t, c) ** 2, drawn(b, t, d) - 0.5],
            [],
        ),
    }


LOSS = LossSettings(
    classify=True, separate=True, embed=True, mean_embeddings=True, update=True, score=True, snippet=True,
    alpha_snippet=0.2, own_classes=True, video=True, alpha_video=0.3, peak_share=0.2,
)  # fmt: skip


SIZES = [(9, 1200, 20, 128, 5000), (2, 40000, 3, 9, 40000)]
NAMES = list(every_operator(2, 1, 1, 1, 1000))


def results(case: Case) -> list[Tensor]:
    """Outputs and gradients."""
    function, differentiable, others = case
    leaves = [x.clone().requires_grad_() for x in differentiable]
    out = function(*leaves, *others)
    out = [out] if isinstance(out, Tensor) else list(out)
    smooth = [x for x in out if x.requires_grad]
    weights = [torch.full_like(x, 1.3) for x in smooth]
    grads = torch.autograd.grad(smooth, leaves, weights, materialize_grads=True) if leaves else ()
    return [x.detach() for x in (*out, *grads)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """-0 is not 0; there is no NaN."""
    return all(
        torch.equal(a, b) and torch.equal(a.signbit(), b.signbit()) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_operators_for_every_number_of_threads(name: str, size: tuple[int, ...]) -> None:
    case = every_operator(*size)[name]
    torch.set_num_threads(1)
    expected = results(case)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert same(results(case), expected), threads


def test_no_operator_is_left_out() -> None:
    assert {name.split()[0] for name in NAMES} == {*operator_names(), "d2net_loss"}


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("thumos14-paper", []),
        ("thumos14-release", []),
        ("activitynet12-paper", []),
        ("thumos14-paper", ["loss.classification=focal", "loss.denoising=l1"]),
        ("thumos14-paper", ["loss.classification=cross_entropy", "loss.denoising=bce"]),
    ],
)
def test_the_loss_for_every_number_of_threads(recipe: str, settings: list[str]) -> None:
    b, t, c, d = 10, 750, 20, 256
    values, lengths = load_recipe(recipe).override(settings).loss, drawn_lengths(b, t)
    labels = torch.eye(c)[torch.arange(b) % c]
    partners = torch.arange(b).roll(1) if values.pairing == "different" else torch.arange(b).expand(4, b)

    def whole(tcam: Tensor, embeddings: Tensor) -> list[Tensor]:
        loss = D2NetLoss(c, d, values)
        return [*loss(tcam, embeddings, lengths, labels, partners), loss.reference]

    case = whole, [drawn(b, t, c) ** 2, drawn(b, t, d) - 0.5], []
    torch.set_num_threads(1)
    expected = results(case)
    assert all(x.any() for x in expected[:4])
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert same(results(case), expected), threads


@pytest.mark.parametrize("recipe", ["thumos14-paper", "thumos14-release", "activitynet12-paper"])
def test_the_network_repeats_its_bits_and_threads_change_roundings_alone(recipe: str) -> None:
    """Between numbers of threads, 2.3e-7 of the largest was the most that was seen (torch 2.13)."""
    b, t, width = 5, 300, 128
    torch.manual_seed(0)
    model = D2Net.from_recipe(load_recipe(recipe).model, num_classes=20, stream_widths=(width, width))
    x, lengths = drawn(b, t, 2 * width) - 0.5, drawn_lengths(b, t)

    def run() -> list[Tensor]:
        torch.manual_seed(1)  # of the dropout
        out = model(x, lengths)
        gradients = torch.autograd.grad(sum(1.3 * y.sum() for y in out), list(model.parameters()))
        return [y.detach() for y in (*out, *gradients)]

    torch.set_num_threads(1)
    of_one = run()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found = run()
        assert same(run(), found), threads
        for y, expected in zip(found, of_one, strict=True):
            assert (y - expected).abs().max() <= 1e-6 * expected.abs().max(), threads


@pytest.mark.parametrize("recipe", ["thumos14-paper", "thumos14-release"])
def test_localization_of_tcams_for_every_number_of_threads_and_every_batch(recipe: str) -> None:
    b, t, c = 6, 900, 20
    localizer, lengths = Localizer.from_recipe(recipe), drawn_lengths(b, t)
    tcam, attention = drawn(b, t, c) ** 2, drawn(b, t)
    torch.set_num_threads(1)
    expected = list(localizer(tcam, attention, lengths))
    assert len(expected[0]) > 100
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert same(list(localizer(tcam, attention, lengths)), expected), threads
    alone = [localizer(tcam[i, :n], attention[i, :n]) for i, n in enumerate(lengths.tolist())]
    alone = [x._replace(recording=x.recording + i) for i, x in enumerate(alone)]
    assert same([torch.cat(column) for column in zip(*alone, strict=True)], expected)


@pytest.mark.parametrize("name", per_recording(1, 1, 1, 1))
def test_a_recording_alone_and_in_a_batch(name: str) -> None:
    b, t, c, d = 5, 333, 7, 37
    function, differentiable, others = case = per_recording(b, t, c, d)[name]
    whole = results(case)
    for i in range(b):
        alone = results((function, [x[i : i + 1] for x in differentiable], [x[i : i + 1] for x in others]))
        if name == "extract_proposals":
            mine = whole[0] == i
            expected = [x[mine] for x in whole]
            expected[0] = expected[0] - i
        else:
            expected = [x[i : i + 1] for x in whole]
        assert same(alone, expected), i
