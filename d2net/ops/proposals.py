"""Segment proposals from activation sequences (Sec. 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops import _library, _native
from d2net.ops.checks import FLOATING, as_number, as_tensor, as_tensors, as_whole, check_choice, check_lengths
from d2net.ops.nms import batched_nms_1d
from d2net.ops.packed import as_offsets, padded
from d2net.words import quoted

# Where the absolute values of a sequence sum to at most this, no sum or difference of prefix sums overflows: no score
# is NaN.
_LARGEST_SUM = torch.finfo(torch.float64).max / 4


class Proposals(NamedTuple):
    """Scored segments of a batch, one row each; in snippets, ``start`` inclusive, ``end`` exclusive.

    Attributes:
        recording: (N,) int64, index into the batch.
        label: (N,) int64, class index.
        start: (N,) int64, the first snippet.
        end: (N,) int64, the snippet after the last.
        score: (N,) outer-inner contrast S = S_i - S_o, float32 (float64 for float64 activations).
    """

    recording: Tensor
    label: Tensor
    start: Tensor
    end: Tensor
    score: Tensor


def extract_proposals(
    activations: Tensor,
    classes: Tensor,
    lengths: Tensor | None = None,
    *,
    thresholds: Sequence[float],
    min_length: int = 1,
    inflation: float = 0.25,
    outer: Literal["pooled", "mean_of_sides"] = "pooled",
    min_contrast: float = -math.inf,
    nms_iou: float = 0.5,
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> Proposals:
    """Proposals of a whole batch, scored by their contrast and thinned by class-wise NMS (Sec. 3.3).

    A proposal is a run of consecutive snippets (a 1-D connected component) whose activations are all above a threshold.
    A run that several thresholds find is one proposal. Its score is S = S_i - S_o: S_i is the mean activation inside,
    S_o the mean over ``max(1, floor(inflation * width))`` snippets on either side, cut off at the ends of the
    recording. S_o is 0 for a proposal that fills its recording. Not differentiable.

    CPU and CUDA give the same proposals and scores, bit for bit. The number of proposals depends on the data, so CUDA
    tensors cost one host synchronisation, two with ``offsets``. While the call runs on CUDA, it takes memory for as
    many proposals as there could be, 12 bytes (float64: 16) for each of the B * T * C activations. For sequences too
    long for shared memory (from about 7000 snippets on an H100, 2000 on a T4) it takes another 32 bytes a snippet, for
    two sequences a multiprocessor.

    Args:
        activations: (B, T, C) refined sequences r_c = lambda' T_c; (N, C) with ``offsets``, which are copied to
            (B, T, C). Half precision is computed in float32.
        classes: (B, C) bool, the classes to look at; the activations of others are never read.
        lengths: (B,) valid snippets of each recording (None: all T). What lies past never matters.
        thresholds: At least one, in any order; rounded to the precision of the activations.
        min_length: Shortest proposal, in snippets.
        inflation: Width of the neighbourhood on either side, as a fraction of the proposal's width.
        outer: ``pooled``: S_o is the mean over the snippets of both sides together; ``mean_of_sides``: the mean
            of the two means, or the one mean where the other side has no snippet.
        min_contrast: Proposals with a lower score are dropped before NMS; by default none. The authors' released code
            drops those below -0.4.
        nms_iou: Of two proposals of one class and recording with an IoU of at least this, the one with the
            lower score is dropped; in (0, 1], and 1 keeps all.
        offsets: (B+1,) the first row of each recording in a packed batch (:mod:`d2net.ops`).
        max_length: Of a packed batch, an upper bound of the lengths.

    Returns:
        Proposals by recording, class and falling score; of equal scores, the earlier start and then the
        earlier end comes first and wins in NMS.

    Raises:
        InputError: a wrong shape, type or setting; a length that is negative or larger than there is room; NaN or Inf
            among the activations that are read, or activations so large that their sum overflows; on CUDA, 2^29
            snippets or more.
    """
    activations, classes = as_tensors("extract_proposals", activations=activations, classes=classes)
    if lengths is not None:
        lengths = as_tensor("extract_proposals", "lengths", lengths).to(activations.device)
    if offsets is not None or max_length is not None:
        if activations.ndim != 2:
            raise InputError(
                f"extract_proposals: activations have shape {tuple(activations.shape)}, expected (N, C) with offsets"
            )
        packing = read_packing("extract_proposals", activations, lengths, offsets, max_length)
        activations, lengths = padded(activations, *packing), packing.lengths
    thresholds = _listed(thresholds)
    check_choice("extract_proposals: outer", outer, "pooled", "mean_of_sides")
    min_length = as_whole("extract_proposals", "min_length", min_length)
    inflation = as_number("extract_proposals", "inflation", inflation)
    min_contrast = as_number("extract_proposals", "min_contrast", min_contrast)
    nms_iou = as_number("extract_proposals", "nms_iou", nms_iou)
    settings = thresholds, min_length, inflation, outer == "mean_of_sides", min_contrast, nms_iou
    if _library.has_kernel("extract_proposals", activations):
        places, score = _extract_proposals(activations.detach(), classes, lengths, *settings)
        recording, label, start, end = places.unbind()
        return Proposals(recording, label, start, end, score)
    _check(activations, classes, lengths, *settings)
    return extract_proposals_ref(
        activations,
        classes,
        lengths,
        thresholds=thresholds,
        min_length=min_length,
        inflation=inflation,
        outer=outer,
        min_contrast=min_contrast,
        nms_iou=nms_iou,
    )


class Packing(NamedTuple):
    """Where the recordings of a packed batch are: the last arguments of :func:`d2net.ops.packed.padded`."""

    offsets: Tensor  # (B+1,)
    lengths: Tensor  # (B,)
    longest: int


def read_packing(
    operator: str, x: Tensor, lengths: Tensor | None, offsets: Tensor | None, max_length: int | None
) -> Packing:
    """The recordings of a packed batch ``x`` (N, ...), for what waits for the device anyway.

    Raises:
        InputError: a length that is negative, larger than there is room or above ``max_length``; or as
            :func:`d2net.ops.packed.as_offsets`.
    """
    offsets, most = as_offsets(operator, offsets, max_length, x)
    assert offsets is not None
    lengths = offsets.diff() if lengths is None else lengths
    check_lengths(operator, lengths, offsets[1:])
    places = torch.stack((offsets[:-1], offsets[1:], lengths)).tolist()
    for recording, (first, end, length) in enumerate(zip(*places, strict=True)):
        if not 0 <= first <= end <= len(x) or not 0 <= length <= end - first:
            raise InputError(
                f"{operator}: recording {recording} has {length} snippets and lies in rows {first} to {end} of "
                f"{len(x)}; lengths must lie in 0 to offsets[{recording + 1}] - offsets[{recording}]"
            )
    longest = max(places[2], default=0)
    if longest > most:
        raise InputError(f"{operator}: max_length is {max_length}, but a recording has {longest} snippets")
    return Packing(offsets, lengths.to(torch.int64), longest)


@torch.no_grad()
def extract_proposals_ref(
    activations: Tensor,
    classes: Tensor,
    lengths: Tensor | None = None,
    *,
    thresholds: Sequence[float],
    min_length: int = 1,
    inflation: float = 0.25,
    outer: Literal["pooled", "mean_of_sides"] = "pooled",
    min_contrast: float = -math.inf,
    nms_iou: float = 0.5,
) -> Proposals:
    """:func:`extract_proposals` in plain PyTorch, on any device; checks the values it reads but not the arguments."""
    _check_range(lengths, activations.shape[1])
    selected = _Selected.of(activations, classes, lengths)
    rows, device = torch.where(selected.valid, selected.rows, 0), activations.device
    if not (rows.to(torch.float64).abs().sum(dim=1) <= _LARGEST_SUM).all():
        raise _unusable(selected)

    # (row, start, end) of every component as one integer, which sorts in that order.
    base = rows.shape[1] + 1
    keys = [torch.empty(0, dtype=torch.int64, device=device)]
    for threshold in torch.tensor([float(t) for t in thresholds], dtype=rows.dtype, device=device):
        row, start, end = _components((rows > threshold) & selected.valid)
        long = end - start >= min_length
        keys.append(((row * base + start) * base + end)[long])
    key = torch.cat(keys).unique()
    row, start, end = key // base**2, key // base % base, key % base

    score = _contrast(rows, selected.length, row, start, end, inflation, outer).to(rows.dtype)
    high = ~(score < min_contrast)
    row, start, end, score = row[high], start[high], end[high], score[high]
    segments = torch.stack((start, end), dim=1).to(torch.float64)
    # Not batched_nms_1d_ref: a device may have a kernel for NMS but none for this operator.
    keep = batched_nms_1d(segments, score.to(torch.float64), row, nms_iou).sort().values
    keep = keep[score[keep].sort(descending=True, stable=True).indices]
    keep = keep[row[keep].sort(stable=True).indices]
    return Proposals(selected.recording[row[keep]], selected.label[row[keep]], start[keep], end[keep], score[keep])


class _Selected(NamedTuple):
    """The sequences of the selected classes, one row each."""

    recording: Tensor  # (R,)
    label: Tensor  # (R,)
    rows: Tensor  # (R, T) float32 or float64
    length: Tensor  # (R,)
    valid: Tensor  # (R, T): before the length

    @staticmethod
    def of(activations: Tensor, classes: Tensor, lengths: Tensor | None) -> _Selected:
        snippets, device = activations.shape[1], activations.device
        recording, label = classes.nonzero(as_tuple=True)
        rows = activations.transpose(1, 2)[recording, label]
        rows = rows.to(_native.accumulator(rows.dtype))
        length = torch.full_like(recording, snippets) if lengths is None else lengths.to(device, torch.int64)[recording]
        return _Selected(recording, label, rows, length, torch.arange(snippets, device=device) < length[:, None])


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
    reach = (inflation * width.to(torch.float64)).clamp(1, max(1, rows.shape[1])).floor().to(torch.int64)
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
    thresholds: list[float],
    min_length: int,
    inflation: float,
    mean_of_sides: bool,
    min_contrast: float,
    nms_iou: float,
) -> None:
    where = "extract_proposals:"
    if activations.ndim != 3 or activations.dtype not in FLOATING:
        raise InputError(
            f"{where} activations are {tuple(activations.shape)} {activations.dtype}, "
            "expected (B, T, C) of float32, float64, float16 or bfloat16"
        )
    batch, snippets, width = activations.shape
    if snippets >= 2**31:
        raise InputError(f"{where} recordings of {snippets} snippets are too long, cut them below 2^31")
    if classes.shape != (batch, width) or classes.dtype != torch.bool:
        raise InputError(
            f"{where} classes are {tuple(classes.shape)} {classes.dtype}, expected ({batch}, {width}) torch.bool"
        )
    if classes.device != activations.device:
        raise InputError(f"{where} classes are on {classes.device} but activations on {activations.device}; move one")
    check_lengths("extract_proposals", lengths, activations)
    if not thresholds or not all(map(math.isfinite, thresholds)):
        raise InputError(f"{where} thresholds must be one or more finite numbers, found {thresholds}")
    if min_length < 1:
        raise InputError(f"{where} min_length must be at least 1 snippet, found {min_length}")
    if not 0 <= inflation < math.inf:
        raise InputError(f"{where} inflation must be a finite number of at least 0, found {inflation}")
    if math.isnan(min_contrast):
        raise InputError(f"{where} min_contrast must be a number, found {min_contrast}")
    if not 0 < nms_iou <= 1:
        raise InputError(f"{where} nms_iou must lie above 0 and at most at 1, found {nms_iou}")


def _cpu(
    activations: Tensor,
    classes: Tensor,
    lengths: Tensor | None,
    thresholds: list[float],
    min_length: int,
    inflation: float,
    mean_of_sides: bool,
    min_contrast: float,
    nms_iou: float,
) -> tuple[Tensor, Tensor]:
    _check_range(lengths, activations.shape[1])
    x = activations.to(_native.accumulator(activations.dtype))
    found = _native.cpu(
        "find_proposals",
        x.dtype,
        _native.address("extract_proposals", x),  # read by its strides
        *x.shape,
        *x.stride(),
        classes.contiguous(),
        _native.plain_lengths(lengths),
        torch.from_numpy(np.array(thresholds)),
        len(thresholds),
        min_length,
        inflation,
        mean_of_sides,
        min_contrast,
        nms_iou,
    )
    if found.count < 0:
        raise _unusable(_Selected.of(x, classes, lengths))
    places, score = _columns(x, found.count)
    _native.cpu("copy_proposals", x.dtype, found, places, score)
    return places, score


def _cuda(
    activations: Tensor,
    classes: Tensor,
    lengths: Tensor | None,
    thresholds: list[float],
    min_length: int,
    inflation: float,
    mean_of_sides: bool,
    min_contrast: float,
    nms_iou: float,
) -> tuple[Tensor, Tensor]:
    x, device = activations, activations.device
    batch, snippets, width = sizes = x.shape
    if snippets >= 2**29:
        raise InputError(
            f"extract_proposals: recordings of {snippets} snippets are too long for CUDA, cut them below 2^29"
        )
    dtype = _native.accumulator(x.dtype)
    sequences = batch * width
    starts, ends = x.new_empty(2, sequences, snippets, dtype=torch.int32)
    scores = x.new_empty(sequences, snippets, dtype=dtype)
    offsets = x.new_empty(sequences + 2, dtype=torch.int64)
    rising = torch.tensor(sorted(thresholds), dtype=dtype)  # must live until the synchronisation below: copied async
    scratch_bytes = _native.cuda("find_proposals_scratch_bytes", x.dtype, device, *sizes)
    _native.cuda(
        "find_proposals",
        x.dtype,
        device,
        _native.address("extract_proposals", x),  # read by its strides
        *sizes,
        *x.stride(),
        classes.contiguous(),
        _native.plain_lengths(lengths),
        rising.to(device, non_blocking=True),
        len(thresholds),
        min_length,
        inflation,
        mean_of_sides,
        min_contrast,
        nms_iou,
        starts,
        ends,
        scores,
        offsets,
        x.new_empty(scratch_bytes, dtype=torch.uint8),
    )
    count, wrong = offsets[-2:].tolist()  # the only synchronisation
    if wrong:
        _check_range(lengths, snippets)
        raise _unusable(_Selected.of(x, classes, lengths))
    places, score = _columns(x, count)
    _native.cuda("copy_proposals", dtype, device, starts, ends, scores, offsets, *sizes, count, places, score)
    return places, score


def _fake(
    activations: Tensor,
    classes: Tensor,
    lengths: Tensor | None,
    thresholds: list[float],
    min_length: int,
    inflation: float,
    mean_of_sides: bool,
    min_contrast: float,
    nms_iou: float,
) -> tuple[Tensor, Tensor]:
    return _columns(activations, torch.library.get_ctx().new_dynamic_size())


def _columns(activations: Tensor, count: int | torch.SymInt) -> tuple[Tensor, Tensor]:
    """Uninitialised memory for N = ``count`` proposals: recording, label, start, end as rows (4, N); scores (N,)."""
    dtype = _native.accumulator(activations.dtype)
    return activations.new_empty(4, count, dtype=torch.int64), activations.new_empty(count, dtype=dtype)


_extract_proposals = _library.register(
    "extract_proposals(Tensor activations, Tensor classes, Tensor? lengths, float[] thresholds, int min_length,"
    " float inflation, bool mean_of_sides, float min_contrast, float nms_iou) -> (Tensor, Tensor)",
    check=_check,
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)


def _listed(thresholds: Sequence[float]) -> list[float]:
    """The thresholds as a list of floats."""
    try:
        return [as_number("extract_proposals", "a threshold", t) for t in thresholds]
    except (TypeError, ValueError):
        found = quoted(thresholds)
        raise InputError(f"extract_proposals: thresholds must be a list of numbers, found {found}") from None


def _check_range(lengths: Tensor | None, snippets: int) -> None:
    """Require lengths in [0, T]. Not in the operator's check, as torch.compile cannot trace a look at values."""
    values = [] if lengths is None else lengths.tolist()
    if values and not 0 <= min(values) <= max(values) <= snippets:
        raise InputError(f"extract_proposals: lengths must lie in 0 to T = {snippets}, found {values}")


def _unusable(selected: _Selected) -> InputError:
    """The error for sequences whose sums are not finite."""
    bad = (~selected.rows.isfinite() & selected.valid).nonzero()
    if not len(bad):
        return InputError("extract_proposals: activations are so large that their sum overflows; scale them down")
    row, snippet = bad[0].tolist()
    return InputError(
        f"extract_proposals: activations hold NaN or Inf (first in recording {int(selected.recording[row])}, "
        f"snippet {snippet}, class {int(selected.label[row])}); check the features and the model"
    )
