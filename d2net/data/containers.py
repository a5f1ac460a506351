"""Feature files in the containers that people have: .npy, .npz, .pt, .h5; one door for all of them."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from d2net.errors import InputError
from d2net.reading import check_ordinary
from d2net.words import reason

SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".h5", ".hdf5")
NAMES = ("feats", "features", "feature", "feat")  # what the one array of a container is called
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


def open_file(path: Path) -> dict[str, FeatureArray]:
    """What a file holds: one array under the name "", or two under "rgb" and "flow". Nothing is unpickled.

    Raises:
        InputError: a missing, damaged or foreign file, pickled objects, an array that is no (T, width).
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        file = open_npy(path)
        return {"": feature_array(file, str(path), file.read)}
    if suffix in (".h5", ".hdf5"):
        return open_h5(path)
    load = _load_npz if suffix == ".npz" else _load_torch
    return {
        stream: feature_array(x, f"{path}[{stream}]" if stream else str(path), partial(_one_of, load, path, stream))
        for stream, x in load(path, None).items()
    }


def _one_of(load: Callable[[Path, str | None], dict[str, np.ndarray]], path: Path, stream: str) -> np.ndarray:
    return load(path, stream)[stream]


def feature_array(array: Any, source: str, read: Callable[[], np.ndarray] | None = None) -> FeatureArray:
    """An array as features: (T, width); or with crops, (T, crops, width) or (crops, T, width), whose mean is taken.

    Args:
        array: Anything with a shape and a dtype.
        source: For messages.
        read: Returns the array where ``array`` only describes it.

    Raises:
        InputError: another shape, or another type than real numbers.
    """
    _check_real(array, source)
    load = read or (lambda: array)
    shape, axis = tuple(array.shape), None
    while len(shape) > 2 and shape[-1] == 1:  # (T, width, 1, 1), as some networks give it
        shape = shape[:-1]
    if shape == (0,):  # numpy's array of nothing
        return FeatureArray(source, 0, 0, load, zero=True)
    if len(shape) == 3:
        axis = _crop_axis(shape, source)
    elif len(shape) != 2:
        raise InputError(f"{source}: has shape {tuple(array.shape)}, expected (T, width); save one row per snippet")
    if shape[-1] == 0:
        raise InputError(f"{source}: has shape {tuple(array.shape)}, rows without numbers; extract its features again")
    zero = not np.any(array[:1]) and not np.any(array[:])  # one row tells of nearly all
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
            raise ValueError(f"expected {array.size} bytes, found {found}")
    _check_real(array, str(path))
    return array


def _check_real(array: Any, source: str) -> None:
    if array.dtype.kind not in "fiu":
        raise InputError(f"{source}: has dtype {array.dtype}; features are real numbers, save them as float32")


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


def _load_npz(path: Path, only: str | None) -> dict[str, np.ndarray]:
    """The streams of an archive, or only one of them."""
    with _opened(path) as file:
        if file.read(2) != b"PK":  # a .npy of another name
            return {"": open_npy(path).read()}
        file.seek(0)
        with np.load(file, allow_pickle=False) as archive:
            keys = _keys(dict.fromkeys(archive.files), str(path))
            try:
                # Of a member that is no .npy numpy gives the bytes.
                return {s: archive[key].view(np.ndarray) for s, key in keys.items() if only in (None, s)}
            except Exception as error:
                if "Object arrays" in str(error):
                    raise InputError(f"{path}: holds pickled Python objects; save plain float32 arrays") from None
                raise InputError(f"{path}: damaged ({reason(error)}); extract or download it again") from None


def _load_torch(path: Path, only: str | None) -> dict[str, np.ndarray]:
    """The streams of a file of PyTorch, or only one of them."""
    import torch

    check_ordinary(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than tensors, which could run code when read, so it is not opened; save the tensor "
            f"alone: torch.save(x, '{path.name}')"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); give a readable file") from None
    except Exception as error:  # a damaged file can raise anything
        raise InputError(
            f"{path}: not a readable PyTorch file, truncated perhaps ({reason(error)}); save it again"
        ) from None
    if isinstance(content, torch.Tensor):
        content = {"": content}
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds a {type(content).__name__}; save one tensor of shape (T, width)")
    tensors = {str(name): x.detach() for name, x in content.items() if isinstance(x, torch.Tensor)}
    chosen = {s: tensors[key] for s, key in _keys(tensors, str(path)).items() if only in (None, s)}
    for x in chosen.values():
        if x.layout == torch.strided and not x.is_meta and x.numel() * x.itemsize > x.untyped_storage().nbytes():
            raise InputError(f"{path}: holds a tensor {tuple(x.shape)} that repeats fewer numbers; save x.contiguous()")
    try:
        return {s: (x.float() if x.is_floating_point() else x).numpy() for s, x in chosen.items()}
    except Exception as error:  # sparse, quantized, on no device
        raise InputError(f"{path}: holds no plain tensor ({reason(error)}); save a dense one") from None


def open_h5(path: Path, name: str | None = None) -> dict[str, FeatureArray]:
    """As :func:`open_file`, of an HDF5 file, or of one recording, ``name``, in a file of many."""
    with _h5(path) as file:
        place = file if name is None else _own(file, name)
        if hasattr(place, "shape"):  # the recording is an array, not a group of arrays
            return {"": _h5_array(path, place)}
        arrays = {key: found for key in place if hasattr(found := _own(place, key), "shape")}
        source = str(path) if name is None else f"{path}[{name}]"
        return {stream: _h5_array(path, arrays[key]) for stream, key in _keys(arrays, source).items()}


def h5_recordings(path: Path) -> list[str]:
    """Names at the top of an HDF5 file."""
    with _h5(path) as file:
        return list(file)


def _own(group: Any, key: str) -> Any:
    """What lies under ``key`` in an HDF5 file itself: links and arrays of other files could be of any file, or wait."""
    import h5py

    link = group.get(key, getlink=True)
    if isinstance(link, h5py.ExternalLink):
        raise InputError(
            f"{group.file.filename}[{key}]: lies in another file, which is not read; copy it into this one"
        )
    found = group[key]
    if isinstance(found, h5py.Dataset) and (found.external or found.is_virtual):
        raise InputError(
            f"{group.file.filename}[{key}]: lies in other files, which are not read; copy it into this one"
        )
    return found


def _h5_array(path: Path, array: Any) -> FeatureArray:
    key = array.name

    def read() -> np.ndarray:
        with _h5(path) as file:
            return np.asarray(file[key])

    return feature_array(array, f"{path}[{key.lstrip('/')}]", read)


@contextmanager
def _h5(path: Path) -> Iterator[Any]:
    """An HDF5 file to read; whatever is raised within, for what is wrong with it, becomes an InputError."""
    try:
        import h5py
    except ImportError:
        raise InputError(f"{path}: reading HDF5 needs the package h5py: pip install 'd2net[h5]'") from None
    check_ordinary(path)
    try:
        before = path.stat().st_size
        with h5py.File(path, "r") as file:
            yield file
        after = path.stat().st_size
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path}: cannot be read as HDF5 ({reason(error)}); extract or download it again") from None
    if after < before:  # HDF5 gives zeros for what has gone
        raise InputError(f"{path}: shrank while it was read (expected {before} bytes, found {after}); write it again")


def _keys(content: Mapping[str, Any], source: str) -> dict[str, str]:
    """Under which names the features lie: {"": its name}, or those of "rgb" and "flow"."""
    lower = {key.lower(): key for key in content}
    if "rgb" in lower and "flow" in lower:
        return {"rgb": lower["rgb"], "flow": lower["flow"]}
    if len(content) == 1:
        return {"": next(iter(content))}
    known = [lower[name] for name in NAMES if name in lower]
    if len(known) == 1:
        return {"": known[0]}
    there = ", ".join(sorted(content)) or "nothing"
    raise InputError(f"{source}: expected one array, or rgb and flow, found {there}; call the features '{NAMES[0]}'")
