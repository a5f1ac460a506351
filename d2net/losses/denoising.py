"""L_D, and its term L_DS, which compares a recording's snippets with pseudo-labels (Eq. 7 to 9, 11).

:class:`SnippetTerm` selects what is compared; its subclasses compute the loss. The paper's own are here, those that the
paper compares with in ``comparison.py``, and L_DV in ``video_denoising.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2net.errors import InputError
from d2net.losses._common import Normalization, Rows, check_known, check_labels, check_same_rows, check_scores, setting
from d2net.losses.video_denoising import VideoDenoising, VideoTerm
from d2net.ops.checks import as_tensor, as_tensors, within
from d2net.ops.loss import d2net_loss
from d2net.ops.loss_ref import (
    LossInputs,
    LossResult,
    LossSettings,
    mean_of,
    own_class_attention,
)
from d2net.ops.precision import at_least_float32
from d2net.ops.snippet_pdmi import snippet_pdmi
from d2net.recipes import Fraction, Weight

RANK_TOL = 1e-5


class Denoising(NamedTuple):
    """Scalars: L_D = L_DS + L_DV (Eq. 11)."""

    total: Tensor  # L_D
    snippet: Tensor  # L_DS
    video: Tensor  # L_DV


class SnippetTerm(nn.Module, ABC):
    """Compares the attention of each recording's snippets with pseudo-labels from their embeddings (Sec. 3.2.1).

    Args:
        fg_threshold: snippets with lambda' (Eq. 8) above it are pseudo-foreground.
        bg_threshold: snippets with lambda' below it are pseudo-background.
        own_classes: take the attention of pseudo-foreground as the maximum over the recording's own classes, not over
            all classes.
    """

    def __init__(self, *, fg_threshold: float = 0.5, bg_threshold: float = 0.5, own_classes: bool = False) -> None:
        super().__init__()
        self.fg_threshold: float = setting(self, Fraction, fg_threshold=fg_threshold)
        self.bg_threshold: float = setting(self, Fraction, bg_threshold=bg_threshold)
        if self.bg_threshold > self.fg_threshold:
            raise InputError(
                f"{type(self).__name__}: bg_threshold {bg_threshold} is above fg_threshold {fg_threshold}; "
                "no snippet can be both"
            )
        self.own_classes: bool = setting(self, bool, own_classes=own_classes)

    def forward(
        self,
        tcam: Tensor,
        embeddings: Tensor,
        lengths: Tensor | None,
        x_ref: Tensor,
        labels: Tensor | None = None,
        *,
        offsets: Tensor | None = None,
        max_length: int | None = None,
    ) -> Tensor:
        """Scalar: the mean over the recordings that can be compared; 0 if there are none.

        Args:
            tcam: (B, T, C) class activations in [0, 1]; (N, C) with ``offsets``.
            embeddings: (B, T, D), or (N, D).
            lengths: (B,) int64, or None (all T).
            x_ref: (D,) background reference of Eq. 8.
            labels: (B, C) multi-hot, for ``own_classes`` only.
            offsets: (B+1,) int64, the first row of each recording in a packed batch (:mod:`d2net.losses`).
            max_length: Of a packed batch, an upper bound of the lengths; None: see :mod:`d2net.losses`.

        Raises:
            InputError: shapes or devices that do not fit; logits as ``tcam`` or NaN labels (checked on a CPU only).
        """
        name = type(self).__name__
        tcam, embeddings = as_tensors(name, tcam=tcam, embeddings=embeddings)
        check_same_rows(name, offsets, tcam=(tcam, "C"), embeddings=(embeddings, "D"))
        rows = Rows.of(name, tcam, lengths, offsets, max_length)
        if labels is not None:
            labels = as_tensor(name, "labels", labels, tcam)
            check_labels(name, tcam, labels, rows)
        check_scores(name, tcam, rows)
        if labels is not None:
            check_known(name, labels, tcam, rows)
        else:
            if self.own_classes:
                raise InputError(f"{name}: own_classes needs the labels")
            labels = tcam.new_zeros(rows.count(tcam), tcam.shape[-1])
        x_ref = as_tensor(name, "x_ref", x_ref, tcam)
        batch = LossInputs(at_least_float32(tcam), embeddings, rows.lengths, labels, x_ref, offsets=rows.offsets)
        result = d2net_loss(batch, LossSettings(**self.settings()), rows.max_length)
        return self.of(batch, result, rows.max_length)

    def settings(self) -> dict[str, Any]:
        """The fields of :class:`~d2net.ops.loss_ref.LossSettings` that this term needs."""
        return {
            "score": True,
            "fg_threshold": self.fg_threshold,
            "bg_threshold": self.bg_threshold,
            "own_classes": self.own_classes,
        }

    def of(self, batch: LossInputs, result: LossResult, max_length: int | None = None) -> Tensor:
        """The term, from the result of ``d2net_loss`` with :meth:`settings` and ``max_length``."""
        return mean_of(*self.terms(batch, result.attention, result.scores, result.counted, max_length))

    def terms(
        self, batch: LossInputs, attention: Tensor, scores: Tensor, counted: Tensor, max_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B,) losses, and (B,) bool whether they count; arguments as in the result of ``d2net_loss``."""
        rows = Rows(counted, batch.offsets, max_length)
        attention, scores = rows.padded(attention), rows.padded(scores)
        if self.own_classes:
            labels = batch.labels.to(attention.dtype)
            attention = own_class_attention(attention, rows.padded(batch.tcam), scores, labels, self.fg_threshold)
        return self.per_recording(attention, scores, counted)

    @abstractmethod
    def per_recording(self, attention: Tensor, scores: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) losses, and (B,) bool whether they count, from (B, T) attention and scores and (B,) lengths."""

    def pseudo_labels(self, scores: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, 2) bool: whether a snippet is pseudo-foreground, and whether it is pseudo-background."""
        mask = within(scores, lengths)
        return torch.stack((mask & (scores > self.fg_threshold), mask & (scores < self.bg_threshold)), 2)


class SnippetJoint(SnippetTerm):
    """A snippet term that depends on the joint distribution U_1 = P_1 Y_1 (Eq. 9).

    Args:
        fg_threshold: see :class:`SnippetTerm`.
        bg_threshold: see there.
        own_classes: see there.
        normalization: "joint" divides Y_1 by z = n_f + n_b; "per_class" each of its columns by its own count.
        entry_floor: smaller entries of U_1 are raised to it.
        rank_tol: singular values of U_1 up to this count as zero.
        oriented: recordings with det U_1 <= 0 do not count.

    Why ``oriented``: a condition number is the same for a matrix with its columns swapped, so where lambda is smaller
    on a recording's pseudo-foreground than on its pseudo-background (det U_1 < 0), L_DS sharpens just that. There
    lambda' contradicts lambda as a whole, and as it has its orientation from lambda, through x_ref, such pseudo-labels
    are more likely wrong than the attention is noisy: they give no reason either to push lambda across det U_1 = 0,
    where L_DS has a pole. So the recording gets neither loss nor gradient from L_DS until L_Dis and x_ref have put its
    pseudo-labels right.
    """

    def __init__(
        self,
        *,
        fg_threshold: float = 0.5,
        bg_threshold: float = 0.5,
        own_classes: bool = False,
        normalization: Normalization = "joint",
        entry_floor: float = 0.0,
        rank_tol: float = RANK_TOL,
        oriented: bool = False,
    ) -> None:
        super().__init__(fg_threshold=fg_threshold, bg_threshold=bg_threshold, own_classes=own_classes)
        self.normalization: Normalization = setting(self, Normalization, normalization=normalization)
        self.entry_floor: float = setting(self, Fraction, entry_floor=entry_floor)
        self.rank_tol: float = setting(self, Weight, rank_tol=rank_tol)
        self.oriented: bool = setting(self, bool, oriented=oriented)

    def joint(self, attention: Tensor, scores: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """U_1 (B, 2, 2), 0 where not valid; and valid (B,) bool: whether the recording counts.

        It does if it has pseudo-foreground and pseudo-background, and with ``oriented`` det U_1 is above 0 or NaN.
        """
        selected = self.pseudo_labels(scores, lengths)
        count = selected.sum(1)
        valid = (count > 0).all(1)
        size = count if self.normalization == "per_class" else count.sum(1, keepdim=True)
        activation = torch.where(selected, attention[:, :, None], 0).sum(1)  # (B, 2)
        if self.oriented:
            foreground, background = activation.detach().unbind(1)
            # det U_1 up to a positive factor, before entries are raised
            valid = valid & ~(foreground * count[:, 1] - background * count[:, 0] <= 0)
        u = torch.stack((activation, count - activation), 1) / size.clamp(min=1)[:, None]
        if self.entry_floor > 0:
            u = u.clamp(min=self.entry_floor)
        return torch.where(valid[:, None, None], u, 0), valid


class SnippetDenoising(SnippetJoint):
    """L_DS: mean over recordings of the snippet-level log condition number (Eq. 7 to 9, 11).

    Recordings without pseudo-foreground or pseudo-background do not count. Args: see :class:`SnippetJoint`.
    """

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "snippet": not self.oriented,  # which the operator does not know
            "snippet_per_class": self.normalization == "per_class",
            "entry_floor": self.entry_floor,
            "rank_tol": self.rank_tol,
        }

    def of(self, batch: LossInputs, result: LossResult, max_length: int | None = None) -> Tensor:
        return super().of(batch, result, max_length) if self.oriented else result.snippet

    def per_recording(self, attention: Tensor, scores: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        loss, valid = snippet_pdmi(
            attention,
            scores,
            lengths,
            fg_threshold=self.fg_threshold,
            bg_threshold=self.bg_threshold,
            normalization=self.normalization,
            entry_floor=self.entry_floor,
            rank_tol=self.rank_tol,
        )
        return loss, self.joint(attention.detach(), scores, lengths)[1] if self.oriented else valid


class DenoisingLoss(nn.Module):
    """L_D = L_DS + L_DV (Eq. 11).

    Args:
        snippet: L_DS; None: the paper's.
        video: L_DV; None: the paper's.
    """

    def __init__(self, snippet: SnippetTerm | None = None, video: VideoTerm | None = None) -> None:
        super().__init__()
        self.snippet: SnippetTerm = setting(self, SnippetTerm | None, snippet=snippet) or SnippetDenoising()
        self.video: VideoTerm = setting(self, VideoTerm | None, video=video) or VideoDenoising()

    def forward(
        self,
        tcam: Tensor,
        embeddings: Tensor,
        lengths: Tensor | None,
        labels: Tensor,
        x_ref: Tensor,
        *,
        offsets: Tensor | None = None,
        max_length: int | None = None,
    ) -> Denoising:
        """Both terms and their sum.

        Args:
            tcam: (B, T, C) class activations in [0, 1]; (N, C) with ``offsets``.
            embeddings: (B, T, D), or (N, D).
            lengths: (B,) int64, or None (all T); recordings of length 0 do not count.
            labels: (B, C) multi-hot.
            x_ref: (D,) background reference of Eq. 8.
            offsets: (B+1,) int64, the first row of each recording in a packed batch (:mod:`d2net.losses`).
            max_length: Of a packed batch, an upper bound of the lengths; None: see :mod:`d2net.losses`.

        Raises:
            InputError: shapes or devices that do not fit; logits as ``tcam`` or NaN labels (checked on a CPU only).
        """
        snippet = self.snippet(tcam, embeddings, lengths, x_ref, labels, offsets=offsets, max_length=max_length)
        video = self.video(tcam, lengths, labels, offsets=offsets, max_length=max_length)
        return Denoising(snippet + video, snippet, video)
