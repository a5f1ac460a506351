"""The losses that the paper compares with: those of Tables 3 and 4, and plain DMI (Eq. 5).

The paper does not say in detail how they are applied. Each class says what it does.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from d2net.losses._common import setting, take_scores
from d2net.losses.denoising import RANK_TOL, SnippetJoint, SnippetTerm
from d2net.losses.discriminative import PROBABILITY_FLOOR, probabilities
from d2net.losses.video_denoising import VideoJoint, VideoTerm
from d2net.ops.loss import d2net_loss
from d2net.ops.loss_ref import LossInputs, LossSettings, mean_of
from d2net.ops.precision import product
from d2net.recipes import Count, Eps, Weight


class FocalLoss(nn.Module):
    """L_F of Table 3: "obtained by zeroing the weights w in Eq. 4".

    Args:
        beta: focusing parameter.
        topk_divisor: k of the top-k pooling is ceil(length / topk_divisor).
        probability_floor: p is clamped to [eps, 1 - eps], eps being this.
    """

    def __init__(
        self, *, beta: float = 2.0, topk_divisor: int = 8, probability_floor: float = PROBABILITY_FLOOR
    ) -> None:
        super().__init__()
        self.beta: float = setting(self, Weight, beta=beta)
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
        """Sum over classes, mean over the recordings that have a snippet.

        Args:
            tcam: (B, T, C) class activations in [0, 1]; (N, C) with ``offsets``.
            lengths: (B,) int64, or None (all T).
            labels: (B, C) multi-hot.
            offsets: (B+1,) int64, the first row of each recording in a packed batch (:mod:`d2net.losses`).
            max_length: Of a packed batch, an upper bound of the lengths; None: see :mod:`d2net.losses`.

        Returns:
            A scalar.

        Raises:
            InputError: shapes or devices that do not fit; logits as ``tcam`` or NaN labels (checked on a CPU only).
        """
        tcam, rows, labels = take_scores(type(self).__name__, tcam, lengths, labels, offsets, max_length)
        settings = LossSettings(
            topk_divisor=self.topk_divisor,
            classify=True,
            beta=self.beta,
            probability_floor=self.probability_floor,
        )
        batch = LossInputs(tcam, None, rows.lengths, labels, offsets=rows.offsets)
        return d2net_loss(batch, settings, rows.max_length).discriminative


class CrossEntropyLoss(FocalLoss):
    """L_CE of Table 3, as the binary cross-entropy of every class: Eq. 4 with w = 0 and beta = 0.

    There is no softmax over classes: the paper's activations are sigmoids, and a recording can have several classes.

    Args:
        topk_divisor: k of the top-k pooling is ceil(length / topk_divisor).
        probability_floor: p is clamped to [eps, 1 - eps], eps being this.
    """

    def __init__(self, *, topk_divisor: int = 8, probability_floor: float = PROBABILITY_FLOOR) -> None:
        super().__init__(beta=0.0, topk_divisor=topk_divisor, probability_floor=probability_floor)


class _SnippetPointwise(SnippetTerm):
    """A loss between lambda(t) and the pseudo-label (1 foreground, 0 background) of every pseudo-labelled snippet.

    Mean over a recording's pseudo-labelled snippets; recordings without any do not count.
    """

    def per_recording(self, attention: Tensor, scores: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        foreground, background = self.pseudo_labels(scores, lengths).unbind(2)
        selected = foreground | background
        p = probabilities(torch.where(selected, attention, 0.5))
        count = selected.sum(1)
        loss = torch.where(selected, self.between(p, foreground.to(p.dtype)), 0)
        return loss.sum(1) / count.clamp(min=1), count > 0

    @abstractmethod
    def between(self, p: Tensor, y: Tensor) -> Tensor:
        """The loss between activations p and pseudo-labels y, elementwise."""


class SnippetL1(_SnippetPointwise):
    """L1 in place of pDMI at the snippet level (Table 4): |lambda(t) - y(t)|, mean over pseudo-labelled snippets."""

    def between(self, p: Tensor, y: Tensor) -> Tensor:
        return (p - y).abs()


class SnippetBCE(_SnippetPointwise):
    """BCE in place of pDMI at the snippet level (Table 4), mean over the pseudo-labelled snippets."""

    def between(self, p: Tensor, y: Tensor) -> Tensor:
        return _cross_entropy(p, y > 0)


class VideoL1(VideoTerm):
    """L1 in place of pDMI at the video level (Table 4): |p - y|, mean over classes and recordings.

    Table 4 replaces the pDMI loss "in L_D", that is, in both terms. To replace the snippet term alone, give the video
    term the weight 0.
    """

    def from_pooled(self, pooled: Tensor, counted: Tensor, labels: Tensor) -> Tensor:
        p = probabilities(pooled, self.probability_floor)
        return mean_of((p - labels.to(p.dtype)).abs().sum(1) / max(p.shape[1], 1), counted)


class VideoBCE(VideoTerm):
    """BCE in place of pDMI at the video level (Table 4), mean over classes and recordings; see :class:`VideoL1`."""

    def from_pooled(self, pooled: Tensor, counted: Tensor, labels: Tensor) -> Tensor:
        p = probabilities(pooled, self.probability_floor)
        return mean_of(_cross_entropy(p, labels > 0).sum(1) / max(p.shape[1], 1), counted)


class SnippetDMI(SnippetJoint):
    """-log |det U_1| (Eq. 5 with Eq. 9), mean over recordings.

    Recordings without pseudo-foreground or pseudo-background, or whose U_1 is singular, do not count.
    """

    def per_recording(self, attention: Tensor, scores: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        u, valid = self.joint(attention, scores, lengths)
        loss, regular = _dmi(u, self.rank_tol)
        return loss, valid & regular


class VideoDMI(VideoJoint):
    """-log |det U_2| (Eq. 5 with Eq. 10).

    0 where U_2 is singular. It always is where a class has no recording in the batch; pDMI does not have this limit.
    """

    def from_pooled(self, pooled: Tensor, counted: Tensor, labels: Tensor) -> Tensor:
        p, y = self.factors(pooled, counted, labels)
        loss, regular = _dmi(product(p, y)[None], RANK_TOL)
        return torch.where(regular & (y > 0).any(0).all(), loss, 0).sum()


def _dmi(u: Tensor, rank_tol: float) -> tuple[Tensor, Tensor]:
    """-log |det| (N,) of matrices (N, C, C), and (N,) bool: whether the matrix is regular. 0 and no gradient if not.

    A matrix counts as singular if its LU decomposition has a pivot of at most ``rank_tol``; rounding makes zero pivots
    a little larger. One with NaN counts as regular, so that NaN propagates.
    """
    with torch.no_grad():
        pivots = torch.linalg.lu_factor_ex(u).LU.diagonal(dim1=1, dim2=2).abs()
        regular = ~(pivots <= rank_tol).any(1)
    safe = torch.where(regular[:, None, None], u, torch.eye(u.shape[1], dtype=u.dtype, device=u.device))
    return -torch.linalg.slogdet(safe).logabsdet, regular


def _cross_entropy(p: Tensor, positive: Tensor) -> Tensor:
    """Elementwise. PyTorch's own raises under autocast and for NaN, on a GPU by an assertion that ends the process."""
    return -torch.where(positive, p, 1 - p).log()
