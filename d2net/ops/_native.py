"""The only file that calls the extension ``d2net._C``, with tensors, sizes and streams.

``_C`` is private: it takes memory for what it is said to be. Callers are kernels of operators, whose check
(``_library.register``) has seen shapes, dtypes, devices and numbers. That tensors are contiguous and on the device of
the call, ``_C`` looks at once more.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from d2net.errors import D2NetError


def _load() -> ModuleType:
    try:
        return importlib.import_module("d2net._C")
    except ImportError as error:
        raise ImportError(
            f"d2net's native extension cannot be imported ({error}): build it with `pip install .` in the repository"
        ) from error


_C = _load()
Native = Callable[..., Any]  # on_cpu or on_cuda, below
Members = tuple[Tensor | float | None, ...]  # of a struct, in their order
Argument = Tensor | float | Members | None
_SUFFIX = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def build_info() -> dict[str, Any]:
    """How it was built: ``compiler``, ``cuda`` (bool), ``cuda_compiler`` and ``cuda_archs`` ('' without CUDA)."""
    return dict(_C.build_info())


def cpu(function: str, dtype: torch.dtype, *args: Argument) -> Any:
    """Call the CPU function ``function`` for ``dtype`` with up to ``torch.get_num_threads()`` threads.

    Of tensors it gets the address, null of None; the number of threads is added last.
    """
    return _bound(function, dtype)(*args, torch.get_num_threads())


def cuda(function: str, dtype: torch.dtype, device: torch.device, *args: Argument) -> Any:
    """Enqueue the kernels of ``function`` on ``device`` and its current stream; both are added last.

    Raises:
        D2NetError: the kernels were built for other chips.
        RuntimeError: a launch failed.
    """
    _check_chip(device)
    call = _bound(f"cuda_{function}", dtype)
    index = device.index
    # What torch.cuda.current_stream(device).cuda_stream is, without making an object of it at every call.
    stream = torch._C._cuda_getCurrentRawStream(index)
    if torch._C._cuda_getDevice() == index:
        return call(*args, index, stream)
    with torch.cuda.device(device):  # the launch makes its device current; this restores the caller's
        return call(*args, index, stream)


@functools.cache
def _bound(function: str, dtype: torch.dtype) -> Callable[..., Any]:
    return getattr(_C, f"{function}_{_SUFFIX[dtype]}")


@functools.cache
def _check_chip(device: torch.device) -> None:
    """Before the first launch, whose error would be hard to understand, and only then."""
    capability = torch.cuda.get_device_capability(device)
    archs = build_info()["cuda_archs"]
    if not runs_on(archs, capability):
        name = torch.cuda.get_device_name(device)
        raise D2NetError(
            f"d2net's kernels were built for CUDA architectures {archs}, {name} ({device}) is {capability[0]}."
            f"{capability[1]}: build them again, CMAKE_CUDA_ARCHITECTURES={capability[0]}{capability[1]} pip install ."
        )


def runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether kernels built for ``archs`` (CMAKE_CUDA_ARCHITECTURES, separated by spaces) run on a chip.

    Machine code (``80-real``) runs on chips of the same major version and no lower minor one, PTX (``80-virtual``) on
    all later chips; ``80`` means both. With an ``a`` it is for that chip alone, with an ``f`` for its major version.
    Words such as ``native`` do not tell: True.
    """
    for arch in archs.split():
        found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", arch)
        if found is None:
            return True
        built = int(found[1]), int(found[2])
        if found[3] == "a":
            runs = built == capability
        elif found[3] == "f" or found[4] == "-real":
            runs = built[0] == capability[0] and built <= capability
        else:
            runs = built <= capability
        if runs:
            return True
    return False


def on_cpu(function: str, like: Tensor, *args: Argument) -> Any:
    """:func:`cpu` for the type of ``like``."""
    return _bound(function, like.dtype)(*args, torch.get_num_threads())


def on_cuda(function: str, like: Tensor, *args: Argument) -> Any:
    """:func:`cuda` for the type and the device of ``like``."""
    return cuda(function, like.dtype, like.device, *args)


def reading(
    native: Native, kernel: Callable[..., Any], fake: Callable[..., Any], tensors: tuple[int, ...], lengths: int
) -> Callable[..., Any]:
    """``kernel(native, *arguments)`` with tensors, the arguments number ``tensors``, as the extension reads them.

    That is contiguous; argument number ``lengths`` (-1: there is none) in int64; and on a CPU half precision in
    float32, where results are converted to the types of those that ``fake`` makes.
    """
    widens = native is on_cpu

    def call(*arguments: Any) -> Any:
        read, widened = list(arguments), False
        for i in tensors:
            x = arguments[i]
            if x is None:
                continue
            dtype = x.dtype
            if dtype is not torch.float32:  # nearly always
                if i == lengths:
                    if dtype is not torch.int64:
                        x = x.to(torch.int64)
                elif widens and (dtype is torch.float16 or dtype is torch.bfloat16):
                    x, widened = x.float(), True
            read[i] = x.contiguous()
        results = kernel(native, *read)
        if not widened:
            return results
        wanted = fake(*arguments)
        if isinstance(results, Tensor):
            return results.to(wanted.dtype)
        return tuple([x.to(like.dtype) for x, like in zip(results, wanted, strict=True)])

    return call


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums over numbers of ``dtype`` are kept in (accumulator_t of csrc/float16.h)."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def empty_sums(x: Tensor, *size: int) -> Tensor:
    """Memory for sums over ``x``."""
    if x.dtype is torch.float32:  # a call without dtype takes half as long
        return x.new_empty(*size)
    return x.new_empty(*size, dtype=accumulator(x.dtype))


def address(function: str, x: Tensor) -> int:
    """Of a tensor whose strides the kernel follows. Raises RuntimeError where its memory was freed."""
    place = x.data_ptr()
    if place == 0 and x.numel() > 0:
        raise RuntimeError(f"{function}: a tensor {tuple(x.shape)} on {x.device} has no memory: it was freed")
    return place


def contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def plain_lengths(lengths: Tensor | None) -> Tensor | None:
    if lengths is None or (lengths.dtype is torch.int64 and lengths.is_contiguous()):
        return lengths  # two calls of PyTorch less
    return lengths.to(torch.int64).contiguous()
