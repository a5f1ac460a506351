"""L_DV: compares the class scores of a batch's recordings with their labels (Eq. 7, 10, 11)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from d2net.losses._common import Normalization, setting, take_scores
from d2net.losses.discriminative import PROBABILITY_FLOOR
from d2net.ops.condition_number import joint_log_condition_number
from d2net.ops.loss import d2net_loss, has_video_kernel
from d2net.ops.loss_ref import LossInputs, LossSettings, video_factors
from d2net.ops.precision import at_least_float32
from d2net.ops.topk_pool import topk_pool
from d2net.recipes import BelowOne, Count, Eps


class VideoTerm(nn.Module, ABC):
    """Compares the class scores of a batch's recordings with their labels (Sec. 3.2.1).

    Args:
        topk_divisor: k of the top-k pooling is ceil(length / topk_divisor).
        probability_floor: scores are clamped to [eps, 1 - eps], eps being this.
    """

    def __init__(self, *, topk_divisor: int = 8, probability_floor: float = PROBABILITY_FLOOR) -> None:
        super().__init__()
        self.topk_divisor: int = setting(self, Count, topk_divisor=topk_divisor)
        self.probability_floor: float = setting(self, Eps, probability_floor=probability_floor)

    def forward(
        self,
        tcam: Tensor,
        lengths: Tensor | None,
        labels: Tensor,
        *,
        offsets: Tensor | None = None,
        max_length: int | None = None,
    ) -> Tensor:
        """Scalar, the loss of the batch.

        Args:
            tcam: (B, T, C) class activations in [0, 1]; (N, C) with ``offsets``.
            lengths: (B,) int64, or None (all T); recordings of length 0 do not count.
            labels: (B, C) multi-hot.
            offsets: (B+1,) int64, the first row of each recording in a packed batch (:mod:`d2net.losses`).
            max_length: Of a packed batch, an upper bound of the lengths; None: see :mod:`d2net.losses`.

        Raises:
            InputError: shapes or devices that do not fit; logits as ``tcam`` or NaN labels (checked on a CPU only).
        """
        tcam, rows, labels = take_scores(type(self).__name__, tcam, lengths, labels, offsets, max_length)
        pooled = topk_pool(
            tcam, rows.lengths, divisor=self.topk_divisor, offsets=rows.offsets, max_length=rows.max_length
        )
        return self.from_pooled(pooled, rows.present(tcam), labels)

    @abstractmethod
    def from_pooled(self, pooled: Tensor, counted: Tensor, labels: Tensor) -> Tensor:
        """:meth:`forward` of pooled scores (B, C); a recording counts where ``counted`` (B,) is above 0."""


class VideoJoint(VideoTerm):
    """A video term that depends on the joint distribution U_2 = P_2 Y_2 (Eq. 10).

    Args:
        topk_divisor: see :class:`VideoTerm`.
        probability_floor: see there.
        peak_share: P_2 holds p where p is above this fraction of the recording's largest p, else 0, normalised to sum
            1. None: P_2 holds p.
        normalization: "joint" divides Y_2 by the number of recordings; "per_class" each class by its own count.
    """

    def __init__(
        self,
        *,
        topk_divisor: int = 8,
        probability_floor: float = PROBABILITY_FLOOR,
        peak_share: float | None = None,
        normalization: Normalization = "joint",
    ) -> None:
        super().__init__(topk_divisor=topk_divisor, probability_floor=probability_floor)
        self.peak_share: float | None = setting(self, BelowOne | None, peak_share=peak_share)
        self.normalization: Normalization = setting(self, Normalization, normalization=normalization)

    def factors(self, pooled: Tensor, counted: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """P_2 (C, B) and Y_2 (B, C) of Eq. 10."""
        pooled = at_least_float32(pooled)
        return video_factors(pooled, labels.detach().to(pooled.dtype), counted, LossSettings(**self.settings()))

    def settings(self) -> dict[str, Any]:
        """The fields of :class:`~d2net.ops.loss_ref.LossSettings` that this term needs."""
        return {
            "topk_divisor": self.topk_divisor,
            "probability_floor": self.probability_floor,
            "peak_share": -1.0 if self.peak_share is None else self.peak_share,
            "video_per_class": self.normalization == "per_class",
        }


class VideoDenoising(VideoJoint):
    """L_DV: log condition number of the batch's joint distribution (Eq. 7, 10, 11).

    0 for fewer than two linearly independent recordings. Args: see :class:`VideoJoint`.
    """

    def forward(
        self,
        tcam: Tensor,
        lengths: Tensor | None,
        labels: Tensor,
        *,
        offsets: Tensor | None = None,
        max_length: int | None = None,
    ) -> Tensor:
        tcam, rows, labels = take_scores(type(self).__name__, tcam, lengths, labels, offsets, max_length)
        if not has_video_kernel(*labels.shape):
            return super().forward(tcam, rows.lengths, labels, offsets=rows.offsets, max_length=rows.max_length)
        batch = LossInputs(tcam, None, rows.lengths, labels, offsets=rows.offsets)
        return d2net_loss(batch, LossSettings(**self.settings(), video=True), rows.max_length).video

    def from_pooled(self, pooled: Tensor, counted: Tensor, labels: Tensor) -> Tensor:
        p, y = self.factors(pooled, counted, labels)
        return joint_log_condition_number(p[None], y[None]).view(())
