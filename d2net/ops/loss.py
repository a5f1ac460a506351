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
from d2net.ops.checks import check_like, check_real
from d2net.ops.condition_number import MAX_SIZE
from d2net.ops.loss_checks import check_inputs, checked_settings, result_shapes, sizes_of
from d2net.ops.loss_ref import LossInputs, LossResult, LossSettings, d2net_loss_ref
from d2net.ops.packed import as_offsets, check_rows

_SMOOTH = 7  # the first results of LossResult, up to x, are differentiable
_INPUTS = len(LossInputs._fields)


def d2net_loss(inputs: LossInputs, settings: LossSettings, max_length: int | None = None) -> LossResult:
    """The parts of the loss that ``settings`` turn on.

    Computed in float32, or in float64 where activations or embeddings are float64. Differentiable once with respect to
    the activations; with ``separate`` also with respect to the embeddings, through ``discriminative`` and ``x``.

    Args:
        inputs: the batch.
        settings: the recipe's values, and which parts are on.
        max_length: of a packed batch, an upper bound of the lengths; None: N. Longer recordings are cut.

    Returns:
        The loss, its terms and what they were computed from.

    Raises:
        InputError: shapes, types or devices that do not fit, a setting out of range, or offsets that are wrong (see
            :func:`~d2net.ops.packed.as_offsets`).
    """
    tcam, embeddings, labels, x_ref = inputs.tcam, inputs.embeddings, inputs.labels, inputs.x_ref
    offsets, t = as_offsets("d2net_loss", inputs.offsets, max_length, tcam)
    check_real("d2net_loss", "labels", labels)
    dtype = torch.promote_types(tcam.dtype, torch.float32)
    if embeddings is not None:
        dtype = torch.promote_types(dtype, embeddings.dtype)
        if _native.accumulator(embeddings.dtype) is not dtype:
            embeddings = embeddings.to(dtype)
    x_ref = None if x_ref is None else _as_dtype(x_ref.detach(), dtype)
    labels = _as_dtype(labels.detach(), dtype)
    tcam = _as_dtype(tcam, dtype)
    # Not _replace: torch.compile of PyTorch 2.7 breaks at it.
    rest = inputs.keys, inputs.partner, inputs.source
    x = LossInputs(tcam, embeddings, inputs.lengths, labels, x_ref, *rest, offsets)
    if _library.has_kernel("d2net_loss", tcam):
        return LossResult(*_d2net_loss(*x, settings, t))
    _check(*x, settings, t)
    return d2net_loss_ref(x, settings, t)


def _as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)  # x.to is slow even where it changes nothing


def has_video_kernel(b: int, c: int) -> bool:
    """Whether the operator computes ``video`` for ``b`` recordings and ``c`` classes."""
    return min(b, c) <= MAX_SIZE


Values = LossSettings | list[float]  # torch's dispatcher hands them on as a list


def _check(*arguments: Any) -> None:
    *inputs, values, t = arguments
    check_inputs("d2net_loss", LossInputs(*inputs), checked_settings("d2net_loss", tuple(values)), t)


def _named(values: Values) -> LossSettings:
    return values if isinstance(values, LossSettings) else LossSettings(*values)


def _empty(x: LossInputs, settings: LossSettings, t: int) -> list[Tensor]:
    """Uninitialised results, but for zeros where kernels leave the gap rows of a packed batch out."""
    *shapes, (workspace, uint8) = result_shapes(x, settings, t)
    device = x.tcam.device
    # Kernels do not write every byte of the workspace. On a CPU zeros cost nothing, and make two calls give the same
    # bytes: tests compare a traced call with an eager one.
    blank = torch.zeros if x.tcam.is_cpu else torch.empty
    results = [torch.empty(size, dtype=dtype, device=device) for size, dtype in shapes]
    if x.offsets is not None:
        for name in ("attention", "scores"):
            results[LossResult._fields.index(name)].zero_()
    return [*results, blank(workspace, dtype=uint8, device=device)]


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, values, t = arguments
    return tuple(_empty(LossInputs(*inputs), _named(values), t))


def _forward(native: Native, *arguments: Any) -> tuple[Tensor, ...]:
    *inputs, values, t = arguments
    x, settings = LossInputs(*inputs), _named(values)
    results = _empty(x, settings, t)
    _run(native, "loss", x, settings, t, results, *(None,) * (_SMOOTH + 2))
    return tuple(results)


Tensors = Sequence[Any]  # Tensor?[] of a schema


def _readable(native: Native, inputs: Tensors) -> LossInputs:
    """The inputs as the kernels read them: contiguous, and on a CPU without half precision."""
    tcam, embeddings, lengths, *rest, offsets = inputs
    if embeddings is not None and native is _native.on_cpu:
        embeddings = _as_dtype(embeddings, tcam.dtype)
    lengths, offsets = _native.plain_lengths(lengths), _native.plain_lengths(offsets)
    return LossInputs(*_native.contiguous(tcam, embeddings, lengths, *rest, offsets))


def _run(
    native: Native,
    function: str,
    x: LossInputs,
    settings: LossSettings,
    t: int,
    results: Tensors,
    *gradients: Tensor | None,
) -> None:
    like, scratch, size, sizes = x.tcam if x.embeddings is None else x.embeddings, None, 0, sizes_of(x, t)
    if native is not _native.on_cpu:
        size = _scratch_bytes(like.dtype, like.device, sizes)
        scratch = torch.empty(size, dtype=torch.uint8, device=like.device)
    members = *sizes, *x, x.tcam.shape[0], *results, results[-1].numel(), *gradients, scratch, size
    native(function, like, (*settings, *members))


@functools.lru_cache(maxsize=64)
def _scratch_bytes(dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...]) -> int:
    return _native.cuda("loss_scratch_bytes", dtype, device, *sizes)


def _setup_context(ctx, inputs, output) -> None:
    tcam, embeddings, _, _, _, *pairs, offsets, ctx.settings, ctx.t = inputs
    smooth = _SMOOTH if _named(ctx.settings).separate else _SMOOTH - 1
    ctx.mark_non_differentiable(*output[smooth:])
    ctx.set_materialize_grads(False)
    # The inputs and results that the backward needs, each in its place; None for the others.
    none = (None,) * 4
    kept = *none, *output[4:10], None, output[11]
    ctx.save_for_backward(tcam, embeddings, *none[:3], *pairs, offsets, *kept)


def _backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    grads, saved = [*gradients, None][:_SMOOTH], list(ctx.saved_tensors)  # x, the last one, may be missing
    inputs, results = saved[:_INPUTS], saved[_INPUTS:]
    total, discriminative, *_, x = grads
    reached = total is not None or discriminative is not None or x is not None
    need_tcam = ctx.needs_input_grad[0]
    need_embeddings = ctx.needs_input_grad[1] and reached and bool(_named(ctx.settings).separate)
    none = (None,) * _INPUTS
    if not (need_tcam or need_embeddings) or all(grad is None for grad in grads):
        return None, None, *none
    grad_tcam, grad_embeddings = _d2net_loss_backward(grads, inputs, results, ctx.settings, need_embeddings, ctx.t)
    leaves = [y for y in (*inputs[:2], *grads) if y is not None]
    return (
        _library.differentiable_once(grad_tcam, *leaves) if need_tcam else None,
        _library.differentiable_once(grad_embeddings, *leaves) if need_embeddings else None,
        *none,
    )


def _check_backward(
    grads: Tensors, inputs: Tensors, results: Tensors, values: Values, need_embeddings: bool, t: int
) -> None:
    if isinstance(values, LossSettings):
        return  # called by _backward, with what the forward saved
    where, settings = "d2net_loss_backward", checked_settings("d2net_loss_backward", tuple(values))
    if (len(grads), len(inputs), len(results)) != (_SMOOTH, _INPUTS, len(LossResult._fields)) or inputs[0] is None:
        expected = f"{_SMOOTH} gradients, {_INPUTS} inputs and {len(LossResult._fields)} results"
        raise InputError(f"{where}: expected {expected}")
    x, device = LossInputs(*inputs), inputs[0].device
    check_rows(where, "tcam", x.tcam, "B, T, C", x.offsets, t)
    # The backward reads no labels, lengths or x_ref: what it needs of them is in the workspace.
    b, _, c, _ = sizes_of(x, t)
    on = settings._replace(update=False, score=False, snippet=False)
    check_inputs(where, x._replace(labels=x.tcam.new_empty((b, c))), on, t)
    shapes = dict(zip(LossResult._fields, result_shapes(x, settings, t), strict=True))
    for name, grad in zip(LossResult._fields, grads, strict=False):
        if grad is not None:
            check_like(where, f"the gradient of {name}", grad, *shapes[name], device)
    for name, result in zip(LossResult._fields, results, strict=True):
        if name in ("attention", "pooled", "x", "counted", "scores", "valid", "workspace"):
            check_like(where, name, result, *shapes[name], device)
    if need_embeddings and not settings.separate:
        raise InputError(f"{where}: embeddings have no gradient without separate")


def _gradient(
    native: Native, grads: Tensors, inputs: Tensors, results: Tensors, values: Values, need_embeddings: bool, t: int
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
    blank = torch.empty_like if x.offsets is None else torch.zeros_like
    grad_tcam = blank(x.tcam)
    grad_embeddings = blank(x.embeddings) if need_embeddings and x.embeddings is not None else None
    gradients = *_native.contiguous(*grads), grad_tcam, grad_embeddings
    _run(native, "loss_backward", x, settings, t, results, *gradients)
    if grad_embeddings is None:
        return grad_tcam, x.tcam.new_empty(0)
    return grad_tcam, _as_dtype(grad_embeddings, inputs[1].dtype)


def _gradient_fake(
    grads: Tensors, inputs: Tensors, results: Tensors, values: Values, need_embeddings: bool, t: int
) -> tuple[Tensor, Tensor]:
    tcam, embeddings, *_ = inputs
    like = torch.contiguous_format
    grad_embeddings = torch.empty_like(embeddings, memory_format=like) if need_embeddings else tcam.new_empty(0)
    return torch.empty_like(tcam, memory_format=like), grad_embeddings


_d2net_loss = _library.register(
    "d2net_loss(Tensor tcam, Tensor? embeddings, Tensor? lengths, Tensor labels, Tensor? x_ref, Tensor? keys,"
    " Tensor? partner, Tensor? source, Tensor? offsets, float[] settings, SymInt max_length)"
    " -> (Tensor total, Tensor discriminative, Tensor snippet, Tensor video, Tensor attention, Tensor pooled, Tensor x,"
    " Tensor counted, Tensor scores, Tensor valid, Tensor new_x_ref, Tensor workspace)",
    check=_check,
    kernel=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_d2net_loss_backward = _library.register(
    "d2net_loss_backward(Tensor?[] grads, Tensor?[] inputs, Tensor?[] results, float[] settings, bool need_embeddings,"
    " SymInt max_length) -> (Tensor, Tensor)",
    check=_check_backward,
    kernel=_gradient,
    fake=_gradient_fake,
    backward=_library.refuse_double_backward,
)
