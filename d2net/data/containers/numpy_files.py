"""Files of numpy's: .npy, of which only the header is read at first, and .npz. Nothing is unpickled."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from d2net.data.containers.array import check_real
from d2net.data.containers.names import stream_names
from d2net.errors import InputError
from d2net.reading import check_ordinary
from d2net.words import quoted, reason


@dataclass(frozen=True)
class NpyFile:
    """A .npy file of real numbers, of which only the header has been read.

    Attributes:
        header: Its bytes: another one at reading is another file.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    header: bytes
    by_columns: bool

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> np.ndarray:
        """The first rows, ``[:n]``, or all, ``[:]``."""
        if rows.stop is None or self.by_columns:
            return self.read()[rows]
        return self._read((min(rows.stop, self.shape[0]), *self.shape[1:]))

    def read(self) -> np.ndarray:
        """All of it.

        Raises:
            InputError: it cannot be read, or has shrunk or changed since it was opened.
        """
        return self._read(self.shape)

    def _read(self, shape: tuple[int, ...]) -> np.ndarray:
        array = np.empty(shape[::-1] if self.by_columns else shape, self.dtype)
        try:
            with open(self.path, "rb") as file:
                header = file.read(len(self.header))
                read = file.readinto(array.reshape(-1).view(np.uint8).data)
                found = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror}); give a readable .npy file") from None
        if found < self.size or read < array.nbytes:
            raise InputError(
                f"{self.path}: shrank while it was read (expected {self.size} bytes, found {found}); write it again"
            )
        if header != self.header:
            raise InputError(f"{self.path}: was changed while it was in use; start again")
        return array.T if self.by_columns else array


def open_npy(path: Path) -> NpyFile:
    """The header of a .npy file; no data is read and no pickle is executed.

    Raises:
        InputError: missing, empty, truncated or foreign file, pickled objects, non-numeric dtype.
    """
    with _opened(path) as file:
        if file.read(2) == b"PK":
            raise InputError(f"{path}: is an .npz archive; name it .npz, or save one array of shape (T, width) as .npy")
        file.seek(0)
        found = os.fstat(file.fileno()).st_size
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"version {version} of the format")
        shape, by_columns, dtype = readers[version](file)
        if dtype.hasobject:
            raise InputError(
                f"{path}: holds pickled Python objects; save each recording as a plain float32 (T, width) array"
            )
        if any(type(n) is not int or n < 0 for n in shape) or len(shape) > 8:
            raise ValueError(f"shape {shape}")
        if max(shape, default=0) >= 2**62 or math.prod(n or 1 for n in shape) * dtype.itemsize >= 2**62:
            raise ValueError(f"shape {shape}, which no memory has room for")
        length = file.tell()
        file.seek(0)
        array = NpyFile(path, shape, dtype, file.read(length), by_columns)
        if found != array.size:
            why = "truncated perhaps" if found < array.size else "longer than its header says"
            raise InputError(
                f"{path}: not a readable .npy file, {why} (expected {array.size} bytes, found {found}); extract or "
                "download it again"
            )
    check_real(array, str(path))
    return array


def load_npz(path: Path, only: str | None) -> dict[str, np.ndarray]:
    """The streams of an archive, or only one of them."""
    with _opened(path) as file:
        if file.read(2) != b"PK":  # a .npy of another name
            return {"": open_npy(path).read()}
        file.seek(0)
        with np.load(file, allow_pickle=False) as archive:
            keys = stream_names(dict.fromkeys(archive.files), str(path))
            try:
                return {s: _member(archive, key, path) for s, key in keys.items() if only in (None, s)}
            except InputError:
                raise
            except Exception as error:
                if "Object arrays" in str(error):
                    raise InputError(f"{path}: holds pickled Python objects; save plain float32 arrays") from None
                raise InputError(f"{path}: damaged ({reason(error)}); extract or download it again") from None


def _member(archive: Any, key: str, path: Path) -> np.ndarray:
    """An array of an archive; it is read to its end, where zipfile compares the CRC-32."""
    name = key if key in archive.zip.namelist() else f"{key}.npy"  # as numpy names them
    with archive.zip.open(name) as file:
        begin = file.read(6)
    if begin != b"\x93NUMPY":
        raise InputError(f"{path}: {quoted(name)} in it is no .npy array; write it with numpy.savez")
    with archive.zip.open(name) as file:
        array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):
            raise ValueError(f"{quoted(name)} in it is longer than its header says")
    return array


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file of numpy's to read; whatever is raised within, for what is wrong with it, becomes an InputError."""
    kind = path.suffix.lower()
    check_ordinary(path)
    try:
        with open(path, "rb") as file:
            yield file
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a readable {kind} file") from None
    except Exception as error:  # numpy lets what a damaged header or zip raises through
        with open(path, "rb") as file:
            begin = file.read(6)
        if not begin:
            raise InputError(f"{path}: the file is empty (0 bytes); extract or download it again") from None
        if not begin.startswith((b"\x93NUMPY"[: len(begin)], b"PK")):
            raise InputError(
                f"{path}: not a readable {kind} file: does not begin as one; a web page or a pointer of git-lfs "
                "perhaps, download the file itself"
            ) from None
        raise InputError(
            f"{path}: not a readable {kind} file, truncated perhaps ({reason(error)}); extract or download it again"
        ) from None
