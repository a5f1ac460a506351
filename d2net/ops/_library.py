"""Registers operators with ``torch.library``, so that torch.compile, opcheck, autocast and autograd see ordinary ones.

An operator is a schema, a check of its arguments, a kernel per device type (a Python function that allocates with torch
and passes tensors to the extension), a fake kernel that gives the shapes of the results, and a backward. The check runs
before every kernel, the fake one included, so no call of ``torch.ops.d2net`` reaches the extension unchecked. A public
function does not check again: it converts its arguments and calls the operator.

The operator's plain-PyTorch reference (``topk_pool_ref``) runs instead of a kernel on a device that has none, such as
MPS, in forward-mode differentiation, and within the transforms of ``torch.func`` (``vmap``, ``grad``, ``jvp``, ...):
these need operations that PyTorch can differentiate itself.
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

# Of torch's ways to define an operator, `Library.define` with `register_autograd` is the fastest per call: about 5 us
# without gradient and 25 us forward and backward; `custom_op` takes 7 and 32 (measured with torch 2.13).
LIBRARY = torch.library.Library("d2net", "DEF")

_BUILT_WITH_CUDA: bool = _native.build_info()["cuda"]

# By operator: the device types that have a kernel. "meta" has the fake one.
_DEVICES: dict[str, frozenset[str]] = {}

# By operator: its CUDA kernel, also where the extension was built without CUDA. Tests run these on the CPU
# (tests/ops/simt.py).
CUDA_FUNCTIONS: dict[str, Callable[..., Any]] = {}

# By operator: its checked kernels by device type, and the autograd.Function that calls them without torch's dispatcher.
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
        check: has the operator's signature; raises InputError for wrong shapes, dtypes and devices, and for numbers
            out of range. It does not look at the values in tensors: kernels clamp or skip what they cannot use.
        fake: has the operator's signature; returns empty tensors of the results' shape, dtype and device.
        kernel: for CPU and CUDA, called as ``kernel(native, *inputs)`` with tensors as :func:`_native.reading` prepares
            them; ``native(function, like, *args)`` is :func:`_native.on_cpu` or :func:`_native.on_cuda`.
        cpu: a kernel for the CPU alone, with the operator's signature and tensors as they come.
        cuda: the same for CUDA; registered where the extension was built with CUDA.
        setup_context: as for ``torch.library.register_autograd``.
        backward: as there; None: no result is differentiable.
        autocast: dtype that autocast converts floating inputs to. None: they stay, for operators that read half
            precision and accumulate in float32.
    """
    name = schema[: schema.index("(")]
    tags = (torch.Tag.pt2_compliant_tag,)
    LIBRARY.define(schema, tags=tags)
    if kernel is not None:
        arguments = getattr(torch.ops.d2net, name).default._schema.arguments
        tensors = tuple(i for i, x in enumerate(arguments) if str(x.type) in ("Tensor", "Optional[Tensor]"))
        lengths = tuple(i for i in tensors if arguments[i].name in ("lengths", "offsets"))
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
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")  # else a backward through it warns
    if autocast is not None:
        for device in kernels:
            torch.library.register_autocast(f"d2net::{name}", device, autocast, lib=LIBRARY)
    _DEVICES[name] = frozenset(kernels) | {"meta"}
    return _caller(name)


def _without_tangents(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel``, or an error in forward mode: torch's dispatcher would silently drop the tangents."""

    def guarded(*args: Any) -> Any:
        if forward_ad._current_level >= 0:  # torch.func.jvp raises the level too
            raise RuntimeError(
                f"d2net::{name} has no forward-mode derivative; the functions of d2net.ops and d2net.losses have one"
            )
        return kernel(*args)

    return guarded


def _checked(name: str, check: Callable[..., None], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` that calls ``check`` first."""

    def checked(*args: Any) -> Any:
        try:
            check(*args)
        except AttributeError:  # an undefined tensor: torch accepts it for a Tensor and passes None
            _refuse_missing(name, args)
            raise
        return kernel(*args)

    return checked


def _refuse_missing(name: str, args: tuple[Any, ...]) -> None:
    for argument, x in zip(getattr(torch.ops.d2net, name).default._schema.arguments, args, strict=True):
        if x is None and str(argument.type) == "Tensor":
            raise InputError(f"d2net::{name}: {argument.name} is missing, expected a tensor") from None


def _caller(name: str) -> Callable[..., Any]:
    """A function that calls operator ``name`` with the kernel of the first tensor's device, which must exist.

    It goes through torch's dispatcher only where something traces or changes the call (torch.compile, a mode, a
    subclass of Tensor): the dispatcher takes longer than most kernels.
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
        if kernel is None:  # the meta device, which has the fake kernel
            return dispatch(arguments)
        if not (differentiated and torch.is_grad_enabled()):
            return kernel(*arguments)
        if direct is None:  # the operator is a backward: its own backward, in the dispatcher, raises
            return dispatch(arguments)
        rest: list[Tensor] = []  # the results without gradient
        differentiable = direct.apply(*arguments, rest)
        if not rest:
            return differentiable
        return (*differentiable, *rest) if type(differentiable) is tuple else (differentiable, *rest)

    return call


def _flat(arguments: tuple[Any, ...]) -> Iterator[Any]:
    for x in arguments:
        if type(x) is list:
            yield from x
        else:
            yield x


def _is_observed() -> bool:
    """Whether a torch.func transform, a dispatch or function mode, or torch.jit.trace sees the calls made now."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def _direct_function(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """An autograd.Function with the same ``setup_context`` and ``backward`` as the torch.library operator.

    It takes one more argument, an empty list, and appends to it the last results if they have no gradient: every tensor
    that a Function returns costs time, and these need not be returned.
    """
    kernels = KERNELS[name]

    def forward(ctx: Any, *inputs: Any) -> Any:
        x, arguments, rest = inputs[0], inputs[:-1], inputs[-1]
        output = kernels["cpu" if x.is_cpu else x.device.type](*arguments)
        setup_context(ctx, arguments, output)
        marked = getattr(ctx, "non_differentiable", None)
        if not marked or output[-len(marked)] is not marked[0]:
            return output
        rest += marked
        del ctx.non_differentiable
        differentiable = output[: -len(marked)]
        return differentiable if len(differentiable) > 1 else differentiable[0]

    def backward_and_none(ctx: Any, *grads: Any) -> Any:
        # torch.library wants a list for a list, an autograd.Function None.
        return *(None if type(grad) is list else grad for grad in backward(ctx, *grads)), None

    functions = {"forward": staticmethod(forward), "backward": staticmethod(backward_and_none)}
    return type(name, (torch.autograd.Function,), functions)


def has_kernel(name: str, x: Tensor) -> bool:
    """Whether operator ``name`` runs its kernel on ``x`` now, not its reference in plain PyTorch (see the top)."""
    if torch.compiler.is_compiling():  # torch.compile cannot trace the calls below
        wanted = not getattr(_local, "reference", False)
        return wanted and x.device.type in _DEVICES[name] and forward_ad._current_level < 0
    device = "cpu" if x.is_cpu else x.device.type  # x.device.type is the slowest call here
    plain = forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active()
    return plain and device in _DEVICES[name] and not (_ever_asked and _wants_reference())


def backend_of(operator: str, device: str) -> str:
    """What runs an operator on a device: ``"cpu"``, ``"cuda"``, or ``"reference"``, its version in plain PyTorch.

    Args:
        operator: its name, such as ``"topk_pool"``.
        device: a device type, such as ``"cuda"``.
    """
    native = device in _DEVICES.get(operator, ()) and not _wants_reference()
    return device if native else "reference"


# Whether this thread is within `use_backend` is kept twice. PyTorch copies its own thread-local state to the threads
# that run autograd for it. torch.compile does not see that state, but compiles again when an attribute of a
# threading.local has changed.
_REFERENCE = "d2net.reference"
_local = threading.local()
_ever_asked = False  # whether any thread ever entered use_backend; until then no call looks at thread-local state


def _wants_reference() -> int:
    """How many ``use_backend`` blocks this thread is within. A count, because they need not be left in order."""
    return torch._C._get_obj_in_tls(_REFERENCE) if torch._C._is_key_in_tls(_REFERENCE) else 0


def _want_reference(more: int) -> None:
    wanted = max(_wants_reference() + more, 0)
    torch._C._stash_obj_in_tls(_REFERENCE, wanted)
    _local.reference = wanted > 0


@contextmanager
def use_backend(name: Literal["reference"]) -> Iterator[None]:
    """Within the block, every operator and loss of d2net computes in plain PyTorch instead of a kernel, to compare.

    It holds for the thread that enters, with all its tasks and generators, and for the threads that run autograd for it
    (where ``torch.utils.checkpoint`` repeats a forward pass); other threads keep using kernels. It can be nested, and
    used as a decorator. A function made by ``torch.compile`` is compiled again for it. A backward runs the way its
    forward did: a kernel's result has a kernel's gradient, wherever ``backward`` is called.

    Args:
        name: ``"reference"``, the only one.

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
    """``backward`` of an operator that is itself a backward: without it torch warns and takes the gradient for 0."""
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
    """``gradient``, such that differentiating it again with respect to ``inputs`` raises.

    For a backward that is computed from what the forward saved, not from the inputs: autograd would take the gradient
    for a constant, and return 0 as the second derivative.
    """
    asked = torch.is_grad_enabled() or forward_ad._current_level >= 0
    return _Once.apply(gradient, *inputs) if asked else gradient
