"""UM's loss, as its paper defines it, to add to the loss of D2-Net."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from d2net.losses._common import Rows, check_same_rows, setting
from d2net.ops.attention_pool import attention_pool
from d2net.ops.checks import as_tensors, check_floating, within
from d2net.ops.loss_ref import mean_of
from d2net.ops.packed import packed
from d2net.ops.precision import at_least_float32
from d2net.recipes import Count, Weight

MarginUnit = Literal["absolute", "embedding"]


class UncertaintyModelingResult(NamedTuple):
    """Scalars of one batch.

    Attributes:
        total: weight * magnitude + entropy, or entropy alone where the weight is 0.
        magnitude: L_um, before its weight.
        entropy: L_be.
    """

    total: Tensor
    magnitude: Tensor
    entropy: Tensor


class RecordingUncertainty(NamedTuple):
    """Of each recording of a batch, (B,) each.

    Attributes:
        act_norm: ||f_act||.
        background_norm: ||f_bkg||.
        entropy: Its term of L_be.
        usable: Whether it counts, bool.
        norms: The sum of ||x(t)|| over its snippets, without gradient.
        snippets: Their number.
    """

    act_norm: Tensor
    background_norm: Tensor
    entropy: Tensor
    usable: Tensor
    norms: Tensor
    snippets: Tensor


class UncertaintyModeling(nn.Module):
    """UM's feature-magnitude and background-entropy terms.

    Lee, Wang, Lu, Byun: "Weakly-supervised Temporal Action Localization by Uncertainty Modeling", AAAI 2021.
    Pseudo-action snippets are the length / act_divisor ones of largest ||x(t)||, pseudo-background snippets the
    length / background_divisor ones of smallest; both numbers are rounded down and at least 1.

        L_um = mean over recordings of (max(0, margin - ||f_act||) + ||f_bkg||)^2, f the mean embedding of the snippets
        L_be = mean over recordings and classes of -log softmax(mean logits of the pseudo-background snippets)

    Args:
        magnitude: weight of L_um beside L_be (the paper's alpha).
        margin: the magnitude that f_act should reach (the paper's m).
        act_divisor: one snippet in so many is pseudo-action.
        background_divisor: one snippet in so many is pseudo-background.
        margin_unit: "absolute", as in the paper; "embedding": in L_um, both norms are divided by the mean of ||x(t)||
            over the snippets of the batch, without gradient. Then a margin of 2 is twice the mean norm, L_um does not
            depend on the scale of the embeddings, and the paper's 100 is out of reach.
    """

    def __init__(
        self,
        *,
        magnitude: float = 5e-4,
        margin: float = 100.0,
        act_divisor: int = 9,
        background_divisor: int = 4,
        margin_unit: MarginUnit = "absolute",
    ) -> None:
        super().__init__()
        self.magnitude: float = setting(self, Weight, magnitude=magnitude)
        self.margin: float = setting(self, Weight, margin=margin)
        self.act_divisor: int = setting(self, Count, act_divisor=act_divisor)
        self.background_divisor: int = setting(self, Count, background_divisor=background_divisor)
        self.margin_unit: MarginUnit = setting(self, MarginUnit, margin_unit=margin_unit)

    def forward(
        self,
        embeddings: Tensor,
        logits: Tensor,
        lengths: Tensor | None,
        *,
        offsets: Tensor | None = None,
        max_length: int | None = None,
    ) -> UncertaintyModelingResult:
        """Means over the recordings of two snippets or more; a single one would be action and background at once.

        Args:
            embeddings: (B, T, D); (N, D) with ``offsets``.
            logits: (B, T, C) class logits, or (N, C).
            lengths: (B,) int64, or None (all T).
            offsets: (B+1,) int64, the first row of each recording in a packed batch (:mod:`d2net.losses`).
            max_length: Of a packed batch, an upper bound of the lengths; None: see :mod:`d2net.losses`.

        Raises:
            InputError: shapes or devices that do not fit.
        """
        where = {"offsets": offsets, "max_length": max_length}
        return self.of_recordings(self.recordings(embeddings, logits, lengths, **where))  # type: ignore[arg-type]

    def recordings(
        self,
        embeddings: Tensor,
        logits: Tensor,
        lengths: Tensor | None,
        *,
        offsets: Tensor | None = None,
        max_length: int | None = None,
    ) -> RecordingUncertainty:
        """What the terms are computed from; arguments and errors as of :meth:`forward`."""
        embeddings, logits = as_tensors("UncertaintyModeling", embeddings=embeddings, logits=logits)
        check_floating("UncertaintyModeling", "embeddings", embeddings)
        check_floating("UncertaintyModeling", "logits", logits)
        check_same_rows("UncertaintyModeling", offsets, embeddings=(embeddings, "D"), logits=(logits, "C"))
        rows = Rows.of("UncertaintyModeling", embeddings, lengths, offsets, max_length)
        lengths = rows.padded_lengths(embeddings)
        logits = rows.padded(logits)
        mask = within(logits, lengths)
        usable = mask.sum(1) >= 2
        mask = mask & usable[:, None]  # the other recordings are not read: NaN in them reaches no gradient
        count = mask.sum(1)
        with torch.no_grad():
            norms = rows.padded(torch.linalg.vector_norm(at_least_float32(embeddings), dim=-1))
            rank = norms.masked_fill(~mask, -1).argsort(dim=1, descending=True, stable=True).argsort(1)
            act_size, size = ((count // d).clamp(min=1) for d in (self.act_divisor, self.background_divisor))
            act = mask & (rank < act_size[:, None])
            background = mask & (rank >= (count - size)[:, None]) & ~act
            # attention_pool weighs foreground with selection and background with 1 - selection, so it gives both means
            # with one read of the embeddings.
            selection = torch.where(act, 1.0, torch.where(background, 0.0, 0.5)).to(embeddings.dtype)
            if rows.offsets is not None:
                selection = packed(selection, rows.offsets, lengths, embeddings.shape[0])
        f = attention_pool(
            embeddings, selection, lengths, reduction="mean", offsets=rows.offsets, max_length=rows.max_length
        )
        act_norm, background_norm = torch.linalg.vector_norm(at_least_float32(torch.stack((f.x_fg, f.x_bg))), dim=2)
        mean_logits = torch.where(background[:, :, None], at_least_float32(logits), 0).sum(1) / size[:, None]
        entropy = -mean_logits.log_softmax(1).sum(1) / max(logits.shape[2], 1)
        total_norm = torch.where(mask, norms, 0).sum(1)
        return RecordingUncertainty(act_norm, background_norm, entropy, usable, total_norm, count)

    def of_recordings(self, found: RecordingUncertainty) -> UncertaintyModelingResult:
        """The terms of the recordings of a batch."""
        act_norm, background_norm, entropies, usable, norms, count = found
        if self.margin_unit == "embedding":
            unit = norms.sum() / count.sum().clamp(min=1)
            unit = unit.clamp(min=torch.finfo(unit.dtype).tiny)  # where all embeddings are 0
            act_norm, background_norm = act_norm / unit, background_norm / unit
        magnitude = mean_of(((self.margin - act_norm).clamp(min=0) + background_norm).square(), usable)
        entropy = mean_of(entropies, usable)
        # 0 * NaN is NaN: a term of weight 0 is left out.
        total = self.magnitude * magnitude + entropy if self.magnitude != 0 else entropy
        return UncertaintyModelingResult(total, magnitude, entropy)
