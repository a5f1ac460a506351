"""Operators of temporal action localization. Shapes: B recordings, T snippets, C classes, D embedding width.

Operators that take ``offsets`` also take packed batches, (N, ...) in place of (B, T, ...): see :mod:`d2net.ops.packed`.
Each size may be 0: results then have the shapes that follow, and a sum, mean or maximum over nothing is 0.

Within :func:`use_backend` they compute in plain PyTorch, to compare with. :func:`backend_of` tells what runs an
operator, :func:`build_info` how the extension was built, :func:`runs_on` on which chips its kernels run, and
:func:`obstacle` what keeps them from a GPU that is there.
"""

from d2net.ops._library import backend_of, use_backend
from d2net.ops._native import build_info, obstacle, runs_on
from d2net.ops.attention_pool import Pooled, attention_pool
from d2net.ops.bottom_up_attention import bottom_up_attention
from d2net.ops.condition_number import joint_log_condition_number, log_condition_number
from d2net.ops.iou import iou_1d
from d2net.ops.nms import batched_nms_1d, nms_1d, soft_nms_1d
from d2net.ops.proposals import Proposals, extract_proposals
from d2net.ops.snippet_pdmi import SnippetPDMI, snippet_pdmi
from d2net.ops.tcam_pool import TCAMPool, tcam_pool
from d2net.ops.topk_pool import topk_pool

__all__ = [
    "TCAMPool",
    "Pooled",
    "Proposals",
    "SnippetPDMI",
    "attention_pool",
    "backend_of",
    "batched_nms_1d",
    "bottom_up_attention",
    "build_info",
    "extract_proposals",
    "iou_1d",
    "joint_log_condition_number",
    "log_condition_number",
    "nms_1d",
    "obstacle",
    "runs_on",
    "snippet_pdmi",
    "soft_nms_1d",
    "tcam_pool",
    "topk_pool",
    "use_backend",
]
