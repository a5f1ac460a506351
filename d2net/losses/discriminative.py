"""L_Dis: a classification loss that also separates foreground from background embeddings (Eq. 2 to 4)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from d2net.losses._common import Rows, setting, take_batch
from d2net.losses.pairing import Pairing, Pairs, have_embeddings, pair_by_permutation, pair_different, uniform
from d2net.ops.attention_pool import Pooled
from d2net.ops.loss import d2net_loss
from d2net.ops.loss_ref import LossInputs, LossSettings, counted_lengths
from d2net.ops.precision import at_least_float32
from d2net.recipes import Count, Eps, Fraction, Weight

Reduction = Literal["sum", "mean"]
PROBABILITY_FLOOR = 1e-6  # keeps log(p) and log(1 - p) finite when a float32 sigmoid saturates


class Discriminative(NamedTuple):
    """L_Dis and the embeddings of Eq. 2 that it was computed from, for instance to update an x_ref.

    Attributes:
        loss: scalar.
        embeddings: x_fg and x_bg of every recording, and whether it has them.
    """

    loss: Tensor
    embeddings: Pooled


def probabilities(pooled: Tensor, eps: float = PROBABILITY_FLOOR) -> Tensor:
    """Pooled scores p, at least in float32, clamped to [eps, 1 - eps]."""
    return at_least_float32(pooled).clamp(eps, 1 - eps)


class DiscriminativeLoss(nn.Module):
    """L_Dis: focal classification whose weights separate foreground from background embeddings (Eq. 2 to 4).

    The defaults are the paper's; docs/fidelity.md has the released code's values.

    Args:
        beta: focusing parameter (Eq. 4).
        gamma: intra-class compactness (Eq. 3).
        threshold: tau on the foreground attention (Eq. 2).
        background_threshold: tau on the background attention (Eq. 2).
        threshold_inclusive: whether a snippet exactly at tau counts.
        embedding_pooling: "sum" is Eq. 2; "mean" divides it by the sum of its weights.
        pairing: "different": x and x~ of Eq. 3 come from different recordings. "permutation": random permutations pair
            the recordings, possibly one with itself.
        topk_divisor: k of the top-k pooling is ceil(length / topk_divisor).
        probability_floor: p is clamped to [eps, 1 - eps], eps being this.
        class_reduction: of Eq. 4 over the classes.
        balance_classes: multiply the terms of positive classes by C.
    """

    def __init__(
        self,
        *,
        beta: float = 2.0,
        gamma: float = 0.01,
        threshold: float = 0.5,
        background_threshold: float = 0.5,
        threshold_inclusive: bool = False,
        embedding_pooling: Reduction = "sum",
        pairing: Pairing = "different",
        topk_divisor: int = 8,
        probability_floor: float = PROBABILITY_FLOOR,
        class_reduction: Reduction = "sum",
        balance_classes: bool = False,
    ) -> None:
        super().__init__()
        threshold = setting(self, Fraction, threshold=threshold)
        background_threshold = setting(self, Fraction, background_threshold=background_threshold)
        # x > (the next float32 below tau) is x >= tau.
        if setting(self, bool, threshold_inclusive=threshold_inclusive):
            threshold = float(np.nextafter(np.float32(threshold), np.float32(-np.inf)))
            background_threshold = float(np.nextafter(np.float32(background_threshold), np.float32(-np.inf)))
        self.beta: float = setting(self, Weight, beta=beta)
        self.gamma: float = setting(self, Weight, gamma=gamma)
        self.threshold, self.background_threshold = threshold, background_threshold
        self.embedding_pooling: Reduction = setting(self, Reduction, embedding_pooling=embedding_pooling)
        self.pairing: Pairing = setting(self, Pairing, pairing=pairing)
        self.topk_divisor: int = setting(self, Count, topk_divisor=topk_divisor)
        self.probability_floor: float = setting(self, Eps, probability_floor=probability_floor)
        self.class_reduction: Reduction = setting(self, Reduction, class_reduction=class_reduction)
        self.balance_classes: bool = setting(self, bool, balance_classes=balance_classes)

    def forward(
        self,
        tcam: Tensor,
        embeddings: Tensor,
        lengths: Tensor | None,
        labels: Tensor,
        partners: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        offsets: Tensor | None = None,
        max_length: int | None = None,
    ) -> Discriminative:
        """Mean over the recordings that have a snippet.

        Args:
            tcam: (B, T, C) class activations in [0, 1]; (N, C) with ``offsets``.
            embeddings: (B, T, D), or (N, D).
            lengths: (B,) int64, or None (all T).
            labels: (B, C) multi-hot.
            partners: int64; None: drawn at random.
                Pairing "different": (B,), the recording that x~ of Eq. 3 comes from, or (3, B), one for each of w_fb,
                w_fg and w_bg. A recording that is its own partner, or whose partner is not one of 0 ... B - 1, has
                weight 0.
                Pairing "permutation": (4, B), each row a permutation of 0 ... B - 1. The n recordings that have a
                foreground (rows 0 and 2) or a background embedding (rows 1 and 3) are numbered 0 ... n - 1, and a row
                begins with a permutation of these numbers. Rows 0 and 1 give the partners for w_fg and w_bg; number
                ``rows[2][j]`` is paired with number ``rows[3][j]`` for w_fb. This is checked on a CPU only, as the
                check would wait for a GPU; there an index out of range is clamped.
            generator: draws the partners; None: PyTorch's default generator.
            offsets: (B+1,) int64, the first row of each recording in a packed batch (:mod:`d2net.losses`).
            max_length: Of a packed batch, an upper bound of the lengths; None: see :mod:`d2net.losses`.

        Returns:
            The loss, and the embeddings of Eq. 2.

        Raises:
            InputError: shapes or devices that do not fit; and, on a CPU only, logits as ``tcam``, labels that are NaN,
                or ``partners`` that are no such permutations.
        """
        tcam, embeddings, rows, labels = take_batch(
            "DiscriminativeLoss", tcam, embeddings, lengths, labels, offsets, max_length
        )
        settings = LossSettings(**self.settings())
        pairs = self.pairs(tcam, rows, labels, settings, partners, generator)
        batch = LossInputs(tcam, embeddings, rows.lengths, labels, None, *pairs, offsets=rows.offsets)
        result = d2net_loss(batch, settings, rows.max_length)
        return Discriminative(result.discriminative, Pooled(*result.x.unbind(), *result.valid.unbind()))

    def settings(self) -> dict[str, Any]:
        """The fields of :class:`~d2net.ops.loss_ref.LossSettings` that this loss needs."""
        return {
            "topk_divisor": self.topk_divisor,
            "classify": True,
            "separate": True,
            "beta": self.beta,
            "gamma": self.gamma,
            "probability_floor": self.probability_floor,
            "mean_over_classes": self.class_reduction == "mean",
            "balanced": self.balance_classes,
            "embed": True,
            "threshold": self.threshold,
            "background_threshold": self.background_threshold,
            "mean_embeddings": self.embedding_pooling == "mean",
        }

    def pairs(
        self,
        tcam: Tensor,
        rows: Rows,
        labels: Tensor,
        settings: LossSettings,
        partners: Tensor | None,
        generator: torch.Generator | None,
    ) -> Pairs:
        """Which recordings are compared in Eq. 3; see :meth:`forward`."""
        if self.pairing == "different":
            return pair_different(rows.count(tcam), tcam.device, partners, generator)
        keys = None if partners is not None else uniform((4, rows.count(tcam)), tcam.device, generator)
        lengths, tcam = rows.padded_lengths(tcam), rows.padded(tcam.detach())
        counted = counted_lengths(tcam, lengths, labels, settings)
        valid = have_embeddings(tcam, counted, self.threshold, self.background_threshold)
        return pair_by_permutation(valid, counted, partners, keys)
