"""In which precision operators and losses compute what comes in half precision."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the type that they have, under autocast too: its sums may be larger than the largest float16."""
    if a.is_meta:  # which has no autocast
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b
