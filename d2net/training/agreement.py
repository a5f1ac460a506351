"""Whether lambda' agrees with lambda, so that L_D can begin when its pseudo-labels mean something."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from d2net.losses.whole_batch import WholeBatch
from d2net.ops.bottom_up_attention import bottom_up_attention
from d2net.ops.checks import within
from d2net.ops.loss_ref import LossSettings, counted_lengths
from d2net.ops.packed import packed_extents, padded
from d2net.ops.tcam_pool import class_max
from d2net.recipes import Recipe

MEMORY = 0.98  # of the running mean, an iteration: it covers the last 50 or so
CHANCE = 0.5


class Agreement:
    """The running agreement of lambda' (Eq. 8) with lambda, and whether it has been enough for L_D to begin.

    :func:`agreement` says what is measured, in every step, on the device. The host looks at it once in a while, where
    it waits for the device anyway. The mean begins at chance, so a single lucky batch starts nothing.

    Args:
        recipe: With ``training.denoising_agreement``.
        device: Where to train.

    Attributes:
        running: scalar on the device, the running mean.
        began: The iterations done when it first was enough; None: it has not been yet.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        assert recipe.training.denoising_agreement is not None
        self.needed: float = recipe.training.denoising_agreement
        self._start = recipe.training.denoising_start
        self._thresholds = recipe.loss.snippet_fg_threshold, recipe.loss.snippet_bg_threshold
        self._counts = LossSettings(min_snippets=recipe.loss.min_snippets, skip_unlabelled=recipe.loss.skip_unlabelled)
        self.running = torch.full((), CHANCE, device=device)
        self.began: int | None = None

    @torch.no_grad()
    def add(
        self,
        tcam: Tensor,
        embeddings: Tensor,
        lengths: Tensor,
        labels: Tensor,
        x_ref: Tensor,
        *,
        offsets: Tensor | None = None,
        max_length: int | None = None,
        whole: WholeBatch | None = None,
    ) -> None:
        """Move the running mean by one batch; the recordings that do not count in the loss do not count here.

        Args:
            tcam: (B, T, C); (N, C) with ``offsets``.
            embeddings: (B, T, D), or (N, D).
            lengths: (B,) int64.
            labels: (B, C) multi-hot.
            x_ref: (D,).
            offsets: (B+1,) int64, the first row of each recording in a packed batch (:mod:`d2net.losses`).
            max_length: Of a packed batch, an upper bound of the lengths; None: N.
            whole: The batch that these recordings are a part of, where others lie on other ranks; ``max_length`` is
                then the same on all of them.
        """
        scores = bottom_up_attention(embeddings.detach(), x_ref, lengths, offsets=offsets, max_length=max_length)
        if offsets is not None:
            most = tcam.shape[0] if max_length is None else max_length
            tcam, scores = (padded(x, offsets, lengths, most) for x in (tcam, scores))
            lengths = packed_extents(offsets, lengths, most, embeddings.shape[0])[1]
        counted = counted_lengths(tcam, lengths, labels, self._counts)
        attention = class_max(tcam.detach())
        if whole is not None:
            attention, scores, counted = whole.gather(attention, scores, counted)
        now = agreement(attention, scores, counted, *self._thresholds)
        self.running.mul_(MEMORY).add_(now, alpha=1 - MEMORY)

    def look(self, iteration: int) -> bool:
        """Whether L_D begins now, for good. Waits for the device.

        Args:
            iteration: Iterations done.
        """
        if self.began is not None or iteration < self._start or self.running.item() < self.needed:
            return False
        self.began = iteration
        return True

    def state(self) -> dict[str, float]:
        """For the log; waits for the device."""
        return {"agreement": self.running.item()} | ({} if self.began is None else {"began": self.began})

    def tensors(self) -> dict[str, Tensor]:
        """The state, for a checkpoint; "began" is -1 where it has not."""
        began = torch.tensor(-1 if self.began is None else self.began)
        return {"agreement": self.running, "began": began}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`tensors`."""
        self.running.copy_(saved["agreement"])
        began = int(saved["began"])
        self.began = None if began < 0 else began


def agreement(
    attention: Tensor, scores: Tensor, lengths: Tensor, fg_threshold: float = 0.5, bg_threshold: float = 0.5
) -> Tensor:
    """How well lambda ranks the pseudo-foreground of lambda' above its pseudo-background: an AUC, over a whole batch.

    It is the probability that of two snippets of the batch, one with lambda' above ``fg_threshold`` and one with
    lambda' below ``bg_threshold``, the former has the larger lambda; ties count half. 1: lambda' never contradicts the
    order of lambda. 0.5, chance: it tells nothing about lambda, also where lambda is the same everywhere, or where
    lambda' calls everything background (or everything foreground). Below: it is swapped. It has no threshold on lambda,
    which early in training lies on one side of any.

    Args:
        attention: (B, T) top-down attention lambda.
        scores: (B, T) bottom-up attention lambda'.
        lengths: (B,) int64; what lies past them does not count.
        fg_threshold: snippets with lambda' above it are pseudo-foreground.
        bg_threshold: snippets with lambda' below it are pseudo-background.

    Returns:
        A scalar in [0, 1], float32. The pairs are counted in whole numbers, so that no order of sums matters.
    """
    attention = attention.float()
    mask = within(attention, lengths)
    foreground, background = mask & (scores > fg_threshold), mask & (scores < bg_threshold)
    below = attention.masked_fill(~background, float("inf")).flatten().sort().values
    values = attention.masked_fill(~foreground, -1).flatten()  # below all, so that they win and tie with nothing
    wins = torch.searchsorted(below, values).sum() + torch.searchsorted(below, values, right=True).sum()
    pairs = foreground.sum() * background.sum()
    return torch.where(pairs > 0, wins / (2 * pairs).clamp(min=1), CHANCE).float()
