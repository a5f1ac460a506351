"""L_Dis from pooled scores and embeddings: who is compared with whom (Eq. 3), and Eq. 4."""

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


class Pairs(NamedTuple):
    """For each recording, whose embeddings give its weights w_fb, w_fg, w_bg of Eq. 3 (the rows).

    Attributes:
        partner: (3, B) int64, the recording of x~; the weight is 0 where it is not one of 0 ... B - 1.
        source: (B,) int64, the recording of x in w_fb; None: the recording itself.
    """

    partner: Tensor
    source: Tensor | None = None


def different_partners(keys: Tensor, valid_fg: Tensor, valid_bg: Tensor) -> Tensor:
    """Pair every recording with another: the next in a cycle through all that have the embedding in question.

    Args:
        keys: (3, B) float32 random numbers, which order the cycles; NaN comes last.
        valid_fg, valid_bg: (B,) bool, whether a recording has a foreground and a background embedding.

    Returns:
        (3, B) int64 ``partner`` of :class:`Pairs`; -1 for a recording without another.
    """
    if _library.has_kernel("different_partners", keys):
        return _different_partners(keys, valid_fg, valid_bg)
    _check_partners(keys, valid_fg, valid_bg)
    return different_partners_reference(keys, valid_fg, valid_bg)


def different_partners_reference(keys: Tensor, valid_fg: Tensor, valid_bg: Tensor) -> Tensor:
    """:func:`different_partners` in plain PyTorch, on any device."""
    takes_part = torch.stack((torch.ones_like(valid_fg), valid_fg, valid_bg))
    place = torch.arange(keys.shape[1], device=keys.device)
    order = keys.argsort(dim=1, stable=True)
    order = order.gather(1, (~takes_part).gather(1, order).byte().argsort(dim=1, stable=True))
    count = takes_part.sum(1, keepdim=True)
    following = torch.where(place < count, (place + 1) % count.clamp(min=1), place)
    partner = torch.empty_like(order).scatter_(1, order, order.gather(1, following))
    has_x, has_other = torch.stack((valid_fg, valid_fg, valid_bg)), torch.stack((valid_bg, valid_fg, valid_bg))
    usable = takes_part & (partner != place) & has_x & has_other.gather(1, partner)
    return torch.where(usable, partner, -1)


def discriminative_terms(
    pooled: Tensor,
    labels: Tensor,
    counted: Tensor,
    embeddings: tuple[Tensor, Tensor] | None = None,
    pairs: Pairs | None = None,
    *,
    beta: float = 2.0,
    gamma: float = 0.01,
    probability_floor: float = 1e-6,
    mean: bool = False,
    balanced: bool = False,
) -> Tensor:
    """Eq. 4 of every recording, with the weights of Eq. 3.

    Args:
        pooled: (B, C) scores p in [0, 1], clamped to [probability_floor, 1 - probability_floor].
        labels: (B, C) multi-hot.
        counted: (B,) bool, or integers of which those above 0 count, such as lengths; others give 0.
        embeddings: x_fg and x_bg (B, D). pairs: of whom. None: the weights are 0, which leaves the focal loss, and with
            beta = 0 cross-entropy.
        beta: focusing parameter. gamma: weight of 1 - cosine.
        mean: over the classes, not their sum. balanced: positive terms count C times.

    Returns:
        (B,) in float32 at least. Differentiable once, to ``pooled`` and ``embeddings``.
    """
    pooled = at_least_float32(pooled)
    check_real("discriminative_terms", "labels", labels)
    labels = labels.detach().to(pooled.dtype)
    x_fg, x_bg = (None, None) if embeddings is None else (x.to(pooled.dtype) for x in embeddings)
    partner, source = (None if x is None else x.to(torch.int64) for x in (pairs or (None, None)))
    inputs = pooled, labels, counted, x_fg, x_bg, partner, source, beta, gamma, probability_floor, mean, balanced
    if _library.has_kernel("discriminative_terms", pooled):
        return _discriminative_terms(*inputs)[0]
    _check(*inputs)
    return discriminative_terms_reference(*inputs)


def discriminative_terms_reference(
    pooled: Tensor,
    labels: Tensor,
    counted: Tensor,
    x_fg: Tensor | None,
    x_bg: Tensor | None,
    partner: Tensor | None,
    source: Tensor | None,
    beta: float,
    gamma: float,
    probability_floor: float,
    mean: bool,
    balanced: bool,
) -> Tensor:
    """:func:`discriminative_terms` in plain PyTorch, on any device."""
    counted = counted > 0
    # Masked first and last: the gradient of log(NaN) would be NaN even times 0.
    p = torch.where(counted[:, None], pooled, 0.5).clamp(probability_floor, 1 - probability_floor)
    classes = max(p.shape[1], 1)
    is_positive = labels > 0
    loss = -torch.where(is_positive, p, 1 - p).log()
    if beta != 0:
        miss = torch.where(is_positive, 1 - p, p)
        if x_fg is not None and x_bg is not None and partner is not None:
            w_fb, w_fg, w_bg = _weights(x_fg, x_bg, partner, source, gamma)
            miss = miss + torch.where(is_positive, (w_fg + w_fb)[:, None], (w_bg + w_fb)[:, None])
        loss = loss * miss**beta
    if balanced:
        loss = torch.where(is_positive, classes * loss, loss)
    terms = torch.where(counted[:, None], loss, 0).sum(1)
    return terms / classes if mean else terms


def _weights(x_fg: Tensor, x_bg: Tensor, partner: Tensor, source: Tensor | None, gamma: float) -> Tensor:
    """(3, B): w_fb, w_fg, w_bg of Eq. 3."""
    b, d = x_fg.shape
    usable = (partner >= 0) & (partner < b)
    if source is not None:
        in_range = (source >= 0) & (source < b)
        usable = torch.cat((usable[:1] & in_range, usable[1:]))
        source = torch.where(in_range, source, 0)
    fg, bg = unit_vectors(torch.stack((x_fg, x_bg)))
    others = torch.stack((bg, fg, bg)).gather(1, torch.where(usable, partner, 0)[:, :, None].expand(-1, -1, d))
    from_fg = fg if source is None else fg.gather(0, source[:, None].expand(-1, d))
    cosine = (torch.stack((from_fg, fg, bg)) * others).sum(2)
    return torch.where(usable, torch.cat((cosine[:1].clamp(min=0), gamma * (1 - cosine[1:]))), 0)


def _check_partners(keys: Tensor, valid_fg: Tensor, valid_bg: Tensor) -> None:
    check_shape("different_partners", "keys", keys, "3, B")
    b, device = keys.shape[1], keys.device
    check_like("different_partners", "keys", keys, (3, b), torch.float32, device)
    check_like("different_partners", "valid_fg", valid_fg, (b,), torch.bool, device)
    check_like("different_partners", "valid_bg", valid_bg, (b,), torch.bool, device)


def unit_vectors(x: Tensor) -> Tensor:
    """``x`` over its length in the last dimension; 0, without gradient, for a zero vector."""
    squares = x.square().sum(-1, keepdim=True)
    return x * torch.where(squares > 0, (squares + 1e-12).rsqrt(), 0)


def _partners(native: Native, keys: Tensor, valid_fg: Tensor, valid_bg: Tensor) -> Tensor:
    partner = _partners_fake(keys, valid_fg, valid_bg)
    native("different_partners", keys, *_native.contiguous(keys, valid_fg, valid_bg), len(valid_fg), partner)
    return partner


def _partners_fake(keys: Tensor, valid_fg: Tensor, valid_bg: Tensor) -> Tensor:
    return keys.new_empty(keys.shape, dtype=torch.int64)


# What the backward needs: `to_pooled` (B, C), the gradient of terms[i] to pooled[i], and `saved` (8, B), empty without
# partners.


def _check(
    pooled: Tensor,
    labels: Tensor,
    counted: Tensor,
    x_fg: Tensor | None,
    x_bg: Tensor | None,
    partner: Tensor | None,
    source: Tensor | None,
    beta: float,
    gamma: float,
    probability_floor: float,
    mean: bool,
    balanced: bool,
) -> None:
    where = "discriminative_terms"
    check_shape(where, "pooled", pooled, "B, C")
    check_computed(where, "pooled", pooled)
    check_same(where, "pooled", pooled, "labels", labels)
    check_counted(where, counted, pooled)
    _check_pairs(where, pooled, x_fg, x_bg, partner, source)
    check_numbers(where, beta=beta, gamma=gamma)
    check_floor(where, probability_floor)


def _check_pairs(
    operator: str,
    like: Tensor,
    x_fg: Tensor | None,
    x_bg: Tensor | None,
    partner: Tensor | None,
    source: Tensor | None,
) -> None:
    """Embeddings and pairs of the recordings that ``like`` (B, ...) is of."""
    b, device = like.shape[0], like.device
    if x_fg is not None or partner is not None:
        if x_fg is None or x_fg.ndim != 2:
            raise InputError(f"{operator}: x_fg is missing or not (B, D)")
        check_like(operator, "x_fg", x_fg, (b, x_fg.shape[1]), like.dtype, device)
        check_like(operator, "x_bg", x_bg, x_fg.shape, like.dtype, device)
    elif x_bg is not None:
        raise InputError(f"{operator}: there is x_bg but no x_fg")
    if partner is not None:
        check_like(operator, "partner", partner, (3, b), torch.int64, device)
    if source is not None:
        check_like(operator, "source", source, (b,), torch.int64, device)


def _terms(
    native: Native,
    pooled: Tensor,
    labels: Tensor,
    counted: Tensor,
    x_fg: Tensor | None,
    x_bg: Tensor | None,
    partner: Tensor | None,
    source: Tensor | None,
    *options: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rest = _native.contiguous(x_fg, x_bg, partner, source)
    inputs = *_native.contiguous(pooled, labels), _native.plain_lengths(counted), *rest
    out = _fake(pooled, labels, counted, x_fg, x_bg, partner)
    sizes = *pooled.shape, 0 if x_fg is None else x_fg.shape[1]
    native("discriminative_terms", pooled, *inputs, *sizes, *options, *out)
    return out


def _fake(
    pooled: Tensor,
    labels: Tensor,
    counted: Tensor,
    x_fg: Tensor | None,
    x_bg: Tensor | None,
    partner: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    b, c = pooled.shape
    return pooled.new_empty(b), pooled.new_empty(b, c), pooled.new_empty(8, 0 if partner is None else b)


def _setup_context(ctx, inputs, output) -> None:
    pooled, _, _, x_fg, x_bg, partner, source, *_ = inputs
    _, to_pooled, saved = output
    ctx.mark_non_differentiable(to_pooled, saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(pooled, to_pooled, saved, x_fg, x_bg, partner, source)


def _backward(ctx, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    none = (None,) * 12
    if grad is None:
        return none
    pooled, to_pooled, saved, x_fg, x_bg, partner, source = ctx.saved_tensors
    inputs = [x for x in (pooled, x_fg, x_bg) if x is not None]
    if not (ctx.needs_input_grad[3] or ctx.needs_input_grad[4]):
        partner = None
    gradients = _terms_backward(grad, to_pooled, saved, x_fg, x_bg, partner, source)
    grad_pooled, grad_fg, grad_bg = (_library.differentiable_once(x, *inputs) for x in gradients)
    if partner is None:
        return grad_pooled, *none[1:]
    return grad_pooled, None, None, grad_fg, grad_bg, *none[5:]


def _check_backward(
    grad: Tensor,
    to_pooled: Tensor,
    saved: Tensor,
    x_fg: Tensor | None,
    x_bg: Tensor | None,
    partner: Tensor | None,
    source: Tensor | None,
) -> None:
    where = "discriminative_terms_backward"
    check_shape(where, "to_pooled", to_pooled, "B, C")
    check_computed(where, "to_pooled", to_pooled)
    b, dtype, device = to_pooled.shape[0], to_pooled.dtype, to_pooled.device
    check_like(where, "grad", grad, (b,), dtype, device)
    if partner is not None:
        check_like(where, "saved", saved, (8, b), dtype, device)
    _check_pairs(where, to_pooled, x_fg, x_bg, partner, source)


def _gradient(
    native: Native,
    grad: Tensor,
    to_pooled: Tensor,
    saved: Tensor,
    x_fg: Tensor | None,
    x_bg: Tensor | None,
    partner: Tensor | None,
    source: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = grad, to_pooled, saved, x_fg, x_bg, partner, source
    out = _gradient_fake(*inputs)
    sizes = *to_pooled.shape, out[1].shape[1]
    native("discriminative_terms_backward", grad, *_native.contiguous(*inputs), *sizes, *out)
    return out


def _gradient_fake(
    grad: Tensor,
    to_pooled: Tensor,
    saved: Tensor,
    x_fg: Tensor | None,
    x_bg: Tensor | None,
    partner: Tensor | None,
    source: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    b, d = len(to_pooled), 0 if partner is None or x_fg is None else x_fg.shape[1]
    return torch.empty_like(to_pooled), to_pooled.new_empty(b, d), to_pooled.new_empty(b, d)


_different_partners = _library.register(
    "different_partners(Tensor keys, Tensor valid_fg, Tensor valid_bg) -> Tensor",
    check=_check_partners,
    kernel=_partners,
    fake=_partners_fake,
)
_discriminative_terms = _library.register(
    "discriminative_terms(Tensor pooled, Tensor labels, Tensor counted, Tensor? x_fg, Tensor? x_bg, Tensor? partner,"
    " Tensor? source, float beta, float gamma, float probability_floor, bool mean, bool balanced)"
    " -> (Tensor terms, Tensor to_pooled, Tensor saved)",
    check=_check,
    kernel=_terms,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=torch.float32,
)
_terms_backward = _library.register(
    "discriminative_terms_backward(Tensor grad, Tensor to_pooled, Tensor saved, Tensor? x_fg, Tensor? x_bg,"
    " Tensor? partner, Tensor? source) -> (Tensor, Tensor, Tensor)",
    check=_check_backward,
    kernel=_gradient,
    fake=_gradient_fake,
    backward=_library.refuse_double_backward,
)
