"""Non-maximum suppression of temporal segments: greedy, greedy per group, and soft.

Segments are rows (start, end), all in one unit (seconds, snippets). Their IoU is overlap / union, and 0 where the union
is 0 or the lengths add up to infinity; a segment with ``end <= start`` overlaps nothing. Of equal scores the lower
index comes first. Nothing here is differentiable.

Computed in float32, or in float64 where segments or scores are float64 or integers. Half precision is converted, which
changes no value; but it is coarse (between 512 and 1024 the steps of float16 are 0.5, those of bfloat16 are 4), so keep
segments in float32 from the start.

The number of results depends on the data, so CUDA tensors cost one host synchronisation, and torch.compile keeps one
graph only with ``torch._dynamo.config.capture_dynamic_output_shape_ops``.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NoReturn

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops import _library, _native
from d2net.ops.checks import as_number, as_tensor, as_tensors, check_choice, check_computed, check_floating


def nms_1d(segments: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy NMS: removes a segment whose IoU with a kept segment of higher score is >= ``iou_threshold``.

    Args:
        segments: (N, 2) floating point or integers, rows (start, end), finite.
        scores: (N,), on the same device, not NaN.
        iou_threshold: In [0, 1]. 1 removes only copies; 0 removes whatever overlaps a kept segment at all.

    Returns:
        (K,) int64, indices of the kept segments by falling score.

    Raises:
        InputError: A wrong shape, type, device or threshold, or NaN in the input.
    """
    segments, scores = _prepared("nms_1d", segments, scores)
    iou_threshold = as_number("nms_1d", "iou_threshold", iou_threshold)
    if _library.has_kernel("nms_1d", scores):
        return _nms_1d(segments, scores, iou_threshold)
    _check("nms_1d", segments, scores, iou_threshold)
    _check_values("nms_1d", segments, scores)
    return nms_1d_ref(segments, scores, iou_threshold)


def batched_nms_1d(segments: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """:func:`nms_1d` within each group: segments of different groups never suppress each other.

    Args:
        segments: (N, 2) floating point or integers, rows (start, end), finite.
        scores: (N,), on the same device, not NaN.
        groups: (N,) integers on the same device, any values (for instance recording * classes + class).
        iou_threshold: In [0, 1], as in :func:`nms_1d`.

    Returns:
        (K,) int64, indices of the kept segments by falling score over all groups.

    Raises:
        InputError: A wrong shape, type, device or threshold, or NaN in the input.
    """
    segments, scores = _prepared("batched_nms_1d", segments, scores)
    iou_threshold = as_number("batched_nms_1d", "iou_threshold", iou_threshold)
    groups = as_tensor("batched_nms_1d", "groups", groups, scores)
    if not groups.is_floating_point():
        groups = groups.to(torch.int64)
    if _library.has_kernel("batched_nms_1d", scores):
        return _batched_nms_1d(segments, scores, groups, iou_threshold)
    _check_batched(segments, scores, groups, iou_threshold)
    _check_values("batched_nms_1d", segments, scores)
    return batched_nms_1d_ref(segments, scores, groups, iou_threshold)


def soft_nms_1d(
    segments: Tensor,
    scores: Tensor,
    *,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: Literal["linear", "gaussian"] = "gaussian",
) -> tuple[Tensor, Tensor]:
    """Soft-NMS: decays the scores of overlapping segments instead of removing them (Bodla et al., ICCV 2017).

    Repeatedly takes the segment of highest score and multiplies every remaining score by ``1 - IoU`` where
    IoU >= ``iou_threshold`` (``linear``) or by ``exp(-IoU^2 / sigma)`` (``gaussian``). Segments whose score is or
    falls below ``min_score`` are dropped; a ``min_score`` above 0 makes it faster. On CUDA one block takes the segments
    in turn, several at once where they do not overlap, and visits only the segments that overlap them.

    Args:
        segments: (N, 2) floating point or integers, rows (start, end), finite.
        scores: (N,), on the same device, not NaN.
        iou_threshold: In [0, 1]; used by ``linear`` only.
        sigma: > 0, and not below the smallest normal number of the type; used by ``gaussian`` only.
        min_score: >= 0.
        method: ``"linear"`` or ``"gaussian"``.

    Returns:
        ``keep`` (K,) int64 and ``new_scores`` (K,): indices and decayed scores, by falling decayed score. The scores
        are float32, or float64 where computed in float64.

    Raises:
        InputError: A wrong shape, type, device or parameter, or NaN in the input.
    """
    segments, scores = _prepared("soft_nms_1d", segments, scores)
    check_choice("soft_nms_1d: method", method, "linear", "gaussian")
    iou_threshold = as_number("soft_nms_1d", "iou_threshold", iou_threshold)
    sigma, min_score = as_number("soft_nms_1d", "sigma", sigma), as_number("soft_nms_1d", "min_score", min_score)
    if _library.has_kernel("soft_nms_1d", scores):
        return _soft_nms_1d(segments, scores, iou_threshold, sigma, min_score, method == "gaussian")
    _check_soft(segments, scores, iou_threshold, sigma, min_score, method == "gaussian")
    _check_values("soft_nms_1d", segments, scores)
    return soft_nms_1d_ref(
        segments, scores, iou_threshold=iou_threshold, sigma=sigma, min_score=min_score, method=method
    )


def nms_1d_ref(segments: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """:func:`nms_1d` in plain PyTorch, on any device, without checks."""
    order = _falling(scores)
    keep = []
    while len(order):
        first, rest = order[0], order[1:]
        keep.append(first)
        overlap, iou = _overlap_iou(segments[first], segments[rest])
        order = rest[~((overlap > 0) & (iou >= iou_threshold))]
    return torch.stack(keep) if keep else order


def batched_nms_1d_ref(segments: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """:func:`batched_nms_1d` in plain PyTorch, on any device, without checks."""
    kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    for group in groups.unique():
        members = torch.nonzero(groups == group).flatten()
        kept[members[nms_1d_ref(segments[members], scores[members], iou_threshold)]] = True
    order = _falling(scores)
    return order[kept[order]]


def soft_nms_1d_ref(
    segments: Tensor,
    scores: Tensor,
    *,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: Literal["linear", "gaussian"] = "gaussian",
) -> tuple[Tensor, Tensor]:
    """:func:`soft_nms_1d` in plain PyTorch, on any device, without checks."""
    left = torch.nonzero(scores >= min_score).flatten()
    current = scores[left]
    keep, new_scores = [], []
    while len(left):
        best = _falling(current)[0]
        keep.append(left[best])
        new_scores.append(current[best])
        overlap, iou = _overlap_iou(segments[left[best]], segments[left])
        if method == "gaussian":
            weight = torch.exp(-(iou * iou) / sigma)
        else:
            weight = torch.where(iou >= iou_threshold, 1 - iou, torch.ones_like(iou))
        current = torch.where(overlap > 0, current * weight, current)
        stays = current >= min_score
        stays[best] = False
        left, current = left[stays], current[stays]
    if not keep:
        return left, current
    return torch.stack(keep), torch.stack(new_scores)


def _check(name: str, segments: Tensor, scores: Tensor, iou_threshold: float) -> None:
    if segments.ndim != 2 or segments.shape[1] != 2:
        raise InputError(f"{name}: segments must be (N, 2) rows (start, end), not {_describe(segments)}")
    if scores.shape != segments.shape[:1]:
        raise InputError(f"{name}: scores must be ({len(segments)},), one per segment, not {_describe(scores)}")
    if segments.device != scores.device:
        raise InputError(f"{name}: segments are on {segments.device}, scores on {scores.device}: move them together")
    check_computed(name, "segments", segments)
    if scores.dtype is not segments.dtype:
        raise InputError(f"{name}: segments are {segments.dtype}, scores {scores.dtype}: convert one of them")
    if not 0 <= iou_threshold <= 1:
        raise InputError(f"{name}: iou_threshold must be in [0, 1], not {iou_threshold}")


def _check_batched(segments: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> None:
    _check("batched_nms_1d", segments, scores, iou_threshold)
    if groups.shape != scores.shape or groups.dtype is not torch.int64:
        raise InputError(
            f"batched_nms_1d: groups must be ({len(scores)},) integers, not {_describe(groups)}: one per segment"
        )
    if groups.device != scores.device:
        raise InputError(
            f"batched_nms_1d: groups are on {groups.device}, scores on {scores.device}: move them together"
        )


def _check_soft(
    segments: Tensor, scores: Tensor, iou_threshold: float, sigma: float, min_score: float, gaussian: bool
) -> None:
    _check("soft_nms_1d", segments, scores, iou_threshold)
    if not sigma >= torch.finfo(scores.dtype).tiny:
        raise InputError(f"soft_nms_1d: sigma must be > 0 in {scores.dtype}, not {sigma}")
    if not min_score >= 0:
        raise InputError(f"soft_nms_1d: min_score must be >= 0, not {min_score}")


def _nms_1d_cpu(segments: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    n = scores.shape[0]
    keep = torch.empty(n, dtype=torch.int64)
    count = _native.cpu("nms_1d", scores.dtype, segments.contiguous(), scores.contiguous(), n, iou_threshold, keep)
    return _first("nms_1d", count, keep)


def _nms_1d_cuda(segments: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return _greedy_cuda("nms_1d", segments, scores, None, iou_threshold)


def _nms_1d_fake(segments: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return segments.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _batched_nms_1d_cpu(segments: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    n = scores.shape[0]
    keep = torch.empty(n, dtype=torch.int64)
    count = _native.cpu(
        "batched_nms_1d",
        scores.dtype,
        segments.contiguous(),
        scores.contiguous(),
        groups.contiguous(),
        n,
        iou_threshold,
        keep,
    )
    return _first("batched_nms_1d", count, keep)


def _batched_nms_1d_cuda(segments: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    return _greedy_cuda("batched_nms_1d", segments, scores, groups, iou_threshold)


# Up to so many segments one CUDA block does all (kNmsBlockLimit in csrc/nms.h).
_BLOCK_LIMIT = {torch.float32: 2048, torch.float64: 1024}


def _greedy_cuda(name: str, segments: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float) -> Tensor:
    n, dtype, device = _cuda_size(name, scores), scores.dtype, scores.device
    if n == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    result = torch.empty(2, dtype=torch.int64, device=device)
    groups = None if groups is None else groups.contiguous()
    inputs = (segments.contiguous(), scores.contiguous(), groups, n, iou_threshold)
    if n <= _BLOCK_LIMIT[dtype]:
        keep = torch.empty(n, dtype=torch.int64, device=device)
        _native.cuda("nms_1d_block", dtype, device, *inputs, keep, result)
        return _cut(keep, _count(name, result))
    scratch_bytes = _native.cuda("nms_1d_scratch_bytes", dtype, device, n)
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=device)
    narrow = torch.empty(n, dtype=torch.int32, device=device)
    _native.cuda("nms_1d", dtype, device, *inputs, scratch, scratch_bytes, narrow, result)
    return narrow[: _count(name, result)].to(torch.int64)


def _batched_nms_1d_fake(segments: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    return segments.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _soft_nms_1d_cpu(
    segments: Tensor, scores: Tensor, iou_threshold: float, sigma: float, min_score: float, gaussian: bool
) -> tuple[Tensor, Tensor]:
    n = scores.shape[0]
    keep = torch.empty(n, dtype=torch.int64)
    new_scores = scores.new_empty(n)
    count = _native.cpu(
        "soft_nms_1d",
        scores.dtype,
        segments.contiguous(),
        scores.contiguous(),
        n,
        iou_threshold,
        sigma,
        min_score,
        gaussian,
        keep,
        new_scores,
    )
    return _first("soft_nms_1d", count, keep), _first("soft_nms_1d", count, new_scores)


def _soft_nms_1d_cuda(
    segments: Tensor, scores: Tensor, iou_threshold: float, sigma: float, min_score: float, gaussian: bool
) -> tuple[Tensor, Tensor]:
    n, dtype, device = _cuda_size("soft_nms_1d", scores), scores.dtype, scores.device
    keep = torch.empty(n, dtype=torch.int64, device=device)
    new_scores, scratch = scores.new_empty(n), scores.new_empty(4 * n)
    if n == 0:
        return keep, new_scores
    result = torch.empty(2, dtype=torch.int64, device=device)
    segments, scores = segments.contiguous(), scores.contiguous()
    options = (iou_threshold, sigma, min_score, gaussian)
    _native.cuda("soft_nms_1d", dtype, device, segments, scores, n, *options, scratch, keep, new_scores, result)
    count = _count("soft_nms_1d", result)
    return _cut(keep, count), _cut(new_scores, count)


def _soft_nms_1d_fake(
    segments: Tensor, scores: Tensor, iou_threshold: float, sigma: float, min_score: float, gaussian: bool
) -> tuple[Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    return segments.new_empty(size, dtype=torch.int64), scores.new_empty(size)


_nms_1d = _library.register(
    "nms_1d(Tensor segments, Tensor scores, float iou_threshold) -> Tensor",
    check=partial(_check, "nms_1d"),
    cpu=_nms_1d_cpu,
    cuda=_nms_1d_cuda,
    fake=_nms_1d_fake,
)
_batched_nms_1d = _library.register(
    "batched_nms_1d(Tensor segments, Tensor scores, Tensor groups, float iou_threshold) -> Tensor",
    check=_check_batched,
    cpu=_batched_nms_1d_cpu,
    cuda=_batched_nms_1d_cuda,
    fake=_batched_nms_1d_fake,
)
_soft_nms_1d = _library.register(
    "soft_nms_1d(Tensor segments, Tensor scores, float iou_threshold, float sigma, float min_score, bool gaussian)"
    " -> (Tensor, Tensor)",
    check=_check_soft,
    cpu=_soft_nms_1d_cpu,
    cuda=_soft_nms_1d_cuda,
    fake=_soft_nms_1d_fake,
)


def _falling(scores: Tensor) -> Tensor:
    """Indices by falling score; of equal scores the lower index comes first."""
    return torch.sort(scores, descending=True, stable=True).indices


def _overlap_iou(one: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Overlap and IoU of one segment (2,) with others (M, 2): (M,) each."""
    start, end = others.unbind(1)
    overlap = (torch.minimum(one[1], end) - torch.maximum(one[0], start)).clamp(min=0)
    union = (one[1] - one[0]).clamp(min=0) + (end - start).clamp(min=0) - overlap
    return overlap, torch.where(union > 0, overlap / union, torch.zeros_like(union))


def _first(name: str, count: int, results: Tensor) -> Tensor:
    """The first ``count`` results; ``-1 - count`` is the row that the kernel refused."""
    if count < 0:
        _refuse_row(name, -1 - count)
    return results[:count].clone()


def _count(name: str, result: Tensor) -> int:
    """The number of results of a CUDA kernel, or InputError if it refused a row. The only host synchronisation."""
    count, bad_row = result.tolist()
    if bad_row >= 0:
        _refuse_row(name, bad_row)
    return int(count)


def _cut(results: Tensor, count: int) -> Tensor:
    """The first ``count`` results: a view where the whole is small, which saves a launch, else a copy."""
    return results[:count] if results.nbytes <= 16 * 1024 else results[:count].clone()


def _refuse_row(name: str, row: int) -> NoReturn:
    raise InputError(
        f"{name}: segments must be finite and scores not NaN, but row {row} is not: filter them before NMS"
    )


def _cuda_size(name: str, scores: Tensor) -> int:
    n = scores.shape[0]
    if n >= 2**31 - 1024:
        raise InputError(f"{name}: {n} segments are too many for one call on CUDA: give fewer than 2147482624")
    return n


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _prepared(name: str, segments: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Segments and scores in the dtype of the computation, without gradient."""
    segments, scores = as_tensors(name, segments=segments, scores=scores)
    dtype = torch.float32
    for what, x in (("segments", segments), ("scores", scores)):
        if x.is_floating_point():
            check_floating(name, what, x)
        if x.dtype == torch.float64 or not x.is_floating_point():
            dtype = torch.float64  # also for integers: float32 holds them only up to 2^24
    return segments.detach().to(dtype), scores.detach().to(dtype)


def _check_values(name: str, segments: Tensor, scores: Tensor) -> None:
    """Raises InputError for NaN or Inf, as the kernels do."""
    if not (torch.isfinite(segments).all() and not torch.isnan(scores).any()):
        raise InputError(f"{name}: segments must be finite and scores not NaN: filter them before NMS")
