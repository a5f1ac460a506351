"""The only file that hands pointers, shapes and streams to the extension ``d2net._C``.

Callers have checked shapes, dtypes and devices, and pass contiguous tensors: a wrong one here is a bug of ours.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def _load() -> ModuleType:
    try:
        return importlib.import_module("d2net._C")
    except ImportError as error:
        raise ImportError(
            f"d2net's native extension cannot be imported ({error}): build it with `pip install .` in the repository"
        ) from error


_C = _load()
_SUFFIX = {torch.float32: "float32", torch.float64: "float64"}


def build_info() -> dict[str, Any]:
    """How it was built: ``compiler``, ``cuda`` (bool), ``cuda_compiler`` and ``cuda_archs`` ('' without CUDA)."""
    return dict(_C.build_info())


def backend(device: torch.device, operator: str) -> str:
    """The backend that runs ``operator`` on ``device``: ``cpu``, ``cuda`` or ``reference`` (plain PyTorch)."""
    prefix = {"cpu": "", "cuda": "cuda_"}.get(device.type)
    if prefix is not None and hasattr(_C, f"{prefix}{operator}_float32"):
        return device.type
    return "reference"


def nms_1d(segments: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """CPU tensors (N, 2) and (N,) of one floating type -> kept indices (K,) int64."""
    keep = torch.empty(len(scores), dtype=torch.int64)
    function = getattr(_C, f"nms_1d_{_SUFFIX[scores.dtype]}")
    count = function(segments.data_ptr(), scores.data_ptr(), len(scores), iou_threshold, keep.data_ptr())
    return keep[:count].clone()


def batched_nms_1d(segments: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """CPU tensors (N, 2), (N,) and int64 (N,) -> kept indices (K,) int64."""
    keep = torch.empty(len(scores), dtype=torch.int64)
    function = getattr(_C, f"batched_nms_1d_{_SUFFIX[scores.dtype]}")
    count = function(
        segments.data_ptr(), scores.data_ptr(), groups.data_ptr(), len(scores), iou_threshold, keep.data_ptr()
    )
    return keep[:count].clone()


def soft_nms_1d(
    segments: Tensor, scores: Tensor, iou_threshold: float, sigma: float, min_score: float, gaussian: bool
) -> tuple[Tensor, Tensor]:
    """CPU tensors (N, 2) and (N,) -> kept indices (K,) int64 and their decayed scores (K,)."""
    keep = torch.empty(len(scores), dtype=torch.int64)
    new_scores = torch.empty_like(scores)
    function = getattr(_C, f"soft_nms_1d_{_SUFFIX[scores.dtype]}")
    count = function(
        segments.data_ptr(),
        scores.data_ptr(),
        len(scores),
        iou_threshold,
        sigma,
        min_score,
        gaussian,
        keep.data_ptr(),
        new_scores.data_ptr(),
    )
    return keep[:count].clone(), new_scores[:count].clone()


def cuda_batched_nms_1d(segments: Tensor, offsets: Tensor, iou_threshold: float) -> Tensor:
    """CUDA rows (N, 2) sorted by group and falling score, int64 offsets (G + 1,) -> alive (N,) bool, on the device."""
    alive = torch.ones(len(segments), dtype=torch.uint8, device=segments.device)
    function = getattr(_C, f"cuda_batched_nms_1d_{_SUFFIX[segments.dtype]}")
    # The kernel launch makes its device current; the guard restores the caller's.
    with torch.cuda.device(segments.device):
        function(
            segments.data_ptr(),
            offsets.data_ptr(),
            len(segments),
            len(offsets) - 1,
            iou_threshold,
            alive.data_ptr(),
            segments.device.index,
            torch.cuda.current_stream().cuda_stream,
        )
    return alive.bool()
