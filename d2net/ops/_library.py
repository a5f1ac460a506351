"""Registers operators with ``torch.library``, so that torch.compile, opcheck, autocast and autograd see ordinary ones.

An operator is a schema, a check of its arguments, a kernel per kind of device (a Python function that allocates with
torch and hands tensors to the extension), a fake kernel that gives the shapes of the results, and a backward. The
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

# By operator: its kernels behind their check, by device, for calls without tangents; and the autograd.Function of
# whoever calls them directly.
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
            is :func:`_native.on_cpu` or :func:`_native.on_cuda`, with tensors as :func:`_native.reading` gives them; or
        cpu, cuda: one for each, of what comes. ``cuda`` is registered if the extension was built with CUDA.
        fake: the same signature; returns empty tensors of the results' shape, dtype and device.
        setup_context, backward: as for ``torch.library.register_autograd``; None: no result is differentiable.
        autocast: type that autocast converts floating inputs to; None leaves them as they come, for operators that
            take half precision and accumulate in float32.
    """
    name = schema[: schema.index("(")]
    tags = (torch.Tag.pt2_compliant_tag,)
    LIBRARY.define(schema, tags=tags)
    if kernel is not None:
        arguments = getattr(torch.ops.d2net, name).default._schema.arguments
        tensors = tuple(i for i, x in enumerate(arguments) if str(x.type) in ("Tensor", "Optional[Tensor]"))
        lengths = next((i for i in tensors if arguments[i].name == "lengths"), -1)
        cpu = cpu or _native.reading(_native.on_cpu, kernel, fake, tensors, lengths)
        cuda = cuda or _native.reading(_native.on_cuda, kernel, fake, tensors, lengths)
    assert cpu is not None
    kernels = {"cpu": _checked(name, check, cpu)}
    if cuda is not None:
        CUDA_FUNCTIONS[name] = _checked(name, check, cuda)
        if _BUILT_WITH_CUDA:
            kernels["cuda"] = CUDA_FUNCTIONS[name]
    guarded = (lambda function: function) if backward is None else partial(_without_tangents, name)
    for device, function in kernels.items():
        LIBRARY.impl(name, guarded(function), device.upper())
    torch.library.register_fake(f"d2net::{name}", guarded(_checked(name, check, fake)), lib=LIBRARY)
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
    return _caller(name)


def _without_tangents(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` behind torch's dispatcher, which keeps the tangents that there may be in forward mode for itself."""

    def guarded(*args: Any) -> Any:
        if forward_ad._current_level >= 0:  # of jvp too
            raise RuntimeError(
                f"d2net::{name} has no forward-mode derivative; the functions of d2net.ops and d2net.losses have one"
            )
        return kernel(*args)

    return guarded


def _checked(name: str, check: Callable[..., None], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` behind ``check``."""

    def checked(*args: Any) -> Any:
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


def _caller(name: str) -> Callable[..., Any]:
    """Calls operator ``name``, of whose device there is a kernel; the first tensor says which.

    By torch's dispatcher only where something traces or changes the call (torch.compile, a mode, a subclass of Tensor),
    for its way through autograd and back takes longer than most kernels.
    """
    kernels, direct = KERNELS[name], _DIRECT.get(name)

    def dispatch(arguments: tuple[Any, ...]) -> Any:
        return getattr(torch.ops.d2net, name).default(*arguments)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _is_observed():
            return dispatch(arguments)
        device, differentiated, forward_mode = None, False, forward_ad._current_level >= 0
        for x in _flat(arguments) if list in map(type, arguments) else arguments:
            if type(x) is Tensor or type(x) is torch.nn.Parameter:
                if x.is_neg() or (forward_mode and forward_ad.unpack_dual(x).tangent is not None):
                    return dispatch(arguments)
                device = device or ("cpu" if x.is_cpu else x.device.type)
                differentiated = differentiated or x.requires_grad
            elif isinstance(x, Tensor):
                return dispatch(arguments)
        kernel = kernels.get(device or "")
        if kernel is None:  # on the meta device there is none
            return dispatch(arguments)
        if not (differentiated and torch.is_grad_enabled()):
            return kernel(*arguments)
        if direct is None:  # a backward: the dispatcher refuses to differentiate it
            return dispatch(arguments)
        rest: list[Tensor] = []
        smooth = direct.apply(*arguments, rest)
        if not rest:
            return smooth
        return (*smooth, *rest) if type(smooth) is tuple else (smooth, *rest)

    return call


def _flat(arguments: tuple[Any, ...]) -> Iterator[Any]:
    for x in arguments:
        if type(x) is list:
            yield from x
        else:
            yield x


def _is_observed() -> bool:
    """By a transform, a mode (of dispatch or of functions), or the tracer of torch.jit."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def _direct_function(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """The autograd that ``register`` gives to torch.library, without its dispatcher.

    Called with an empty list behind the operator's arguments, for the results at the end that have no gradient: torch
    takes a while over every result of a Function.
    """
    kernels = KERNELS[name]

    def forward(ctx: Any, *inputs: Any) -> Any:
        x, arguments, rest = inputs[0], inputs[:-1], inputs[-1]
        output = kernels["cpu" if x.is_cpu else x.device.type](*arguments)
        setup_context(ctx, arguments, output)
        constant = getattr(ctx, "non_differentiable", None)
        if not constant or output[-len(constant)] is not constant[0]:
            return output
        rest += constant
        del ctx.non_differentiable
        smooth = output[: -len(constant)]
        return smooth if len(smooth) > 1 else smooth[0]

    def backward_and_none(ctx: Any, *grads: Any) -> Any:
        return *backward(ctx, *grads), None

    functions = {"forward": staticmethod(forward), "backward": staticmethod(backward_and_none)}
    return type(name, (torch.autograd.Function,), functions)


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


def _wants_reference() -> int:
    """How often it was entered and not left: whoever leaves first need not have entered last."""
    return torch._C._get_obj_in_tls(_REFERENCE) if torch._C._is_key_in_tls(_REFERENCE) else 0


def _want_reference(more: int) -> None:
    wanted = max(_wants_reference() + more, 0)
    torch._C._stash_obj_in_tls(_REFERENCE, wanted)
    _local.reference = wanted > 0


@contextmanager
def use_backend(name: Literal["reference"]) -> Iterator[None]:
    """Within, every operator and loss of d2net computes in plain PyTorch, whatever kernels there are: to compare with.

    That is so in the thread that enters, for all its tasks and generators, and in those in which autograd works for it
    (where ``torch.utils.checkpoint`` computes a forward pass again); all others go on with the kernels. It may be
    nested, and used as a decorator. A function made by ``torch.compile`` is compiled again for it. A gradient belongs
    to its result: of what a kernel computed it comes from a kernel, and of what a reference computed from PyTorch,
    wherever ``backward`` is called.

    Args:
        name: ``"reference"``.

    Raises:
        InputError: another name.
    """
    if name != "reference":
        raise InputError(f"use_backend: there is 'reference', not {quoted(name)}; leave it out for the kernels")
    global _ever_asked
    _ever_asked = True
    _want_reference(1)
    try:
        yield
    finally:
        _want_reference(-1)


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
