"""The only file that calls the extension ``d2net._C``, with tensors, sizes and streams.

``_C`` is private and trusts the sizes that it is given. Only kernels of operators call it, after the operator's check
(``_library.register``) of shapes, dtypes, devices and numbers. ``_C`` itself checks that tensors are contiguous and on
the device of the call.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from d2net.errors import D2NetError


def _load() -> ModuleType:
    try:
        return importlib.import_module("d2net._C")
    except ImportError as error:
        root = Path(__file__).parents[2]
        way_out = "install a wheel for this Python, or build it with `pip install .` in the repository"
        if (root / "CMakeLists.txt").exists():
            way_out = (
                f"Python took d2net from its source folder {root}, before any that is installed: run it in another "
                "folder, or install in place, `pip install -e .`"
            )
        raise ImportError(f"d2net's native extension cannot be imported ({error}): {way_out}") from error


_C = _load()
Native = Callable[..., Any]  # on_cpu or on_cuda, below
Members = tuple[Tensor | float | None, ...]  # the members of a C++ struct, in their order
Argument = Tensor | float | Members | None
_SUFFIX = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def build_info() -> dict[str, Any]:
    """How the extension was built: ``compiler``, ``cuda`` (bool), ``cuda_compiler`` and ``cuda_archs``.

    The last two are "" where it was built without CUDA.
    """
    return dict(_C.build_info())


def cpu(function: str, dtype: torch.dtype, *args: Argument) -> Any:
    """Call the CPU function ``function`` for ``dtype`` with up to ``torch.get_num_threads()`` threads.

    A tensor is passed as its address, None as null; the number of threads is appended.
    """
    return _bound(function, dtype)(*args, torch.get_num_threads())


def cuda(function: str, dtype: torch.dtype, device: torch.device, *args: Argument) -> Any:
    """Enqueue the kernels of ``function`` on ``device`` and its current stream, which are appended to the arguments.

    Raises:
        D2NetError: the kernels were built for other chips, or with a CUDA newer than the driver.
        RuntimeError: a launch failed.
    """
    _check_chip(device)
    call = _bound(f"cuda_{function}", dtype)
    index = device.index
    # torch.cuda.current_stream(device).cuda_stream, without a Stream object at every call.
    stream = torch._C._cuda_getCurrentRawStream(index)
    if torch._C._cuda_getDevice() == index:
        return call(*args, index, stream)
    with torch.cuda.device(device):  # restores the caller's current device, which the launch changes
        return call(*args, index, stream)


@functools.cache
def _bound(function: str, dtype: torch.dtype) -> Callable[..., Any]:
    return getattr(_C, f"{function}_{_SUFFIX[dtype]}")


@functools.cache
def _check_chip(device: torch.device) -> None:
    """Raises D2NetError where the kernels do not run: a launch's own error would not say why."""
    if reason := obstacle(device):
        raise D2NetError(f"d2net's CUDA kernels do not run on {device}: {reason}")


def obstacle(device: torch.device) -> str:
    """Why the CUDA kernels do not run on a GPU, and the way out; "" where they do.

    They run where the driver is of the same major version of CUDA as the compiler that built them, or a later one, and
    where they were built for the chip (:func:`runs_on`).

    Args:
        device: a CUDA device that is there; for a build without CUDA the answer is "".
    """
    built = build_info()
    if not built["cuda"]:
        return ""
    capability = torch.cuda.get_device_capability(device)
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # PyTorch's stubs lack it
    if found := re.search(r"(\d+)\.", built["cuda_compiler"]):
        if driver < 1000 * int(found[1]):
            return (
                f"they were built with CUDA {found[1]}, its driver is for CUDA {driver // 1000}.{driver % 1000 // 10}: "
                "update the driver, or build d2net from source with the toolkit of this driver"
            )
    if not runs_on(built["cuda_archs"], capability):
        return (
            f"they were built for CUDA architectures {built['cuda_archs']}, {torch.cuda.get_device_name(device)} is "
            f"{capability[0]}.{capability[1]}: build them again, "
            f"CMAKE_CUDA_ARCHITECTURES={capability[0]}{capability[1]} pip install ."
        )
    return ""


def runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether kernels built for some architectures run on a chip.

    Machine code (``80-real``) runs on chips of the same major version and the same or a higher minor one, PTX
    (``80-virtual``) on all later chips; ``80`` means both. With an ``a`` it runs on that chip only, with an ``f`` on
    its major version. For a word that names no architecture, such as ``native``, the answer is True.

    Args:
        archs: CMAKE_CUDA_ARCHITECTURES, separated by spaces.
        capability: (major, minor) of the chip.
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
    """:func:`cpu` for the dtype of ``like``."""
    return _bound(function, like.dtype)(*args, torch.get_num_threads())


def on_cuda(function: str, like: Tensor, *args: Argument) -> Any:
    """:func:`cuda` for the dtype and the device of ``like``."""
    return cuda(function, like.dtype, like.device, *args)


def reading(
    native: Native,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    tensors: tuple[int, ...],
    lengths: tuple[int, ...],
) -> Callable[..., Any]:
    """A function that calls ``kernel(native, *arguments)`` with tensors as the extension reads them.

    They are made contiguous, and lengths and offsets int64. On a CPU half precision is converted to float32, and the
    results to the dtypes that ``fake`` returns.

    Args:
        native: :func:`on_cpu` or :func:`on_cuda`.
        kernel: called with ``native`` and the arguments.
        fake: called with the arguments as they come, for the dtypes of the results.
        tensors: positions of the arguments that are tensors or None.
        lengths: positions of lengths and offsets.
    """
    widens = native is on_cpu

    def call(*arguments: Any) -> Any:
        read, widened = list(arguments), False
        for i in tensors:
            x = arguments[i]
            if x is None:
                continue
            dtype = x.dtype
            if dtype is not torch.float32:  # rare
                if i in lengths:
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
    """The dtype in which numbers of ``dtype`` are summed (accumulator_t of csrc/float16.h)."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def empty_sums(x: Tensor, *size: int) -> Tensor:
    """Uninitialised memory for sums over ``x``."""
    if x.dtype is torch.float32:  # new_empty without dtype is twice as fast
        return x.new_empty(*size)
    return x.new_empty(*size, dtype=accumulator(x.dtype))


def address(function: str, x: Tensor) -> int:
    """The address of a tensor that the kernel reads by its strides. Raises RuntimeError where its memory was freed."""
    place = x.data_ptr()
    if place == 0 and x.numel() > 0:
        raise RuntimeError(f"{function}: a tensor {tuple(x.shape)} on {x.device} has no memory: it was freed")
    return place


def contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def plain_lengths(lengths: Tensor | None) -> Tensor | None:
    """Lengths or offsets as the extension reads them."""
    if lengths is None or (lengths.dtype is torch.int64 and lengths.is_contiguous()):
        return lengths  # saves two calls of PyTorch
    return lengths.to(torch.int64).contiguous()
