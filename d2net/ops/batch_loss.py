"""What the loss sums over the recordings of a batch: the factors of U_2, the total, and the background reference.

``counted`` (B,) says which recordings count: bool, or integers of which those above 0 count, so that their lengths
will do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops import _library, _native
from d2net.ops._checks import (
    check_computed,
    check_counted,
    check_floor,
    check_like,
    check_numbers,
    check_real,
    check_same,
    check_shape,
)
from d2net.ops._native import Native, at_least_float32


def video_factors(
    pooled: Tensor,
    labels: Tensor,
    counted: Tensor,
    *,
    probability_floor: float = 1e-6,
    peak_share: float | None = None,
    per_class: bool = False,
) -> tuple[Tensor, Tensor]:
    """P_2 (C, B) and Y_2 (B, C) of the batch's joint distribution U_2 = P_2 Y_2 (Eq. 10).

    Args:
        pooled: (B, C) scores p in [0, 1], clamped to [probability_floor, 1 - probability_floor].
        labels: (B, C) multi-hot. counted: (B,), the recordings that Y_2 holds.
        peak_share: P_2 holds p where it is above this share of the recording's best, else 0, normalised to sum 1;
            None: P_2 holds p.
        per_class: divide Y_2 class by class by the number of its recordings, not by that of all.

    Returns:
        In float32 at least; P_2 is differentiable once, to ``pooled``. Labels get no gradient.
    """
    pooled = at_least_float32(pooled)
    check_real("video_factors", "labels", labels)
    labels = labels.detach().to(pooled.dtype)
    share = -1.0 if peak_share is None else peak_share
    inputs = pooled, labels, counted, probability_floor, share, per_class
    if _library.has_kernel("video_factors", pooled):
        return _video_factors(*inputs)
    _check_factors(*inputs)
    return video_factors_reference(*inputs)


def video_factors_reference(
    pooled: Tensor, labels: Tensor, counted: Tensor, probability_floor: float, peak_share: float, per_class: bool
) -> tuple[Tensor, Tensor]:
    """:func:`video_factors` in plain PyTorch, on any device; ``peak_share`` below 0: none."""
    p = pooled.clamp(probability_floor, 1 - probability_floor)
    counted = counted > 0
    y = torch.where(counted[:, None], labels, 0)
    size = y.sum(0) if per_class else counted.sum()
    if peak_share >= 0 and p.shape[1]:
        p = torch.where(p > peak_share * p.amax(1, keepdim=True), p, 0)
        p = p / p.sum(1, keepdim=True)
    return p.T.contiguous(), y / size.clamp(min=1)


class Total(NamedTuple):
    """Scalars: the weighted sum (Eq. 1) and what it sums, with means over recordings for L_Dis and L_DS."""

    total: Tensor
    discriminative: Tensor
    snippet: Tensor
    video: Tensor
    other: Tensor


def total_loss(
    discriminative: Tensor,
    counted: Tensor,
    snippet: Tensor | None = None,
    valid: Tensor | None = None,
    video: Tensor | None = None,
    other: Tensor | None = None,
    *,
    alpha_snippet: float = 0.0,
    alpha_video: float = 0.0,
    weight: float = 0.0,
) -> Total:
    """Eq. 1 and 11: the terms of the recordings become the batch's loss.

    Args:
        discriminative: (B,) terms of L_Dis. counted: (B,), those that its mean is over.
        snippet: (B,) terms of L_DS, and valid: (B,) bool, those that its mean is over; None: 0.
        video: scalar, L_DV; None: 0. other: scalar, of another method; None: 0.
        alpha_snippet, alpha_video, weight: what the last three are multiplied with; 0 leaves one out of the total,
            whatever it is.

    Returns:
        Total, of the type of ``discriminative``, float32 at least; a mean over nothing is 0. Differentiable once, to
        the terms.
    """
    discriminative = at_least_float32(discriminative)
    snippet, video, other = (None if x is None else x.to(discriminative.dtype) for x in (snippet, video, other))
    if snippet is None or valid is None:
        snippet = valid = None
    inputs = discriminative, counted, snippet, valid, video, other, alpha_snippet, alpha_video, weight
    if _library.has_kernel("total_loss", discriminative):
        return Total(*_total_loss(*inputs))
    _check_total(*inputs)
    return total_loss_reference(*inputs)


def total_loss_reference(
    discriminative: Tensor,
    counted: Tensor,
    snippet: Tensor | None,
    valid: Tensor | None,
    video: Tensor | None,
    other: Tensor | None,
    alpha_snippet: float,
    alpha_video: float,
    weight: float,
) -> Total:
    """:func:`total_loss` in plain PyTorch, on any device."""
    zero = discriminative.new_zeros(())
    dis = mean_of(discriminative, counted)
    snip = zero if snippet is None or valid is None else mean_of(snippet, valid)
    video, other = zero if video is None else video, zero if other is None else other
    total = dis
    for factor, term in ((alpha_snippet, snip), (alpha_video, video), (weight, other)):
        if factor != 0:  # NaN * 0 would be NaN
            total = total + factor * term
    return Total(total, dis, snip, video, other)


def mean_of(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of ``values`` (B,) where ``counted``, in plain PyTorch; 0 where nothing is."""
    counted = counted > 0
    return torch.where(counted, values, 0).sum() / counted.sum().clamp(min=1)


def update_reference(reference: Tensor, background: Tensor, valid: Tensor, momentum: float) -> None:
    """x_ref after a batch: momentum x_ref + (1 - momentum) times the mean of its background embeddings (below Eq. 8).

    Args:
        reference: (D,), changed in place, without gradient; half precision is computed in float32.
        background: (B, D), of which those with ``valid`` (B,) bool count; without any, x_ref stays.
    """
    kept = reference.detach()  # the same memory and version counter
    wide = at_least_float32(kept)
    background = background.detach().to(wide.dtype)
    if _library.has_kernel("update_reference", wide):
        _update_reference(wide, background, valid, momentum)
    else:
        _check_reference(wide, background, valid, momentum)
        wide = update_reference_reference(wide, background, valid, momentum)
    if wide is not kept:
        kept.copy_(wide)


def update_reference_reference(reference: Tensor, background: Tensor, valid: Tensor, momentum: float) -> Tensor:
    """What :func:`update_reference` makes of x_ref, in plain PyTorch, on any device."""
    mean = torch.where(valid[:, None], background, 0).sum(0) / valid.sum().clamp(min=1)
    return torch.where(valid.any(), torch.lerp(mean, reference, momentum), reference)


def _check_factors(
    pooled: Tensor, labels: Tensor, counted: Tensor, probability_floor: float, peak_share: float, per_class: bool
) -> None:
    check_shape("video_factors", "pooled", pooled, "B, C")
    check_computed("video_factors", "pooled", pooled)
    check_same("video_factors", "pooled", pooled, "labels", labels)
    check_counted("video_factors", counted, pooled)
    check_numbers("video_factors", peak_share=peak_share)
    check_floor("video_factors", probability_floor)


def _factors(native: Native, pooled: Tensor, labels: Tensor, counted: Tensor, *options: float) -> tuple[Tensor, Tensor]:
    out = _factors_fake(pooled)
    inputs = *_native.contiguous(pooled, labels), _native.plain_lengths(counted)
    native("video_factors", pooled, *inputs, *pooled.shape, *options, *out)
    return out


def _factors_fake(pooled: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    b, c = pooled.shape
    return pooled.new_empty(c, b), pooled.new_empty(b, c)


def _factors_setup_context(ctx, inputs, output) -> None:
    pooled, _, _, ctx.probability_floor, ctx.peak_share, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(pooled)


def _factors_backward(ctx, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None, None, None]:
    gradient = None
    if grad is not None:
        gradient = _video_factors_backward(grad, *ctx.saved_tensors, ctx.probability_floor, ctx.peak_share)
    return gradient, None, None, None, None, None


def _check_factors_gradient(grad: Tensor, pooled: Tensor, probability_floor: float, peak_share: float) -> None:
    where = "video_factors_backward"
    check_shape(where, "pooled", pooled, "B, C")
    check_computed(where, "pooled", pooled)
    check_like(where, "grad", grad, (pooled.shape[1], pooled.shape[0]), pooled.dtype, pooled.device)
    check_numbers(where, peak_share=peak_share)
    check_floor(where, probability_floor)


def _factors_gradient(native: Native, grad: Tensor, pooled: Tensor, *options: float) -> Tensor:
    out = pooled.new_empty(pooled.shape)
    native("video_factors_backward", pooled, *_native.contiguous(grad, pooled), *pooled.shape, *options, out)
    return out


def _factors_gradient_fake(grad: Tensor, pooled: Tensor, *_: float) -> Tensor:
    return pooled.new_empty(pooled.shape)


def _check_total(
    discriminative: Tensor,
    counted: Tensor,
    snippet: Tensor | None,
    valid: Tensor | None,
    video: Tensor | None,
    other: Tensor | None,
    alpha_snippet: float,
    alpha_video: float,
    weight: float,
) -> None:
    check_shape("total_loss", "discriminative", discriminative, "B")
    check_computed("total_loss", "discriminative", discriminative)
    check_counted("total_loss", counted, discriminative)
    dtype, device = discriminative.dtype, discriminative.device
    if snippet is not None or valid is not None:
        check_like("total_loss", "snippet", snippet, discriminative.shape, dtype, device)
        check_like("total_loss", "valid", valid, discriminative.shape, torch.bool, device)
    if video is not None:
        check_like("total_loss", "video", video, (), dtype, device)
    if other is not None:
        check_like("total_loss", "other", other, (), dtype, device)
    check_numbers("total_loss", alpha_snippet=alpha_snippet, alpha_video=alpha_video, weight=weight)


def _total(
    native: Native,
    discriminative: Tensor,
    counted: Tensor,
    snippet: Tensor | None,
    valid: Tensor | None,
    video: Tensor | None,
    other: Tensor | None,
    *weights: float,
) -> tuple[Tensor, ...]:
    out, rest = _total_fake(discriminative), _native.contiguous(snippet, valid, video, other)
    inputs = discriminative.contiguous(), _native.plain_lengths(counted), *rest
    native("total_loss", discriminative, *inputs, len(discriminative), *weights, *out)
    return out


def _total_fake(discriminative: Tensor, *_: object) -> tuple[Tensor, ...]:
    return tuple(discriminative.new_empty(()) for _ in range(5))


def _total_setup_context(ctx, inputs, output) -> None:
    _, counted, snippet, valid, video, other, *ctx.weights = inputs
    ctx.terms = [x is not None for x in (snippet, video, other)]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(counted, valid)


def _total_backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if all(grad is None for grad in grads):
        return (None,) * 9
    dis, snippet, video, other = _total_loss_backward(*grads, *ctx.saved_tensors, ctx.terms, ctx.weights)
    with_snippet, with_video, with_other = ctx.terms
    return (
        dis,
        None,
        snippet if with_snippet else None,
        None,
        video.view(()) if with_video else None,
        other.view(()) if with_other else None,
        *(None,) * 3,
    )


# `terms`: whether there are a snippet, a video and another term.


def _check_total_gradient(
    to_total: Tensor | None,
    to_mean: Tensor | None,
    to_snippet: Tensor | None,
    to_video: Tensor | None,
    to_other: Tensor | None,
    counted: Tensor,
    valid: Tensor | None,
    terms: list[bool],
    weights: list[float],
) -> None:
    where = "total_loss_backward"
    check_shape(where, "counted", counted, "B")
    check_counted(where, counted, counted)
    grads = [x for x in (to_total, to_mean, to_snippet, to_video, to_other) if x is not None]
    if not grads or len(terms) != 3 or len(weights) != 3:
        raise InputError(f"{where}: expected a gradient, and three terms and weights")
    check_computed(where, "the gradient", grads[0])
    for grad in grads:
        check_like(where, "a gradient", grad, (), grads[0].dtype, counted.device)
    if terms[0]:
        check_like(where, "valid", valid, counted.shape, torch.bool, counted.device)


def _total_gradient(
    native: Native,
    to_total: Tensor | None,
    to_mean: Tensor | None,
    to_snippet: Tensor | None,
    to_video: Tensor | None,
    to_other: Tensor | None,
    counted: Tensor,
    valid: Tensor | None,
    terms: list[bool],
    weights: list[float],
) -> tuple[Tensor, ...]:
    grads = to_total, to_mean, to_snippet, to_video, to_other
    out = _total_gradient_fake(*grads, counted, valid, terms, weights)
    inputs = *grads, _native.plain_lengths(counted), *_native.contiguous(valid), len(counted), *weights
    native("total_loss_backward", out[0], *inputs, *_present(out))
    return out


def _present(gradients: tuple[Tensor, ...]) -> list[Tensor | None]:
    """A null pointer for a term that there is not."""
    return [gradients[0], *(x if len(x) else None for x in gradients[1:])]


def _total_gradient_fake(
    to_total: Tensor | None,
    to_mean: Tensor | None,
    to_snippet: Tensor | None,
    to_video: Tensor | None,
    to_other: Tensor | None,
    counted: Tensor,
    valid: Tensor | None,
    terms: list[bool],
    weights: list[float],
) -> tuple[Tensor, ...]:
    like = next(x for x in (to_total, to_mean, to_snippet, to_video, to_other) if x is not None)
    b = len(counted)
    sizes = (size if there_is else 0 for size, there_is in zip((b, 1, 1), terms, strict=True))
    return like.new_empty(b), *(like.new_empty(size) for size in sizes)


def _check_reference(reference: Tensor, background: Tensor, valid: Tensor, momentum: float) -> None:
    check_shape("update_reference", "background", background, "B, D")
    check_computed("update_reference", "background", background)
    b, d = background.shape
    check_like("update_reference", "reference", reference, (d,), background.dtype, background.device)
    check_like("update_reference", "valid", valid, (b,), torch.bool, background.device)
    check_numbers("update_reference", momentum=momentum)
    if reference.requires_grad:
        raise InputError("update_reference: reference requires a gradient, which this change has not; detach it")


def _reference(native: Native, reference: Tensor, background: Tensor, valid: Tensor, momentum: float) -> None:
    updated = reference.contiguous()
    native("update_reference", updated, updated, *_native.contiguous(background, valid), *background.shape, momentum)
    if updated is reference:
        torch.autograd.graph.increment_version(reference)
    else:
        reference.copy_(updated)


_video_factors = _library.register(
    "video_factors(Tensor pooled, Tensor labels, Tensor counted, float probability_floor, float peak_share,"
    " bool per_class) -> (Tensor p, Tensor y)",
    check=_check_factors,
    kernel=_factors,
    fake=_factors_fake,
    setup_context=_factors_setup_context,
    backward=_factors_backward,
    autocast=torch.float32,
)
_video_factors_backward = _library.register(
    "video_factors_backward(Tensor grad, Tensor pooled, float probability_floor, float peak_share) -> Tensor",
    check=_check_factors_gradient,
    kernel=_factors_gradient,
    fake=_factors_gradient_fake,
    backward=_library.refuse_double_backward,
)
_total_loss = _library.register(
    "total_loss(Tensor discriminative, Tensor counted, Tensor? snippet, Tensor? valid, Tensor? video, Tensor? other,"
    " float alpha_snippet, float alpha_video, float weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_check_total,
    kernel=_total,
    fake=_total_fake,
    setup_context=_total_setup_context,
    backward=_total_backward,
    autocast=torch.float32,
)
_total_loss_backward = _library.register(
    "total_loss_backward(Tensor? to_total, Tensor? to_mean, Tensor? to_snippet, Tensor? to_video, Tensor? to_other,"
    " Tensor counted, Tensor? valid, bool[] terms, float[] weights) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check_total_gradient,
    kernel=_total_gradient,
    fake=_total_gradient_fake,
    backward=_library.refuse_double_backward,
)
_update_reference = _library.register(
    "update_reference(Tensor(a!) reference, Tensor background, Tensor valid, float momentum) -> ()",
    check=_check_reference,
    kernel=_reference,
    fake=lambda *_: None,
)
