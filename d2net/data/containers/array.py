"""The features of one file as (T, width), in whatever shape their array was saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2net.errors import InputError

CROPS = (5, 10)


@dataclass(frozen=True)
class FeatureArray:
    """The features of one file (or of one part of it), not read yet.

    Attributes:
        source: Where they lie, for messages.
        snippets: T.
        width: Columns.
        read: Returns them, (T, width), in the file's own type. Read anew each time, never memory-mapped: a file that
            shrinks under a map ends the process.
        crops: Crops whose mean they are, 1 where the file holds no crops.
        zero: Whether every number is 0 (or there is none): what some collections put in place of a dead video.
    """

    source: str
    snippets: int
    width: int
    read: Callable[[], np.ndarray]
    crops: int = 1
    zero: bool = False


def feature_array(array: Any, source: str, read: Callable[[], np.ndarray] | None = None) -> FeatureArray:
    """An array as features: (T, width); or with crops, (T, crops, width) or (crops, T, width), whose mean is taken.

    Args:
        array: Anything with a shape and a dtype.
        source: For messages.
        read: Returns the array where ``array`` only describes it.

    Raises:
        InputError: another shape, or another type than real numbers.
    """
    check_real(array, source)
    load = read or (lambda: array)
    shape, axis = tuple(array.shape), None
    while len(shape) > 2 and shape[-1] == 1:  # (T, width, 1, 1), as some networks give it
        shape = shape[:-1]
    if shape == (0,):  # numpy's empty array
        return FeatureArray(source, 0, 0, load, zero=True)
    if len(shape) == 3:
        axis = _crop_axis(shape, source)
    elif len(shape) != 2:
        raise InputError(f"{source}: has shape {tuple(array.shape)}, expected (T, width); save one row per snippet")
    if shape[-1] == 0:
        raise InputError(f"{source}: has shape {tuple(array.shape)}, rows without numbers; extract its features again")
    zero = not np.any(array[:1]) and not np.any(array[:])  # the first row usually decides
    if axis is None:
        squeezed = shape != tuple(array.shape)
        return FeatureArray(
            source, shape[0], shape[1], (lambda: load().reshape(shape)) if squeezed else load, zero=zero
        )
    rest = tuple(n for i, n in enumerate(shape) if i != axis)

    def mean() -> np.ndarray:
        return load().astype(np.float32).reshape(shape).mean(axis=axis)

    return FeatureArray(source, rest[0], rest[1], mean, crops=shape[axis], zero=zero)


def _crop_axis(shape: tuple[int, ...], source: str) -> int:
    found = [axis for axis in (1, 0) if shape[axis] in (1, *CROPS)]
    if shape[:2] == (1, 1):
        found = [1]
    if len(found) != 1:
        why = "both of its first axes could be crops" if found else "expected (T, width)"
        raise InputError(
            f"{source}: has shape {shape}, {why}; of crops only (T, 10, width) and (10, T, width) are understood, or 5 "
            "of them: save their mean as (T, width)"
        )
    return found[0]


def check_real(array: Any, source: str) -> None:
    if array.dtype.kind not in "fiu":
        raise InputError(f"{source}: has dtype {array.dtype}; features are real numbers, save them as float32")
