"""Arrays and lists in place of tensors, and what is refused instead of giving a number that looks right."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from d2net import losses, ops
from d2net.errors import InputError
from d2net.localization import Localizer
from d2net.losses import D2NetLoss
from d2net.model import D2Net
from d2net.ops.checks import as_tensor
from d2net.recipes import LossRecipe, ModelRecipe, load_recipe

# Not importable by name under --import-mode=importlib.
_spec = importlib.util.spec_from_file_location("every", Path(__file__).with_name("test_every_operator.py"))
every = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(every)

INTERNAL = ("d2net_loss", "network")
B, T, C, D = 4, 30, 3, 8


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """TCAM, embeddings, lengths and labels."""
    generator = torch.Generator().manual_seed(0)
    tcam = torch.rand(B, T, C, generator=generator, dtype=dtype)
    embeddings = torch.randn(B, T, D, generator=generator, dtype=dtype)
    return tcam, embeddings, torch.tensor([T, 7, 20, 1]), torch.eye(C, dtype=dtype)[[0, 1, 2, 1]]


# Every loss as a function of such a batch.
LOSSES = {
    "D2NetLoss": lambda t, x, n, y: D2NetLoss(C, D).to(torch.as_tensor(x).dtype)(t, x, n, y, PARTNERS).total,
    "DiscriminativeLoss": lambda t, x, n, y: losses.DiscriminativeLoss()(t, x, n, y, PARTNERS).loss,
    "DenoisingLoss": lambda t, x, n, y: losses.DenoisingLoss()(t, x, n, y, REFERENCE).total,
    "FocalLoss": lambda t, x, n, y: losses.FocalLoss()(t, n, y),
    "SnippetL1": lambda t, x, n, y: losses.SnippetL1(own_classes=True)(t, x, n, REFERENCE, y),
    "SnippetDMI": lambda t, x, n, y: losses.SnippetDMI()(t, x, n, REFERENCE),
    "VideoBCE": lambda t, x, n, y: losses.VideoBCE()(t, n, y),
    "UncertaintyModeling": lambda t, x, n, y: losses.UncertaintyModeling()(x, t, n).total,
    "CoActivitySimilarity": lambda t, x, n, y: losses.CoActivitySimilarity()(x, t, n, y),
    "SnippetContrast": lambda t, x, n, y: losses.SnippetContrast()(x, np.asarray(t)[..., 0], n),
}
PARTNERS = [1, 2, 3, 0]
REFERENCE = np.linspace(-1, 1, D)


def same(found: object, expected: object) -> None:
    found, expected = ([x] if isinstance(x, Tensor) else list(x) for x in (found, expected))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("name", [name for name in every.CASES if name.split()[0] not in INTERNAL])
def test_operators_take_arrays_and_lists(name):
    function, differentiable, others = every.CASES[name]
    inputs = [*differentiable, *others]
    expected = function(*inputs)
    same(function(*(x.numpy() for x in inputs)), expected)
    same(function(*(x.tolist() for x in inputs)), expected)
    same(function(inputs[0], *(x.tolist() for x in inputs[1:])), expected)


@pytest.mark.parametrize("name", [name for name in every.CASES if name.split()[0] not in INTERNAL])
def test_operators_compute_arrays_of_float64_in_float64(name):
    function, differentiable, others = every.CASES[name]
    wide = [x.double() if x.is_floating_point() else x for x in (*differentiable, *others)]
    same(function(*(x.numpy() for x in wide)), function(*wide))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_take_arrays_and_lists(loss, dtype):
    inputs = batch(dtype)
    expected = loss(*inputs)
    assert expected.dtype == dtype and expected > 0
    same(loss(*(x.numpy() for x in inputs)), expected)
    tcam, embeddings, lengths, labels = inputs
    for other in (labels.tolist(), labels.bool().numpy(), labels.int().tolist()):
        same(loss(tcam, embeddings, lengths.tolist(), other), expected)
    if dtype == torch.float32:
        same(loss(*(x.tolist() for x in inputs)), expected)


@pytest.mark.parametrize("attention", [None, np.linspace(0, 1, B * T).reshape(B, T)])
def test_the_localizer_takes_arrays_and_lists(attention):
    tcam, _, lengths, _ = batch(torch.float64)
    localizer = Localizer.from_recipe("thumos14-paper")
    expected = localizer(tcam, None if attention is None else torch.from_numpy(attention), lengths)
    assert len(expected.score) > 0
    same(localizer(tcam.numpy(), attention, lengths.tolist()), expected)
    same(localizer(tcam, None if attention is None else attention.tolist(), lengths.int().numpy()), expected)


def test_the_network_takes_arrays_and_lists_in_its_own_type():
    torch.manual_seed(0)
    features = torch.randn(2, 6, 8)
    model = D2Net(3, (4, 4)).eval()
    expected = model(features, torch.tensor([6, 2]))
    for x in (features.numpy(), features.double().numpy(), features.tolist()):
        same(model(x, [6, 2]), expected)


def test_lists_beside_a_tensor_are_as_exact_as_it():
    third = 1 / 3
    assert as_tensor("f", "x", [third]).dtype == torch.float32
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float16, torch.float32),
        (torch.int64, torch.float32),
    ):
        found = as_tensor("f", "x", [third], torch.zeros(1, dtype=dtype))
        assert found.dtype == expected and found.item() == torch.tensor(third, dtype=expected).item()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3)[::-1],
        np.arange(6.0).reshape(2, 3).astype(">f8"),
        np.arange(6, dtype=np.uint16).reshape(2, 3),
        np.arange(6.0).reshape(3, 2).T,
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        [np.arange(3.0), np.arange(3.0)],
        ((1, 2), (3, 4)),
    ],
)
@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.filterwarnings("error")
def test_any_array_of_numbers_is_taken(array, writable):
    if isinstance(array, np.ndarray):
        array.setflags(write=writable)
    tensor = as_tensor("f", "x", array)
    assert np.array_equal(tensor.numpy(), np.asarray(array))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (None, "a NoneType that cannot"),
        ("abc", "a str that cannot"),
        ({"a": 1}, "a dict that cannot"),
        ([[1.0], [1.0, 2.0]], "a list that cannot"),
        (np.array([1 + 2j]), "an array of complex128 that cannot"),
        (np.array([None, "x"]), "an array of object that cannot"),
        (np.array([2**63], dtype=np.uint64), "an array of uint64 that cannot"),
        ([torch.zeros(2), torch.zeros(2)], "a list of tensors; torch.stack"),
        ([[torch.zeros(2, requires_grad=True)]], "a list of tensors; torch.stack"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(x, words):
    for call, name in (
        (lambda: ops.topk_pool(x), "topk_pool: x"),
        (lambda: ops.attention_pool(torch.zeros(1, 2, 3), x), "attention_pool: attention"),
        (lambda: D2Net(3, (4, 4))(x), "D2Net: features"),
        (lambda: Localizer.from_recipe("thumos14-paper")(x), "Localizer: tcam"),
        (lambda: LOSSES["D2NetLoss"](x, *batch()[1:]) if x is not None else ops.topk_pool(x), ""),
    ):
        with pytest.raises(InputError, match=words) as error:
            call()
        assert str(error.value).startswith(name) and "\n" not in str(error.value)


@pytest.mark.parametrize("lengths", [[1.0, 2, 3, 4], [True] * 4, [1, 2], 3, "abcd", [[1, 2, 3, 4]]])
def test_lengths_that_are_none(lengths):
    tcam, embeddings, _, labels = batch()
    for call in (
        lambda: ops.topk_pool(tcam, lengths),
        lambda: D2NetLoss(C, D)(tcam, embeddings, lengths, labels),
        lambda: D2Net(3, (4, 4))(embeddings, lengths),
        lambda: Localizer.from_recipe("thumos14-paper")(tcam, lengths=lengths),
    ):
        with pytest.raises(InputError, match="lengths"):
            call()


@pytest.mark.parametrize("pairing", ["different", "permutation"])
@pytest.mark.parametrize("partners", [[1.0, 2, 3, 0], [1, 2], 1, [[[0]]]])
def test_partners_that_are_none(pairing, partners):
    with pytest.raises(InputError, match="partners has shape"):
        losses.DiscriminativeLoss(pairing=pairing)(*batch(), partners)


def test_permutations_of_a_list_of_counts():
    drawn = [losses.draw_permutations(n, 4, torch.Generator().manual_seed(0)) for n in ([2, 4], torch.tensor([2, 4]))]
    assert torch.equal(*drawn) and drawn[0][0, :2].sort().values.tolist() == [0, 1]


@pytest.mark.parametrize("thresholds", [0.5, "high", ["low", "high"], [], [float("nan")]])
def test_thresholds_that_are_none(thresholds):
    with pytest.raises(InputError, match="thresholds must be"):
        ops.extract_proposals(torch.zeros(1, 2, 3), torch.ones(1, 3).bool(), thresholds=thresholds)


TAKES_ACTIVATIONS = [name for name in LOSSES if name not in ("UncertaintyModeling", "CoActivitySimilarity")]


@pytest.mark.parametrize("name", [name for name in TAKES_ACTIVATIONS if name != "SnippetContrast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_are_no_activations(name, dtype):
    tcam, embeddings, lengths, labels = batch()
    for wrong in (4 * tcam - 2, tcam - 0.1, 1.1 * tcam):
        with pytest.raises(InputError, match=r"tcam holds values from .*\[0, 1\]; apply torch.sigmoid to logits"):
            LOSSES[name](wrong.to(dtype), embeddings, lengths, labels)


def test_only_what_lies_before_the_lengths_must_be_an_activation():
    tcam, embeddings, lengths, labels = batch()
    expected = LOSSES["D2NetLoss"](tcam, embeddings, lengths, labels)
    past = torch.arange(T) >= lengths[:, None]
    for filler in (float("nan"), float("inf"), -7.0):
        padded = tcam.masked_fill(past[:, :, None], filler)
        same(LOSSES["D2NetLoss"](padded, embeddings, lengths, labels), expected)
    rounded = tcam.clone()
    rounded[0, 0], rounded[0, 1] = 1 + 1e-6, -1e-6
    assert LOSSES["D2NetLoss"](rounded, embeddings, lengths, labels).isfinite()
    tcam[0, 2, 1] = torch.nan  # propagates, as everywhere
    assert LOSSES["D2NetLoss"](tcam, embeddings, lengths, labels).isnan()


def test_while_traced_no_value_is_looked_at():
    tcam, embeddings, lengths, labels = batch()
    loss = losses.FocalLoss()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tcam, lengths, labels), loss(tcam, lengths, labels))
    assert compiled(4 * tcam - 2, lengths, labels).isfinite()  # nobody sees it there
    traced = torch.func.vmap(lambda t: losses.VideoL1()(t, None, labels))(tcam[None])
    torch.testing.assert_close(traced[0], losses.VideoL1()(tcam, None, labels))
    assert losses.FocalLoss()(*(x.to("meta") for x in (tcam, lengths, labels))).device.type == "meta"


@pytest.mark.parametrize("widths", [(), (4, 4, 4), (0,), (4, -1), (4.0,), "64", 64, None, ("a", "b"), {}])
def test_stream_widths_that_are_none(widths):
    with pytest.raises(InputError, match="stream_widths is .*; expected one or two widths"):
        D2Net(3, widths)


def test_stream_widths_of_any_whole_numbers():
    for widths in ([4, 5], np.array([4, 5]), torch.tensor([4, 5]), (np.int64(4), 5)):
        assert D2Net(3, widths).stream_widths == (4, 5)


@pytest.mark.parametrize("classes", [0, -1, 2.5, "3", None])
def test_numbers_of_classes_that_are_none(classes):
    with pytest.raises(InputError, match="num_classes is .*; expected a whole number"):
        D2Net(classes)


def test_a_recipe_of_another_kind():
    for recipe in ("thumos14-paper", load_recipe("watch"), LossRecipe()):
        with pytest.raises(InputError, match=r"expected a ModelRecipe"):
            D2Net(3, (4, 4), recipe)
    D2Net(3, (4, 4), ModelRecipe())


def test_features_of_another_type_or_place():
    model = D2Net(3, (4, 4))
    for features, words in (
        (torch.zeros(1, 5, 8, dtype=torch.float64), "float64 but the network torch.float32"),
        (torch.zeros(1, 5, 8, dtype=torch.int64), "dtype torch.int64"),
        (torch.zeros(1, 5, 8, device="meta"), "on meta but the network on cpu"),
    ):
        with pytest.raises(InputError, match=words):
            model(features)
