"""The loss of a batch: what goes in, what comes out, and all of it in plain PyTorch, part by part, for any device.

One recording at a time, as the paper has it: :mod:`d2net.equations`.
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
from d2net.ops.snippet_pdmi import snippet_pdmi_ref
from d2net.ops.two_stream_tcam import class_max, tcam_pool_ref


class LossSettings(NamedTuple):
    """What a recipe says and which parts are on; ``LossSettings`` of csrc/loss.h, in its order."""

    topk_divisor: float = 8  # p is the mean of the ceil(length / topk_divisor) largest activations
    min_snippets: float = 1  # shorter recordings do not count ...
    skip_unlabelled: float = False  # ... nor do those without a label
    # Eq. 4, with the weights of Eq. 3 (separate) or 0
    classify: float = False
    separate: float = False
    beta: float = 2.0
    gamma: float = 0.01
    probability_floor: float = 1e-6
    mean_over_classes: float = False
    balanced: float = False  # positive classes count C times
    # x_fg and x_bg of Eq. 2
    embed: float = False
    threshold: float = 0.5
    background_threshold: float = 0.5
    mean_embeddings: float = False
    # x_ref
    update: float = False
    momentum: float = 0.9
    lowest_attention: float = False  # it moves towards snippets of the lowest attention, not towards x_bg
    # lambda' of Eq. 8; Eq. 9 and its weight
    score: float = False
    snippet: float = False
    alpha_snippet: float = 0.0
    fg_threshold: float = 0.5
    bg_threshold: float = 0.5
    own_classes: float = False
    snippet_per_class: float = False
    entry_floor: float = 0.0
    rank_tol: float = 1e-5
    # Eq. 10 and its weight
    video: float = False
    alpha_video: float = 0.0
    peak_share: float = -1.0  # below 0: none
    video_per_class: float = False


class LossInputs(NamedTuple):
    """A batch.

    Attributes:
        tcam: (B, T, C). embeddings: (B, T, D); None where no part needs them. lengths: (B,), or None (all T).
        labels: (B, C), above 0 where a recording has the class. x_ref: (D,), for ``update`` and ``score``.
        keys: (3, B) float32 random numbers: ``separate`` pairs every recording with the next in a cycle through those
            that have the embedding in question, in the order of keys. Or else
        partner: (3, B) int64, whose x~ stands in w_fb, w_fg and w_bg of Eq. 3; none where it is not one of 0 ... B - 1.
        source: (B,) int64, whose x_fg stands in w_fb; None: the recording's own, and nothing is paired with itself.
    """

    tcam: Tensor
    embeddings: Tensor | None
    lengths: Tensor | None
    labels: Tensor
    x_ref: Tensor | None = None
    keys: Tensor | None = None
    partner: Tensor | None = None
    source: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, T, C, D."""
        return *self.tcam.shape, 0 if self.embeddings is None else self.embeddings.shape[2]


class LossResult(NamedTuple):
    """What the loss is made of; empty tensors of parts that are off.

    Attributes:
        total, discriminative, snippet, video: scalars, 0 of what is off; the total is with the weights of ``settings``.
        attention: (B, T), top-down. pooled: (B, C), scores p. x: (2, B, D), x_fg and x_bg, 0 where there is none.
        counted: (B,) int64, lengths of the recordings that count, 0 of others. scores: (B, T), lambda' of Eq. 8.
        valid: (2, B) bool, whether there is an x_fg and an x_bg. x_ref: (D,), updated. workspace: the backward's.
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


def d2net_loss_ref(inputs: LossInputs, settings: LossSettings) -> LossResult:
    """:func:`d2net.ops.loss.d2net_loss` without checks; all inputs in one type, but for embeddings."""
    tcam, embeddings, lengths, labels, x_ref, keys, partner, source = inputs
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
        background = x[1].detach()
        if settings.lowest_attention and t:
            lowest = (1 - attention.detach()).masked_fill(~within(tcam, counted), -1).argmax(1)
            background = embeddings.detach()[torch.arange(b, device=tcam.device), lowest].to(tcam.dtype)
        mean = torch.where(valid[1][:, None], background, 0).sum(0) / valid[1].sum().clamp(min=1)
        moved = settings.momentum * x_ref + (1 - settings.momentum) * mean
        x_ref = new_x_ref = torch.where(valid[1].any(), moved, x_ref)
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
        if weight != 0:  # NaN * 0 would be NaN
            total = total + weight * term
    scalars = total, discriminative, snippet, video
    return LossResult(*scalars, attention, pooled, x, counted, scores, valid, new_x_ref, none)


def counted_lengths(tcam: Tensor, lengths: Tensor | None, labels: Tensor, settings: LossSettings) -> Tensor:
    """(B,) int64 lengths of the recordings that count, 0 of others."""
    b, t = tcam.shape[:2]
    if lengths is None:
        lengths = torch.full((b,), t, device=tcam.device)
    counts = lengths >= settings.min_snippets
    if settings.skip_unlabelled:
        counts = counts & (labels > 0).any(1)
    return torch.where(counts, lengths.long().clamp(0, t), 0)


def different_partners(keys: Tensor, valid: Tensor) -> Tensor:
    """(3, B) int64: the next recording in a cycle through all, those with a foreground and those with a background
    embedding; of the others: themselves."""
    takes_part = torch.stack((torch.ones_like(valid[0]), *valid))
    place = torch.arange(keys.shape[1], device=keys.device)
    order = keys.argsort(dim=1, stable=True)
    order = order.gather(1, (~takes_part).gather(1, order).byte().argsort(dim=1, stable=True))
    count = takes_part.sum(1, keepdim=True)
    following = torch.where(place < count, (place + 1) % count.clamp(min=1), place)
    return torch.empty_like(order).scatter_(1, order, order.gather(1, following))


def separation_weights(x: Tensor, valid: Tensor, partner: Tensor, source: Tensor | None, gamma: float) -> Tensor:
    """(3, B): w_fb, w_fg, w_bg of Eq. 3; 0 where one of the two embeddings does not exist."""
    _, b, d = x.shape
    own = torch.arange(b, device=x.device).expand(3, b)
    first = own if source is None else torch.stack((source, *own[1:]))
    usable = (partner >= 0) & (partner < b) & (first >= 0) & (first < b)
    if source is None:
        usable = usable & (partner != own)
    first, partner = torch.where(usable, first, 0), torch.where(usable, partner, 0)
    usable = usable & valid[[0, 0, 1]].gather(1, first) & valid[[1, 0, 1]].gather(1, partner)
    unit = unit_vectors(x)
    u = unit[[0, 0, 1]].gather(1, first[:, :, None].expand(3, b, d))
    v = unit[[1, 0, 1]].gather(1, partner[:, :, None].expand(3, b, d))
    cosine = (u * v).sum(2)
    return torch.where(usable, torch.cat((cosine[:1].clamp(min=0), gamma * (1 - cosine[1:]))), 0)


def unit_vectors(x: Tensor) -> Tensor:
    """``x`` over its length in the last dimension; 0, without gradient, for a zero vector."""
    squares = x.square().sum(-1, keepdim=True)
    return x * torch.where(squares > 0, (squares + 1e-12).rsqrt(), 0)


def discriminative_terms(
    pooled: Tensor, labels: Tensor, counted: Tensor, weights: Tensor, settings: LossSettings
) -> Tensor:
    """(B,): Eq. 4 of every recording, 0 of those that do not count."""
    counts = (counted > 0)[:, None]
    # Masked first and last: the gradient of log(NaN) would be NaN even times 0.
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
    """(B, T): of pseudo-foreground the maximum over the recording's own classes, 0 without one."""
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
    """Mean of ``values`` (B,) where ``counted`` is above 0; 0 where nothing is."""
    counts = counted > 0
    return torch.where(counts, values, 0).sum() / counts.sum().clamp(min=1)
