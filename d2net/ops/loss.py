"""The whole loss of a batch (Eq. 1 to 11): one native call forward, one backward."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops import _library, _native
from d2net.ops._native import Native
from d2net.ops.checks import (
    check_computed,
    check_floating,
    check_lengths,
    check_like,
    check_numbers,
    check_probability_floor,
    check_real,
    check_same,
    check_shape,
)
from d2net.ops.condition_number import MAX_SIZE, check_rank_tol
from d2net.ops.loss_ref import LossInputs, LossResult, LossSettings, d2net_loss_ref

_SMOOTH = 7  # the first results of LossResult, up to x, are differentiable


def d2net_loss(inputs: LossInputs, settings: LossSettings) -> LossResult:
    """The parts of the loss that ``settings`` turn on.

    Computed in float32, or in float64 where activations or embeddings are float64. Differentiable once with respect to
    the activations; with ``separate`` also with respect to the embeddings, through ``discriminative`` and ``x``.

    Args:
        inputs: the batch.
        settings: the recipe's values, and which parts are on.

    Returns:
        The loss, its terms and what they were computed from.

    Raises:
        InputError: shapes, types or devices that do not fit, or a setting out of range.
    """
    tcam, embeddings, lengths, labels, x_ref, *pairs = inputs
    check_real("d2net_loss", "labels", labels)
    dtype = torch.promote_types(tcam.dtype, torch.float32)
    if embeddings is not None:
        dtype = torch.promote_types(dtype, embeddings.dtype)
        if _native.accumulator(embeddings.dtype) is not dtype:
            embeddings = embeddings.to(dtype)
    x_ref = None if x_ref is None else _as_dtype(x_ref.detach(), dtype)
    labels = _as_dtype(labels.detach(), dtype)
    x = LossInputs(_as_dtype(tcam, dtype), embeddings, lengths, labels, x_ref, *pairs)
    if _library.has_kernel("d2net_loss", tcam):
        return LossResult(*_d2net_loss(*x, settings))
    _check(*x, settings)
    return d2net_loss_ref(x, settings)


def _as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)  # x.to is slow even where it changes nothing


def has_video_kernel(b: int, c: int) -> bool:
    """Whether the operator computes ``video`` for ``b`` recordings and ``c`` classes."""
    return min(b, c) <= MAX_SIZE


Values = LossSettings | list[float]  # torch's dispatcher hands them on as a list


def _check(*arguments: Any) -> None:
    *inputs, values = arguments
    _check_inputs("d2net_loss", LossInputs(*inputs), _checked("d2net_loss", tuple(values)))


def _named(values: Values) -> LossSettings:
    return values if isinstance(values, LossSettings) else LossSettings(*values)


@functools.lru_cache(maxsize=64)
def _checked(operator: str, values: tuple[float, ...]) -> LossSettings:
    if len(values) != len(LossSettings._fields):
        raise InputError(f"{operator}: there are {len(values)} settings, expected {len(LossSettings._fields)}")
    settings = LossSettings(*values)
    if not all(x == x for x in settings):
        check_numbers(operator, **settings._asdict())
    if not 1 <= settings.topk_divisor < 2**62:
        raise InputError(f"{operator}: topk_divisor is {settings.topk_divisor}, expected at least 1")
    check_probability_floor(operator, settings.probability_floor)
    check_rank_tol(operator, settings.rank_tol)
    for part, needed in (("separate", "embed"), ("separate", "classify"), ("update", "embed"), ("snippet", "score")):
        if getattr(settings, part) and not getattr(settings, needed):
            raise InputError(f"{operator}: {part} is on without {needed}")
    return settings


def _check_inputs(operator: str, x: LossInputs, settings: LossSettings) -> None:
    check_shape(operator, "tcam", x.tcam, "B, T, C")
    check_computed(operator, "tcam", x.tcam)
    dtype, device = x.tcam.dtype, x.tcam.device
    if x.embeddings is not None:
        check_shape(operator, "embeddings", x.embeddings, "B, T, D")
        check_floating(operator, "embeddings", x.embeddings)
        check_same(operator, "tcam", x.tcam, "embeddings", x.embeddings, 2)
        if _native.accumulator(x.embeddings.dtype) is not dtype:
            raise InputError(f"{operator}: tcam has dtype {dtype}, which does not go with {x.embeddings.dtype}")
    elif settings.embed or settings.score:
        raise InputError(f"{operator}: embeddings are missing")
    b, _, c, d = x.sizes
    check_lengths(operator, x.lengths, x.tcam)
    check_like(operator, "labels", x.labels, (b, c), dtype, device)
    if x.x_ref is not None or settings.update or settings.score:
        check_like(operator, "x_ref", x.x_ref, (d,), dtype, device)
    if x.keys is not None:
        check_like(operator, "keys", x.keys, (3, b), torch.float32, device)
    if x.partner is not None or (settings.separate and x.keys is None):
        check_like(operator, "partner", x.partner, (3, b), torch.int64, device)
    if x.source is not None:
        check_like(operator, "source", x.source, (b,), torch.int64, device)
    if settings.video and not has_video_kernel(b, c):
        raise InputError(f"{operator}: video takes up to {MAX_SIZE} recordings or classes, not {b} and {c}")


Shape = tuple[int, ...]


def _shapes(x: LossInputs, settings: LossSettings) -> list[tuple[Shape, torch.dtype]]:
    """Shape and dtype of every result."""
    (b, t, c, d), dtype = x.sizes, x.tcam.dtype
    a, own = dtype.itemsize, t if settings.own_classes else 0
    # Bytes; at least as many as LossWorkspace of csrc/loss.h needs, which checks that.
    workspace = b * (4 * t + (4 + 2 * a) * c + own * (a + 4) + 14 * a + 41) + 2 * a * c + 64 * 15
    return [
        *[((), dtype)] * 4,
        ((b, t), dtype),
        ((b, c), dtype),
        ((2, b, d) if settings.embed else (0,), dtype),
        ((b,), torch.int64),
        ((b, t) if settings.score else (0,), dtype),
        ((2, b) if settings.embed else (0,), torch.bool),
        ((d if settings.update else 0,), dtype),
        ((workspace,), torch.uint8),
    ]


def _empty(x: LossInputs, settings: LossSettings) -> list[Tensor]:
    """Uninitialised results."""
    *shapes, (workspace, uint8) = _shapes(x, settings)
    device = x.tcam.device
    # Kernels do not write every byte of the workspace. On a CPU zeros cost nothing, and make two calls give the same
    # bytes: tests compare a traced call with an eager one.
    blank = torch.zeros if x.tcam.is_cpu else torch.empty
    return [
        *[torch.empty(size, dtype=dtype, device=device) for size, dtype in shapes],
        blank(workspace, dtype=uint8, device=device),
    ]


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, values = arguments
    return tuple(_empty(LossInputs(*inputs), _named(values)))


def _forward(native: Native, *arguments: Any) -> tuple[Tensor, ...]:
    *inputs, values = arguments
    x, settings = LossInputs(*inputs), _named(values)
    results = _empty(x, settings)
    _run(native, "loss", x, settings, results, *(None,) * (_SMOOTH + 2))
    return tuple(results)


Tensors = Sequence[Any]  # Tensor?[] of a schema


def _readable(native: Native, inputs: Tensors) -> LossInputs:
    """The inputs as the kernels read them: contiguous, and on a CPU without half precision."""
    tcam, embeddings, lengths, *rest = inputs
    if embeddings is not None and native is _native.on_cpu:
        embeddings = _as_dtype(embeddings, tcam.dtype)
    read: Tensors = _native.contiguous(tcam, embeddings, _native.plain_lengths(lengths), *rest)
    return LossInputs(*read)


def _run(
    native: Native, function: str, x: LossInputs, settings: LossSettings, results: Tensors, *gradients: Tensor | None
) -> None:
    like, scratch, size, sizes = x.tcam if x.embeddings is None else x.embeddings, None, 0, x.sizes
    if native is not _native.on_cpu:
        size = _scratch_bytes(like.dtype, like.device, sizes)
        scratch = torch.empty(size, dtype=torch.uint8, device=like.device)
    members = *sizes, *x, *results, results[-1].numel(), *gradients, scratch, size
    native(function, like, (*settings, *members))


@functools.lru_cache(maxsize=64)
def _scratch_bytes(dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...]) -> int:
    return _native.cuda("loss_scratch_bytes", dtype, device, *sizes)


def _setup_context(ctx, inputs, output) -> None:
    tcam, embeddings, _, _, _, keys, partner, source, ctx.settings = inputs
    smooth = _SMOOTH if _named(ctx.settings).separate else _SMOOTH - 1
    ctx.mark_non_differentiable(*output[smooth:])
    ctx.set_materialize_grads(False)
    # The inputs and results that the backward needs, each in its place; None for the others.
    none = (None,) * 4
    ctx.save_for_backward(tcam, embeddings, *none[:3], keys, partner, source, *none, *output[4:10], None, output[11])


def _backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    grads, saved = [*gradients, None][:_SMOOTH], list(ctx.saved_tensors)  # x, the last one, may be missing
    inputs, results = saved[:8], saved[8:]
    total, discriminative, *_, x = grads
    reached = total is not None or discriminative is not None or x is not None
    need_tcam = ctx.needs_input_grad[0]
    need_embeddings = ctx.needs_input_grad[1] and reached and bool(_named(ctx.settings).separate)
    none = (None,) * 7
    if not (need_tcam or need_embeddings) or all(grad is None for grad in grads):
        return None, None, *none
    grad_tcam, grad_embeddings = _d2net_loss_backward(grads, inputs, results, ctx.settings, need_embeddings)
    leaves = [y for y in (*inputs[:2], *grads) if y is not None]
    return (
        _library.differentiable_once(grad_tcam, *leaves) if need_tcam else None,
        _library.differentiable_once(grad_embeddings, *leaves) if need_embeddings else None,
        *none,
    )


def _check_backward(grads: Tensors, inputs: Tensors, results: Tensors, values: Values, need_embeddings: bool) -> None:
    if isinstance(values, LossSettings):
        return  # called by _backward, with what the forward saved
    where, settings = "d2net_loss_backward", _checked("d2net_loss_backward", tuple(values))
    if (len(grads), len(inputs), len(results)) != (_SMOOTH, 8, len(LossResult._fields)) or inputs[0] is None:
        raise InputError(f"{where}: expected {_SMOOTH} gradients, 8 inputs and {len(LossResult._fields)} results")
    x, device = LossInputs(*inputs), inputs[0].device
    check_shape(where, "tcam", x.tcam, "B, T, C")
    # The backward reads no labels, lengths or x_ref: what it needs of them is in the workspace.
    labels = x.tcam.new_empty((x.tcam.shape[0], x.tcam.shape[2]))
    _check_inputs(where, x._replace(labels=labels), settings._replace(update=False, score=False, snippet=False))
    shapes = dict(zip(LossResult._fields, _shapes(x, settings), strict=True))
    for name, grad in zip(LossResult._fields, grads, strict=False):
        if grad is not None:
            check_like(where, f"the gradient of {name}", grad, *shapes[name], device)
    for name, result in zip(LossResult._fields, results, strict=True):
        if name in ("attention", "pooled", "x", "counted", "scores", "valid", "workspace"):
            check_like(where, name, result, *shapes[name], device)
    if need_embeddings and not settings.separate:
        raise InputError(f"{where}: embeddings have no gradient without separate")


def _gradient(
    native: Native, grads: Tensors, inputs: Tensors, results: Tensors, values: Values, need_embeddings: bool
) -> tuple[Tensor, Tensor]:
    if isinstance(values, list):
        # torch resolves lazy negation (the neg bit) of tensor arguments, but not of tensors in lists.
        resolved: list[list[Any]] = [[y if y is None else y.resolve_neg() for y in z] for z in (grads, inputs, results)]
        grads, inputs, (*others, workspace) = resolved
        results = [*others, workspace]
        if workspace.data_ptr() % 8 != 0:  # it holds numbers of 8 bytes; the forward's own is always aligned
            results = [*others, workspace.clone()]
        results = _native.contiguous(*results)
    x, settings = _readable(native, inputs), _named(values)
    grad_tcam = torch.empty_like(x.tcam)
    grad_embeddings = torch.empty_like(x.embeddings) if need_embeddings and x.embeddings is not None else None
    gradients = *_native.contiguous(*grads), grad_tcam, grad_embeddings
    _run(native, "loss_backward", x, settings, results, *gradients)
    if grad_embeddings is None:
        return grad_tcam, x.tcam.new_empty(0)
    return grad_tcam, _as_dtype(grad_embeddings, inputs[1].dtype)


def _gradient_fake(
    grads: Tensors, inputs: Tensors, results: Tensors, values: Values, need_embeddings: bool
) -> tuple[Tensor, Tensor]:
    tcam, embeddings, *_ = inputs
    like = torch.contiguous_format
    grad_embeddings = torch.empty_like(embeddings, memory_format=like) if need_embeddings else tcam.new_empty(0)
    return torch.empty_like(tcam, memory_format=like), grad_embeddings


_d2net_loss = _library.register(
    "d2net_loss(Tensor tcam, Tensor? embeddings, Tensor? lengths, Tensor labels, Tensor? x_ref, Tensor? keys,"
    " Tensor? partner, Tensor? source, float[] settings) -> (Tensor total, Tensor discriminative, Tensor snippet,"
    " Tensor video, Tensor attention, Tensor pooled, Tensor x, Tensor counted, Tensor scores, Tensor valid,"
    " Tensor new_x_ref, Tensor workspace)",
    check=_check,
    kernel=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_d2net_loss_backward = _library.register(
    "d2net_loss_backward(Tensor?[] grads, Tensor?[] inputs, Tensor?[] results, float[] settings, bool need_embeddings)"
    " -> (Tensor, Tensor)",
    check=_check_backward,
    kernel=_gradient,
    fake=_gradient_fake,
    backward=_library.refuse_double_backward,
)
