"""What docs/numbers.md says of every loss: what does not count changes nothing, NaN in what counts is never hidden, and
half precision is finite.

Not counting are padding, recordings that a loss leaves out, and terms of weight 0. They may hold NaN, infinity or
garbage: every result keeps its bits, and no gradient reaches them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from d2net import losses
from d2net.ops.loss import d2net_loss
from d2net.ops.loss_ref import LossInputs, LossSettings, d2net_loss_ref
from d2net.recipes import LossRecipe, load_recipe

B, T, C, D = 7, 40, 3, 6
LENGTHS = torch.tensor([40, 0, 33, 1, 12, 26, 4])
LABELS = torch.eye(C)[[0, 1, 0, 1, 2, 1, 1]] * torch.tensor([1, 1, 1, 1, 1, 0, 1])[:, None]
PARTNERS = {"different": torch.tensor([2, 0, 4, 5, 6, 0, 2]), "permutation": torch.arange(B).expand(4, B)}
REFERENCE = torch.linspace(-1, 1, D)
JUNK = [math.nan, math.inf, -math.inf, 3e38, -7.0]


def drawn(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


class Case(NamedTuple):
    """A loss of tensors (B, T, ...); which of them a gradient reaches; which recordings count."""

    loss: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: dict[str, Tensor]
    differentiable: tuple[str, ...]
    counted: Tensor


INPUTS = {
    "tcam": drawn(B, T, C) ** 2,
    "embeddings": drawn(B, T, D) - 0.5,
    "logits": 6 * drawn(B, T, C) - 3,
    "actionness": drawn(B, T),
}


def case(loss: Callable, *names: str, counted: Tensor = LENGTHS > 0) -> Case:
    return Case(loss, {n: INPUTS[n] for n in names}, tuple(n for n in names if n != "actionness"), counted)


def whole(recipe: LossRecipe) -> Callable[..., tuple[Tensor, ...]]:
    """D2NetLoss of a recipe, with the x_ref after it."""

    def loss(tcam: Tensor, embeddings: Tensor, logits: Tensor | None = None) -> tuple[Tensor, ...]:
        module = losses.D2NetLoss(C, D, recipe).to(tcam.dtype)
        module.reference.copy_(REFERENCE)
        result = module(tcam, embeddings, LENGTHS, LABELS, PARTNERS[recipe.pairing], logits=logits)
        return *result, module.reference

    return loss


PAPER, RELEASE = (load_recipe(name).loss for name in ("thumos14-paper", "thumos14-release"))
RECIPES = {
    "paper": PAPER,
    "release": RELEASE,
    "um": replace(PAPER, um_weight=0.1),
    "oriented": replace(PAPER, snippet_oriented=True),
    "queue": replace(PAPER, video_queue=5),
    "um in units": replace(PAPER, um_weight=0.1, um_margin=2.0, um_margin_unit="embedding"),
    **{kind: replace(PAPER, denoising=kind) for kind in ("dmi", "l1", "bce")},
    **{kind: replace(PAPER, classification=kind) for kind in ("focal", "cross_entropy")},
}
IN_CLASS = LABELS * (LENGTHS > 0)[:, None]
PAIRED = (IN_CLASS * (IN_CLASS.sum(0) >= 2)).any(1)


def scored(loss: torch.nn.Module) -> Case:
    return case(lambda tcam: loss(tcam, LENGTHS, LABELS), "tcam")


def snippets(loss: torch.nn.Module) -> Case:
    return case(
        lambda tcam, embeddings: loss(tcam, embeddings, LENGTHS, REFERENCE.to(tcam), LABELS), "tcam", "embeddings"
    )


CASES = {
    **{
        f"D2NetLoss {name}": case(
            whole(recipe),
            *("tcam", "embeddings", *(["logits"] if recipe.um_weight else [])),
            counted=(LENGTHS >= max(recipe.min_snippets, 1)) & (LABELS.any(1) | (not recipe.skip_unlabelled)),
        )
        for name, recipe in RECIPES.items()
    },
    **{
        name: scored(getattr(losses, name)())
        for name in ("FocalLoss", "CrossEntropyLoss", "VideoL1", "VideoBCE", "VideoDMI", "VideoDenoising")
    },
    **{
        name: snippets(getattr(losses, name)())
        for name in ("SnippetL1", "SnippetBCE", "SnippetDMI", "SnippetDenoising")
    },
    "SnippetDenoising own classes": snippets(
        losses.SnippetDenoising(own_classes=True, fg_threshold=0.6, bg_threshold=0.3)
    ),
    "DenoisingLoss": case(
        lambda tcam, embeddings: losses.DenoisingLoss()(tcam, embeddings, LENGTHS, LABELS, REFERENCE.to(tcam)),
        "tcam",
        "embeddings",
    ),
    "DiscriminativeLoss": case(
        lambda tcam, embeddings: (
            losses.DiscriminativeLoss()(tcam, embeddings, LENGTHS, LABELS, PARTNERS["different"]).loss
        ),
        "tcam",
        "embeddings",
    ),
    "UncertaintyModeling": case(
        lambda embeddings, logits: losses.UncertaintyModeling(margin=3.0)(embeddings, logits, LENGTHS),
        "embeddings",
        "logits",
        counted=LENGTHS >= 2,
    ),
    "CoActivitySimilarity": case(
        lambda embeddings, logits: losses.CoActivitySimilarity()(embeddings, logits, LENGTHS, LABELS),
        "embeddings",
        "logits",
        counted=PAIRED,
    ),
    "SnippetContrast": case(
        lambda embeddings, actionness: losses.SnippetContrast()(embeddings, actionness, LENGTHS),
        "embeddings",
        "actionness",
        counted=LENGTHS >= 4,  # with a single snippet none is above the median, so there is no border
    ),
}


def evaluated(
    x: Case, inputs: dict[str, Tensor], autocast: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Results of a forward under autocast to a dtype, and gradients, in the order of ``differentiable``."""
    leaves = {n: v.clone().requires_grad_(n in x.differentiable) for n, v in inputs.items()}
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        out = x.loss(**leaves)
    out = [out] if isinstance(out, Tensor) else list(out)
    smooth = [v for v in out if v.requires_grad]
    grads = torch.autograd.grad(
        smooth, [leaves[n] for n in x.differentiable], [torch.ones_like(v) for v in smooth], materialize_grads=True
    )
    return [v.detach() for v in out], list(grads)


def test_no_loss_is_left_out() -> None:
    results = {"Denoising", "Discriminative", "WholeBatch"}  # the last is of arguments
    modules = {n for n in losses.__all__ if isinstance(getattr(losses, n), type)} - results
    assert {name.split()[0] for name in CASES} == {n for n in modules if not n.endswith("Result")}


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("name", CASES)
def test_padding_and_recordings_left_out_may_hold_anything(name: str, junk: float) -> None:
    x = CASES[name]
    left_out = (torch.arange(T) >= LENGTHS[:, None]) | ~x.counted[:, None]
    expected, expected_grads = evaluated(x, {n: fill(v, left_out, 0.25) for n, v in x.inputs.items()})
    inputs = {n: fill(v, left_out, junk) for n, v in x.inputs.items()}
    if "tcam" in inputs:  # within the lengths, values outside [0, 1] are refused, except NaN
        refused = left_out & (torch.arange(T) < LENGTHS[:, None])
        inputs["tcam"] = fill(inputs["tcam"], refused, math.nan)
    found, grads = evaluated(x, inputs)
    assert all(v.isfinite().all() for v in expected) and any(v.any() for v in expected_grads)
    for a, b in zip((*found, *grads), (*expected, *expected_grads), strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))
    for grad in grads:
        assert not grad[left_out].any()


def fill(x: Tensor, where: Tensor, value: float) -> Tensor:
    return x.masked_fill(where[:, :, None] if x.ndim == 3 else where, value)


@pytest.mark.parametrize("name", CASES)
def test_nan_in_what_counts_is_not_hidden(name: str) -> None:
    x = CASES[name]
    for broken in x.differentiable:
        if broken == "embeddings" and (name.startswith(("Snippet", "Denoising")) and name != "SnippetContrast"):
            continue  # there embeddings only select snippets
        if broken == "embeddings" and name.split()[-1] in ("focal", "cross_entropy"):
            continue  # there embeddings only update x_ref
        everywhere = torch.zeros(B, T, dtype=torch.bool)
        everywhere[0] = True
        found, _ = evaluated(x, {**x.inputs, broken: fill(x.inputs[broken], everywhere, math.nan)})
        assert any(v.isnan().any() for v in found), broken


@pytest.mark.parametrize("function", [d2net_loss, d2net_loss_ref])
def test_a_term_of_weight_0_is_off_whatever_it_is(function: Callable) -> None:
    embeddings, labels = INPUTS["embeddings"], (LABELS > 0).float()
    on = LossSettings(
        topk_divisor=1, classify=True, score=True, snippet=True, fg_threshold=0.3, bg_threshold=0.2, video=True
    )
    tcam = INPUTS["tcam"].masked_fill((torch.arange(T) == 3)[:, None], 0.5)
    chosen = function(LossInputs(tcam, embeddings, LENGTHS, labels, REFERENCE), on).scores[0] > 0.3
    tcam[0, chosen.nonzero()[0]] = math.nan  # in all three terms
    tcam.requires_grad_()
    result = function(LossInputs(tcam, embeddings, LENGTHS, labels, REFERENCE), on)
    assert result.snippet.isnan() and result.video.isnan() and result.total.isnan()
    without = function(LossInputs(tcam, embeddings, LENGTHS, labels, REFERENCE), on._replace(classify=False))
    assert without.total == 0
    if without.total.requires_grad:
        assert not torch.autograd.grad(without.total, tcam, torch.tensor(math.inf))[0].any()
    for weight in ("alpha_snippet", "alpha_video"):
        settings = on._replace(classify=False, **{weight: 0.5})
        assert function(LossInputs(tcam, embeddings, LENGTHS, labels, REFERENCE), settings).total.isnan()


def test_the_magnitude_of_um_is_off_where_its_weight_is_0() -> None:
    embeddings = INPUTS["embeddings"].clone()
    embeddings[0] = math.nan
    result = losses.UncertaintyModeling(magnitude=0.0)(embeddings, INPUTS["logits"], LENGTHS)
    assert result.magnitude.isnan() and result.total.isfinite() and result.total == result.entropy


def test_a_singular_matrix_is_no_term_of_dmi_whatever_rounding_makes_of_it() -> None:
    """Fewer recordings than classes: U_2 is singular; the log of its determinant would be that of rounding errors."""
    tcam, labels = drawn(9, 30, 20), (drawn(9, 20) > 0.5).float()
    assert labels.any(0).all()
    for threads in (1, 4):
        torch.set_num_threads(threads)
        assert losses.VideoDMI()(tcam, None, labels) == 0
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    x = CASES[name]
    inputs = {n: 1e4 * v if n == "embeddings" else v for n, v in x.inputs.items()}
    expected, expected_grads = evaluated(x, inputs)
    found, grads = evaluated(x, inputs, autocast=dtype)
    for a, b in zip((*found, *grads), (*expected, *expected_grads), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 6e4])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_finite_and_as_good_as_float32(name: str, scale: float, dtype: torch.dtype) -> None:
    """Embeddings of 6e4 are close to the largest float16; sums of them exceed it.

    Against float64 on the same inputs; the largest error as a share of the largest number.
    """
    x = CASES[name]
    inputs = {n: (2 * scale * v if n == "embeddings" else v).to(dtype) for n, v in x.inputs.items()}
    found, grads = evaluated(x, inputs)
    expected, expected_grads = evaluated(x, {n: v.double() for n, v in inputs.items()})
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - b).abs().max() <= 1e-6 * b.abs().max()
    for a, b in zip(grads, expected_grads, strict=True):
        assert a.dtype == dtype
        least = torch.finfo(dtype).smallest_normal
        assert (a.double() - b).abs().max() <= torch.finfo(dtype).eps * b.abs().max().clamp(min=least)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in CASES if "tcam" in CASES[name].inputs])
def test_scores_of_1_lose_what_float32_lacks_below_it(name: str, dtype: torch.dtype) -> None:
    """In float32 1 - (1 - 1e-6) is 1.013e-6, whose logarithm is off by 0.00096, for inputs of every dtype."""
    x = CASES[name]
    inputs = {n: (torch.where(v > 0.5, 1.0, v) if n == "tcam" else v).to(dtype) for n, v in x.inputs.items()}
    found, grads = evaluated(x, inputs)
    expected, expected_grads = evaluated(x, {n: v.double() for n, v in inputs.items()})
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).abs().max() <= 1e-3 * b.abs().max()
    for a, b in zip(grads, expected_grads, strict=True):
        rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert (a.double() - b).abs().max() <= (1.1e-3 + rounding) * b.abs().max()


@pytest.mark.parametrize("recipe", ["thumos14-paper", "thumos14-release"])
def test_half_precision_of_the_papers_size(recipe: str) -> None:
    """Sums over 750 snippets of numbers near the largest float16; one recording is all zeros."""
    values = load_recipe(recipe).loss
    b, t, c, d = 4, 750, 20, 1024
    tcam, embeddings = drawn(b, t, c).half() ** 3, (6e4 * drawn(b, t, d)).half()
    embeddings[1, ::2] *= -1
    embeddings[3] = 0
    partners = torch.tensor([1, 2, 3, 0]) if values.pairing == "different" else torch.arange(b).expand(4, b)
    labels, lengths = torch.eye(c)[:b], torch.tensor([t, 500, 333, 20])
    results = {}
    for dtype in (torch.float16, torch.float64):
        loss = losses.D2NetLoss(c, d, values).to(dtype)
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (tcam, embeddings)]
        out = loss(*leaves, lengths, labels, partners)
        out.total.backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)
        assert loss.reference.isfinite().all()
        results[dtype] = torch.stack(out).double()
    torch.testing.assert_close(results[torch.float16], results[torch.float64], rtol=1e-5, atol=1e-5)
