"""Arguments of public operators and losses: numbers of wrong types, and tensors and arrays that cannot be read."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from d2net import losses, ops
from d2net.errors import InputError
from d2net.localization import to_detections

T, C = 9, 3
X = torch.rand(2, T, C, generator=torch.Generator().manual_seed(0))
LABELS = torch.eye(C)[:2]
SEGMENTS = X[0, :, :2].sort(1).values


def soft_nms(segments: Tensor = SEGMENTS, scores: Tensor = X[0, :, 0], **changed: object) -> object:
    return ops.soft_nms_1d(segments, scores, **{"iou_threshold": 0.3, "sigma": 0.5, "min_score": 0.1, **changed})


def proposals(activations: Tensor = X, classes: Tensor = LABELS > 0, **changed: object) -> object:
    return ops.extract_proposals(activations, classes, **{"thresholds": [0.3, 0.6], **changed})


# Every public operator with its settings by name.
SETTINGS: dict[str, tuple[Callable[..., object], dict[str, float]]] = {
    "topk_pool": (lambda **s: ops.topk_pool(X, **s), {"divisor": 2}),
    "tcam_pool": (lambda **s: ops.tcam_pool(X, **s), {"divisor": 2}),
    "attention_pool": (
        lambda **s: ops.attention_pool(X, X[..., 0], **s),
        {"threshold": 0.4, "background_threshold": 0.6},
    ),
    "log_condition_number": (lambda **s: ops.log_condition_number(X, **s), {"rank_tol": 1e-3}),
    "joint_log_condition_number": (
        lambda **s: ops.joint_log_condition_number(X, X.mT, **s),
        {"rank_tol": 1e-3},
    ),
    "snippet_pdmi": (
        lambda **s: ops.snippet_pdmi(X[..., 0], X[..., 1], **s),
        {"fg_threshold": 0.6, "bg_threshold": 0.4, "entry_floor": 0.01, "rank_tol": 1e-3},
    ),
    "nms_1d": (lambda **s: ops.nms_1d(SEGMENTS, X[0, :, 0], **s), {"iou_threshold": 0.4}),
    "batched_nms_1d": (
        lambda **s: ops.batched_nms_1d(SEGMENTS, X[0, :, 0], torch.arange(T) % 2, **s),
        {"iou_threshold": 0.4},
    ),
    "soft_nms_1d": (soft_nms, {"iou_threshold": 0.4, "sigma": 0.4, "min_score": 0.2}),
    "extract_proposals": (proposals, {"min_length": 2, "inflation": 0.5, "min_contrast": -0.2, "nms_iou": 0.4}),
}
WITHOUT = {"bottom_up_attention", "iou_1d"}  # operators without settings
ABOUT = {"backend_of", "build_info", "obstacle", "runs_on", "use_backend"}  # functions that are no operators
OPERATORS = {name for name in ops.__all__ if name[0].islower()} - ABOUT
EACH = [(name, setting) for name, (_, settings) in SETTINGS.items() for setting in settings]


def flat(x: object) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)


def test_no_setting_is_left_out():
    assert set(SETTINGS) | WITHOUT == OPERATORS
    for name, (_, settings) in SETTINGS.items():
        numbers = inspect.signature(getattr(ops, name)).parameters.values()
        assert set(settings) == {p.name for p in numbers if p.annotation in ("int", "float")}


@pytest.mark.parametrize("module", [ops, losses])
def test_no_name_is_public_twice(module):
    assert len(module.__all__) == len(set(module.__all__))


@pytest.fixture
def kind(request):
    with ops.use_backend("reference") if request.param == "reference" else nullcontext():
        yield


@pytest.mark.parametrize("kind", ["kernel", "reference"], indirect=True)
@pytest.mark.parametrize(("name", "setting"), EACH)
def test_a_setting_of_another_type_is_refused(name, setting, kind):
    call, settings = SETTINGS[name]
    whole = isinstance(settings[setting], int)
    wrong = ["a", "0.5", b"1", True, np.True_, torch.tensor(True), None, [1], (), {}, 1j, object(), torch.zeros(2, 2)]
    wrong += [torch.zeros((), device="meta"), torch.tensor(1j), 2**2000, np.ma.masked]
    if whole:
        wrong += [
            2.5,
            2.0,
            math.nan,
            math.inf,
            np.float32(2),
            torch.tensor(1.9),
            torch.tensor(2.0),
            2**63,
            -(2**63) - 1,
        ]
    for value in wrong:
        with pytest.raises(InputError, match=f"{name}.*{setting}") as error:
            call(**{setting: value})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "setting"), EACH)
def test_numbers_of_numpy_and_torch_are_those_of_python(name, setting):
    call, settings = SETTINGS[name]
    value = settings[setting]
    expected = flat(call(**{setting: value}))
    others = [np.int64(value), np.uint8(value), torch.tensor(value)]
    if isinstance(value, float):
        others = [np.float64(value), torch.tensor(value, dtype=torch.float64), np.array(value)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(flat(call(**{setting: other})), expected, strict=True))


@pytest.mark.parametrize("choice", ["most", None, 1, ["sum"], np.array(["sum", "mean"]), True])
def test_choices_that_are_none(choice):
    for call, name in (
        (lambda: ops.attention_pool(X, X[..., 0], reduction=choice), "attention_pool: reduction is"),
        (lambda: ops.snippet_pdmi(X[..., 0], X[..., 0], normalization=choice), "snippet_pdmi: normalization is"),
        (lambda: soft_nms(method=choice), "soft_nms_1d: method is"),
        (lambda: proposals(outer=choice), "extract_proposals: outer is"),
    ):
        with pytest.raises(InputError, match=f"{name} .*, expected '.*' or '.*'"):
            call()


@pytest.mark.parametrize(
    "thresholds", ["12", ["0.5"], [True], [1j], [None], [[0.5]], np.ma.masked_less([0.1, 0.5], 0.3)]
)
def test_thresholds_of_another_type(thresholds):
    with pytest.raises(InputError, match="thresholds must be a list of numbers"):
        proposals(thresholds=thresholds)


# For every tensor argument of every operator and loss: a call with that argument, and a valid value.
TAKEN: dict[str, tuple[Callable[[object], object], Tensor]] = {
    "topk_pool: x": (ops.topk_pool, X),
    "topk_pool: lengths": (lambda x: ops.topk_pool(X, x), torch.tensor([3, 4])),
    "tcam_pool: tcam": (ops.tcam_pool, X),
    "attention_pool: x": (lambda x: ops.attention_pool(x, X[..., 0]), X),
    "attention_pool: attention": (lambda x: ops.attention_pool(X, x), X[..., 0]),
    "bottom_up_attention: embeddings": (lambda x: ops.bottom_up_attention(x, X[0, 0]), X),
    "bottom_up_attention: x_ref": (lambda x: ops.bottom_up_attention(X, x), X[0, 0]),
    "log_condition_number: u": (ops.log_condition_number, X),
    "joint_log_condition_number: p": (lambda x: ops.joint_log_condition_number(x, X.mT), X),
    "joint_log_condition_number: y": (lambda x: ops.joint_log_condition_number(X, x), X.mT),
    "snippet_pdmi: attention": (lambda x: ops.snippet_pdmi(x, X[..., 0]), X[..., 0]),
    "snippet_pdmi: scores": (lambda x: ops.snippet_pdmi(X[..., 0], x), X[..., 0]),
    "nms_1d: segments": (lambda x: ops.nms_1d(x, X[0, :, 0], 0.5), SEGMENTS),
    "nms_1d: scores": (lambda x: ops.nms_1d(SEGMENTS, x, 0.5), X[0, :, 0]),
    "batched_nms_1d: groups": (lambda x: ops.batched_nms_1d(SEGMENTS, X[0, :, 0], x, 0.5), torch.arange(T)),
    "soft_nms_1d: scores": (lambda x: soft_nms(scores=x), X[0, :, 0]),
    "iou_1d: a": (lambda x: ops.iou_1d(x, SEGMENTS), SEGMENTS),
    "iou_1d: b": (lambda x: ops.iou_1d(SEGMENTS, x), SEGMENTS),
    "extract_proposals: activations": (lambda x: proposals(x), X),
    "extract_proposals: classes": (lambda x: proposals(X, x), LABELS > 0),
    "D2NetLoss: tcam": (lambda x: losses.D2NetLoss(C, C)(x, X, None, LABELS), X),
    "D2NetLoss: embeddings": (lambda x: losses.D2NetLoss(C, C)(X, x, None, LABELS), X),
    "D2NetLoss: labels": (lambda x: losses.D2NetLoss(C, C)(X, X, None, x), LABELS),
    "DiscriminativeLoss: partners": (
        lambda x: losses.DiscriminativeLoss()(X, X, None, LABELS, x),
        torch.tensor([1, 0]),
    ),
    "FocalLoss: tcam": (lambda x: losses.FocalLoss()(x, None, LABELS), X),
    "CrossEntropyLoss: labels": (lambda x: losses.CrossEntropyLoss()(X, None, x), LABELS),
    "VideoBCE: tcam": (lambda x: losses.VideoBCE()(x, None, LABELS), X),
    "VideoL1: labels": (lambda x: losses.VideoL1()(X, None, x), LABELS),
    "VideoDMI: tcam": (lambda x: losses.VideoDMI()(x, None, LABELS), X),
    "VideoDenoising: tcam": (lambda x: losses.VideoDenoising()(x, None, LABELS), X),
    "SnippetL1: embeddings": (lambda x: losses.SnippetL1()(X, x, None, X[0, 0]), X),
    "SnippetBCE: x_ref": (lambda x: losses.SnippetBCE()(X, X, None, x), X[0, 0]),
    "SnippetDMI: tcam": (lambda x: losses.SnippetDMI()(x, X, None, X[0, 0]), X),
    "SnippetDenoising: labels": (
        lambda x: losses.SnippetDenoising(own_classes=True)(X, X, None, X[0, 0], x),
        LABELS,
    ),
    "UncertaintyModeling: embeddings": (lambda x: losses.UncertaintyModeling()(x, X, None), X),
    "UncertaintyModeling: logits": (lambda x: losses.UncertaintyModeling()(X, x, None), X),
    "CoActivitySimilarity: embeddings": (lambda x: losses.CoActivitySimilarity()(x, X, None, LABELS), X),
    "CoActivitySimilarity: logits": (lambda x: losses.CoActivitySimilarity()(X, x, None, LABELS), X),
    "SnippetContrast: embeddings": (lambda x: losses.SnippetContrast()(x, X[..., 0], None), X),
    "SnippetContrast: actionness": (lambda x: losses.SnippetContrast()(X, x, None), X[..., 0]),
    "draw_permutations: counts": (lambda x: losses.draw_permutations(x, 4), torch.tensor([1, 2])),
}


def nested(x: Tensor, layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([x, x], layout=layout)


UNREADABLE: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "complex": (lambda x: x.cfloat(), r"dtype torch.complex64, expected real"),
    "quantized": (lambda x: torch.quantize_per_tensor(x.float(), 0.01, 0, torch.quint8), "dtype torch.quint8"),
    "sparse": (lambda x: x.to_sparse(), r"layout torch.sparse_coo, expected a dense tensor"),
    "nested": (lambda x: nested(x, torch.strided), r"is nested, expected a dense tensor"),
    "jagged": (lambda x: nested(x[None], torch.jagged), r"is nested, expected a dense tensor"),
    "masked": (lambda x: np.ma.masked_array(x.numpy()), r"is a masked array, whose mask would be lost"),
    "masked inside": (lambda x: [np.ma.masked_array(x.numpy())], r"is a masked array, whose mask would be lost"),
    "masked number": (lambda x: [[1.0, np.ma.masked]], r"is a masked array, whose mask would be lost"),
    "tensor inside": (lambda x: [[1.0, x]], r"is a list of tensors; torch.stack"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated, but users may have such tensors
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("argument", TAKEN)
def test_what_cannot_be_read_whole_is_refused(argument, kind):
    call, right = TAKEN[argument]
    call(right)
    make, words = UNREADABLE[kind]
    with pytest.raises(InputError, match=f"^{argument} {'(has )?' if kind != 'nested' else ''}{words}") as error:
        call(make(right))
    assert "\n" not in str(error.value)


def test_no_operator_or_loss_takes_tensors_unseen():
    seen = {argument.split(":")[0] for argument in TAKEN}
    assert seen >= OPERATORS
    modules = {name for name in losses.__all__ if name[0].isupper() and hasattr(getattr(losses, name), "forward")}
    assert modules <= seen | {"DenoisingLoss"}  # which passes everything to its terms


@pytest.mark.parametrize("argument", ["seconds_per_snippet", "first_snippet", "durations"])
def test_masked_times_of_recordings(argument):
    given = {"seconds_per_snippet": [1.0, 1.0], "first_snippet": [0.0, 0.0], "durations": [9.0, 9.0]}
    made = {"videos": ["a", "b"], "classes": ["x", "y", "z"]}
    assert len(to_detections(proposals(), **made, **given).score)
    given[argument] = np.ma.masked_greater(np.array([1.0, 5.0]), 4)
    with pytest.raises(InputError, match=f"to_detections: {argument} is a masked array"):
        to_detections(proposals(), **made, **given)


@pytest.mark.parametrize("shape", [(1, 2**31, 1), (1, 1, 2**31)])
def test_sizes_beyond_32_bits_are_refused_by_the_operator_that_was_called(shape):
    x = torch.zeros(()).expand(shape)  # one number
    for name, call in (
        ("topk_pool", lambda: ops.topk_pool(x)),
        ("tcam_pool", lambda: ops.tcam_pool(x)),
        ("topk_pool", lambda: ops.topk_pool(x.to("meta"))),
    ):
        with pytest.raises(InputError, match=rf"^{name}: .* has shape .*; T and C must be below 2\^31"):
            call()
