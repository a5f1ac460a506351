"""Segment proposals from activation sequences (Sec. 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops.nms import batched_nms_1d


class Proposals(NamedTuple):
    """Scored segments of a batch, one row each; in snippets, ``start`` inclusive, ``end`` exclusive.

    Attributes:
        recording: (N,) int64, index into the batch.
        label: (N,) int64, class index.
        start, end: (N,) int64.
        score: (N,) outer-inner contrast S = S_i - S_o, float32 (float64 for float64 activations).
    """

    recording: Tensor
    label: Tensor
    start: Tensor
    end: Tensor
    score: Tensor


@torch.no_grad()
def extract_proposals(
    activations: Tensor,
    classes: Tensor,
    lengths: Tensor | None = None,
    *,
    thresholds: Sequence[float],
    min_length: int = 1,
    inflation: float = 0.25,
    outer: Literal["pooled", "mean_of_sides"] = "pooled",
    nms_iou: float = 0.5,
    min_contrast: float = -math.inf,
) -> Proposals:
    """Proposals of a whole batch, scored by their contrast and thinned by class-wise NMS (Sec. 3.3).

    A proposal is a 1-D connected component of the snippets whose activation is strictly above a threshold.
    A component that several thresholds find is one proposal. Its score is S = S_i - S_o: S_i is the mean
    activation inside, S_o the mean of the neighbouring background, which is
    ``max(1, floor(inflation * width))`` snippets on either side, cut off at the ends of the recording; S_o
    is 0 for a proposal that fills its recording.

    Args:
        activations: (B, T, C) refined sequences r_c = lambda' T_c. Half precision is computed in float32.
        classes: (B, C) bool, the classes to look at; the activations of others are never read.
        lengths: (B,) valid snippets of each recording (None: all T). What lies past never matters.
        thresholds: At least one, in any order; rounded to the precision of the activations.
        min_length: Shortest proposal, in snippets.
        inflation: Width of each neighbourhood as a share of the proposal's.
        outer: ``pooled``: S_o is the mean over the snippets of both sides together; ``mean_of_sides``: the mean
            of the means of the sides there are.
        nms_iou: Of two proposals of one class and recording with an IoU of at least this, the one with the
            lower score goes; in (0, 1], and 1 keeps all.
        min_contrast: Proposals with a lower S are dropped before NMS.

    Returns:
        Proposals by recording, class and falling score; of equal scores, the earlier start and then the
        earlier end comes first and wins in NMS.

    Raises:
        InputError: a wrong shape, type or setting; NaN or Inf among the activations that are read.
    """
    _check(activations, classes, lengths, thresholds, min_length, inflation, outer, nms_iou)
    snippets = activations.shape[1]
    device = activations.device
    recording, label = classes.nonzero(as_tuple=True)
    rows = activations.transpose(1, 2)[recording, label]  # (R, T): one row for each class kept in a recording
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    length = torch.full_like(recording, snippets) if lengths is None else lengths.to(device, torch.int64)[recording]
    valid = torch.arange(snippets, device=device) < length[:, None]
    if not (rows.isfinite() | ~valid).all():
        bad = (~rows.isfinite() & valid).nonzero()[0].tolist()
        raise InputError(
            f"extract_proposals: activations hold NaN or Inf (first in recording {int(recording[bad[0]])}, "
            f"snippet {bad[1]}, class {int(label[bad[0]])}); check the features and the model"
        )

    # A component's identity as one integer, ordered by row, start, end.
    base = snippets + 1
    keys = [torch.empty(0, dtype=torch.int64, device=device)]
    for threshold in torch.tensor([float(t) for t in thresholds], dtype=rows.dtype, device=device):
        row, start, end = _components((rows > threshold) & valid)
        long = end - start >= min_length
        keys.append(((row * base + start) * base + end)[long])
    key = torch.cat(keys).unique()
    row, start, end = key // base**2, key // base % base, key % base

    score = _contrast(torch.where(valid, rows, 0), length, row, start, end, inflation, outer).to(rows.dtype)
    row, start, end, score = (x[score >= min_contrast] for x in (row, start, end, score))
    segments = torch.stack((start, end), dim=1).to(torch.float64)
    keep = batched_nms_1d(segments, score.to(torch.float64), row, nms_iou).sort().values
    keep = keep[score[keep].sort(descending=True, stable=True).indices]
    keep = keep[row[keep].sort(stable=True).indices]
    return Proposals(recording[row[keep]], label[row[keep]], start[keep], end[keep], score[keep])


def _components(above: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, start and exclusive end of every run of True in ``above`` (R, T)."""
    padded = torch.nn.functional.pad(above, (1, 1))
    edges = (padded[:, 1:] != padded[:, :-1]).nonzero()  # in a row, starts and ends alternate
    return edges[::2, 0], edges[::2, 1], edges[1::2, 1]


def _contrast(
    rows: Tensor, length: Tensor, row: Tensor, start: Tensor, end: Tensor, inflation: float, outer: str
) -> Tensor:
    """S_i - S_o of segments [start, end) of ``rows`` (R, T), in float64."""
    prefix = torch.nn.functional.pad(rows.to(torch.float64).cumsum(dim=1), (1, 0))
    width = end - start
    reach = (inflation * width.to(torch.float64)).floor().to(torch.int64).clamp(min=1)
    left = (start - reach).clamp(min=0)
    right = torch.minimum(end + reach, length[row])
    at_left, at_start, at_end, at_right = (prefix[row, t] for t in (left, start, end, right))
    sums = torch.stack((at_start - at_left, at_right - at_end))
    counts = torch.stack((start - left, right - end))
    if outer == "pooled":
        background = sums.sum(0) / counts.sum(0).clamp(min=1)
    else:
        background = (sums / counts.clamp(min=1)).sum(0) / (counts > 0).sum(0).clamp(min=1)
    return (at_end - at_start) / width - background


def _check(
    activations: Tensor,
    classes: Tensor,
    lengths: Tensor | None,
    thresholds: Sequence[float],
    min_length: int,
    inflation: float,
    outer: str,
    nms_iou: float,
) -> None:
    where = "extract_proposals:"
    if activations.ndim != 3 or not activations.is_floating_point():
        raise InputError(
            f"{where} activations are {tuple(activations.shape)} {activations.dtype}, "
            "expected (B, T, C) of a float type"
        )
    batch, snippets, width = activations.shape
    if classes.shape != (batch, width) or classes.dtype != torch.bool:
        raise InputError(
            f"{where} classes are {tuple(classes.shape)} {classes.dtype}, expected ({batch}, {width}) torch.bool"
        )
    if classes.device != activations.device:
        raise InputError(f"{where} classes are on {classes.device} but activations on {activations.device}; move one")
    if lengths is not None:
        if lengths.shape != (batch,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise InputError(
                f"{where} lengths are {tuple(lengths.shape)} {lengths.dtype}, expected ({batch},) torch.int64"
            )
        if ((lengths < 0) | (lengths > snippets)).any():
            raise InputError(f"{where} lengths must lie in 0 to T = {snippets}, found {lengths.tolist()}")
    if len(thresholds) == 0 or not all(math.isfinite(t) for t in thresholds):
        raise InputError(f"{where} thresholds must be one or more finite numbers, found {list(thresholds)}")
    if min_length < 1:
        raise InputError(f"{where} min_length must be at least 1 snippet, found {min_length}")
    if not 0 <= inflation < math.inf:
        raise InputError(f"{where} inflation must be a finite number of at least 0, found {inflation}")
    if outer not in ("pooled", "mean_of_sides"):
        raise InputError(f"{where} outer must be 'pooled' or 'mean_of_sides', found {outer!r}")
    if not 0 < nms_iou <= 1:
        raise InputError(f"{where} nms_iou must lie above 0 and at most at 1, found {nms_iou}")
