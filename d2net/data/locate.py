"""Finding the features of a recording in a folder, by its name."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from d2net.data.containers import SUFFIXES, FeatureArray, h5_recordings, open_file, open_h5
from d2net.errors import InputError

STREAMS = ("rgb", "flow")
JOINT = "-I3D-JOINTFeatures.npy"  # how the one file of the W-TALC layout ends


class MissingFeatures(InputError):
    """A recording has no features here: it can be left out."""


class FeatureFolder:
    """A folder of feature files, one a recording: ``NAME.npy`` or another container, or two, ``NAME_rgb.npy`` and
    ``NAME_flow.npy``; or one HDF5 file of all recordings.

    A recording's name may lack or have ActivityNet's prefix ``v_``. Names are compared in Unicode's composed form,
    since some file systems store them decomposed.

    Args:
        folder: What to look in; folders in it are not looked in.

    Raises:
        InputError: the folder cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, list[Path]] = {}
        # A recording may be called anything, ".x" too; what is no recording's name is never looked up.
        for path in entries(folder):
            if path.suffix.lower() in SUFFIXES:
                self.files.setdefault(_key(path.stem), []).append(path)
        self.collection: tuple[Path, dict[str, str]] | None = None
        paths = feature_files(folder)
        if len(paths) == 1 and paths[0].suffix.lower() in (".h5", ".hdf5"):
            self.collection = paths[0], {_key(name): name for name in h5_recordings(paths[0])}

    def open(self, name: str) -> tuple[FeatureArray, ...]:
        """The features of a recording: one array, or that of RGB and that of flow.

        Raises:
            MissingFeatures: no file, or only one of two.
            InputError: more than one file that could be meant, or one that cannot be used.
        """
        for each in (name, f"v_{name}", name.removeprefix("v_")):
            key = _key(each)
            if self.collection is not None and key in self.collection[1]:
                path, names = self.collection
                return _streams(open_h5(path, names[key]))
            if key in self.files:
                return _streams(open_file(self._one(key, name)))
            pair = [self._suffixed(key, stream) for stream in STREAMS]
            if all(pair):
                return tuple(_only(open_file(self._one(k, name))) for k in pair if k)
            if any(pair):
                there, absent = STREAMS if pair[0] else STREAMS[::-1]
                raise MissingFeatures(f"{self.folder}: '{name}' has {there} features but no {absent}; add them")
        raise MissingFeatures(
            f"{self.folder / name}.npy: no such feature file; add it, or take the recording out of the annotations or "
            "split"
        )

    def unused(self, names: set[str]) -> list[Path]:
        """Files that belong to none of the recordings ``names``."""
        known = {_key(each) for name in names for each in (name, f"v_{name}", name.removeprefix("v_"))}
        known |= {key for each in list(known) for stream in STREAMS for key in _suffixed_keys(each, stream)}
        if self.collection is not None:
            return []
        return [path for path in feature_files(self.folder) if _key(path.stem) not in known]

    def _suffixed(self, key: str, stream: str) -> str | None:
        return next((each for each in _suffixed_keys(key, stream) if each in self.files), None)

    def _one(self, key: str, name: str) -> Path:
        found = self.files[key]
        if len(found) > 1:
            names = " and ".join(p.name for p in found)
            raise InputError(f"{self.folder}: {names} could both be the features of '{name}'; keep one of them")
        return found[0]


def feature_files(folder: Path) -> list[Path]:
    """Paths of the files in ``folder`` that could be features. Raises InputError when it cannot be read."""
    return [p for p in visible(folder) if p.suffix.lower() in SUFFIXES and not p.name.endswith(JOINT)]


def visible(folder: Path) -> list[Path]:
    """What is in a folder, by name, but for what editors, archives and file browsers leave behind."""
    return [
        p
        for p in entries(folder)
        if not (p.name.startswith((".", "~$", "#")) or p.name.endswith("~") or p.name == "__MACOSX")
    ]


def entries(folder: Path) -> list[Path]:
    """All that is in a folder, by name. Raises InputError when it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); give a folder") from None


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _suffixed_keys(key: str, stream: str) -> tuple[str, ...]:
    return tuple(f"{key}{sign}{text}" for sign in "_-." for text in (stream, stream.upper()))


def _streams(arrays: dict[str, FeatureArray]) -> tuple[FeatureArray, ...]:
    return tuple(arrays[s] for s in STREAMS) if "rgb" in arrays else (_only(arrays),)


def _only(arrays: dict[str, FeatureArray]) -> FeatureArray:
    if "" not in arrays:
        raise InputError(f"{next(iter(arrays.values())).source}: holds two streams, expected one array; save it alone")
    return arrays[""]
