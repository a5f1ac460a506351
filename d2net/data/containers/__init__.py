"""Opens feature files of every supported format: .npy, .npz, .pt, .h5."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from d2net.data.containers.array import FeatureArray, feature_array
from d2net.data.containers.hdf5 import h5_recordings, open_h5
from d2net.data.containers.numpy_files import load_npz, open_npy
from d2net.data.containers.torch_files import load_torch

__all__ = ["SUFFIXES", "FeatureArray", "feature_array", "h5_recordings", "open_file", "open_h5", "open_npy"]

SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".h5", ".hdf5")


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
    load = load_npz if suffix == ".npz" else load_torch
    return {
        stream: feature_array(x, f"{path}[{stream}]" if stream else str(path), partial(_one_of, load, path, stream))
        for stream, x in load(path, None).items()
    }


def _one_of(load: Callable[[Path, str | None], dict[str, np.ndarray]], path: Path, stream: str) -> np.ndarray:
    return load(path, stream)[stream]
