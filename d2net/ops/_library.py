"""Registers operators with ``torch.library``, so that torch.compile, opcheck, autocast and autograd see ordinary ones.

An operator is a schema, a check of its arguments, a kernel per kind of device (a Python function that allocates with
torch and hands pointers to the extension), a fake kernel that gives the shapes of the results, and a backward. The
check runs before every kernel, the fake one included, so that no call of ``torch.ops.d2net`` reaches the extension
unchecked; a public function does not repeat it, but converts its arguments and calls the operator.

A device without a kernel, such as MPS, runs the operator's plain-PyTorch reference instead, and so do forward-mode
differentiation and the transforms of ``torch.func`` (``vmap``, ``grad``, ``jvp``, ...), which see through plain PyTorch
but not into a kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from d2net.errors import InputError
from d2net.ops import _native
from d2net.words import quoted

# `Library.define` with `register_autograd` costs least a call of what torch offers: about 5 us without gradient and
# 25 us forward and backward, against 7 and 32 for `custom_op` (measured with torch 2.13).
LIBRARY = torch.library.Library("d2net", "DEF")

_BUILT_WITH_CUDA: bool = _native.build_info()["cuda"]

# Devices that have a kernel, by operator; "meta" has the fake one.
_DEVICES: dict[str, frozenset[str]] = {}

# The cuda function of every operator that has one, also where the extension was built without CUDA: tests run them on
# the CPU (tests/ops/simt.py).
CUDA_FUNCTIONS: dict[str, Callable[..., Any]] = {}

# By operator: its kernels behind their check, by device; and the autograd.Function of whoever calls them directly.
KERNELS: dict[str, dict[str, Callable[..., Any]]] = {}
_DIRECT: dict[str, type[torch.autograd.Function]] = {}


def register(
    schema: str,
    *,
    check: Callable[..., None],
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
        check: the same signature; raises InputError for what the kernels must not see: shapes, types and devices of all
            tensors, and numbers out of range. What tensors hold is the kernels' business: they clamp or skip.
        kernel: for both kinds of device, called as ``kernel(native, *inputs)``, where ``native(function, like, *args)``
            is :func:`_native.on_cpu` or :func:`_native.on_cuda`; or
        cpu, cuda: one for each. ``cuda`` is registered if the extension was built with CUDA.
        fake: the same signature; returns empty tensors of the results' shape, dtype and device.
        setup_context, backward: as for ``torch.library.register_autograd``; None: no result is differentiable.
        autocast: type that autocast converts floating inputs to; None leaves them as they come, for operators that
            take half precision and accumulate in float32.
    """
    name = schema[: schema.index("(")]
    tags = (torch.Tag.pt2_compliant_tag,)
    LIBRARY.define(schema, tags=tags)
    if kernel is not None:
        cpu, cuda = partial(kernel, _native.on_cpu), partial(kernel, _native.on_cuda)
    assert cpu is not None
    kernels = {"cpu": _checked(name, check, cpu, backward)}
    if cuda is not None:
        CUDA_FUNCTIONS[name] = _checked(name, check, cuda, backward)
        if _BUILT_WITH_CUDA:
            kernels["cuda"] = CUDA_FUNCTIONS[name]
    for device, function in kernels.items():
        LIBRARY.impl(name, function, device.upper())
    torch.library.register_fake(f"d2net::{name}", _checked(name, check, fake, backward), lib=LIBRARY)
    KERNELS[name] = kernels
    if backward is not None:
        torch.library.register_autograd(f"d2net::{name}", backward, setup_context=setup_context, lib=LIBRARY)
        if setup_context is not None:
            _DIRECT[name] = _direct_function(name, setup_context, backward)
    else:
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")  # else torch warns of results without gradient
    if autocast is not None:
        for device in kernels:
            torch.library.register_autocast(f"d2net::{name}", device, autocast, lib=LIBRARY)
    _DEVICES[name] = frozenset(kernels) | {"meta"}
    return partial(call, name)


def _checked(
    name: str, check: Callable[..., None], kernel: Callable[..., Any], backward: Callable[..., Any] | None
) -> Callable[..., Any]:
    """``kernel`` behind ``check``."""

    def checked(*args: Any) -> Any:
        if backward is not None and forward_ad._current_level >= 0:  # of jvp too; tangents do not get here
            raise RuntimeError(
                f"d2net::{name} has no forward-mode derivative; the functions of d2net.ops and d2net.losses have one"
            )
        try:
            check(*args)
        except AttributeError:  # an undefined tensor, which torch takes for a tensor and hands on as None
            _refuse_missing(name, args)
            raise
        return kernel(*args)

    return checked


def _refuse_missing(name: str, args: tuple[Any, ...]) -> None:
    for argument, x in zip(getattr(torch.ops.d2net, name).default._schema.arguments, args, strict=True):
        if x is None and str(argument.type) == "Tensor":
            raise InputError(f"d2net::{name}: {argument.name} is missing, expected a tensor") from None


def call(name: str, *arguments: Any) -> Any:
    """Operator ``name``, of whose device there is a kernel; the first tensor says which.

    By torch's dispatcher only where something traces or changes the call (torch.compile, a mode, a subclass of Tensor),
    for its way through autograd and back takes longer than most kernels.
    """
    if torch.compiler.is_compiling() or _is_observed():
        return getattr(torch.ops.d2net, name).default(*arguments)
    tensors = _tensors(arguments)
    kernel = KERNELS[name].get(tensors[0].device.type)  # on the meta device there is none
    if kernel is None or any(type(x) not in _PLAIN or x.is_neg() for x in tensors):
        return getattr(torch.ops.d2net, name).default(*arguments)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return kernel(*arguments)
    if name not in _DIRECT:  # a backward: the dispatcher refuses to differentiate it
        return getattr(torch.ops.d2net, name).default(*arguments)
    return _DIRECT[name].apply(*arguments)


_PLAIN = (Tensor, torch.nn.Parameter)


def _is_observed() -> bool:
    """By a transform, a mode (of dispatch or of functions), or the tracer of torch.jit."""
    return (
        forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def _tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    found = []
    for x in arguments:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list):
            found += [y for y in x if isinstance(y, Tensor)]
    return found


def _direct_function(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """The autograd that ``register`` gives to torch.library, without its dispatcher."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        device = next(x for x in inputs if isinstance(x, Tensor)).device.type
        output = KERNELS[name][device](*inputs)
        setup_context(ctx, inputs, output)
        return output

    return type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )


def has_kernel(name: str, x: Tensor) -> bool:
    """Whether the kernel of operator ``name`` can do what is asked with ``x``; otherwise its reference runs: on other
    devices, in forward-mode differentiation, and within :func:`use_backend` and the transforms of ``torch.func``."""
    if torch.compiler.is_compiling():  # what else is asked below would stay in the graph
        wanted = not getattr(_local, "reference", False)
        return wanted and x.device.type in _DEVICES[name] and forward_ad._current_level < 0
    device = "cpu" if x.is_cpu else x.device.type  # a string that takes longer to make than all else here
    plain = forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active()
    return plain and device in _DEVICES[name] and not (_ever_asked and _wants_reference())


def backend_of(operator: str, device: str) -> str:
    """What runs an operator on tensors of ``device``, a type as ``"cuda"``: ``cpu``, ``cuda``, or ``reference``."""
    native = device in _DEVICES.get(operator, ()) and not _wants_reference()
    return device if native else "reference"


# Whether this thread wants references. PyTorch hands on what it keeps of a thread to those in which autograd works for
# it; torch.compile does not see that, but compiles anew where an attribute of a thread has changed. So it is in both.
_REFERENCE = "d2net.reference"
_local = threading.local()
_ever_asked = False  # in any thread: until then no call looks further


def _wants_reference() -> bool:
    return torch._C._is_key_in_tls(_REFERENCE) and torch._C._get_obj_in_tls(_REFERENCE)


def _want_reference(wanted: bool) -> None:
    torch._C._stash_obj_in_tls(_REFERENCE, wanted)
    _local.reference = wanted


@contextmanager
def use_backend(name: Literal["reference"]) -> Iterator[None]:
    """Within, every operator and loss of d2net computes in plain PyTorch, whatever kernels there are: to compare with.

    That is so in the thread that enters, and in those in which autograd works for it (where ``torch.utils.checkpoint``
    computes a forward pass again); all others go on with the kernels. It may be nested, and used as a decorator.
    A function made by ``torch.compile`` is compiled again for it. A gradient belongs to its result: of what a kernel
    computed it comes from a kernel, and of what a reference computed from PyTorch, wherever ``backward`` is called.

    Args:
        name: ``"reference"``.

    Raises:
        InputError: another name.
    """
    if name != "reference":
        raise InputError(f"use_backend: there is 'reference', not {quoted(name)}; leave it out for the kernels")
    global _ever_asked
    _ever_asked, before = True, _wants_reference()
    _want_reference(True)
    try:
        yield
    finally:
        _want_reference(before)


def refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    """``backward`` of an operator that is itself a backward: without one torch warns and goes on with gradient 0."""
    raise RuntimeError("d2net: this operator is differentiable once; its gradient has no gradient (create_graph=True)")


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    backward = jvp = staticmethod(refuse_double_backward)


def differentiable_once(gradient: Tensor, *inputs: Tensor) -> Tensor:
    """``gradient`` with respect to ``inputs``, as a function of them whose own gradient is refused.

    For a backward that is computed from what the forward left, not from its inputs: autograd would take the gradient
    for a constant, and a second derivative for 0.
    """
    asked = torch.is_grad_enabled() or forward_ad._current_level >= 0
    return _Once.apply(gradient, *inputs) if asked else gradient
