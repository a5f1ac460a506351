"""Every loss of a packed batch equals that of the padded one, with its gradients, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from d2net import losses
from d2net.errors import InputError
from d2net.ops.packed import packed
from d2net.recipes import LossRecipe, load_recipe, recipe_names
from d2net.training.agreement import Agreement

C, D = 4, 6
NAN = float("nan")


class Layout(NamedTuple):
    """How a batch lies in its rows.

    Attributes:
        lengths: Of each recording.
        lead: Rows before the first recording.
        gaps: Rows behind each recording.
        tail: Rows behind the last gap, past offsets[B].
        given: Whether lengths are given; else there are no gaps, only a tail.
        bound: What max_length is above the longest, or None where it is not given.
    """

    lengths: list[int]
    lead: int
    gaps: list[int]
    tail: int
    given: bool
    bound: int | None

    @property
    def offsets(self) -> Tensor:
        gaps = self.gaps if self.given else [0] * len(self.gaps)
        return torch.tensor([self.lead, *(n + gap for n, gap in zip(self.lengths, gaps, strict=True))]).cumsum(0)

    @property
    def rows(self) -> int:
        return int(self.offsets[-1]) + self.tail

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def inside(self) -> Tensor:
        """(N,) bool: the rows of recordings."""
        mask = torch.zeros(self.rows, dtype=torch.bool)
        for first, n in zip(self.offsets.tolist(), self.lengths, strict=False):
            mask[first : first + n] = True
        return mask

    def keywords(self, device: torch.device) -> dict[str, Any]:
        bound = {} if self.bound is None else {"max_length": self.longest + self.bound}
        return {"offsets": self.offsets.to(device), **bound}


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    lengths = draw(st.lists(st.integers(0, 23), max_size=5))
    gaps = draw(st.lists(st.integers(0, 4), min_size=len(lengths), max_size=len(lengths)))
    lead, tail = draw(st.integers(0, 3)), draw(st.integers(0, 6))
    return Layout(lengths, lead, gaps, tail, draw(st.booleans()), draw(st.sampled_from([None, 0, 3])))


PLAIN = Layout([23, 0, 9, 1, 12, 6], 1, [2, 2, 0, 4, 1, 3], 5, True, 0)


class Batch(NamedTuple):
    """The inputs of a loss, padded and packed, with NaN in all rows that do not matter."""

    padded: dict[str, Tensor]
    packed: dict[str, Tensor]
    lengths: Tensor
    labels: Tensor
    layout: Layout


def batch_of(layout: Layout, seed: int, device: torch.device, dtype: torch.dtype = torch.float64) -> Batch:
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, dtype=torch.float64)

    b, t, lengths = len(layout.lengths), layout.longest, torch.tensor(layout.lengths, dtype=torch.int64)
    inputs = {
        "tcam": drawn(b, t, C) ** 2,
        "embeddings": drawn(b, t, D) - 0.5,
        "logits": 6 * drawn(b, t, C) - 3,
        "actionness": drawn(b, t),
    }
    past = torch.arange(t) >= lengths[:, None]
    padded_, packed_ = {}, {}
    for name, x in inputs.items():
        y = packed(x, layout.offsets, lengths, layout.rows)
        y[~layout.inside()] = NAN
        x[past] = NAN
        padded_[name], packed_[name] = x.to(device, dtype), y.to(device, dtype)
    labels = (drawn(b, C) > 0.5).double()
    return Batch(padded_, packed_, lengths.to(device), labels.to(device, dtype), layout)


# Called with the inputs by name, lengths, labels, x_ref and offsets and max_length; gives a loss or several.
Loss = Callable[..., Any]


def whole(recipe: LossRecipe, denoise: bool = True, training: bool = True) -> Loss:
    """D2NetLoss of a recipe in two steps, with the x_ref and the queue after them."""

    def loss(
        tcam: Tensor, embeddings: Tensor, logits: Tensor, lengths: Any, labels: Tensor, x_ref: Tensor, **rows: Any
    ):
        module = losses.D2NetLoss(C, D, recipe).to(tcam.device, tcam.dtype).train(training)
        module.reference.copy_(x_ref)
        generator = torch.Generator().manual_seed(0)
        results = []
        for _ in range(2):
            logits = logits if recipe.um_weight else None
            result = module(
                tcam, embeddings, lengths, labels, generator=generator, logits=logits, denoise=denoise, **rows
            )
            results += [*result, module.reference.clone()]
        return *results, *([] if module.queue is None else [module.queue.pooled, module.queue.counted.double()])

    return loss


def scored(module: torch.nn.Module) -> Loss:
    return lambda tcam, lengths, labels, x_ref, **rows: module(tcam, lengths, labels, **rows)


def snippets(module: torch.nn.Module) -> Loss:
    return lambda tcam, embeddings, lengths, labels, x_ref, **rows: module(
        tcam, embeddings, lengths, x_ref, labels, **rows
    )


def measured(tcam: Tensor, embeddings: Tensor, lengths: Any, labels: Tensor, x_ref: Tensor, **rows: Any) -> Tensor:
    recipe = load_recipe("thumos14-release").override(["training.denoising_agreement=0.8", "loss.min_snippets=3"])
    agreement = Agreement(recipe, tcam.device)
    if lengths is None:  # which a training always has
        lengths = rows["offsets"].diff()
    agreement.add(tcam, embeddings, lengths, labels, x_ref, **rows)
    return agreement.running


PAPER, RELEASE = (load_recipe(name).loss for name in ("thumos14-paper", "thumos14-release"))
BOTH, ALL = ("tcam", "embeddings"), ("tcam", "embeddings", "logits")
CASES: dict[str, tuple[Loss, tuple[str, ...]]] = {
    **{f"recipe {name}": (whole(load_recipe(name).loss), ALL) for name in recipe_names()},
    "in evaluation": (whole(PAPER, training=False), ALL),
    "before L_D": (whole(RELEASE, denoise=False), ALL),
    "um": (whole(replace(PAPER, um_weight=0.1)), ALL),
    "um in units": (whole(replace(PAPER, um_weight=0.1, um_margin=2.0, um_margin_unit="embedding")), ALL),
    "oriented": (whole(replace(RELEASE, snippet_oriented=True)), ALL),
    "queue": (whole(replace(PAPER, video_queue=5)), ALL),
    **{kind: (whole(replace(RELEASE, denoising=kind)), ALL) for kind in ("dmi", "l1", "bce")},
    **{kind: (whole(replace(PAPER, classification=kind)), ALL) for kind in ("focal", "cross_entropy")},
    **{
        name: (scored(getattr(losses, name)()), ("tcam",))
        for name in ("FocalLoss", "CrossEntropyLoss", "VideoL1", "VideoBCE", "VideoDMI", "VideoDenoising")
    },
    **{
        name: (snippets(getattr(losses, name)(own_classes=True, fg_threshold=0.6, bg_threshold=0.4)), BOTH)
        for name in ("SnippetL1", "SnippetBCE", "SnippetDMI", "SnippetDenoising")
    },
    "DenoisingLoss": (
        lambda tcam, embeddings, lengths, labels, x_ref, **rows: losses.DenoisingLoss()(
            tcam, embeddings, lengths, labels, x_ref, **rows
        ),
        BOTH,
    ),
    **{
        f"DiscriminativeLoss {pairing}": (
            lambda tcam, embeddings, lengths, labels, x_ref, pairing=pairing, **rows: (
                losses.DiscriminativeLoss(pairing=pairing)(
                    tcam, embeddings, lengths, labels, generator=torch.Generator().manual_seed(1), **rows
                ).loss
            ),
            BOTH,
        )
        for pairing in ("different", "permutation")
    },
    "UncertaintyModeling": (
        lambda embeddings, logits, lengths, labels, x_ref, **rows: losses.UncertaintyModeling(margin=3.0)(
            embeddings, logits, lengths, **rows
        ),
        ("embeddings", "logits"),
    ),
    "CoActivitySimilarity": (
        lambda embeddings, logits, lengths, labels, x_ref, **rows: losses.CoActivitySimilarity()(
            embeddings, logits, lengths, labels, **rows
        ),
        ("embeddings", "logits"),
    ),
    "SnippetContrast": (
        lambda embeddings, actionness, lengths, labels, x_ref, **rows: losses.SnippetContrast(inner=2, outer=4)(
            embeddings, actionness, lengths, **rows
        ),
        ("embeddings", "actionness"),
    ),
    "Agreement": (measured, BOTH),
}


def evaluated(loss: Loss, inputs: dict[str, Tensor], *arguments: Any, **rows: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The results, and the gradients of their weighted sum with respect to the inputs."""
    leaves = {name: x.clone().requires_grad_(name != "actionness") for name, x in inputs.items()}
    lengths, labels, x_ref = arguments
    results = loss(**leaves, lengths=lengths, labels=labels, x_ref=x_ref, **rows)
    results = [results] if isinstance(results, Tensor) else list(results)
    smooth = [(i + 1) * y for i, y in enumerate(results) if y.requires_grad]
    wanted = [x for x in leaves.values() if x.requires_grad]
    grads = torch.autograd.grad(sum(smooth), wanted, materialize_grads=True) if smooth else ()
    return [y.detach() for y in results], list(grads)


def check(name: str, layout: Layout, seed: int, device: torch.device, **tolerance: float) -> None:
    (loss, names), batch = CASES[name], batch_of(layout, seed, device)
    x_ref = torch.linspace(-1, 1, D, dtype=torch.float64, device=device)
    given = (batch.labels, x_ref)
    results, grads = evaluated(loss, {n: batch.padded[n] for n in names}, batch.lengths, *given)
    packed_inputs = {n: batch.packed[n] for n in names}
    lengths = batch.lengths if layout.given else None
    found, found_grads = evaluated(loss, packed_inputs, lengths, *given, **layout.keywords(device))
    assert all(x.isfinite().all() for x in (*results, *found, *grads, *found_grads))
    torch.testing.assert_close(found, results, **tolerance)
    offsets = layout.offsets.to(device)
    expected = [packed(g, offsets, batch.lengths, layout.rows) for g in grads]
    torch.testing.assert_close(found_grads, expected, **tolerance)
    for g in found_grads:
        assert not g[~layout.inside().to(device)].any()


@pytest.mark.parametrize("name", CASES)
@given(layout=layouts(), seed=st.integers(0, 10**6))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_packed_equals_padded(device: torch.device, name: str, layout: Layout, seed: int) -> None:
    check(name, layout, seed, device, rtol=1e-9, atol=1e-11)


def call(name: str, batch: Batch, **changes: Any) -> Any:
    """The loss of a packed batch, with arguments replaced."""
    loss, names = CASES[name]
    x_ref = torch.linspace(-1, 1, D, dtype=torch.float64, device=batch.lengths.device)
    arguments = {n: batch.packed[n] for n in names} | {"lengths": batch.lengths, "labels": batch.labels, "x_ref": x_ref}
    return loss(**arguments | batch.layout.keywords(batch.lengths.device) | changes)


LOSSES = [name for name in CASES if name != "Agreement"]


@pytest.mark.parametrize("name", LOSSES)
def test_wrong_packing_is_refused_in_one_line(name: str) -> None:
    batch = batch_of(PLAIN, 0, torch.device("cpu"))
    n, ends = batch.layout.rows, batch.layout.offsets
    falling, past = ends.clone(), ends.clone()
    falling[2], past[-1] = 3, n + 1
    for changes, message in (
        ({"offsets": falling}, r"offsets\[2\] is 3, below offsets\[1\], 26"),
        ({"offsets": past}, rf"offsets\[6\] is {n + 1}, past the {n} rows"),
        ({"offsets": ends.double()}, "offsets has shape .7,. and dtype torch.float64"),
        ({"max_length": -1}, "max_length is -1, expected 0 or more"),
        ({"lengths": batch.lengths[1:]}, "lengths has shape .5,. and dtype torch.int64, expected .6,. int64"),
    ):
        with pytest.raises(InputError, match=message) as error:
            call(name, batch, **changes)
        assert "\n" not in str(error.value)
    padded_inputs = {k: batch.padded[k] for k in CASES[name][1]}
    with pytest.raises(InputError, match="max_length is given without offsets"):
        call(name, batch, **padded_inputs, offsets=None)
    first = next(iter(padded_inputs))
    with pytest.raises(InputError, match=r"shape \(6, 23, \d\), expected \(N, [CD]\)"):
        call(name, batch, **{first: batch.padded[first]})


def test_labels_are_of_as_many_recordings_as_the_offsets() -> None:
    batch = batch_of(PLAIN, 0, torch.device("cpu"))
    with pytest.raises(InputError, match=r"labels have shape \(5, 4\) on cpu, expected multi-hot \(6, 4\)"):
        call("FocalLoss", batch, labels=batch.labels[1:])
    unknown = batch.labels.clone()
    unknown[1] = NAN  # of a recording without snippets
    call("FocalLoss", batch, labels=unknown)
    unknown[2] = NAN
    with pytest.raises(InputError, match="labels are NaN in 1 of 6 recordings .first in recording 2"):
        call("FocalLoss", batch, labels=unknown)


def test_logits_in_place_of_activations_are_seen_within_recordings_only() -> None:
    batch = batch_of(PLAIN, 0, torch.device("cpu"))
    tcam = torch.where(batch.layout.inside()[:, None], batch.packed["tcam"], 7.0)
    call("VideoDenoising", batch, tcam=tcam)
    tcam[int(batch.layout.offsets[4])] = 7.0
    with pytest.raises(InputError, match=r"tcam holds values from .* to 7, expected activations"):
        call("VideoDenoising", batch, tcam=tcam)


@pytest.mark.parametrize("name", CASES)
def test_nothing_of_a_packed_batch_waits_for_the_device(name: str) -> None:
    """Without values to look at, as while a CUDA graph is captured."""
    batch = batch_of(PLAIN, 0, torch.device("cpu"))
    loss, names = CASES[name]

    def step(lengths: Tensor, offsets: Tensor, labels: Tensor, x_ref: Tensor, *inputs: Tensor) -> Any:
        leaves = [x.clone().requires_grad_() for x in inputs]
        named = dict(zip(names, leaves, strict=True))
        results = loss(**named, lengths=lengths, labels=labels, x_ref=x_ref, offsets=offsets, max_length=30)
        results = [results] if isinstance(results, Tensor) else list(results)
        smooth = [y.sum() for y in results if y.requires_grad]
        return torch.autograd.grad(sum(smooth), leaves, materialize_grads=True) if smooth else results

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        arguments = (batch.lengths, batch.layout.offsets, batch.labels, torch.ones(D, dtype=torch.float64))
        fake = [mode.from_tensor(x) for x in (*arguments, *(batch.packed[n] for n in names))]
        step(*fake)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recipe", ["thumos14-paper", "thumos14-release"])
def test_other_precisions(recipe: str, dtype: torch.dtype) -> None:
    batch = batch_of(PLAIN, 3, torch.device("cpu"), torch.float32)
    x_ref = torch.linspace(-1, 1, D)

    def run(inputs: dict[str, Tensor], **rows: Any) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [inputs["tcam"].clone().requires_grad_(), inputs["embeddings"].to(dtype).requires_grad_()]
        module = losses.D2NetLoss.from_recipe(recipe, num_classes=C, embedding_dim=D)
        module.reference.copy_(x_ref)
        generator = torch.Generator().manual_seed(0)
        result = module(*leaves, batch.lengths, batch.labels, generator=generator, **rows)
        return list(result), list(torch.autograd.grad(result.total, leaves))

    results, grads = run(batch.padded)
    found, found_grads = run(batch.packed, **PLAIN.keywords(torch.device("cpu")))
    assert [x.dtype for x in (*found, *found_grads)] == [x.dtype for x in (*results, *grads)]
    torch.testing.assert_close(found, results, rtol=1e-5, atol=1e-6)
    expected = [packed(g, PLAIN.offsets, batch.lengths, PLAIN.rows) for g in grads]
    torch.testing.assert_close(found_grads, expected, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_lengths_are_cut_to_the_rows_there_are_and_to_the_longest_allowed(name: str) -> None:
    batch = batch_of(PLAIN._replace(given=False), 1, torch.device("cpu"))
    bounds = {"offsets": batch.layout.offsets, "max_length": 10}
    cut = call(name, batch, lengths=batch.lengths.clamp(max=10), **bounds)
    for lengths in (torch.tensor([99, 99, 99, 99, 12, 6]), [23, -3, 9, 1, 12, 10**12], batch.lengths.short()):
        torch.testing.assert_close(call(name, batch, lengths=torch.as_tensor(lengths), **bounds), cut, rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_offsets_may_be_a_list_or_an_array(name: str) -> None:
    batch = batch_of(PLAIN, 2, torch.device("cpu"))
    expected = call(name, batch)
    for offsets in (batch.layout.offsets.tolist(), batch.layout.offsets.numpy().astype(np.int32)):
        torch.testing.assert_close(call(name, batch, offsets=offsets), expected, rtol=0, atol=0)
