"""Opening feature files: memory-mapped, checked by their header, with errors a user can act on."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from d2net.errors import InputError


def open_npy(path: Path) -> np.ndarray:
    """An array of real numbers, memory-mapped read-only: no data is read and no pickle is executed.

    Raises:
        InputError: missing, empty, truncated or foreign file, pickled objects, non-numeric dtype.
    """
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty (0 bytes); extract or download it again")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such feature file; add it, or take the recording out of the annotations or split"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a readable .npy file") from None
    except (ValueError, EOFError) as error:
        if "Python objects in dtype" in str(error):
            raise InputError(
                f"{path}: holds pickled Python objects; save each recording as a plain float32 (T, width) array"
            ) from None
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{path}: not a readable .npy file, truncated perhaps ({reason}); extract or download it again"
        ) from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise InputError(f"{path}: is an .npz archive; save each recording as one .npy array of shape (T, width)")
    if array.dtype.kind not in "fiu":
        raise InputError(f"{path}: has dtype {array.dtype}; features are real numbers, save them as float32")
    return array


def open_features(path: Path, width: int | None = None) -> np.ndarray:
    """Features of one recording, (T, width), T >= 1, memory-mapped; values are not looked at.

    Args:
        width: Columns that the other recordings have, or None for the first one.

    Raises:
        InputError: as :func:`open_npy`, or a wrong shape.
    """
    return check_features(open_npy(path), str(path), width)


def check_features(array: np.ndarray, source: str, width: int | None = None) -> np.ndarray:
    """``array`` itself when it is (T >= 1, width); otherwise an InputError that names ``source``."""
    if array.ndim != 2 or (width is not None and array.shape[1] != width):
        expected = "(T, width)" if width is None else f"(T, {width}) as the other recordings have"
        raise InputError(
            f"{source}: has shape {tuple(array.shape)}, expected {expected}; extract all with the same network"
        )
    if array.size == 0:
        raise InputError(f"{source}: has shape {tuple(array.shape)}, no snippet; extract its features again")
    return array


def halves(width: int, source: str) -> tuple[int, int]:
    """Stream widths of joint RGB + flow features. Raises InputError for an odd width."""
    if width % 2:
        raise InputError(f"{source}: width {width} is odd; joint features are two streams (RGB, flow) of equal width")
    return width // 2, width // 2


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError for a missing or malformed file, or another JSON type."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the path of an annotations JSON") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); repair it or download it again") from None
    if not isinstance(value, dict):
        raise InputError(f'{path}: holds a JSON {type(value).__name__}, expected an object with the key "database"')
    return value


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls ``write(file)`` on a temporary file beside ``path`` and renames it: whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would keep colleagues out of a shared folder
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
