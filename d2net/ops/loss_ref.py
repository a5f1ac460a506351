"""The loss of a batch in plain PyTorch, for any device, with the types of its inputs, settings and results.

:mod:`d2net.equations` has the same as the paper writes it, one recording at a time.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from d2net.ops.attention_pool import attention_pool_ref
from d2net.ops.bottom_up_attention import bottom_up_attention_ref
from d2net.ops.checks import within
from d2net.ops.condition_number import joint_log_condition_number_ref
from d2net.ops.packed import packed, packed_extents, padded
from d2net.ops.snippet_pdmi import snippet_pdmi_ref
from d2net.ops.tcam_pool import class_max, tcam_pool_ref

FG, BG = 0, 1  # rows of x (2, B, D) and of valid (2, B): foreground, background
# The pairs of Eq. 3 are fb, fg and bg, in this order: which embedding of a recording meets which of its partner.
OWN, OTHER = [FG, FG, BG], [BG, FG, BG]


class LossSettings(NamedTuple):
    """A recipe's values, and which parts of the loss are on: ``LossSettings`` of csrc/loss.h, in the same order."""

    topk_divisor: float = 8  # p is the mean of the ceil(length / topk_divisor) largest activations
    min_snippets: float = 1  # shorter recordings do not count
    skip_unlabelled: float = False  # recordings without a label do not count
    # Eq. 4; with `separate` it has the weights of Eq. 3, else they are 0
    classify: float = False
    separate: float = False
    beta: float = 2.0
    gamma: float = 0.01
    probability_floor: float = 1e-6
    mean_over_classes: float = False
    balanced: float = False  # the terms of positive classes are multiplied by C
    # x_fg and x_bg of Eq. 2
    embed: float = False
    threshold: float = 0.5
    background_threshold: float = 0.5
    mean_embeddings: float = False
    # x_ref
    update: float = False
    momentum: float = 0.9
    lowest_attention: float = False  # moves x_ref towards each recording's snippet of lowest attention, not its x_bg
    # lambda' of Eq. 8 (score); L_DS of Eq. 9 (snippet) and its weight
    score: float = False
    snippet: float = False
    alpha_snippet: float = 0.0
    fg_threshold: float = 0.5
    bg_threshold: float = 0.5
    own_classes: float = False
    snippet_per_class: float = False
    entry_floor: float = 0.0
    rank_tol: float = 1e-5
    # L_DV of Eq. 10 and its weight
    video: float = False
    alpha_video: float = 0.0
    peak_share: float = -1.0  # p at or below this fraction of its maximum becomes 0; negative: p stays as it is
    video_per_class: float = False


class LossInputs(NamedTuple):
    """A batch: padded, or packed where there are ``offsets``; then (B, T, ...) are (N, ...) here and in the result.

    ``separate`` needs either ``keys`` or ``partner``.

    Attributes:
        tcam: (B, T, C).
        embeddings: (B, T, D); None where no part needs them.
        lengths: (B,), or None (all T).
        labels: (B, C), above 0 where a recording has the class.
        x_ref: (D,), for ``update`` and ``score``.
        keys: (3, B) float32 random numbers, one row for each of w_fb, w_fg and w_bg of Eq. 3. They give the recordings
            an order; each is paired with the next one that has the other embedding, the first coming after the last.
        partner: (3, B) int64, the recording that x~ comes from in w_fb, w_fg and w_bg. The weight is 0 where the index
            is not one of 0 ... B - 1.
        source: (B,) int64, the recording that x_fg of w_fb comes from. None: the recording itself; then the weight is 0
            where it is its own partner.
        offsets: (B+1,), the row that each recording begins at, and the end; None: padded. See :mod:`d2net.ops.packed`.
    """

    tcam: Tensor
    embeddings: Tensor | None
    lengths: Tensor | None
    labels: Tensor
    x_ref: Tensor | None = None
    keys: Tensor | None = None
    partner: Tensor | None = None
    source: Tensor | None = None
    offsets: Tensor | None = None


class LossResult(NamedTuple):
    """The loss and what it was computed from. Where a part is off, its scalar is 0 and its tensor is empty.

    Attributes:
        total: scalar, discriminative + alpha_snippet * snippet + alpha_video * video.
        discriminative: scalar, L_Dis.
        snippet: scalar, L_DS.
        video: scalar, L_DV.
        attention: (B, T), top-down.
        pooled: (B, C), the scores p.
        x: (2, B, D), x_fg and x_bg; 0 where a recording has none.
        counted: (B,) int64, the lengths of the recordings that count; 0 for the others.
        scores: (B, T), lambda' of Eq. 8.
        valid: (2, B) bool, whether a recording has an x_fg and an x_bg.
        x_ref: (D,), after the update.
        workspace: bytes that the backward reads; empty in plain PyTorch.
    """

    total: Tensor
    discriminative: Tensor
    snippet: Tensor
    video: Tensor
    attention: Tensor
    pooled: Tensor
    x: Tensor
    counted: Tensor
    scores: Tensor
    valid: Tensor
    x_ref: Tensor
    workspace: Tensor


def d2net_loss_ref(inputs: LossInputs, settings: LossSettings, max_length: int = 0) -> LossResult:
    """:func:`d2net.ops.loss.d2net_loss` without checks. Only the embeddings may have another dtype than the rest."""
    if inputs.offsets is not None:
        return _packed_ref(inputs, inputs.offsets, settings, max_length)
    tcam, embeddings, lengths, labels, x_ref, keys, partner, source, _ = inputs
    b, t = tcam.shape[:2]
    zero, none = tcam.new_zeros(()), tcam.new_empty(0)
    counted = counted_lengths(tcam, lengths, labels, settings)
    attention, pooled = tcam_pool_ref(tcam, counted, divisor=int(settings.topk_divisor))
    x, valid, scores, new_x_ref = none, none.bool(), none, none
    if embeddings is not None and settings.embed:
        thresholds = settings.threshold, settings.background_threshold, bool(settings.mean_embeddings)
        with nullcontext() if settings.separate else torch.no_grad():
            x_fg, x_bg, *has = attention_pool_ref(embeddings, attention, counted, *thresholds)
            x, valid = torch.stack((x_fg, x_bg)), torch.stack(has)

    discriminative = zero
    if settings.classify:
        weights = tcam.new_zeros(3, b)
        if settings.separate:
            if keys is not None:
                partner = different_partners(keys, valid)
            assert partner is not None
            weights = separation_weights(x, valid, partner, source, settings.gamma)
        discriminative = mean_of(discriminative_terms(pooled, labels, counted, weights, settings), counted)

    if embeddings is not None and x_ref is not None and settings.update:
        background = x[BG].detach()
        if settings.lowest_attention and t:
            background = embeddings.detach()[torch.arange(b, device=tcam.device), lowest_snippet(attention, counted)]
            background = background.to(tcam.dtype)
        x_ref = new_x_ref = moved_x_ref(x_ref, background, valid[BG], settings.momentum)
    if embeddings is not None and x_ref is not None and settings.score:
        scores = bottom_up_attention_ref(embeddings.detach(), x_ref, counted)

    snippet = video = zero
    if settings.snippet:
        seen = attention
        if settings.own_classes:
            seen = own_class_attention(attention, tcam, scores, labels, settings.fg_threshold)
        terms, comparable = snippet_pdmi_ref(
            seen,
            scores,
            counted,
            settings.fg_threshold,
            settings.bg_threshold,
            bool(settings.snippet_per_class),
            settings.entry_floor,
            settings.rank_tol,
        )
        snippet = mean_of(terms, comparable)
    if settings.video and pooled.numel():
        p, y = video_factors(pooled, labels, counted, settings)
        video = joint_log_condition_number_ref(p[None], y[None])[0]

    total = discriminative
    for weight, term in ((settings.alpha_snippet, snippet), (settings.alpha_video, video)):
        if weight != 0:  # 0 * NaN is NaN: a term of weight 0 is left out
            total = total + weight * term
    scalars = total, discriminative, snippet, video
    return LossResult(*scalars, attention, pooled, x, counted, scores, valid, new_x_ref, none)


def _packed_ref(inputs: LossInputs, offsets: Tensor, settings: LossSettings, max_length: int) -> LossResult:
    """The loss of the padded batch, with what has a row for every snippet packed again."""
    n = inputs.tcam.shape[0]
    _, length = packed_extents(offsets, inputs.lengths, max_length, n)
    tcam = padded(inputs.tcam, offsets, length, max_length)
    embeddings = None if inputs.embeddings is None else padded(inputs.embeddings, offsets, length, max_length)
    batch = inputs._replace(tcam=tcam, embeddings=embeddings, lengths=length, offsets=None)
    result = d2net_loss_ref(batch, settings)
    scores = packed(result.scores, offsets, length, n) if result.scores.ndim == 2 else result.scores
    return result._replace(attention=packed(result.attention, offsets, length, n), scores=scores)


def counted_lengths(tcam: Tensor, lengths: Tensor | None, labels: Tensor, settings: LossSettings) -> Tensor:
    """(B,) int64: the lengths of the recordings that count, 0 for the others."""
    b, t = tcam.shape[:2]
    if lengths is None:
        lengths = torch.full((b,), t, device=tcam.device)
    counts = lengths >= settings.min_snippets
    if settings.skip_unlabelled:
        counts = counts & (labels > 0).any(1)
    return torch.where(counts, lengths.long().clamp(0, t), 0)


def lowest_snippet(attention: Tensor, counted: Tensor) -> Tensor:
    """(B,): the snippet of the lowest attention (B, T) of every recording, T at least 1."""
    return (1 - attention.detach()).masked_fill(~within(attention, counted), -1).argmax(1)


def moved_x_ref(x_ref: Tensor, background: Tensor, valid: Tensor, momentum: float) -> Tensor:
    """x_ref (D,), moved towards the mean of ``background`` (B, D) where that is ``valid`` (B,), if it is anywhere."""
    mean = torch.where(valid[:, None], background, 0).sum(0) / valid.sum().clamp(min=1)
    return torch.where(valid.any(), momentum * x_ref + (1 - momentum) * mean, x_ref)


def different_partners(keys: Tensor, valid: Tensor) -> Tensor:
    """(3, B) int64: every recording's partner for w_fb, w_fg and w_bg of Eq. 3.

    In the order of ``keys``, the first coming after the last, it is the next recording that has the other embedding:
    an x_bg for w_fb and w_bg, an x_fg for w_fg. Where only the recording itself has one, it is its own partner; where
    none has, the partner is -1.
    """
    b = keys.shape[1]
    order = keys.argsort(dim=1, stable=True)
    # The places of those that have it, twice around, and of each place the least that is not before it.
    places = torch.where(valid[OTHER].gather(1, order).repeat(1, 2), torch.arange(2 * b, device=keys.device), 2 * b)
    at_or_after = places.flip(1).cummin(1).values.flip(1) if b else places
    following = at_or_after[:, 1 : b + 1]
    next_one = torch.where(following < 2 * b, order.gather(1, following % max(b, 1)), -1)
    return torch.empty_like(order).scatter_(1, order, next_one)


def separation_weights(x: Tensor, valid: Tensor, partner: Tensor, source: Tensor | None, gamma: float) -> Tensor:
    """(3, B): w_fb, w_fg, w_bg of Eq. 3; 0 where one of the two embeddings does not exist."""
    _, b, d = x.shape
    own = torch.arange(b, device=x.device).expand(3, b)
    first = own if source is None else torch.stack((source, *own[1:]))
    usable = (partner >= 0) & (partner < b) & (first >= 0) & (first < b)
    if source is None:
        usable = usable & (partner != own)
    first, partner = torch.where(usable, first, 0), torch.where(usable, partner, 0)
    usable = usable & valid[OWN].gather(1, first) & valid[OTHER].gather(1, partner)
    unit = unit_vectors(x)
    u = unit[OWN].gather(1, first[:, :, None].expand(3, b, d))
    v = unit[OTHER].gather(1, partner[:, :, None].expand(3, b, d))
    cos_fb, cos_fg, cos_bg = (u * v).sum(2)
    weights = torch.stack((cos_fb.clamp(min=0), gamma * (1 - cos_fg), gamma * (1 - cos_bg)))
    return torch.where(usable, weights, 0)


def unit_vectors(x: Tensor) -> Tensor:
    """``x`` divided by its L2 norm over the last dimension. A zero vector stays 0 and gets gradient 0."""
    squares = x.square().sum(-1, keepdim=True)
    return x * torch.where(squares > 0, (squares + 1e-12).rsqrt(), 0)


def discriminative_terms(
    pooled: Tensor, labels: Tensor, counted: Tensor, weights: Tensor, settings: LossSettings
) -> Tensor:
    """(B,): Eq. 4 of every recording that counts, 0 for the others."""
    counts = (counted > 0)[:, None]
    # Masked before and after: the gradient of log(NaN) is NaN even where the loss is multiplied by 0.
    p = torch.where(counts, pooled, 0.5).clamp(settings.probability_floor, 1 - settings.probability_floor)
    w_fb, w_fg, w_bg = weights[:, :, None]
    positive, classes = labels > 0, max(p.shape[1], 1)
    loss = -torch.where(positive, p, 1 - p).log()
    if settings.beta != 0:
        loss = loss * (torch.where(positive, 1 - p + w_fg, p + w_bg) + w_fb) ** settings.beta
    if settings.balanced:
        loss = torch.where(positive, classes * loss, loss)
    terms = torch.where(counts, loss, 0).sum(1)
    return terms / classes if settings.mean_over_classes else terms


def own_class_attention(attention: Tensor, tcam: Tensor, scores: Tensor, labels: Tensor, fg_threshold: float) -> Tensor:
    """(B, T): ``attention``, but at pseudo-foreground snippets the maximum over the recording's own classes only.

    0 there where the recording has no class.
    """
    own = class_max(tcam.masked_fill(labels[:, None] <= 0, -1)).clamp(min=0)
    return torch.where(scores > fg_threshold, own, attention)


def video_factors(pooled: Tensor, labels: Tensor, counted: Tensor, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """P_2 (C, B) and Y_2 (B, C) of the batch's joint distribution U_2 = P_2 Y_2 (Eq. 10)."""
    p = pooled.clamp(settings.probability_floor, 1 - settings.probability_floor)
    y = torch.where((counted > 0)[:, None], labels, 0)
    size = y.sum(0) if settings.video_per_class else (counted > 0).sum()
    if settings.peak_share >= 0 and p.shape[1]:
        p = torch.where(p <= settings.peak_share * p.amax(1, keepdim=True), 0, p)
        p = p / p.sum(1, keepdim=True)
    return p.T.contiguous(), y / size.clamp(min=1)


def mean_of(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of ``values`` (B,) over the entries with ``counted`` > 0; 0 where there are none."""
    counts = counted > 0
    return torch.where(counts, values, 0).sum() / counts.sum().clamp(min=1)
