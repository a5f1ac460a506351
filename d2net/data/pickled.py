"""NumPy's pickled arrays, as the files of W-TALC are, read without running anything that they name.

A pickle calls what it names, with what it holds: code of anybody's, or NumPy's own functions, which end the process
where a type or a length in a damaged file is another. Here the few names that such files need stand for functions of
this module, which check before they make an array; any other name is an error.
"""

from __future__ import annotations

import math
import pickle
import re
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_TYPES = re.compile(r"([<>|=]?)(?:([biufcSU])([0-9]{1,9})|(O)[0-9]?|(\?))")  # of items; none with fields
_MAX_AXES = 32
_MODULES = {"numpy.core.multiarray", "numpy._core.multiarray"}  # of NumPy 1 and 2


def load_pickled(path: Path) -> Any:
    """What a ``.npy`` file, or a pickle without its header, holds; texts of Python 2 as Latin-1.

    Raises:
        Exception: of any kind, where it is damaged or holds more than arrays, numbers, texts, lists, tuples and dicts.
    """
    with open(path, "rb") as file:
        return read_pickled(file)


def read_pickled(file: BinaryIO) -> Any:
    """:func:`load_pickled` of an open file, from its beginning."""
    file.seek(0)
    start = file.read(6)
    file.seek(0)
    if start != b"\x93NUMPY":
        return _Unpickler(file).load()
    shape, objects = _header(file)
    if not objects:
        file.seek(0)
        array = np.lib.format.read_array(file, allow_pickle=False)
        _check_texts(array.tobytes(), array.dtype)
        return array
    array = _Unpickler(file).load()
    if not isinstance(array, np.ndarray) or not array.dtype.hasobject or array.size != math.prod(shape):
        raise ValueError(f"its header says {shape}, its content is another")
    return array.reshape(shape)


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject and dtype != np.dtype(object):
        raise ValueError(f"items of {dtype}")
    _check_shape(shape)
    return shape, dtype.hasobject


def _check_shape(shape: Any) -> None:
    if not isinstance(shape, tuple) or len(shape) > _MAX_AXES or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError("a shape that no array has")


class _Unpickler(pickle._Unpickler):
    """In Python: that in C complains of damaged bytearrays on stderr, and takes a state for anything."""

    dispatch = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code not in (pickle.EXT1[0], pickle.EXT2[0], pickle.EXT4[0], pickle.INST[0])
    }

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], (_Array, _Type)):  # type: ignore[attr-defined]
            raise pickle.UnpicklingError("it gives a state to what has none")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]

    def find_class(self, module: str, name: str) -> Any:
        if module in _MODULES and name in ("_reconstruct", "scalar"):
            return _new_array if name == "_reconstruct" else _scalar
        if module in ("numpy._core.numeric", "numpy.core.numeric") and name == "_frombuffer":
            return _from_buffer
        if (module, name) == ("numpy", "dtype"):
            return _new_type
        if (module, name) == ("numpy", "ndarray"):
            return "ndarray"  # only named, beside _reconstruct
        if (module, name) == ("_codecs", "encode"):  # bytes, of Python 3 in a protocol of Python 2
            return _encode
        if module in ("builtins", "__builtin__") and name == "bytes":  # none of them, as Python 3 writes that
            return _no_bytes
        raise pickle.UnpicklingError(f"it names {module}.{name}, and arrays alone are read")


def _check_texts(content: bytes | bytearray, dtype: np.dtype) -> None:
    """NumPy takes any 32 bits for a letter, and fails where one is looked at that there is not."""
    if dtype.kind == "U" and content:
        letters = np.frombuffer(content, np.dtype(np.uint32).newbyteorder(dtype.byteorder))
        if letters.max() > sys.maxunicode:
            raise ValueError("a text has a letter that there is not")


class _Array(np.ndarray):
    """An array that is filled once, as a pickle does it, after its content has been checked."""

    def __setstate__(self, state: Any) -> None:
        if self.shape != (0,) or not isinstance(state, tuple) or len(state) not in (4, 5):
            raise ValueError("the content of an array is malformed")
        shape, kind, by_columns, content = state[-4:]
        _check_shape(shape)
        dtype = _dtype(kind)
        if dtype.hasobject:
            right = isinstance(content, list) and len(content) == math.prod(shape)
        else:
            content = content.encode("latin1") if isinstance(content, str) else content
            right = isinstance(content, bytes)
            right = right and len(content) == math.prod(shape) * dtype.itemsize
        if not right or not isinstance(by_columns, (bool, int)):
            raise ValueError(f"an array of shape {shape} and type {dtype} does not have its content")
        if not dtype.hasobject:
            _check_texts(content, dtype)
        # A list of its own: the pickle may go on filling the one that it gave.
        content = list(content) if dtype.hasobject else content
        super().__setstate__((1, shape, dtype, bool(by_columns), content))  # type: ignore[arg-type]


class _Type:
    """A type of items as the pickle describes it, in two steps; :func:`_dtype` makes NumPy's of it."""

    __slots__ = ("order", "text")

    def __init__(self, text: str) -> None:
        self.text, self.order = text, ""

    def __setstate__(self, state: Any) -> None:
        # Version, order of bytes, then what types with fields or of arrays have, and for the others is known by text.
        if not isinstance(state, tuple) or len(state) < 5 or state[2:5] != (None, None, None):
            raise ValueError("the type of an array is none of plain items")
        if not isinstance(state[1], str) or state[1] not in ("<", ">", "|", "="):
            raise ValueError("the type of an array has no order of bytes")
        self.order = state[1]


def _dtype(kind: Any) -> np.dtype:
    if not isinstance(kind, _Type):
        raise ValueError("an array has no type")
    dtype = np.dtype(object) if kind.text.lstrip("<>|=").startswith("O") else np.dtype(kind.text)
    return dtype.newbyteorder(kind.order) if kind.order in ("<", ">") else dtype  # type: ignore[arg-type]


def _new_type(text: Any, align: Any = False, copy: Any = True) -> _Type:
    text = text.decode("ascii") if isinstance(text, bytes) else text
    if not isinstance(text, str) or not _TYPES.fullmatch(text):
        raise ValueError("an array of a type that is not read")
    return _Type(text)


def _new_array(kind: Any, shape: Any, code: Any) -> _Array:
    if kind != "ndarray":
        raise ValueError("an array of another class")
    return np.ndarray.__new__(_Array, (0,), np.int8)


def _scalar(kind: Any, content: Any = None) -> Any:
    dtype = _dtype(kind)
    if dtype.hasobject:
        return content
    content = content.encode("latin1") if isinstance(content, str) else content
    if not isinstance(content, bytes) or len(content) != dtype.itemsize:
        raise ValueError(f"a number of type {dtype} does not have its bytes")
    _check_texts(content, dtype)
    return np.frombuffer(content, dtype)[0] if dtype.itemsize else dtype.type()


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any, axis_order: Any = None) -> np.ndarray:
    _check_shape(shape)
    dtype = _dtype(kind)
    right = isinstance(content, (bytes, bytearray)) and order in ("C", "F") and axis_order is None
    if not right or dtype.hasobject or len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError("the content of an array is malformed")
    _check_texts(content, dtype)
    return (
        np.frombuffer(bytes(content), dtype).reshape(shape, order=order).copy() if content else np.empty(shape, dtype)
    )


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("bytes in an encoding that is not read")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""
