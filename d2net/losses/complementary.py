"""Losses of W-TALC and CoLA, as their papers define them, to add to the loss of D2-Net."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2net.errors import InputError
from d2net.fields import Range
from d2net.losses._common import Rows, check_known, check_labels, check_same_rows, setting
from d2net.ops.checks import as_tensors, check_floating, within
from d2net.ops.loss_ref import mean_of, unit_vectors
from d2net.ops.precision import at_least_float32, product
from d2net.recipes import Count, Weight, Width

Temperature = Annotated[float, Range(1e-6)]  # below, float32 does not tell one cosine from the next


class CoActivitySimilarity(nn.Module):
    """W-TALC's co-activity similarity loss (CASL).

    Paul, Roy, Roy-Chowdhury: "W-TALC: Weakly-supervised Temporal Activity Localization and Classification", ECCV 2018.
    For every class and every pair of recordings that have it: the mean features where the class is active (H, weighted
    with the softmax of its logits over time) should be closer to each other, by a margin, than to those where it is not
    active (L, weighted with (1 - softmax) / (length - 1)). In cosine distance d:

        1/2 max(0, d(H_m, H_n) - d(H_m, L_n) + margin) + 1/2 max(0, d(H_m, H_n) - d(L_m, H_n) + margin)

    Args:
        margin: of the ranking hinge (the paper's delta).
    """

    def __init__(self, *, margin: float = 0.5) -> None:
        super().__init__()
        self.margin: float = setting(self, Weight, margin=margin)

    def forward(
        self,
        embeddings: Tensor,
        logits: Tensor,
        lengths: Tensor | None,
        labels: Tensor,
        *,
        offsets: Tensor | None = None,
        max_length: int | None = None,
    ) -> Tensor:
        """Mean over the pairs of a class, then over the classes that have a pair; 0 if no class has one.

        Args:
            embeddings: (B, T, D); (N, D) with ``offsets``.
            logits: (B, T, C) class logits, or (N, C).
            lengths: (B,) int64, or None (all T).
            labels: (B, C) multi-hot.
            offsets: (B+1,) int64, the first row of each recording in a packed batch (:mod:`d2net.losses`).
            max_length: Of a packed batch, an upper bound of the lengths; None: see :mod:`d2net.losses`.

        Returns:
            A scalar.

        Raises:
            InputError: shapes or devices that do not fit.
        """
        logits, embeddings, labels = as_tensors(
            "CoActivitySimilarity", logits=logits, embeddings=embeddings, labels=labels
        )
        check_same_rows("CoActivitySimilarity", offsets, logits=(logits, "C"), embeddings=(embeddings, "D"))
        rows = Rows.of("CoActivitySimilarity", logits, lengths, offsets, max_length)
        check_labels("CoActivitySimilarity", logits, labels, rows)
        check_known("CoActivitySimilarity", labels, logits, rows)
        lengths, counts = rows.padded_lengths(logits), rows.present(logits)
        logits, embeddings = rows.padded(logits), rows.padded(embeddings)
        if logits.shape[1] == 0:
            return at_least_float32(embeddings).sum() + at_least_float32(logits).sum()
        has = (labels > 0) & counts[:, None]
        paired = has & (has.sum(0) >= 2)
        padding = ~within(logits, lengths)[:, :, None]
        dtype = torch.promote_types(at_least_float32(logits).dtype, at_least_float32(embeddings).dtype)
        # What is in no pair is set to 0: NaN there would reach the gradients of the pairs.
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
    Learning", CVPR 2021.

    - Easy actions are the snippets of largest actionness, easy background those of smallest.
    - Hard snippets lie at the borders of the regions whose actionness is above the recording's median. Hard actions are
      removed by erosion with ``outer`` snippets but not with ``inner``; hard background is added by dilation with
      ``outer`` but not with ``inner``. Of both, those of largest actionness are taken.
    - InfoNCE draws the mean hard action to the mean easy action and away from every easy background snippet, and the
      mean hard background to the mean easy background and away from every easy action.

    Args:
        temperature: of InfoNCE.
        easy_divisor: one snippet in so many is an easy action, and one an easy background; at least one.
        hard_divisor: one snippet in so many is a hard action, and one a hard background; at least one.
        inner: width of the smaller structuring element, in snippets (the paper's m).
        outer: width of the larger structuring element, in snippets (the paper's M).
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

    def forward(
        self,
        embeddings: Tensor,
        actionness: Tensor,
        lengths: Tensor | None,
        *,
        offsets: Tensor | None = None,
        max_length: int | None = None,
    ) -> Tensor:
        """The sum of both directions, each a mean over the recordings that have such hard snippets.

        Args:
            embeddings: (B, T, D); (N, D) with ``offsets``.
            actionness: (B, T), or (N,); it only selects, so it gets no gradient.
            lengths: (B,) int64, or None (all T).
            offsets: (B+1,) int64, the first row of each recording in a packed batch (:mod:`d2net.losses`).
            max_length: Of a packed batch, an upper bound of the lengths; None: see :mod:`d2net.losses`.

        Returns:
            A scalar.

        Raises:
            InputError: shapes or devices that do not fit.
        """
        embeddings, actionness = as_tensors("SnippetContrast", embeddings=embeddings, actionness=actionness)
        check_floating("SnippetContrast", "embeddings", embeddings)
        check_floating("SnippetContrast", "actionness", actionness)
        check_same_rows("SnippetContrast", offsets, embeddings=(embeddings, "D"), actionness=(actionness, ""))
        rows = Rows.of("SnippetContrast", embeddings, lengths, offsets, max_length)
        lengths = rows.padded_lengths(embeddings)
        embeddings, actionness = rows.padded(embeddings), rows.padded(actionness)
        mask = within(embeddings, lengths)
        if embeddings.shape[1] == 0:
            return at_least_float32(embeddings).sum()
        with torch.no_grad():
            selected = self._select(at_least_float32(actionness), mask)  # (4, B, T)
        size = selected.sum(2)
        usable = (size[:2] > 0) & (size[2:] > 0)
        # Recordings that do not count are set to 0: NaN in them would reach the gradients of the others.
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
    """Binary dilation of (B, T) over time; an even width adds one snippet more before a region than after it."""
    padded = F.pad(x.float(), ((width - 1) // 2, width // 2))
    return F.max_pool1d(padded[:, None], width, stride=1)[:, 0] > 0


def _eroded(x: Tensor, width: int) -> Tensor:
    """Binary erosion of (B, T), with background beyond the ends; its element is that of :func:`_dilated`, mirrored."""
    padded = F.pad((~x).float(), (width // 2, (width - 1) // 2), value=1.0)
    return F.max_pool1d(padded[:, None], width, stride=1)[:, 0] == 0
