"""In which precision operators and losses compute what comes in half precision."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def kept_in_float32(before: Tensor, after: Tensor) -> Tensor:
    """What a buffer becomes where its module's conversion made ``after`` of it: ``half()`` and its kin only move it."""
    return before.to(after.device) if after.dtype in (torch.float16, torch.bfloat16) else after


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the type that they have, under autocast too: its sums may be larger than the largest float16."""
    if a.is_meta:  # which has no autocast
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b
