"""Losses of other methods that can stand beside ours, as their papers define them: batched, on plain tensors."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2net.errors import InputError
from d2net.fields import Range
from d2net.losses._common import check_batch, check_known, present, setting
from d2net.ops.attention_pool import attention_pool
from d2net.ops.checks import as_lengths, as_tensors, check_floating, check_same, check_shape, valid_mask, within
from d2net.ops.loss_ref import mean_of, unit_vectors
from d2net.ops.precision import at_least_float32, product
from d2net.recipes import Count, Weight, Width

Temperature = Annotated[float, Range(1e-6)]  # below, float32 does not tell one cosine from the next


class UncertaintyModelingResult(NamedTuple):
    """Scalars; total = weight * magnitude + entropy, or entropy alone where the weight is 0."""

    total: Tensor
    magnitude: Tensor
    entropy: Tensor


class UncertaintyModeling(nn.Module):
    """UM's feature-magnitude and background-entropy terms.

    Lee, Wang, Lu, Byun: "Weakly-supervised Temporal Action Localization by Uncertainty Modeling", AAAI 2021.
    Pseudo-action snippets are the k = length / act_divisor of largest ||x(t)||, pseudo-background those of smallest.

        L_um = mean over recordings of (max(0, margin - ||f_act||) + ||f_bkg||)^2, f the mean embedding of the snippets
        L_be = mean over recordings and classes of -log softmax(mean logits of the pseudo-background snippets)

    Args:
        magnitude: weight of L_um beside L_be (its alpha). margin: the magnitude f_act should reach (its m).
        act_divisor, background_divisor: shares of the snippets, rounded down, at least one snippet.
    """

    def __init__(
        self,
        *,
        magnitude: float = 5e-4,
        margin: float = 100.0,
        act_divisor: int = 9,
        background_divisor: int = 4,
    ) -> None:
        super().__init__()
        self.magnitude: float = setting(self, Weight, magnitude=magnitude)
        self.margin: float = setting(self, Weight, margin=margin)
        self.act_divisor: int = setting(self, Count, act_divisor=act_divisor)
        self.background_divisor: int = setting(self, Count, background_divisor=background_divisor)

    def forward(self, embeddings: Tensor, logits: Tensor, lengths: Tensor | None) -> UncertaintyModelingResult:
        """Means over the recordings of at least two snippets: with one, it would be action and background at once.

        Args:
            embeddings: (B, T, D). logits: (B, T, C) class logits. lengths: (B,) int64 or None.

        Raises:
            InputError: shapes or devices that do not fit.
        """
        embeddings, logits = as_tensors("UncertaintyModeling", embeddings=embeddings, logits=logits)
        check_floating("UncertaintyModeling", "embeddings", embeddings)
        check_floating("UncertaintyModeling", "logits", logits)
        check_shape("UncertaintyModeling", "embeddings", embeddings, "B, T, D")
        check_shape("UncertaintyModeling", "logits", logits, "B, T, C")
        check_same("UncertaintyModeling", "embeddings", embeddings, "logits", logits, 2)
        lengths = as_lengths("UncertaintyModeling", lengths, embeddings)
        mask = within(embeddings, lengths)
        usable = mask.sum(1) >= 2
        mask = mask & usable[:, None]  # nothing of the others is read, so that NaN there reaches no gradient
        count = mask.sum(1)
        with torch.no_grad():
            norms = torch.linalg.vector_norm(at_least_float32(embeddings), dim=2)
            rank = norms.masked_fill(~mask, -1).argsort(dim=1, descending=True, stable=True).argsort(1)
            act_size, size = ((count // d).clamp(min=1) for d in (self.act_divisor, self.background_divisor))
            act = mask & (rank < act_size[:, None])
            background = mask & (rank >= (count - size)[:, None]) & ~act
            # 1 - selection is 1 for the pseudo-background, so that one operator reads the embeddings once for both.
            selection = torch.where(act, 1.0, torch.where(background, 0.0, 0.5)).to(embeddings.dtype)
        f = attention_pool(embeddings, selection, lengths, reduction="mean")
        act_norm, background_norm = torch.linalg.vector_norm(at_least_float32(torch.stack((f.x_fg, f.x_bg))), dim=2)
        magnitude = mean_of(((self.margin - act_norm).clamp(min=0) + background_norm).square(), usable)
        mean_logits = torch.where(background[:, :, None], at_least_float32(logits), 0).sum(1) / size[:, None]
        entropy = mean_of(-mean_logits.log_softmax(1).sum(1) / max(logits.shape[2], 1), usable)
        # A term of weight 0 is off, whatever it is: NaN * 0 would be NaN.
        total = self.magnitude * magnitude + entropy if self.magnitude != 0 else entropy
        return UncertaintyModelingResult(total, magnitude, entropy)


class CoActivitySimilarity(nn.Module):
    """W-TALC's co-activity similarity loss (CASL).

    Paul, Roy, Roy-Chowdhury: "W-TALC: Weakly-supervised Temporal Activity Localization and Classification", ECCV 2018.
    For every class and every pair of recordings that have it, their features where the class is active (H, weights:
    softmax of its logits over time) should be closer to each other than to those where it is not (L, weights:
    (1 - softmax) / (length - 1)), by a margin, in cosine distance d:

        1/2 max(0, d(H_m, H_n) - d(H_m, L_n) + margin) + 1/2 max(0, d(H_m, H_n) - d(L_m, H_n) + margin)

    Args:
        margin: the ranking hinge's (its delta).
    """

    def __init__(self, *, margin: float = 0.5) -> None:
        super().__init__()
        self.margin: float = setting(self, Weight, margin=margin)

    def forward(self, embeddings: Tensor, logits: Tensor, lengths: Tensor | None, labels: Tensor) -> Tensor:
        """Scalar: mean over the pairs of a class, then over the classes with a pair; 0 if none has one.

        Args:
            embeddings: (B, T, D). logits: (B, T, C) class logits. lengths: (B,) int64 or None.
            labels: (B, C) multi-hot.

        Raises:
            InputError: shapes or devices that do not fit.
        """
        logits, embeddings, labels = as_tensors(
            "CoActivitySimilarity", logits=logits, embeddings=embeddings, labels=labels
        )
        check_batch("CoActivitySimilarity", logits, embeddings, labels)
        lengths = as_lengths("CoActivitySimilarity", lengths, logits)
        check_known("CoActivitySimilarity", labels, logits, lengths)
        if logits.shape[1] == 0:
            return at_least_float32(embeddings).sum() + at_least_float32(logits).sum()
        has = (labels > 0) & present(logits, lengths)[:, None]
        paired = has & (has.sum(0) >= 2)
        padding = ~within(logits, lengths)[:, :, None]
        dtype = torch.promote_types(at_least_float32(logits).dtype, at_least_float32(embeddings).dtype)
        # Nothing is read of what is in no pair: NaN there would reach the gradients of those that are.
        logits = logits.to(dtype).masked_fill(~paired[:, None], 0)
        x = embeddings.to(dtype).masked_fill(padding | ~paired.any(1)[:, None, None], 0)
        active = logits.masked_fill(padding, torch.finfo(logits.dtype).min).softmax(1).masked_fill(padding, 0)
        others = (~padding).sum(1, keepdim=True).sub(1).clamp(min=1)
        inactive = ((1 - active) / others).masked_fill(padding, 0)
        b, c, d = logits.shape[0], logits.shape[2], x.shape[2]
        pooled = product(torch.cat((active, inactive), 2).transpose(1, 2), x)  # (B, 2C, D)
        high, low = unit_vectors(pooled).view(b, 2, c, d).permute(1, 2, 0, 3)  # (C, B, D)
        together = product(high, high.transpose(1, 2))  # (C, B, B), rows m, columns n
        apart = product(high, low.transpose(1, 2))  # H_m with L_n; L_m with H_n is its transpose
        hinge = (apart - together + self.margin).clamp(min=0)
        loss = 0.5 * (hinge + hinge.transpose(1, 2))
        pairs = (has.T[:, :, None] & has.T[:, None, :]).triu(1)
        count = pairs.sum((1, 2))
        return mean_of(torch.where(pairs, loss, 0).sum((1, 2)) / count.clamp(min=1), count > 0)


class SnippetContrast(nn.Module):
    """CoLA's snippet contrast (SniCo) loss.

    Zhang, Cao, Yang, Chen, Zou: "CoLA: Weakly-Supervised Temporal Action Localization with Snippet Contrastive
    Learning", CVPR 2021. Easy actions and easy background are the snippets of largest and smallest actionness. Hard
    ones lie at the borders of the snippets whose actionness is above its median: hard actions are lost by erosion
    with ``outer`` but not with ``inner`` snippets, hard background is gained by dilation with ``outer`` but not with
    ``inner``; of both, those of largest actionness. InfoNCE draws the mean hard action to the mean easy action and
    away from every easy background snippet, and the mean hard background the other way round.

    Args:
        temperature: of InfoNCE. easy_divisor, hard_divisor: shares of the snippets, rounded down, at least one.
        inner, outer: widths of the structuring elements (its m and M).
    """

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        easy_divisor: int = 5,
        hard_divisor: int = 20,
        inner: int = 3,
        outer: int = 6,
    ) -> None:
        super().__init__()
        self.temperature: float = setting(self, Temperature, temperature=temperature)
        self.easy_divisor: int = setting(self, Count, easy_divisor=easy_divisor)
        self.hard_divisor: int = setting(self, Count, hard_divisor=hard_divisor)
        self.inner: int = setting(self, Width, inner=inner)
        self.outer: int = setting(self, Width, outer=outer)
        if self.inner >= self.outer:
            raise InputError(
                f"{type(self).__name__}: inner is {inner} and outer {outer}; hard snippets lie between the two, so "
                "inner must be below outer"
            )

    def forward(self, embeddings: Tensor, actionness: Tensor, lengths: Tensor | None) -> Tensor:
        """Scalar: the sum of both directions, each a mean over the recordings that have such hard snippets.

        Args:
            embeddings: (B, T, D). actionness: (B, T); it only selects, so no gradient flows to it.
            lengths: (B,) int64 or None.

        Raises:
            InputError: shapes or devices that do not fit.
        """
        embeddings, actionness = as_tensors("SnippetContrast", embeddings=embeddings, actionness=actionness)
        check_floating("SnippetContrast", "embeddings", embeddings)
        check_floating("SnippetContrast", "actionness", actionness)
        check_shape("SnippetContrast", "embeddings", embeddings, "B, T, D")
        check_shape("SnippetContrast", "actionness", actionness, "B, T")
        check_same("SnippetContrast", "embeddings", embeddings, "actionness", actionness, 2)
        mask = valid_mask("SnippetContrast", embeddings, lengths)
        if embeddings.shape[1] == 0:
            return at_least_float32(embeddings).sum()
        with torch.no_grad():
            selected = self._select(at_least_float32(actionness), mask)  # (4, B, T)
        size = selected.sum(2)
        usable = (size[:2] > 0) & (size[2:] > 0)
        # Nothing is read of recordings that do not count, so that NaN there reaches no gradient.
        x = at_least_float32(embeddings).masked_fill(~(mask & usable.any(0)[:, None])[:, :, None], 0)
        mean = product(selected.transpose(0, 1).to(x.dtype), x) / size.T.clamp(min=1)[:, :, None]  # (B, 4, D)
        mean, each = unit_vectors(mean), unit_vectors(x)
        query, key = mean[:, 2:], mean[:, :2]
        positive = (query * key).sum(2, keepdim=True)  # (B, 2, 1)
        negative = product(query, each.transpose(1, 2))  # (B, 2, T)
        negative = negative.masked_fill(~selected[:2].flip(0).transpose(0, 1), -torch.inf)
        loss = -(torch.cat((positive, negative), 2) / self.temperature).log_softmax(2)[:, :, 0]
        return mean_of(loss[:, 0], usable[0]) + mean_of(loss[:, 1], usable[1])

    def _select(self, actionness: Tensor, mask: Tensor) -> Tensor:
        """(4, B, T) bool: easy action, easy background, hard action, hard background."""
        count = mask.sum(1, keepdim=True)
        ordered = actionness.masked_fill(~mask, torch.inf).sort(1).values
        middle = torch.cat(((count - 1) // 2, count // 2), 1).clamp(0, actionness.shape[1] - 1)
        above = mask & (actionness > ordered.gather(1, middle).mean(1, keepdim=True))
        easy, hard = ((count // d).clamp(min=1) for d in (self.easy_divisor, self.hard_divisor))
        regions = torch.stack(
            (
                mask,
                mask,
                _eroded(above, self.inner) & ~_eroded(above, self.outer),
                mask & _dilated(above, self.outer) & ~_dilated(above, self.inner),
            )
        )
        value = torch.stack((actionness, -actionness, actionness, actionness)).masked_fill(~regions, -torch.inf)
        rank = value.argsort(dim=2, descending=True, stable=True).argsort(2)
        return regions & (rank < torch.stack((easy, easy, hard, hard)))


def _dilated(x: Tensor, width: int) -> Tensor:
    """Binary dilation of (B, T) over time; an even element reaches one snippet farther to the past."""
    padded = F.pad(x.float(), ((width - 1) // 2, width // 2))
    return F.max_pool1d(padded[:, None], width, stride=1)[:, 0] > 0


def _eroded(x: Tensor, width: int) -> Tensor:
    """Binary erosion of (B, T), what lies beyond the ends being background; mirrors :func:`_dilated`."""
    padded = F.pad((~x).float(), (width // 2, (width - 1) // 2), value=1.0)
    return F.max_pool1d(padded[:, None], width, stride=1)[:, 0] == 0
