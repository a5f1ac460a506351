"""Bottom-up attention: how far every snippet is from the background, in angle (Eq. 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops import _library, _native
from d2net.ops._native import Native
from d2net.ops.checks import as_tensor, as_tensors, check_floating, check_lengths, check_like, check_shape, within
from d2net.ops.packed import as_offsets, as_padded, check_rows, packed, padded_shape
from d2net.ops.precision import product


def bottom_up_attention(
    embeddings: Tensor,
    x_ref: Tensor,
    lengths: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Foreground scores lambda'(t) = 0.5 (1 - cos(x(t), x_ref)) (Eq. 8).

    Args:
        embeddings: (B, T, D) x(t), of any magnitude.
        x_ref: (D,) background reference, the running mean of background embeddings.
        lengths: (B,) int64, or None (all T).
        offsets: (B+1,) int64 of a packed batch, or None. Recording b has the rows of embeddings (N, D) from offsets[b]
            on, and the result is (N,), 0 in gap rows; see :mod:`d2net.ops.packed`.
        max_length: of a packed batch, an upper bound of the lengths; None: N. Longer recordings are cut.

    Returns:
        (B, T) in [0, 1], in the dtype of the embeddings, at least float32. 0.5 past a length and where either vector is
        zero; NaN propagates within its snippet. Differentiable once with respect to embeddings and x_ref, with
        gradient 0 where a vector is zero.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or offsets that are wrong (see
            :func:`~d2net.ops.packed.as_offsets`).
    """
    embeddings, x_ref = as_tensors("bottom_up_attention", embeddings=embeddings, x_ref=x_ref)
    lengths = None if lengths is None else as_tensor("bottom_up_attention", "lengths", lengths, embeddings)
    check_floating("bottom_up_attention", "x_ref", x_ref)
    x_ref = x_ref.to(_native.accumulator(embeddings.dtype))
    offsets, t = as_offsets("bottom_up_attention", offsets, max_length, embeddings)
    if _library.has_kernel("bottom_up_attention", embeddings):
        return _bottom_up_attention(embeddings, x_ref, lengths, offsets, t)[0]
    _check(embeddings, x_ref, lengths, offsets, t)
    if offsets is None:
        return bottom_up_attention_ref(embeddings, x_ref, lengths)
    lengths, (x,) = as_padded(offsets, lengths, t, embeddings)
    return packed(bottom_up_attention_ref(x, x_ref, lengths), offsets, lengths, embeddings.shape[0])


def bottom_up_attention_ref(embeddings: Tensor, x_ref: Tensor, lengths: Tensor | None) -> Tensor:
    """:func:`bottom_up_attention` in plain PyTorch, on any device, without checks; x_ref in float32 or float64."""
    # Past a length, and everywhere if x_ref is zero, the result is 0.5 whatever the embeddings hold, NaN too.
    unused = ~within(embeddings, lengths) | ~x_ref.any()
    x = embeddings.to(x_ref.dtype).masked_fill(unused[:, :, None], 0)
    x_ref = x_ref.masked_fill(unused.all(), 0)

    def scaled(v: Tensor) -> Tensor:
        # The cosine does not depend on the scale; this one keeps squares within the range of the dtype.
        largest = v.detach().abs().amax(-1, keepdim=True) if v.shape[-1] else v.new_ones(())
        return v / torch.where(largest == 0, 1, largest)

    x, x_ref = scaled(x), scaled(x_ref)
    norm = torch.linalg.vector_norm(x, dim=2) * torch.linalg.vector_norm(x_ref)
    cosine = torch.where(unused | (norm == 0), 0, product(x, x_ref) / torch.where(norm == 0, 1, norm))
    return 0.5 * (1 - cosine.clamp(-1, 1))


def _check(embeddings: Tensor, x_ref: Tensor, lengths: Tensor | None, offsets: Tensor | None, t: int) -> None:
    check_rows("bottom_up_attention", "embeddings", embeddings, "B, T, D", offsets, t)
    check_lengths("bottom_up_attention", lengths, embeddings, offsets=offsets)
    _check_vectors("bottom_up_attention", embeddings, x_ref)


def _check_vectors(operator: str, embeddings: Tensor, x_ref: Tensor) -> None:
    check_floating(operator, "embeddings", embeddings)
    if x_ref.shape != embeddings.shape[-1:]:
        raise InputError(
            f"{operator}: x_ref has shape {tuple(x_ref.shape)}, expected ({embeddings.shape[-1]},), "
            "the width of the embeddings"
        )
    if x_ref.device != embeddings.device:
        raise InputError(
            f"{operator}: embeddings are on {embeddings.device} but x_ref is on {x_ref.device}; move one of them"
        )
    if x_ref.dtype is not _native.accumulator(embeddings.dtype):
        raise InputError(
            f"{operator}: x_ref has dtype {x_ref.dtype}, which does not go with {embeddings.dtype} embeddings"
        )


def _forward(
    native: Native, x: Tensor, x_ref: Tensor, lengths: Tensor | None, offsets: Tensor | None, t: int
) -> tuple[Tensor, Tensor]:
    out = _fake(x, x_ref, lengths, offsets, t)
    sizes = padded_shape(x, offsets, t)
    native("bottom_up_attention", x, (x, x_ref, lengths, *sizes, *out, offsets, x.shape[0]))
    return out


def _fake(x, x_ref, lengths, offsets, t) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1]
    if offsets is None:
        return x_ref.new_empty(rows), x_ref.new_empty(rows)
    return x_ref.new_zeros(rows), x_ref.new_zeros(rows)


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], inputs[1], *output)


def _backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_x_ref = ctx.needs_input_grad[:2]
    grad_x, grad_x_ref = _bottom_up_attention_backward(*ctx.saved_tensors, grad, need_x, need_x_ref)
    return grad_x if need_x else None, grad_x_ref if need_x_ref else None, *(None,) * 3


def _check_backward(
    x: Tensor, x_ref: Tensor, attention: Tensor, norms: Tensor, grad: Tensor, need_x: bool, need_x_ref: bool
) -> None:
    where = "bottom_up_attention_backward"
    if x.ndim != 2:  # (N, D), of a packed batch
        check_shape(where, "x", x, "B, T, D")
    _check_vectors(where, x, x_ref)
    shape, device = x.shape[:-1], x.device
    check_like(where, "attention", attention, shape, x_ref.dtype, device)
    check_like(where, "norms", norms, shape, x_ref.dtype, device)
    check_like(where, "grad", grad, shape, x_ref.dtype, device)


def _gradients(
    x: Tensor,
    x_ref: Tensor,
    attention: Tensor,
    norms: Tensor,
    grad: Tensor,
    need_x: bool,
    need_x_ref: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to x (B, T, D) or (N, D) and x_ref, empty where not needed.

    With the unit vectors u of x and r of x_ref, d cos / dx = (r - cos u) / |x| and
    d cos / dx_ref = (u - cos r) / |x_ref|.
    """
    if x.ndim == 2:
        rows = x[None], x_ref, attention[None], norms[None], grad[None]
        grad_x, grad_x_ref = _gradients(*rows, need_x, need_x_ref)
        return grad_x[0] if need_x else grad_x, grad_x_ref
    unused = norms == 0
    norms = norms.masked_fill(unused, 1)[:, :, None]
    cosine = (1 - 2 * attention)[:, :, None]
    grad = (-0.5 * grad).masked_fill(unused, 0)[:, :, None]
    unit = x.to(x_ref.dtype).masked_fill(unused[:, :, None], 0).div_(norms)
    length = torch.linalg.vector_norm(x_ref, dtype=torch.float64)
    r = (x_ref / torch.where(length == 0, 1, length)).to(x_ref.dtype).masked_fill(unused.all(), 0)
    grad_x, grad_x_ref = x.new_empty(0), x_ref.new_empty(0)
    if need_x_ref:
        # The same sum twice: PyTorch splits a sum with a single result by the number of threads, which changes bits.
        products = (grad * unit).expand(-1, -1, 2 if unit.shape[2] == 1 else -1)
        along = (grad * cosine).expand(-1, -1, 2).sum((0, 1))[0]
        total = products.sum((0, 1))[: unit.shape[2]] - along * r
        grad_x_ref = (total / torch.where(length == 0, 1, length)).to(x_ref.dtype)
        grad_x_ref.masked_fill_(unused.all(), 0)
    if need_x:
        grad_x = unit.mul_(-cosine).add_(r).mul_(grad / norms).masked_fill_(unused[:, :, None], 0).to(x.dtype)
    return grad_x, grad_x_ref


def _gradients_fake(x, x_ref, attention, norms, grad, need_x, need_x_ref) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), x_ref.new_empty(x_ref.shape if need_x_ref else 0)


_bottom_up_attention = _library.register(
    "bottom_up_attention(Tensor x, Tensor x_ref, Tensor? lengths, Tensor? offsets, SymInt max_length)"
    " -> (Tensor, Tensor)",
    check=_check,
    kernel=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_bottom_up_attention_backward = _library.register(
    "bottom_up_attention_backward(Tensor x, Tensor x_ref, Tensor attention, Tensor norms, Tensor grad, "
    "bool need_x, bool need_x_ref) -> (Tensor, Tensor)",
    check=_check_backward,
    cpu=_gradients,
    cuda=_gradients,
    fake=_gradients_fake,
    backward=_library.refuse_double_backward,
)
