"""In which precision operators and losses compute with inputs in half precision."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def kept_in_float32(before: Tensor, after: Tensor) -> Tensor:
    """A module's buffer after a conversion of the module: ``half()`` and ``bfloat16()`` move it but keep its dtype.

    Args:
        before: The buffer before the conversion.
        after: What ``nn.Module._apply`` made of it.
    """
    return before.to(after.device) if after.dtype in (torch.float16, torch.bfloat16) else after


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the dtype of ``a`` and ``b``, also under autocast: the sums may exceed the largest float16."""
    if a.is_meta:  # no autocast on the meta device
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b
