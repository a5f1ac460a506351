"""Types and ranges of settings, as annotations: ``ema_decay: Annotated[float, Range(0, below=1)]``.

:func:`check_fields` checks all fields of a dataclass when an instance is made. So a setting is checked in the same way
in a recipe, on the command line, in Python, and in a checkpoint that is read or written.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from operator import index
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from d2net.errors import InputError
from d2net.words import did_you_mean, is_number, quoted

LARGEST_COUNT = 10**9
_FLOAT32_MAX = 3.4e38  # larger numbers are Inf in float32, in which most computations are


@dataclass(frozen=True)
class Range:
    """The range of a number: ``at_least`` and ``at_most`` are inclusive bounds, ``above`` and ``below`` exclusive."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    odd: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether ``value`` is in the range. NaN, Inf and what is Inf in float32 never are."""
        return (
            -_FLOAT32_MAX <= value <= _FLOAT32_MAX
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and not (self.odd and value % 2 == 0)
        )

    def __str__(self) -> str:
        limits = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        said = [f"{word} {limit:,}" for word, limit in limits.items() if limit is not None]
        if self.at_most is None and self.below is None:
            said.append(f"finite in float32 (up to {_FLOAT32_MAX:g})")
        return " and ".join(["odd"] * self.odd + said)


Count = Annotated[int, Range(1, LARGEST_COUNT)]
Number = Annotated[float, Range()]
Positive = Annotated[float, Range(above=0)]
Weight = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]


def check_fields(of: Any, prefix: str = "") -> None:
    """Check every field of a (frozen) dataclass against its annotation, and convert it to that type.

    An annotation is int, float, bool, str, another class, a Literal of strings, ``tuple[one of these, ...]`` (of at
    least one value), one of these with a :class:`Range`, or one of these ``| None``. A float may be given as a string
    (YAML reads 1e-4 as one). A bool is no number, and 2.0 is no int.

    Args:
        of: The instance; its fields are replaced by the converted values.
        prefix: Of the field's name in messages.

    Raises:
        InputError: the field's name, its value, and what it must be.
    """
    made: Any = type(of)
    for name, wanted in _types(made).items():
        object.__setattr__(of, name, checked(getattr(of, name), wanted, f"{prefix}{name}"))


def check_field(made: Any, name: str, value: object, prefix: str = "") -> None:
    """Check a value as that of one field of the dataclass ``made``, as :func:`check_fields` does when one is made."""
    checked(value, _types(made)[name], f"{prefix}{name}")


@functools.cache
def _types(made: Any) -> dict[str, Any]:
    return get_type_hints(made, include_extras=True)


def checked(value: object, wanted: Any, name: str) -> Any:
    """``value`` converted to the type ``wanted``, as :func:`check_fields` does; ``name`` is for the message."""
    if get_origin(wanted) in (Union, UnionType):  # "X | None"
        if value is None:
            return None
        return _checked(value, next(c for c in get_args(wanted) if c is not NoneType), name, " or null")
    return _checked(value, wanted, name, "")


def _checked(value: object, wanted: Any, name: str, or_null: str) -> Any:
    allowed: Range | None = None
    if get_origin(wanted) is Annotated:
        wanted, allowed = get_args(wanted)
    if get_origin(wanted) is tuple:
        if isinstance(value, (list, tuple)) and value:
            return tuple(checked(v, get_args(wanted)[0], f"{name}[{i}]") for i, v in enumerate(value))
        raise _refused(name, value, f"a list of at least one value{or_null}")
    if get_origin(wanted) is Literal:
        choices = get_args(wanted)
        if isinstance(value, str) and value in choices:
            return value
        near = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise _refused(name, value, f"{' or '.join(choices)}{or_null}{near}")
    wanted = get_origin(wanted) or wanted
    kind, convert = _KINDS.get(wanted, (f"a {wanted.__name__}", functools.partial(_instance, wanted)))
    converted = convert(value)
    if converted is None:
        raise _refused(name, value, f"{kind}{or_null}")
    if allowed is not None and converted not in allowed:
        raise _refused(name, converted if isinstance(value, str) else value, f"{allowed}{or_null}")
    return converted


def _refused(name: str, value: object, expected: str) -> InputError:
    return InputError(f"{name} is {quoted(value)}; it must be {expected}")


def _instance(wanted: type, value: object) -> object | None:
    return value if isinstance(value, wanted) else None


def _whole(value: object) -> int | None:
    try:
        return None if isinstance(value, bool) else index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _real(value: object) -> float | None:
    try:
        wrong = isinstance(value, (bool, bytes)) or (isinstance(value, str) and not is_number(value))
        return None if wrong else float(value)  # type: ignore[arg-type]
    except OverflowError:  # a whole number
        return float("inf")
    except (TypeError, ValueError, RuntimeError):  # also of a meta tensor
        return None


_KINDS: dict[type, tuple[str, Any]] = {
    int: ("a whole number", _whole),
    float: ("a number", _real),
    bool: ("true or false", functools.partial(_instance, bool)),
    str: ("a text", functools.partial(_instance, str)),
}
