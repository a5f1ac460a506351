"""Every setting of every loss has a type and a range, checked when the loss is made."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from d2net import losses
from d2net.errors import InputError
from d2net.recipes import LossRecipe, load_recipe, recipe_names

LOSSES: dict[str, type[nn.Module]] = {
    name: getattr(losses, name)
    for name in losses.__all__
    if isinstance(getattr(losses, name), type) and issubclass(getattr(losses, name), nn.Module)
}
SIZES = {"num_classes": 3, "embedding_dim": 8}

NO_NUMBER = [math.nan, math.inf, -math.inf, True, None, "high", [1], 1j, torch.zeros(2), 10**400, object()]
NO_COUNT = [*NO_NUMBER, 0, -1, 2.5, 2.0, torch.tensor(1.9), 2**63]
NO_FRACTION = [*NO_NUMBER, -1e-9, 1.001]
NO_WEIGHT = [*NO_NUMBER, -1e-9, 1e39]  # Inf in float32
NO_FLOOR = [*NO_NUMBER, 0, 1e-8, 0.5, -1]
NO_CHOICE = ["median", "", None, 1, ["sum"], math.nan]
NO_FLAG = [None, 1, 0.0, "true", math.nan, np.array([True, False])]
WRONG: dict[str, list[Any]] = {
    **dict.fromkeys(("topk_divisor", "act_divisor", "background_divisor", "easy_divisor", "hard_divisor"), NO_COUNT),
    **dict.fromkeys(("inner", "outer"), [*NO_COUNT, 10**9]),
    **dict.fromkeys(("threshold", "background_threshold", "fg_threshold", "bg_threshold", "entry_floor"), NO_FRACTION),
    **dict.fromkeys(("beta", "gamma", "margin", "magnitude", "rank_tol"), NO_WEIGHT),
    **dict.fromkeys(("embedding_pooling", "pairing", "class_reduction", "normalization", "margin_unit"), NO_CHOICE),
    **dict.fromkeys(("threshold_inclusive", "balance_classes", "own_classes", "oriented"), NO_FLAG),
    **dict.fromkeys(("num_classes", "embedding_dim"), [x for x in NO_COUNT if type(x) is not int or x]),
    "peak_share": [*(x for x in NO_FRACTION if x is not None), 1],  # nothing is above its own maximum
    "probability_floor": NO_FLOOR,
    "temperature": [*NO_WEIGHT, 0, 1e-9],
    "recipe": ["thumos14-paper", load_recipe("thumos14-paper"), {"beta": 2}, LossRecipe],
    "snippet": [losses.VideoDenoising(), "pdmi", 0.2, losses.SnippetDenoising],
    "video": [losses.SnippetDenoising(), "pdmi", 0.2, losses.VideoDenoising],
}
EACH = [(loss, name) for loss, made in LOSSES.items() for name in inspect.signature(made).parameters]


@pytest.mark.parametrize(("loss", "name"), EACH)
def test_a_setting_that_cannot_be_is_refused(loss, name):
    needed = SIZES if loss == "D2NetLoss" else {}
    for value in WRONG[name]:
        with pytest.raises(InputError, match=rf"^{loss}: {name} is .*; it must be ") as error:
            LOSSES[loss](**{**needed, name: value})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("loss", LOSSES)
def test_defaults_are_taken_and_kept(loss):
    made = LOSSES[loss](**(SIZES if loss == "D2NetLoss" else {}))
    for name, parameter in inspect.signature(LOSSES[loss]).parameters.items():
        if name != "threshold_inclusive" and parameter.default not in (None, inspect.Parameter.empty):
            assert getattr(made, name) == parameter.default, name


def test_numbers_of_numpy_and_torch_are_taken():
    loss = losses.DiscriminativeLoss(beta=np.float32(2), gamma=torch.tensor(0.5), topk_divisor=np.int64(4))
    assert (loss.beta, loss.gamma, loss.topk_divisor) == (2.0, 0.5, 4)
    assert [type(x) for x in (loss.beta, loss.gamma, loss.topk_divisor)] == [float, float, int]


@pytest.mark.parametrize(("inner", "outer"), [(3, 3), (6, 3)])
def test_no_snippet_lies_between_equal_widths(inner, outer):
    with pytest.raises(InputError, match=f"SnippetContrast: inner is {inner} and outer {outer}.*must be below outer"):
        losses.SnippetContrast(inner=inner, outer=outer)


def test_snippets_that_would_be_both():
    for loss in ("SnippetL1", "SnippetBCE", "SnippetDMI", "SnippetDenoising"):
        with pytest.raises(InputError, match=f"{loss}: bg_threshold 0.6 is above fg_threshold 0.4"):
            LOSSES[loss](fg_threshold=0.4, bg_threshold=0.6)


def test_what_a_recipe_allows_a_loss_allows():
    for name in recipe_names():
        losses.D2NetLoss(3, 8, load_recipe(name).loss)
    with pytest.raises(InputError, match="loss.video_peak_share is 1; it must be at least 0 and below 1 or null"):
        LossRecipe(video_peak_share=1)


LABELS = torch.eye(3)[[0, 1, 2, 0]]
TCAM = torch.rand(4, 12, 3, generator=torch.Generator().manual_seed(0))
EMBEDDINGS = torch.rand(4, 12, 8, generator=torch.Generator().manual_seed(1)) - 0.5
LABELLED = {
    **{
        name: lambda n, y, name=name: LOSSES[name]()(TCAM, n, y)
        for name in ("FocalLoss", "CrossEntropyLoss", "VideoBCE", "VideoL1", "VideoDMI", "VideoDenoising")
    },
    "DiscriminativeLoss": lambda n, y: losses.DiscriminativeLoss()(TCAM, EMBEDDINGS, n, y),
    "D2NetLoss": lambda n, y: losses.D2NetLoss(3, 8)(TCAM, EMBEDDINGS, n, y),
    "DenoisingLoss": lambda n, y: losses.DenoisingLoss()(TCAM, EMBEDDINGS, n, y, EMBEDDINGS[0, 0]),
    "SnippetDenoising": lambda n, y: losses.SnippetDenoising(own_classes=True)(
        TCAM, EMBEDDINGS, n, EMBEDDINGS[0, 0], y
    ),
    "SnippetBCE": lambda n, y: losses.SnippetBCE(own_classes=True)(TCAM, EMBEDDINGS, n, EMBEDDINGS[0, 0], y),
    "CoActivitySimilarity": lambda n, y: losses.CoActivitySimilarity()(EMBEDDINGS, TCAM, n, y),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("name", LABELLED)
def test_labels_that_are_nan_are_refused(name, dtype):
    """NaN labels are refused: compared with 0 they would count as absent."""
    labels = LABELS.to(dtype, copy=True)
    labels[1, 2] = math.nan
    with pytest.raises(InputError, match=r"labels are NaN in 1 of 4 recordings \(first in recording 1\)"):
        LABELLED[name](None, labels)
    LABELLED[name](torch.tensor([12, 0, 12, 5]), labels)  # a recording of no snippets does not count


def test_labels_of_which_the_sum_overflows():
    labels = LABELS.half() * 60_000
    assert losses.FocalLoss()(TCAM, None, labels) == losses.FocalLoss()(TCAM, None, LABELS)


class TestPermutations:
    """Partners given for the pairing of the released code."""

    def of(self, partners: Any, lengths: torch.Tensor | None = None) -> torch.Tensor:
        loss = losses.DiscriminativeLoss(pairing="permutation")
        return loss(TCAM, EMBEDDINGS, lengths, LABELS, partners).loss

    def test_permutations_are_taken(self):
        right = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i)) for i in range(4)])
        expected = self.of(right)
        for other in (right.int(), right.tolist(), right.numpy()):
            assert torch.equal(self.of(other), expected)

    @pytest.mark.parametrize("wrong", [[0, 1, 2, 4], [0, 1, 2, -1], [0, 0, 1, 2], [2**40, 1, 2, 3], [3, 3, 3, 3]])
    @pytest.mark.parametrize("row", range(4))
    def test_what_is_no_permutation_is_refused(self, wrong, row):
        partners = torch.arange(4).repeat(4, 1)
        partners[row] = torch.tensor(wrong)
        with pytest.raises(InputError, match=rf"row {row} of partners is \[.*\], expected a permutation of the 4"):
            self.of(partners)

    def test_those_that_have_an_embedding_come_first(self):
        lengths = torch.tensor([12, 12, 12, 0])
        self.of([[2, 1, 0, 3]] * 4, lengths)
        with pytest.raises(InputError, match=r"row 1 .* whose first 3 \(.* background embedding\) are the least"):
            self.of([[2, 1, 0, 3], [3, 1, 0, 2], [2, 1, 0, 3], [2, 1, 0, 3]], lengths)

    def test_where_values_are_not_looked_at_nothing_leads_outside(self):
        def outside(tcam: torch.Tensor) -> torch.Tensor:
            loss = losses.DiscriminativeLoss(pairing="permutation")
            return loss(tcam, EMBEDDINGS, None, LABELS, torch.tensor([[9, -9, 2**40, 1]] * 4)).loss

        torch._dynamo.reset()
        assert torch.compile(outside, fullgraph=True, backend="aot_eager")(TCAM).isfinite()

    @pytest.mark.parametrize("pairing", ["different", "permutation"])
    def test_flags_are_no_indices(self, pairing):
        with pytest.raises(InputError, match="partners has shape .* and dtype torch.bool"):
            losses.DiscriminativeLoss(pairing=pairing)(TCAM, EMBEDDINGS, None, LABELS, [[True] * 4] * 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(0, 12, 3, 8), (4, 0, 3, 8), (4, 12, 0, 8), (4, 12, 3, 0), (0, 0, 0, 0)])
def test_half_precision_of_no_snippets_gives_float32_too(size, dtype):
    b, t, c, d = size
    tcam, embeddings, labels = torch.rand(b, t, c, dtype=dtype), torch.rand(b, t, d, dtype=dtype), torch.ones(b, c)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x_ref = torch.rand(d, dtype=dtype)
    for loss in (
        lambda: losses.CoActivitySimilarity()(embeddings, tcam, None, labels),
        lambda: losses.SnippetContrast()(embeddings, torch.rand(b, t, dtype=dtype), None),
        lambda: losses.UncertaintyModeling()(embeddings, tcam, None),
        lambda: losses.DenoisingLoss()(tcam, embeddings, None, labels, x_ref),
        lambda: losses.DiscriminativeLoss()(tcam, embeddings, None, labels).loss,
        lambda: losses.SnippetBCE()(tcam, embeddings, None, x_ref),
        lambda: losses.SnippetDMI()(tcam, embeddings, None, x_ref),
        lambda: losses.VideoBCE()(tcam, None, labels),
        lambda: losses.VideoDMI()(tcam, None, labels),
        lambda: losses.FocalLoss()(tcam, None, labels),
        lambda: losses.D2NetLoss(c, d).to(dtype)(tcam, embeddings, None, labels),
    ):
        out = loss()
        for x in [out] if isinstance(out, torch.Tensor) else out:
            assert x.dtype == wide and x.isfinite()


def a_batch() -> tuple[torch.Tensor | None, ...]:
    return torch.rand(2, 5, 3), torch.randn(2, 5, 4), None, torch.eye(3)[:2]


@pytest.mark.parametrize("denoise", [None, "x", 1, torch.tensor(True)])
def test_denoise_is_true_or_false(denoise):
    with pytest.raises(InputError, match="D2NetLoss: denoise is .*it must be true or false"):
        losses.D2NetLoss(3, 4)(*a_batch(), denoise=denoise)


@pytest.mark.parametrize("loss", [losses.D2NetLoss(3, 4), losses.DiscriminativeLoss()])
def test_a_generator_is_one(loss):
    with pytest.raises(InputError, match="generator is 5, expected a torch.Generator"):
        loss(*a_batch(), generator=5)


@pytest.mark.parametrize(
    ("counts", "size", "words"),
    [
        ([5], 3, "counts are 5 to 5, expected 0 to 3"),
        ([-1], 3, "expected 0 to 3"),
        ([2.5], 3, "expected integers"),
        (torch.tensor(1), 3, "expected integers"),
        ([1], -1, "size is -1"),
        ([1], 2**40, "size is 1099511627776"),
        ([1], 2.0, "size is 2.0, expected a whole number"),
    ],
)
def test_permutations_of_so_many(counts, size, words):
    with pytest.raises(InputError, match=f"draw_permutations: .*{words}"):
        losses.draw_permutations(counts, size)


def test_what_a_loss_cannot_compute():
    tcam, embeddings, lengths, labels = a_batch()
    with pytest.raises(InputError, match="margin is .*must be"):
        losses.CoActivitySimilarity(margin=torch.tensor(3.0, device="meta"))
    with pytest.raises(InputError, match="embeddings has dtype torch.int64"):
        losses.UncertaintyModeling()(embeddings.long(), tcam, lengths)
    with pytest.raises(InputError, match="actionness has dtype torch.int64"):
        losses.SnippetContrast()(embeddings, tcam[:, :, 0].long(), lengths)
    with pytest.raises(InputError, match="tcam has dtype torch.float8_e4m3fn"):
        losses.D2NetLoss(3, 4)(tcam.to(torch.float8_e4m3fn), embeddings, lengths, labels)
