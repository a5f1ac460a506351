"""Converts the arguments of operators and losses to tensors and numbers, and checks them.

Nothing here waits for a device, except where an array or a list is copied to it. Every call of an operator runs these
checks, so they build no message before something is wrong: one that passes takes some 200 ns.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from d2net.errors import InputError
from d2net.words import quoted


def as_tensor(operator: str, name: str, x: Any, like: Tensor | None = None) -> Tensor:
    """A tensor as it is; an array or a list of numbers as a tensor on the device of ``like``.

    An array keeps its dtype. Floats in a list get PyTorch's default dtype, as with ``torch.tensor``, or that of
    ``like`` where it is wider.

    Raises:
        InputError: anything else, tensors that are sparse, nested, quantized or complex and masked arrays included.
    """
    if isinstance(x, Tensor):
        if x.layout is not torch.strided or x.is_nested:
            kind = "is nested" if x.is_nested else f"has layout {x.layout}"
            raise InputError(f"{operator}: {name} {kind}, expected a dense tensor: convert it")
        check_real(operator, name, x)
        if x.dtype.itemsize == 1 and x.dtype.is_floating_point:
            raise InputError(f"{operator}: {name} has dtype {x.dtype}, with which PyTorch cannot compute: convert it")
        return x
    check_kept(operator, name, x)
    try:
        array = np.asarray(x)
        if array.dtype.kind not in "biuf":
            raise TypeError
        if array.dtype.kind == "u" and array.itemsize > 1:  # PyTorch supports few operations on uint16 and wider
            if array.size and array.max() > np.iinfo(np.int64).max:
                raise ValueError
            array = array.astype(np.int64)
        # Read-only, misaligned, byte-swapped and negatively strided arrays are copied, as tensors cannot be like that.
        tensor = torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "A", "W"]))
    except (TypeError, ValueError):
        found = f"an array of {x.dtype}" if isinstance(x, np.ndarray) else f"a {type(x).__name__}"
        raise InputError(
            f"{operator}: {name} is {found} that cannot be made a tensor; give a tensor, an array of numbers, or a "
            "list of them with rows of one length"
        ) from None
    if isinstance(x, (list, tuple)) and tensor.dtype == torch.float64:
        default = torch.get_default_dtype()
        tensor = tensor.to(default if like is None else torch.promote_types(default, like.dtype))
    return tensor if like is None else tensor.to(like.device)


def check_kept(operator: str, name: str, x: Any) -> None:
    """Refuse what loses something when numpy reads it, also within lists: a tensor its gradient, an array its mask."""
    if isinstance(x, np.ma.MaskedArray):
        raise InputError(f"{operator}: {name} is a masked array, whose mask would be lost; give x.filled(value) of it")
    if isinstance(x, Tensor):
        raise InputError(f"{operator}: {name} is a list of tensors; torch.stack or torch.cat them")
    if isinstance(x, (list, tuple)):
        for y in x:
            if type(y) is not float and type(y) is not int:
                check_kept(operator, name, y)


def as_tensors(operator: str, **arguments: Any) -> tuple[Tensor, ...]:
    """:func:`as_tensor` of each, on the device of those that are tensors already."""
    like = None
    for x in arguments.values():
        if like is None and isinstance(x, Tensor):
            like = x
    return tuple([as_tensor(operator, name, x, like) for name, x in arguments.items()])


def as_lengths(operator: str, lengths: Any, x: Tensor) -> Tensor | None:
    """None, or integers (B,) on the device of ``x`` (B, T, ...), checked."""
    if lengths is not None:
        lengths = as_tensor(operator, "lengths", lengths, x)
        check_lengths(operator, lengths, x)
    return lengths


FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
COMPUTED = (torch.float32, torch.float64)  # for operators whose callers convert half precision first
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_shape(operator: str, name: str, x: Tensor, dims: str) -> None:
    """Require as many dimensions as ``dims`` names, such as "B, T, C"."""
    if x.ndim != dims.count(",") + 1:
        raise InputError(f"{operator}: {name} has shape {tuple(x.shape)}, expected ({dims})")


def check_floating(operator: str, name: str, x: Tensor) -> None:
    if x.dtype not in FLOATING:
        raise InputError(
            f"{operator}: {name} has dtype {x.dtype}, expected floating point of 16, 32 or 64 bits: convert it"
        )


def check_computed(operator: str, name: str, x: Tensor) -> None:
    if x.dtype not in COMPUTED:
        raise InputError(f"{operator}: {name} has dtype {x.dtype}, expected float32 or float64: convert it")


def check_real(operator: str, name: str, x: Tensor) -> None:
    """Refuse complex and quantized numbers, before a conversion that would keep only the real part of complex ones."""
    if x.is_complex() or x.is_quantized:
        raise InputError(f"{operator}: {name} has dtype {x.dtype}, expected real numbers: convert it")


def check_same(operator: str, name: str, x: Tensor, other: str, y: Tensor, dims: int | None = None) -> None:
    """Require the same device and the same first ``dims`` sizes; with None all sizes, and the same dtype."""
    if dims is None and x.shape == y.shape and x.dtype is y.dtype and x.device == y.device:
        return
    if x.device != y.device:
        raise InputError(f"{operator}: {name} is on {x.device} but {other} on {y.device}; move one of them")
    if x.shape[:dims] != y.shape[:dims]:
        raise InputError(f"{operator}: {name} has shape {tuple(x.shape)} but {other} {tuple(y.shape)}; they must match")
    if dims is None:
        raise InputError(f"{operator}: {name} has dtype {x.dtype} but {other} {y.dtype}; they must match")


def check_like(
    operator: str, name: str, x: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Require exactly this shape, dtype and device."""
    if x is None:
        raise InputError(f"{operator}: {name} is missing, expected {tuple(shape)} {dtype}")
    if x.shape != shape or x.dtype is not dtype or x.device != device:
        raise InputError(
            f"{operator}: {name} is {tuple(x.shape)} {x.dtype} on {x.device}, "
            f"expected {tuple(shape)} {dtype} on {device}"
        )


def check_lengths(
    operator: str, lengths: Tensor | None, x: Tensor, name: str = "lengths", offsets: Tensor | None = None
) -> None:
    """Require None, or integers (B,) on the device of ``x`` (B, ...), or (N, ...) with ``offsets`` (B+1,).

    Any values: operators clamp them to [0, T].
    """
    if lengths is None:
        return
    b = x.shape[0] if offsets is None else offsets.shape[0] - 1
    if lengths.shape != (b,) or lengths.dtype not in INTEGERS:
        raise InputError(
            f"{operator}: {name} has shape {tuple(lengths.shape)} and dtype {lengths.dtype}, expected ({b},) int64"
        )
    if lengths.device != x.device:
        raise InputError(f"{operator}: {name} is on {lengths.device} but the input on {x.device}; move one of them")


def as_whole(operator: str, name: str, value: Any) -> int:
    """A whole number as an int. It may come from Python or numpy, or be a tensor of one integer.

    Raises:
        InputError: anything else, such as 2.5, 2.0 or True, or an integer beyond 64 bits.
    """
    whole = value
    if type(value) is not int:  # rare
        try:
            if isinstance(value, (bool, np.bool_)) or (isinstance(value, Tensor) and value.dtype is torch.bool):
                raise TypeError
            whole = index(value)
        except (TypeError, ValueError, RuntimeError):  # a tensor of several numbers, or on the meta device
            raise InputError(f"{operator}: {name} is {quoted(value)}, expected a whole number") from None
    if not -(2**63) <= whole < 2**63:
        raise InputError(f"{operator}: {name} is {quoted(value)}, expected a whole number of at most 64 bits")
    return whole


def as_number(operator: str, name: str, value: Any) -> float:
    """A number as a float. It may come from Python or numpy, or be a tensor of one real number.

    Raises:
        InputError: anything else, such as "0.5", True or None, or an integer beyond the range of floats.
    """
    if type(value) is float:  # the usual case
        return value
    try:
        if isinstance(value, (bool, np.bool_, str, bytes, np.ma.MaskedArray)):
            raise TypeError
        if isinstance(value, Tensor) and value.dtype is torch.bool:
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(f"{operator}: {name} is {quoted(value)}, expected a number") from None


def check_choice(name: str, value: object, *known: str) -> None:
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{name} is {quoted(value)}, expected {' or '.join(map(repr, known))}")


def check_probability_floor(operator: str, probability_floor: float) -> None:
    if not 0 <= probability_floor <= 0.5:
        raise InputError(f"{operator}: probability_floor is {probability_floor}, expected 0 to 0.5")


def check_numbers(operator: str, **settings: float) -> None:
    """Require that no setting is NaN."""
    for name, value in settings.items():
        if value != value:
            raise InputError(f"{operator}: {name} is NaN, expected a number")


def valid_mask(operator: str, x: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, T) bool: True where snippet t lies before the recording's length. ``x`` is (B, T, ...)."""
    return within(x, as_lengths(operator, lengths, x))


def within(x: Tensor, lengths: Tensor | None) -> Tensor:
    """:func:`valid_mask` without checks."""
    b, t = x.shape[:2]
    if lengths is None:
        return torch.ones(b, t, dtype=torch.bool, device=x.device)
    return torch.arange(t, device=x.device) < lengths[:, None]


SLACK = 1e-3  # what rounding or interpolation may add to an activation


def can_look_at(x: Tensor) -> bool:
    """Whether the values of ``x`` can be read at little cost: tensors on the CPU, outside of tracing.

    On a GPU reading would wait for the device, and while a function is traced there are no values.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()
    return x.device.type == "cpu" and not traced and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def may_be_activations(x: Tensor) -> bool:
    """False where a value is seen that is none in [0, 1]; NaN is one too. It may be in a row that does not matter."""
    if not can_look_at(x) or x.numel() == 0:
        return True
    low, high = (value.item() for value in x.detach().aminmax())
    return low >= -SLACK and high <= 1 + SLACK


def check_activations(operator: str, name: str, x: Tensor, lengths: Tensor | None) -> None:
    """Require values in [0, 1] before the lengths, where they can be read at little cost (:func:`can_look_at`).

    NaN is not refused; it propagates.
    """
    if may_be_activations(x):
        return
    # Something is out of range. It may be in the padding, which may hold anything; NaN in x makes low and high NaN too.
    inside = x.detach()[within(x, lengths)]
    inside = inside[~inside.isnan()]
    if inside.numel() and not (inside.min() >= -SLACK and inside.max() <= 1 + SLACK):
        raise InputError(
            f"{operator}: {name} holds values from {inside.min():.3g} to {inside.max():.3g}, expected activations in "
            "[0, 1]; apply torch.sigmoid to logits first"
        )
