"""The operator of the whole loss, part by part, on every backend; tests/losses has the losses of recipes."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from d2net.errors import InputError
from d2net.ops.loss import d2net_loss
from d2net.ops.loss_ref import (
    BG,
    FG,
    LossInputs,
    LossResult,
    LossSettings,
    d2net_loss_ref,
    different_partners,
    video_factors,
)

PAPER = LossSettings(
    classify=True, separate=True, embed=True, update=True, score=True, snippet=True, alpha_snippet=0.2, video=True,
    alpha_video=0.3, gamma=0.3,
)  # fmt: skip
RELEASE = PAPER._replace(
    topk_divisor=4, min_snippets=3, skip_unlabelled=True, mean_over_classes=True, balanced=True, threshold=0.3,
    background_threshold=0.6, mean_embeddings=True, lowest_attention=True, fg_threshold=0.6, bg_threshold=0.4,
    own_classes=True, snippet_per_class=True, entry_floor=0.01, peak_share=0.3, video_per_class=True,
)  # fmt: skip
SETTINGS = {
    "paper": PAPER,
    "release": RELEASE,
    "beta": PAPER._replace(beta=1.5, probability_floor=0.1, balanced=True),
    "cross entropy": PAPER._replace(beta=0.0, mean_over_classes=True),
    "focal": PAPER._replace(separate=False),
    "evaluation": RELEASE._replace(update=False),
    "embeddings": LossSettings(classify=True, separate=True, embed=True),
    "scores": LossSettings(score=True),
    "snippet": LossSettings(score=True, snippet=True, own_classes=True),
    "video": LossSettings(video=True, peak_share=0.2),
    "nothing": LossSettings(),
}
SMOOTH = 7  # results that have a gradient


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def batch(b: int, t: int, c: int, d: int, seed: int = 0) -> LossInputs:
    """A batch with a recording of length 0, one without labels, and partners out of range."""
    lengths = (uniform(b, seed=seed) * (t + 1)).long()
    lengths[0], lengths[-1] = t, 0
    labels = (uniform(b, c, seed=seed) > 0.6).double()
    labels[1 % b] = 0
    partner = (uniform(3, b, seed=seed) * (b + 2)).long() - 1
    tcam, embeddings = uniform(b, t, c, seed=seed) ** 3, uniform(b, t, d, seed=seed) - 0.5
    return LossInputs(tcam, embeddings, lengths, labels, uniform(d, seed=seed) - 0.5, None, partner)


def to(x: LossInputs, device: torch.device, dtype: torch.dtype = torch.float64) -> LossInputs:
    moved = (None if y is None else y.to(device, copy=True) for y in x)
    return LossInputs(*(None if y is None else y.to(dtype) if y.dtype == torch.float64 else y for y in moved))


def evaluated(function, x: LossInputs, settings: LossSettings) -> list[Tensor]:
    """The results without the workspace, and the gradients of their weighted sum."""
    x = x._replace(tcam=x.tcam.requires_grad_(), embeddings=x.embeddings.requires_grad_())
    result = function(x, settings)
    smooth = [y for y in result[:SMOOTH] if y.requires_grad]
    weights = [(1 + uniform(*y.shape)).to(y) for y in smooth]
    grads = torch.autograd.grad(smooth, x[:2], weights, materialize_grads=True) if smooth else ()
    return [y.detach().cpu() for y in (*result[:-1], *grads)]


def close(found: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    for at, (a, b) in enumerate(zip(found, expected, strict=True)):
        name = (*LossResult._fields[:-1], "the gradient of tcam", "the gradient of embeddings")[at]
        torch.testing.assert_close(a, b, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("sizes", [(5, 70, 7, 33), (4, 33, 20, 132), (6, 12, 3, 8), (1, 1, 1, 1), (9, 3, 2, 1)])
def test_equals_plain_pytorch(device, name, sizes):
    for pairs in ("partner", "keys", "source"):
        x = batch(*sizes)
        if pairs == "keys":
            x = x._replace(partner=None, keys=uniform(3, sizes[0], dtype=torch.float32))
        elif pairs == "source":
            x = x._replace(source=torch.arange(sizes[0]).flip(0) - 1)
        found, expected = (
            evaluated(function, to(x, where), SETTINGS[name])
            for function, where in ((d2net_loss, device), (d2net_loss_ref, torch.device("cpu")))
        )
        close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sizes", [(20, 5, 300, 4), (300, 4, 3, 5), (1, 17000, 2, 2), (2, 40, 70, 5), (70, 40, 80, 5)])
def test_other_sizes_equal_plain_pytorch(device, sizes):
    for name in ("paper", "release"):
        found, expected = (
            evaluated(function, to(batch(*sizes), where), SETTINGS[name])
            for function, where in ((d2net_loss, device), (d2net_loss_ref, torch.device("cpu")))
        )
        close(found, expected, rtol=1e-6, atol=1e-8)  # large U_2 are nearly singular


@pytest.mark.parametrize("name", ["paper", "release"])
def test_float32_follows_float64(device, name):
    x, settings = batch(10, 60, 20, 256), SETTINGS[name]._replace(video=False)
    found = evaluated(d2net_loss, to(x, device, torch.float32), settings)
    wide = LossInputs(
        *(
            y.double() if y is not None and y.is_floating_point() else y
            for y in to(x, torch.device("cpu"), torch.float32)
        )
    )
    expected = evaluated(d2net_loss_ref, wide, settings)
    assert all(y.dtype == torch.float32 for y in found[:SMOOTH])
    close([y.double() for y in found], [y.double() for y in expected], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_embeddings_is_that_of_the_input(device, dtype):
    x = to(batch(5, 70, 7, 36), device, torch.float32)
    half = x.embeddings.to(dtype)
    for settings in (PAPER, RELEASE):
        found = evaluated(d2net_loss, x._replace(embeddings=half.clone()), settings)
        expected = evaluated(d2net_loss, x._replace(embeddings=half.float()), settings)
        close(found[:-1], expected[:-1], rtol=1e-5, atol=1e-6)
        assert found[-1].dtype == dtype
        torch.testing.assert_close(found[-1].float(), expected[-1], rtol=1e-2, atol=1e-4)


def definition(x: LossInputs, result: LossResult, settings: LossSettings) -> float:
    """Mean of Eq. 4, recording by recording and class by class in Python floats, from pooled scores and embeddings."""

    def weight(i: int, pair: str) -> float:
        first = int(x.source[i]) if x.source is not None and pair == "fb" else i
        other = int(x.partner[["fb", "fg", "bg"].index(pair)][i])
        if not (0 <= other < b and 0 <= first < b) or (x.source is None and other == i):
            return 0.0
        own_side, other_side = {"fb": (FG, BG), "fg": (FG, FG), "bg": (BG, BG)}[pair]
        if not (result.valid[own_side, first] and result.valid[other_side, other]):
            return 0.0
        u, v = result.x[own_side, first], result.x[other_side, other]
        cosine = float(u @ v / math.sqrt((u @ u + 1e-12) * (v @ v + 1e-12)))
        return max(0.0, cosine) if pair == "fb" else settings.gamma * (1 - cosine)

    b, c = result.pooled.shape
    terms = []
    for i in range(b):
        if result.counted[i] == 0:
            continue
        w_fb, w_fg, w_bg = (weight(i, pair) for pair in ("fb", "fg", "bg"))
        term, eps, beta = 0.0, settings.probability_floor, settings.beta
        for k in range(c):
            p = min(max(float(result.pooled[i, k]), eps), 1 - eps)
            if x.labels[i, k] > 0:
                term -= (c if settings.balanced else 1) * (1 - p + w_fg + w_fb) ** beta * math.log(p)
            else:
                term -= (p + w_bg + w_fb) ** beta * math.log(1 - p)
        terms.append(term / c if settings.mean_over_classes else term)
    return sum(terms) / max(len(terms), 1)


@pytest.mark.parametrize("name", ["paper", "release", "beta", "cross entropy"])
@pytest.mark.parametrize("sizes", [(2, 3, 3, 7), (6, 9, 20, 33), (9, 12, 4, 300)])
@pytest.mark.parametrize("with_source", [False, True])
def test_eq_4_equals_its_definition(device, name, sizes, with_source):
    for seed in range(3):
        x = batch(*sizes, seed=seed)
        if with_source:
            x = x._replace(source=torch.arange(sizes[0]).flip(0))
        result = LossResult(*(y.detach().cpu() for y in d2net_loss(to(x, device), SETTINGS[name])))
        assert result.discriminative.item() == pytest.approx(definition(x, result, SETTINGS[name]), rel=1e-9, abs=1e-12)


PATTERNS = [[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 1], [0, 0, 0, 1, 0], [0] * 5]


@pytest.mark.parametrize("fg", PATTERNS)
@pytest.mark.parametrize("bg", PATTERNS)
def test_a_partner_is_found_whenever_another_recording_has_the_embedding(fg, bg):
    valid, seen = torch.tensor([fg, bg]).bool(), set()
    for seed in range(8):
        keys = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed))
        partner = different_partners(keys, valid)
        for row, has in enumerate((bg, fg, bg)):
            order = sorted(range(5), key=lambda i: keys[row, i])
            for place, i in enumerate(order):
                following = [j for j in order[place + 1 :] + order[: place + 1] if has[j]]
                assert partner[row][i] == (following[0] if following else -1)
        seen.add(tuple(partner.flatten().tolist()))
    assert len(seen) > 1 or (sum(fg) < 2 and sum(bg) < 2)


def test_no_weight_is_lost_while_another_recording_has_the_embedding(device):
    """Of three recordings with an x_fg only one has an x_bg: the other two are both compared with it (w_fb)."""
    tcam = torch.full((3, 8, 1), 0.9, dtype=torch.float64)
    tcam[0, :4] = 0.1
    settings = LossSettings(classify=True, separate=True, embed=True, gamma=0.0)
    for seed in range(6):
        keys = torch.rand(3, 3, generator=torch.Generator().manual_seed(seed))
        x = LossInputs(tcam, torch.ones(3, 8, 4, dtype=torch.float64), None, torch.ones(3, 1), keys=keys)
        found = d2net_loss(to(x, device), settings).discriminative.item()
        # Recording 0 has nobody to be compared with; of the others the weight of the positive class is 1 - p + 1.
        p = [0.9, 0.9, 0.9]
        weight = [0.0, 1.0, 1.0]
        assert found == pytest.approx(sum(-math.log(q) * (1 - q + w) ** 2 for q, w in zip(p, weight, strict=True)) / 3)


@pytest.mark.parametrize("b", [2, 7, 40, 300])
def test_drawn_partners_are_those_of_plain_pytorch(device, b):
    """NaN is the largest key; of equal keys the lower index comes first."""
    settings = LossSettings(classify=True, separate=True, embed=True, gamma=10.0)
    odd = torch.tensor([math.nan, math.inf, -math.inf, 0.5, -0.0, 0.0, 0.5]).repeat(3 * b)[: 3 * b].view(3, b)
    for keys in (uniform(3, b, dtype=torch.float32), odd, torch.zeros(3, b), torch.full((3, b), math.nan)):
        x = batch(b, 6, 2, 5)._replace(partner=None, keys=keys)
        valid = d2net_loss_ref(x, settings).valid
        given = x._replace(keys=None, partner=different_partners(keys, valid))
        found, expected = (d2net_loss(to(y, device), settings).discriminative for y in (x, given))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("peak_share", [-1.0, 0.0, 0.2, 0.9])
@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize(("b", "c"), [(1, 1), (4, 3), (10, 20)])
def test_video_factors_equal_equation_10(peak_share, per_class, b, c):
    pooled, labels, counted = uniform(b, c), (uniform(b, c, seed=1) > 0.6).double(), (uniform(b, seed=2) > 0.3).long()
    pooled[0, 0] = 0.0  # will be clamped
    settings = LossSettings(probability_floor=1e-3, peak_share=peak_share, video_per_class=per_class)
    p, y = video_factors(pooled, labels, counted, settings)
    for i in range(b):
        row = [min(max(x, 1e-3), 1 - 1e-3) for x in pooled[i].tolist()]
        if peak_share >= 0:
            kept = [x if x > peak_share * max(row) else 0.0 for x in row]
            row = [x / sum(kept) for x in kept]
        assert p[:, i].tolist() == pytest.approx(row)
        for k in range(c):
            size = sum(labels[j, k].item() for j in range(b) if counted[j]) if per_class else int(counted.sum())
            assert y[i, k].item() == pytest.approx(labels[i, k].item() / max(size, 1) if counted[i] else 0.0)


@pytest.mark.parametrize("name", ["paper", "release", "focal", "snippet", "video"])
def test_gradient(name):
    x = batch(4, 9, 3, 4, seed=3)
    x = x._replace(tcam=(0.05 + 0.9 * x.tcam).requires_grad_(), embeddings=x.embeddings.requires_grad_())

    def function(tcam: Tensor, embeddings: Tensor) -> tuple[Tensor, ...]:
        result = d2net_loss(x._replace(tcam=tcam, embeddings=embeddings), SETTINGS[name]._replace(update=False))
        return tuple(y for y in result[:SMOOTH] if y.requires_grad)

    assert torch.autograd.gradcheck(function, x[:2], eps=1e-7, atol=1e-5)


def test_clamped_scores_have_no_gradient(device):
    scores = torch.tensor([[[0.0, 1.0, 0.5, 1e-7]]], device=device, requires_grad=True)
    labels = torch.tensor([[1.0, 0.0, 1.0, 0.0]], device=device)
    for settings in (LossSettings(classify=True), LossSettings(video=True)):
        result = d2net_loss(LossInputs(scores, None, None, labels), settings)
        (grad,) = torch.autograd.grad(result.discriminative + result.video, scores)
        assert result.discriminative.isfinite() and (grad[0, 0, [0, 1, 3]] == 0).all()


def test_nan_reaches_the_terms_that_it_is_part_of(device):
    x = batch(4, 6, 3, 5)._replace(lengths=None, partner=torch.tensor([[1, 2, 3, 0]] * 3))
    x = x._replace(labels=torch.eye(4, 3).double())
    settings = PAPER._replace(update=False)
    assert all(y.isfinite() for y in d2net_loss(to(x, device), settings)[:4])
    broken = x._replace(embeddings=x.embeddings.index_fill(0, torch.tensor([2]), math.nan))
    result = d2net_loss(to(broken, device), settings)
    assert result.discriminative.isnan() and result.total.isnan() and result.video.isfinite()
    broken = x._replace(tcam=x.tcam.index_fill(0, torch.tensor([1]), math.nan))
    result = d2net_loss(to(broken, device), settings)
    assert result.discriminative.isnan() and result.video.isnan() and result.pooled[[0, 2, 3]].isfinite().all()


def test_x_ref_moves_towards_the_mean(device):
    x = batch(5, 9, 3, 33)
    for settings in (PAPER, RELEASE._replace(skip_unlabelled=False)):
        result = d2net_loss(to(x, device), settings)
        has = result.valid[1].cpu()
        assert has.any() and not has.all()
        towards = result.x[1].cpu()
        if settings.lowest_attention:
            rows = result.attention.cpu().masked_fill(torch.arange(9) >= x.lengths[:, None], 2).argmin(1)
            towards = x.embeddings[torch.arange(5), rows]
        torch.testing.assert_close(result.x_ref.cpu(), 0.9 * x.x_ref + 0.1 * towards[has].mean(0))
        nothing = d2net_loss(to(x._replace(lengths=torch.zeros(5).long()), device), settings)
        assert torch.equal(nothing.x_ref.cpu(), x.x_ref) and nothing.total == 0


def test_rows_of_equal_activations_and_rows_at_the_threshold(device):
    """Of equal classes the first gets the gradient; a snippet at tau is neither foreground nor background."""
    tcam = torch.full((2, 4, 3), 0.5).double()
    tcam[1] = 0.75
    x = batch(2, 4, 3, 5)._replace(tcam=tcam, lengths=None, partner=torch.tensor([[1, 0]] * 3))
    found, expected = (
        evaluated(f, to(x, where), PAPER) for f, where in ((d2net_loss, device), (d2net_loss_ref, "cpu"))
    )
    assert found[LossResult._fields.index("valid")].tolist() == [[False, True], [False, False]]
    close(found, expected, rtol=1e-9, atol=1e-12)


def test_wrong_settings_and_missing_tensors_are_named():
    x = batch(3, 4, 2, 5)
    for settings, changes, message in (
        (PAPER._replace(gamma=math.nan), {}, "gamma is NaN"),
        (PAPER._replace(topk_divisor=0), {}, "topk_divisor is 0, expected at least 1"),
        (PAPER._replace(rank_tol=-1), {}, "rank_tol is -1"),
        (PAPER._replace(probability_floor=0.6), {}, "probability_floor is 0.6"),
        (PAPER._replace(embed=False), {}, "separate is on without embed"),
        (PAPER, {"partner": None}, "partner is missing"),
        (PAPER, {"embeddings": None, "x_ref": None}, "embeddings are missing"),
        (PAPER, {"x_ref": None}, "x_ref is missing"),
        (PAPER, {"x_ref": torch.ones(4)}, r"x_ref is \(4,\)"),
        (PAPER, {"labels": torch.ones(3, 3)}, r"labels is \(3, 3\)"),
        (PAPER, {"keys": torch.ones(3, 2)}, r"keys is \(3, 2\)"),
        (PAPER, {"source": torch.ones(4).long()}, r"source is \(4,\)"),
        (PAPER, {"lengths": torch.ones(3)}, "lengths has"),
        (LossSettings(video=True), {"tcam": torch.ones(200, 1, 300), "embeddings": None, "labels": torch.ones(200, 300),
                                    "lengths": None, "x_ref": None, "partner": None}, "up to 128"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"d2net_loss: .*{message}"):
            d2net_loss(x._replace(**changes), settings)


def test_tensors_in_lists_are_checked_too():
    x = batch(3, 4, 2, 5)
    *results, workspace = torch.ops.d2net.d2net_loss(*x, PAPER, 0)
    gradients = [torch.ones_like(y) for y in results[:SMOOTH]]
    right = [gradients, [x.tcam, x.embeddings, None, None, None, None, x.partner, None, None], [*results, workspace]]
    expected = torch.ops.d2net.d2net_loss_backward(*right, PAPER, True, 0)
    needed = {0: range(SMOOTH), 1: (0, 1, 6), 2: (4, 5, 6, 7, 8, 9, 11)}
    for which, places in needed.items():
        for at in places:
            y = right[which][at]
            wrongs = [
                y[None],
                y.to("meta"),
                y.bool() if y.dtype != torch.bool else y.long(),
                *([y[:0]] if y.ndim else []),
            ]
            for wrong in wrongs:
                lists = [list(z) for z in right]
                lists[which][at] = wrong
                with pytest.raises((InputError, RuntimeError)):
                    torch.ops.d2net.d2net_loss_backward(*lists, PAPER, True, 0)
    for part in range(3):
        lists = [list(z) for z in right]
        lists[part].pop()
        with pytest.raises(InputError, match="expected 7 gradients, 9 inputs and 12 results"):
            torch.ops.d2net.d2net_loss_backward(*lists, PAPER, True, 0)
    garbage = [list(z) for z in right]
    garbage[2][-1] = torch.full_like(workspace, 0x7F)  # wrong contents must not lead to reads or writes out of range
    torch.ops.d2net.d2net_loss_backward(*garbage, RELEASE._replace(own_classes=False), True, 0)
    for a, b in zip(torch.ops.d2net.d2net_loss_backward(*right, PAPER, True, 0), expected, strict=True):
        assert torch.equal(a, b)


def test_opcheck_and_double_backward():
    x = batch(4, 6, 3, 5)
    x = x._replace(tcam=x.tcam.requires_grad_(), embeddings=x.embeddings.requires_grad_())
    for settings in (PAPER, RELEASE, SETTINGS["video"]):
        torch.library.opcheck(torch.ops.d2net.d2net_loss, (*x, list(settings), 0))
    total = d2net_loss(x, PAPER).total
    (gradient,) = torch.autograd.grad(total, x.tcam, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_traced_and_direct_calls_give_the_same_bits():
    x = batch(5, 40, 7, 33)
    for settings in (PAPER, RELEASE):
        direct = evaluated(d2net_loss, to(x, torch.device("cpu")), settings)
        with _Watching():
            traced = evaluated(d2net_loss, to(x, torch.device("cpu")), settings)
        assert all(torch.equal(a, b) for a, b in zip(direct, traced, strict=True))


def test_settings_and_members_stand_in_the_order_of_the_header():
    header = (Path(__file__).parents[2] / "csrc" / "loss.h").read_text()

    def members(struct: str) -> list[str]:
        body = header[header.index(f"struct {struct} {{") :]
        body = re.sub(r"//.*", "", body[body.index("{") : body.index("\n};")])
        statements = [s for s in body.split(";") if not re.search(r"using |[({]$", s.strip())]
        return [name for s in statements for name in re.findall(r"(\w+)\s*(?:,|$)", s.strip())]

    assert members("LossSettings") == list(LossSettings._fields)
    found = members("Loss")
    assert found[1:5] == ["b", "t", "c", "d"]
    assert found[5:13] == list(LossInputs._fields[:8]) and LossInputs._fields[8:] == ("offsets",)
    assert found[13] == "rows"
    assert found[14:26] == [{"x_ref": "new_x_ref"}.get(name, name) for name in LossResult._fields]
    assert found[27 : 27 + SMOOTH] == [f"grad_{name}" for name in LossResult._fields[:SMOOTH]]
