"""HDF5 files: of one recording, or of many; only what lies in the file itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from d2net.data.containers.array import FeatureArray, feature_array
from d2net.data.containers.names import stream_names
from d2net.errors import InputError
from d2net.reading import check_ordinary
from d2net.words import reason


def open_h5(path: Path, name: str | None = None) -> dict[str, FeatureArray]:
    """As :func:`open_file`, of an HDF5 file, or of one recording, ``name``, in a file of many."""
    with _h5(path) as file:
        place = file if name is None else _own(file, name)
        if hasattr(place, "shape"):  # the recording is an array, not a group of arrays
            return {"": _h5_array(path, place)}
        arrays = {key: found for key in place if hasattr(found := _own(place, key), "shape")}
        source = str(path) if name is None else f"{path}[{name}]"
        return {stream: _h5_array(path, arrays[key]) for stream, key in stream_names(arrays, source).items()}


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
    if array.shape is None:
        raise InputError(f"{path}[{key.lstrip('/')}]: is a null dataset, without numbers; extract its features again")

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
