"""Snippet-level pDMI of every recording of a batch (Eq. 9)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from d2net.ops import _library
from d2net.ops._native import Native
from d2net.ops.checks import (
    as_number,
    as_tensor,
    as_tensors,
    check_choice,
    check_computed,
    check_floating,
    check_lengths,
    check_like,
    check_numbers,
    check_same,
    within,
)
from d2net.ops.condition_number import check_rank_tol, log_condition_number_ref
from d2net.ops.packed import as_offsets, as_padded, blank_like, check_rows, padded_shape
from d2net.ops.precision import at_least_float32


class SnippetPDMI(NamedTuple):
    """L_DS of every recording, and whether it has one.

    Attributes:
        loss: (B,) log condition numbers.
        valid: (B,) bool, whether the recording has pseudo-foreground and pseudo-background.
    """

    loss: Tensor
    valid: Tensor


def snippet_pdmi(
    attention: Tensor,
    scores: Tensor,
    lengths: Tensor | None = None,
    *,
    fg_threshold: float = 0.5,
    bg_threshold: float = 0.5,
    normalization: Literal["joint", "per_class"] = "joint",
    entry_floor: float = 0.0,
    rank_tol: float = 1e-5,
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> SnippetPDMI:
    """Log condition number of U_1 = P_1 Y_1 (Eq. 9) for every recording.

    Snippets with scores > fg_threshold are pseudo-foreground, those with scores < bg_threshold pseudo-background. The
    scores only select, so they get no gradient.

    Args:
        attention: (B, T) top-down attention lambda in [0, 1].
        scores: (B, T) bottom-up foreground scores lambda' (Eq. 8); converted to the dtype of ``attention``.
        lengths: (B,) int64, or None (all T). Later snippets never matter.
        fg_threshold: snippets with scores above it are pseudo-foreground.
        bg_threshold: snippets with scores below it are pseudo-background.
        normalization: "joint" divides by z = n_f + n_b as in the paper; "per_class" each column by its own count.
        entry_floor: entries of U_1 below it are raised to it, and get no gradient.
        rank_tol: singular values of U_1 up to this count as zero.
        offsets: (B+1,) int64 of a packed batch, or None. Recording b has the entries of attention (N,) and scores (N,)
            from offsets[b] on; see :mod:`d2net.ops.packed`.
        max_length: of a packed batch, an upper bound of the lengths; None: N. Longer recordings are cut.

    Returns:
        SnippetPDMI(loss (B,), valid (B,)); loss is 0 where not valid, and where U_1 has rank 1, that is, its smaller
        singular value is at most ``rank_tol``. NaN where the attention of a selected snippet is NaN or Inf; a snippet
        whose score is NaN is not selected. Sums are in float64; half precision gives a float32 loss, also under
        autocast. Differentiable once with respect to ``attention``.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, an unknown normalization, a setting that is no number,
            rank_tol < 0, or offsets that are wrong (see :func:`~d2net.ops.packed.as_offsets`).
    """
    attention, scores = as_tensors("snippet_pdmi", attention=attention, scores=scores)
    lengths = None if lengths is None else as_tensor("snippet_pdmi", "lengths", lengths, attention)
    check_choice("snippet_pdmi: normalization", normalization, "joint", "per_class")
    check_floating("snippet_pdmi", "attention", attention)
    fg_threshold = as_number("snippet_pdmi", "fg_threshold", fg_threshold)
    bg_threshold = as_number("snippet_pdmi", "bg_threshold", bg_threshold)
    entry_floor = as_number("snippet_pdmi", "entry_floor", entry_floor)
    rank_tol = as_number("snippet_pdmi", "rank_tol", rank_tol)
    attention = at_least_float32(attention)
    scores = scores.detach().to(attention.dtype)
    options = fg_threshold, bg_threshold, normalization == "per_class", entry_floor, rank_tol
    offsets, t = as_offsets("snippet_pdmi", offsets, max_length, attention)
    if _library.has_kernel("snippet_pdmi", attention):
        loss, valid, _ = _snippet_pdmi(attention, scores, lengths, *options, offsets, t)
        return SnippetPDMI(loss, valid)
    _check(attention, scores, lengths, *options, offsets, t)
    lengths, (attention, scores) = as_padded(offsets, lengths, t, attention, scores)
    return snippet_pdmi_ref(attention, scores, lengths, *options)


def snippet_pdmi_ref(
    attention: Tensor,
    scores: Tensor,
    lengths: Tensor | None,
    fg_threshold: float,
    bg_threshold: float,
    per_class: bool,
    entry_floor: float,
    rank_tol: float,
) -> SnippetPDMI:
    """:func:`snippet_pdmi` in plain PyTorch, on any device, without checks."""
    mask = within(attention, lengths)
    columns, counts = [], []
    for selected in (mask & (scores > fg_threshold), mask & (scores < bg_threshold)):
        lam = torch.where(selected, attention, 0)
        columns.append(torch.stack([lam.sum(1), torch.where(selected, 1 - attention, 0).sum(1)], 1))
        counts.append(selected.sum(1))
    count = torch.stack(counts, 1)  # (B, 2): n_f, n_b
    valid = (count > 0).all(1)
    size = count if per_class else count.sum(1, keepdim=True)
    u = torch.stack(columns, 2) / size.clamp(min=1)[:, None, :]
    u = torch.where(valid[:, None, None], u.clamp(min=entry_floor) if entry_floor > 0 else u, 0)
    return SnippetPDMI(log_condition_number_ref(u, rank_tol=rank_tol), valid)


def _check(
    attention: Tensor,
    scores: Tensor,
    lengths: Tensor | None,
    fg_threshold: float,
    bg_threshold: float,
    per_class: bool,
    entry_floor: float,
    rank_tol: float,
    offsets: Tensor | None,
    t: int,
) -> None:
    check_rows("snippet_pdmi", "attention", attention, "B, T", offsets, t)
    check_computed("snippet_pdmi", "attention", attention)
    check_same("snippet_pdmi", "attention", attention, "scores", scores)
    check_lengths("snippet_pdmi", lengths, attention, offsets=offsets)
    check_numbers("snippet_pdmi", fg_threshold=fg_threshold, bg_threshold=bg_threshold, entry_floor=entry_floor)
    check_rank_tol("snippet_pdmi", rank_tol)


def _forward(
    native: Native,
    attention: Tensor,
    scores: Tensor,
    lengths: Tensor | None,
    fg_threshold: float,
    bg_threshold: float,
    per_class: bool,
    entry_floor: float,
    rank_tol: float,
    offsets: Tensor | None,
    t: int,
) -> tuple[Tensor, Tensor, Tensor]:
    out = _fake(attention, offsets, t)
    settings = fg_threshold, bg_threshold, entry_floor, rank_tol, per_class
    inputs = attention, scores, lengths, *padded_shape(attention, offsets, t)
    native("snippet_pdmi", attention, (*settings, *inputs, *out, None, None, offsets, attention.shape[0]))
    return out


def _fake(attention: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    b = padded_shape(attention, *rest[-2:])[0]
    return attention.new_empty(b), attention.new_empty(b, dtype=torch.bool), attention.new_empty(b, 2)


def _setup_context(ctx, inputs, output) -> None:
    attention, scores, lengths, ctx.fg_threshold, ctx.bg_threshold, *_, offsets, ctx.t = inputs
    _, valid, weights = output
    ctx.mark_non_differentiable(valid, weights)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(attention, weights, scores, lengths, offsets)


def _backward(ctx, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grad_attention = None
    if grad is not None:
        attention, *saved, offsets = ctx.saved_tensors
        grad_attention = _snippet_pdmi_backward(grad, *saved, ctx.fg_threshold, ctx.bg_threshold, offsets, ctx.t)
        grad_attention = _library.differentiable_once(grad_attention, attention)
    return grad_attention, *(None,) * 9


def _check_backward(
    grad: Tensor,
    weights: Tensor,
    scores: Tensor,
    lengths: Tensor | None,
    fg_threshold: float,
    bg_threshold: float,
    offsets: Tensor | None,
    t: int,
) -> None:
    where = "snippet_pdmi_backward"
    check_rows(where, "scores", scores, "B, T", offsets, t)
    check_computed(where, "scores", scores)
    b, dtype, device = padded_shape(scores, offsets, t)[0], scores.dtype, scores.device
    check_like(where, "grad", grad, (b,), dtype, device)
    check_like(where, "weights", weights, (b, 2), dtype, device)
    check_lengths(where, lengths, scores, offsets=offsets)
    check_numbers(where, fg_threshold=fg_threshold, bg_threshold=bg_threshold)


def _gradient(
    native: Native,
    grad: Tensor,
    weights: Tensor,
    scores: Tensor,
    lengths: Tensor | None,
    fg_threshold: float,
    bg_threshold: float,
    offsets: Tensor | None,
    t: int,
) -> Tensor:
    grad_attention, none = blank_like(scores, offsets), None
    inputs = fg_threshold, bg_threshold, 0.0, 0.0, 0, none, scores, lengths, *padded_shape(scores, offsets, t)
    results = none, none, weights, grad, grad_attention
    native("snippet_pdmi_backward", weights, (*inputs, *results, offsets, scores.shape[0]))
    return grad_attention


def _gradient_fake(grad, weights, scores, *_) -> Tensor:
    return weights.new_empty(scores.shape)


# `weights` (B, 2): the gradient with respect to the attention of each pseudo-foreground snippet (the same for all of a
# recording), and of each pseudo-background snippet.
_snippet_pdmi = _library.register(
    "snippet_pdmi(Tensor attention, Tensor scores, Tensor? lengths, float fg_threshold, float bg_threshold, "
    "bool per_class, float entry_floor, float rank_tol, Tensor? offsets, SymInt max_length)"
    " -> (Tensor loss, Tensor valid, Tensor weights)",
    check=_check,
    kernel=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=torch.float32,
)
_snippet_pdmi_backward = _library.register(
    "snippet_pdmi_backward(Tensor grad, Tensor weights, Tensor scores, Tensor? lengths, float fg_threshold, "
    "float bg_threshold, Tensor? offsets, SymInt max_length) -> Tensor",
    check=_check_backward,
    kernel=_gradient,
    fake=_gradient_fake,
    backward=_library.refuse_double_backward,
)
