"""L_Dis: classification that also separates foreground from background embeddings (Eq. 2 to 4)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from d2net.losses._common import setting, take_batch
from d2net.losses.pairing import Pairing, Pairs, pair_by_permutation, pair_different
from d2net.ops.attention_pool import Pooled
from d2net.ops.loss import d2net_loss
from d2net.ops.loss_ref import LossInputs, LossSettings, counted_lengths
from d2net.ops.precision import at_least_float32
from d2net.recipes import Count, Eps, Fraction, Weight

Reduction = Literal["sum", "mean"]
PROBABILITY_FLOOR = 1e-6  # keeps log(p) and log(1 - p) finite when a float32 sigmoid saturates


class Discriminative(NamedTuple):
    """L_Dis (scalar) and the embeddings of Eq. 2 it was made of, for instance for a running background reference."""

    loss: Tensor
    embeddings: Pooled


def probabilities(pooled: Tensor, floor: float = PROBABILITY_FLOOR) -> Tensor:
    """Pooled scores p as the losses use them: in float32 at least, within [floor, 1 - floor]."""
    return at_least_float32(pooled).clamp(floor, 1 - floor)


class DiscriminativeLoss(nn.Module):
    """L_Dis: focal classification whose weights separate foreground from background embeddings (Eq. 2 to 4).

    The defaults are the paper's; docs/fidelity.md has the released code's values.

    Args:
        beta: focusing parameter. gamma: intra-class compactness. threshold, background_threshold: tau of Eq. 2.
        threshold_inclusive: whether a snippet exactly at tau counts.
        embedding_pooling: "sum" is Eq. 2; "mean" divides it by the sum of its weights.
        pairing: "different": x and x~ of Eq. 3 are of different recordings; "permutation": of recordings that random
            permutations bring together, which may be the same one.
        topk_divisor: k of the top-k pooling is ceil(length / topk_divisor).
        probability_floor: p is clamped to [floor, 1 - floor].
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
        # Above the next smaller float32 is at or above.
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
    ) -> Discriminative:
        """Mean over the recordings that have a snippet.

        Args:
            tcam: (B, T, C) in [0, 1]. embeddings: (B, T, D). lengths: (B,) int64 or None. labels: (B, C) multi-hot.
            partners: int64; None: drawn at random.
                Pairing "different": (B,) the recording whose embeddings stand as x~ in Eq. 3, or (3, B) to give one
                for each of w_fb, w_fg, w_bg; paired with itself, or with none of 0 ... B - 1, a recording
                has weight 0.
                Pairing "permutation": (4, B), each row a permutation of 0 ... B - 1 that begins with one of the
                numbers 0 ... n - 1 of the n recordings that have a foreground (rows 0 and 2) or background (rows 1
                and 3) embedding. Rows 0 and 1 give the partners for w_fg and w_bg; number rows[2][j] is paired with
                number rows[3][j] for w_fb. Refused where it is not so, but not on a GPU, where a look at it would wait:
                there an index that leads outside counts as the nearest.
            generator: source of that randomness.

        Raises:
            InputError: shapes or devices that do not fit; and, seen on a CPU only, logits as ``tcam``, labels that are
                NaN, or ``partners`` that are no such permutations.
        """
        tcam, embeddings, lengths, labels = take_batch("DiscriminativeLoss", tcam, embeddings, lengths, labels)
        settings = LossSettings(**self.settings())
        pairs = self.pairs(tcam, lengths, labels, settings, partners, generator)
        result = d2net_loss(LossInputs(tcam, embeddings, lengths, labels, None, *pairs), settings)
        return Discriminative(result.discriminative, Pooled(*result.x.unbind(), *result.valid.unbind()))

    def settings(self) -> dict[str, Any]:
        """Its part of :class:`~d2net.ops.loss_ref.LossSettings`."""
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
        lengths: Tensor | None,
        labels: Tensor,
        settings: LossSettings,
        partners: Tensor | None,
        generator: torch.Generator | None,
    ) -> Pairs:
        """Who is compared with whom; see :meth:`forward`."""
        if self.pairing == "different":
            return pair_different(tcam.shape[0], tcam.device, partners, generator)
        counted = counted_lengths(tcam, lengths, labels, settings)
        return pair_by_permutation(tcam, counted, self.threshold, self.background_threshold, partners, generator)
