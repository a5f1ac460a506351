"""The only file that hands pointers, shapes and streams to the extension ``d2net._C``.

Callers have checked shapes, dtypes and devices, and pass contiguous tensors: a wrong one here is a bug of ours.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
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
Native = Callable[..., Any]  # on_cpu or on_cuda, below
_SUFFIX = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def build_info() -> dict[str, Any]:
    """How it was built: ``compiler``, ``cuda`` (bool), ``cuda_compiler`` and ``cuda_archs`` ('' without CUDA)."""
    return dict(_C.build_info())


def cpu(function: str, dtype: torch.dtype, *args: Tensor | float | None) -> Any:
    """Call the CPU function ``function`` for ``dtype`` with up to ``torch.get_num_threads()`` threads.

    Tensors go as their address, None as null, numbers as they are; the number of threads is added last.
    """
    return getattr(_C, f"{function}_{_SUFFIX[dtype]}")(*map(_passed, args), torch.get_num_threads())


def cuda(function: str, dtype: torch.dtype, device: torch.device, *args: Tensor | float | None) -> Any:
    """Enqueue the kernels of ``function`` on ``device`` and its current stream; both are added last."""
    # The launch makes its device current; the guard restores the caller's.
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        return getattr(_C, f"cuda_{function}_{_SUFFIX[dtype]}")(*map(_passed, args), device.index, stream)


def on_cpu(function: str, like: Tensor, *args: Tensor | float | None) -> Any:
    """:func:`cpu` for the type of ``like``."""
    return cpu(function, like.dtype, *args)


def on_cuda(function: str, like: Tensor, *args: Tensor | float | None) -> Any:
    """:func:`cuda` for the type and the device of ``like``."""
    return cuda(function, like.dtype, like.device, *args)


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def plain(x: Tensor) -> Tensor:
    """``x`` as the CPU functions read it: contiguous, half precision in float32."""
    return (x if x.dtype in (torch.float32, torch.float64) else x.float()).contiguous()


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def plain_lengths(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.to(torch.int64).contiguous()


def _passed(argument: Tensor | float | None) -> float:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return 0 if argument is None else argument
