"""In which precision operators and losses compute with inputs in half precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

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


# Asked here, since torch.compile of PyTorch before 2.12 breaks at the question.
_AUTOCAST = frozenset(
    d for d in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu") if torch.amp.is_autocast_available(d)
)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the dtype of ``a`` and ``b``, also under autocast: the sums may exceed the largest float16."""
    with without_autocast(a.device.type):
        return a @ b


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device, of which some, such as "meta", have none."""
    return device in _AUTOCAST and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager[None]:
    """Within the block autocast is off for a type of device."""
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()
