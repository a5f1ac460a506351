"""Registers operators with ``torch.library``, so that torch.compile, opcheck, autocast and autograd see ordinary ones.

An operator is a schema, a kernel per kind of device (a Python function that allocates with torch and hands pointers to
the extension), a fake kernel that gives the shapes of the results, and a backward. A device without a kernel, such as
MPS, runs the operator's plain-PyTorch reference instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from d2net.ops import _native

# `Library.define` with `register_autograd` costs least a call of what torch offers: about 5 us without gradient and
# 25 us forward and backward, against 7 and 32 for `custom_op` (measured with torch 2.13).
LIBRARY = torch.library.Library("d2net", "DEF")

_BUILT_WITH_CUDA: bool = _native.build_info()["cuda"]

# Devices that have a kernel, by operator. Emptied by tests that want the reference.
_DEVICES: dict[str, frozenset[str]] = {}

# The cuda function of every operator that has one, also where the extension was built without CUDA: tests run them on
# the CPU (tests/ops/simt.py).
CUDA_FUNCTIONS: dict[str, Callable[..., Any]] = {}


def register(
    schema: str,
    *,
    fake: Callable[..., Any],
    kernel: Callable[..., Any] | None = None,
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    autocast: torch.dtype | None = None,
) -> Callable[..., Any]:
    """Define the operator ``d2net::NAME`` and return it.

    Args:
        schema: such as ``"scale(Tensor x, float by) -> Tensor"``.
        kernel: for both kinds of device, called as ``kernel(native, *inputs)``, where ``native(function, like, *args)``
            is :func:`_native.on_cpu` or :func:`_native.on_cuda`; or
        cpu, cuda: one for each. ``cuda`` is registered if the extension was built with CUDA.
        fake: the same signature; returns empty tensors of the results' shape, dtype and device.
        setup_context, backward: as for ``torch.library.register_autograd``; None: not differentiable.
        autocast: type that autocast converts floating inputs to; None leaves them as they come, for operators that
            take half precision and accumulate in float32.
    """
    name = schema[: schema.index("(")]
    tags = (torch.Tag.pt2_compliant_tag,)
    LIBRARY.define(schema, tags=tags)
    if kernel is not None:
        cpu, cuda = partial(kernel, _native.on_cpu), partial(kernel, _native.on_cuda)
    assert cpu is not None
    kernels = {"cpu": cpu}
    if cuda is not None:
        CUDA_FUNCTIONS[name] = cuda
        if _BUILT_WITH_CUDA:
            kernels["cuda"] = cuda
    for device, function in kernels.items():
        LIBRARY.impl(name, function, device.upper())
    torch.library.register_fake(f"d2net::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"d2net::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    if autocast is not None:
        for device in kernels:
            torch.library.register_autocast(f"d2net::{name}", device, autocast, lib=LIBRARY)
    _DEVICES[name] = frozenset(kernels)
    return getattr(torch.ops.d2net, name).default


def has_kernel(name: str, x: Tensor) -> bool:
    """Whether operator ``name`` has a kernel for the device of ``x``; otherwise its reference runs."""
    return x.device.type in _DEVICES[name]


def backend(name: str, device: str) -> str:
    """What runs operator ``name`` on tensors of ``device``: ``cpu``, ``cuda`` or ``reference`` (plain PyTorch)."""
    return device if device in _DEVICES.get(name, ()) else "reference"


def refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    """``backward`` of an operator that is itself a backward: without one torch warns and goes on with gradient 0."""
    raise RuntimeError("d2net: this operator is differentiable once; its gradient has no gradient (create_graph=True)")
