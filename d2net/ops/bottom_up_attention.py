"""Bottom-up attention: how unlike the background every snippet is (Eq. 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops import _library, _native
from d2net.ops._native import Native
from d2net.ops.checks import as_tensor, as_tensors, check_floating, check_lengths, check_like, check_shape, within
from d2net.ops.precision import product


def bottom_up_attention(embeddings: Tensor, reference: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Foreground scores lambda'(t) = 0.5 (1 - cos(x(t), x_ref)) (Eq. 8).

    Args:
        embeddings: (B, T, D) x(t), of any magnitude.
        reference: (D,) the running background reference x_ref.
        lengths: (B,) int64, or None (all T).

    Returns:
        (B, T) in [0, 1], in the type of the embeddings, at least float32: 0.5 where either vector is zero and past a
        length; NaN propagates within its snippet. Differentiable once, in embeddings and reference, with gradient 0
        where a vector is zero.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """
    embeddings, reference = as_tensors("bottom_up_attention", embeddings=embeddings, reference=reference)
    lengths = None if lengths is None else as_tensor("bottom_up_attention", "lengths", lengths, embeddings)
    check_floating("bottom_up_attention", "reference", reference)
    reference = reference.to(_native.accumulator(embeddings.dtype))
    if _library.has_kernel("bottom_up_attention", embeddings):
        return _bottom_up_attention(embeddings, reference, lengths)[0]
    _check(embeddings, reference, lengths)
    return bottom_up_attention_ref(embeddings, reference, lengths)


def bottom_up_attention_ref(embeddings: Tensor, reference: Tensor, lengths: Tensor | None) -> Tensor:
    """:func:`bottom_up_attention` in plain PyTorch, on any device, without checks; reference in float32 or float64."""
    # Past a length, and of a reference that is zero, nothing depends on either, NaN or not.
    unused = ~within(embeddings, lengths) | ~reference.any()
    x = embeddings.to(reference.dtype).masked_fill(unused[:, :, None], 0)
    reference = reference.masked_fill(unused.all(), 0)

    def scaled(v: Tensor) -> Tensor:
        # The cosine does not depend on it, and no square leaves the range of the type.
        largest = v.detach().abs().amax(-1, keepdim=True) if v.shape[-1] else v.new_ones(())
        return v / torch.where(largest == 0, 1, largest)

    x, reference = scaled(x), scaled(reference)
    norm = torch.linalg.vector_norm(x, dim=2) * torch.linalg.vector_norm(reference)
    cosine = torch.where(unused | (norm == 0), 0, product(x, reference) / torch.where(norm == 0, 1, norm))
    return 0.5 * (1 - cosine.clamp(-1, 1))


def _check(
    embeddings: Tensor, reference: Tensor, lengths: Tensor | None, operator: str = "bottom_up_attention"
) -> None:
    check_shape(operator, "embeddings", embeddings, "B, T, D")
    check_floating(operator, "embeddings", embeddings)
    check_lengths(operator, lengths, embeddings)
    if reference.shape != embeddings.shape[2:]:
        raise InputError(
            f"{operator}: reference has shape {tuple(reference.shape)}, expected ({embeddings.shape[2]},), "
            "the width of the embeddings"
        )
    if reference.device != embeddings.device:
        raise InputError(
            f"{operator}: embeddings are on {embeddings.device} but reference on {reference.device}; move one of them"
        )
    if reference.dtype is not _native.accumulator(embeddings.dtype):
        raise InputError(
            f"{operator}: reference has dtype {reference.dtype}, which does not go with {embeddings.dtype} embeddings"
        )


def _forward(native: Native, x: Tensor, reference: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    out = _fake(x, reference, lengths)
    native("bottom_up_attention", x, (x, reference, lengths, *x.shape, *out))
    return out


def _fake(x, reference, lengths) -> tuple[Tensor, Tensor]:
    return reference.new_empty(x.shape[:2]), reference.new_empty(x.shape[:2])


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], inputs[1], *output)


def _backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_reference = ctx.needs_input_grad[:2]
    grad_x, grad_reference = _bottom_up_attention_backward(*ctx.saved_tensors, grad, need_x, need_reference)
    return grad_x if need_x else None, grad_reference if need_reference else None, None


def _check_backward(
    x: Tensor, reference: Tensor, attention: Tensor, norms: Tensor, grad: Tensor, need_x: bool, need_reference: bool
) -> None:
    where = "bottom_up_attention_backward"
    _check(x, reference, None, where)
    shape, device = x.shape[:2], x.device
    check_like(where, "attention", attention, shape, reference.dtype, device)
    check_like(where, "norms", norms, shape, reference.dtype, device)
    check_like(where, "grad", grad, shape, reference.dtype, device)


def _gradients(
    x: Tensor,
    reference: Tensor,
    attention: Tensor,
    norms: Tensor,
    grad: Tensor,
    need_x: bool,
    need_reference: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to x and reference, empty where not needed. With unit vectors u of x and r of reference,
    d cos / dx = (r - cos u) / |x| and d cos / dreference = (u - cos r) / |reference|."""
    unused = norms == 0
    norms = norms.masked_fill(unused, 1)[:, :, None]
    cosine = (1 - 2 * attention)[:, :, None]
    grad = (-0.5 * grad).masked_fill(unused, 0)[:, :, None]
    unit = x.to(reference.dtype).masked_fill(unused[:, :, None], 0).div_(norms)
    length = torch.linalg.vector_norm(reference, dtype=torch.float64)
    r = (reference / torch.where(length == 0, 1, length)).to(reference.dtype).masked_fill(unused.all(), 0)
    grad_x, grad_reference = x.new_empty(0), reference.new_empty(0)
    if need_reference:
        # Twice the same sum: PyTorch cuts one that gives a single number into as many parts as there are threads.
        products = (grad * unit).expand(-1, -1, 2 if unit.shape[2] == 1 else -1)
        along = (grad * cosine).expand(-1, -1, 2).sum((0, 1))[0]
        total = products.sum((0, 1))[: unit.shape[2]] - along * r
        grad_reference = (total / torch.where(length == 0, 1, length)).to(reference.dtype)
        grad_reference.masked_fill_(unused.all(), 0)
    if need_x:
        grad_x = unit.mul_(-cosine).add_(r).mul_(grad / norms).masked_fill_(unused[:, :, None], 0).to(x.dtype)
    return grad_x, grad_reference


def _gradients_fake(x, reference, attention, norms, grad, need_x, need_reference) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), reference.new_empty(reference.shape if need_reference else 0)


_bottom_up_attention = _library.register(
    "bottom_up_attention(Tensor x, Tensor reference, Tensor? lengths) -> (Tensor, Tensor)",
    check=_check,
    kernel=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_bottom_up_attention_backward = _library.register(
    "bottom_up_attention_backward(Tensor x, Tensor reference, Tensor attention, Tensor norms, Tensor grad, "
    "bool need_x, bool need_reference) -> (Tensor, Tensor)",
    check=_check_backward,
    cpu=_gradients,
    cuda=_gradients,
    fake=_gradients_fake,
    backward=_library.refuse_double_backward,
)
