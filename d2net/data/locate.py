"""Finds the features of a recording in a folder, by its name."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from functools import cached_property
from pathlib import Path

from d2net.data.containers import SUFFIXES, FeatureArray, h5_recordings, open_file, open_h5
from d2net.errors import InputError
from d2net.files import one_component
from d2net.reading import missing
from d2net.words import listed

STREAMS = ("rgb", "flow")
JOINT = "-I3D-JOINTFeatures.npy"  # suffix of the single feature file of the W-TALC layout


class MissingFeatures(InputError):
    """A recording has no features; it can be left out."""


class FeatureFolder:
    """A folder of feature files, one a recording: ``NAME.npy`` or another container; or two, ``NAME_rgb.npy`` and
    ``NAME_flow.npy``, or ``NAME.npy`` in each of the folders ``rgb`` and ``flow``; or one HDF5 file of all recordings.
    Where no recording has flow (or none has RGB), the other is the only stream.

    A recording's name may lack or have ActivityNet's prefix ``v_``. Names are compared in Unicode's composed form,
    since some file systems store them decomposed. What is called exactly as a recording is that recording's alone.

    Args:
        folder: What to look in, when the first recording is opened.
        names: Of all recordings that may lie here.
    """

    def __init__(self, folder: Path, names: Collection[str] = ()) -> None:
        self.folder = folder
        self._names = frozenset(names)
        self._used: set[Path] = set()

    def open(self, name: str) -> tuple[FeatureArray, ...]:
        """The features of a recording: one array, or that of RGB and that of flow.

        Raises:
            MissingFeatures: no file, or only one of two.
            InputError: more than one file that could be meant, or one that cannot be used; an unreadable folder.
        """
        if self._streams:
            return tuple(_only(stream.open(name)) for stream in self._streams)
        for each in _spellings(name):
            key = spelt(each)
            if self._of(key, name):
                return _streams(open_file(self._one(key, name)))
            path, names = self._collection
            if path is not None and key in names and not self._of_another(names[key], name):
                self._used.add(path)
                return _streams(open_h5(path, names[key]))
            found = {s: k for s in STREAMS if (k := self._suffixed(key, s, name))}
            if found and set(found) != self._suffixes:
                there, absent = STREAMS if "rgb" in found else STREAMS[::-1]
                raise MissingFeatures(f"{self.folder}: '{name}' has {there} features but no {absent}; add them")
            if found:
                return tuple(_only(open_file(self._one(k, name))) for k in found.values())
        others = [p for p in entries(self.folder) if spelt(p.stem) in map(spelt, _spellings(name))]
        try:
            one_component(name, str(self.folder))
        except InputError as error:
            raise MissingFeatures(str(error)) from None
        dangling = [p.name for p in others if p.is_symlink() and not p.exists()]
        if dangling:
            raise MissingFeatures(
                f"{self.folder / dangling[0]}: {missing(self.folder / dangling[0])}; mend it, or take the recording "
                "out of the annotations or split"
            )
        found_names = listed([p.name for p in others])
        there = f" (there is {found_names}, of which none can be read: {', '.join(SUFFIXES)})" if others else ""
        raise MissingFeatures(
            f"{self.folder / name}.npy: no such feature file{there}; add it, or take the recording out of the "
            "annotations or split"
        )

    def unused(self) -> list[Path]:
        """Files that belong to no recording opened so far. Raises InputError for an unreadable folder."""
        if self._streams:
            return [path for stream in self._streams for path in stream.unused()]
        return [p for p in feature_files(self.folder) if p not in self._used and p.exists()]

    @cached_property
    def _streams(self) -> list[FeatureFolder]:
        return [FeatureFolder(self.folder / s, self._names) for s in STREAMS if (self.folder / s).is_dir()]

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        """Of each stem. A recording may be called anything, ".x" too: what is no recording's name is not looked up."""
        files: dict[str, list[Path]] = {}
        if not self.folder.is_dir():
            raise MissingFeatures(f"{self.folder}: no such folder of features; add them")
        for path in entries(self.folder):
            if path.suffix.lower() in SUFFIXES and (path.exists() or not path.is_symlink()):
                files.setdefault(spelt(path.stem), []).append(path)
        return files

    @cached_property
    def _suffixes(self) -> set[str]:
        """The streams that some file here is named after."""
        return {s for s in STREAMS if any(key.endswith(end) for key in self._files for end in _suffixed_keys("", s))}

    @cached_property
    def _collection(self) -> tuple[Path | None, dict[str, str]]:
        """The one HDF5 file of all recordings and their names in it; None and none where there is no such file."""
        paths = [p for p in feature_files(self.folder) if p.suffix.lower() in (".h5", ".hdf5")] if self._files else []
        if len(paths) != 1:
            return None, {}
        return paths[0], {spelt(name): name for name in h5_recordings(paths[0])}

    def _of_another(self, spelt: str, name: str) -> bool:
        return spelt != name and spelt in self._names

    def _of(self, key: str, name: str) -> list[Path]:
        """The files under ``key`` that can be those of ``name``."""
        return [p for p in self._files.get(key, ()) if not self._of_another(p.stem, name)]

    def _suffixed(self, key: str, stream: str, name: str) -> str | None:
        return next((each for each in _suffixed_keys(key, stream) if self._of(each, name)), None)

    def _one(self, key: str, name: str) -> Path:
        found = self._of(key, name)
        if len(found) > 1:
            names = " and ".join(p.name for p in found)
            raise InputError(f"{self.folder}: {names} could both be the features of '{name}'; keep one of them")
        self._used.add(found[0])
        return found[0]


class FeatureFinder:
    """Looks for the folder of the features when the first of them is wanted: an evaluation needs none.

    Args:
        place: Holds the annotations: see :func:`features_folder`.
        names: Of all recordings that may lie there.
    """

    def __init__(self, place: Path, names: Collection[str]) -> None:
        self.place = place
        self.names = names

    @cached_property
    def folder(self) -> FeatureFolder:
        return FeatureFolder(features_folder(self.place), self.names)

    def open(self, name: str) -> tuple[FeatureArray, ...]:
        return self.folder.open(name)


def features_folder(folder: Path) -> Path:
    """The folder that holds the feature files, or their folders ``rgb`` and ``flow``, of annotations in ``folder``:
    ``features`` in it, itself, or the only other one in it with such files.

    Raises:
        InputError: there is none, or more than one.
    """
    named = folder / "features"
    if named.is_dir() or _holds_features(folder):
        return named if named.is_dir() else folder
    found = [p for p in visible(folder) if p.is_dir() and _holds_features(p)]
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise InputError(f"{folder}: expected one folder of .npy features, found {names}; name yours 'features'")
    return found[0]


def _holds_features(folder: Path) -> bool:
    return bool(feature_files(folder)) or any((folder / s).is_dir() for s in STREAMS)


def spelt(name: str) -> str:
    """A name as it is compared: some file systems take Unicode's letters apart."""
    return unicodedata.normalize("NFC", name)


def feature_files(folder: Path) -> list[Path]:
    """Paths of the files in ``folder`` that could be features. Raises InputError when it cannot be read."""
    return [p for p in visible(folder) if p.suffix.lower() in SUFFIXES and not p.name.endswith(JOINT)]


def visible(folder: Path) -> list[Path]:
    """The entries of a folder by name, without what editors, archives and file browsers leave behind."""
    return [
        p
        for p in entries(folder)
        if not (p.name.startswith((".", "~$", "#")) or p.name.endswith("~") or p.name == "__MACOSX")
    ]


def entries(folder: Path) -> list[Path]:
    """The entries of a folder by name. Raises InputError when it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); give a folder") from None


def _spellings(name: str) -> tuple[str, ...]:
    return (name, f"v_{name}", name.removeprefix("v_"))


def _suffixed_keys(key: str, stream: str) -> tuple[str, ...]:
    return tuple(f"{key}{sign}{text}" for sign in "_-." for text in (stream, stream.upper()))


def _streams(arrays: dict[str, FeatureArray]) -> tuple[FeatureArray, ...]:
    return tuple(arrays[s] for s in STREAMS) if "rgb" in arrays else (arrays[""],)


def _only(arrays: dict[str, FeatureArray] | tuple[FeatureArray, ...]) -> FeatureArray:
    """The array of a file, or of a recording in a folder, that may hold one stream alone."""
    found = tuple(arrays.values()) if isinstance(arrays, dict) else arrays
    if len(found) > 1:
        raise InputError(f"{found[0].source}: holds two streams where one is expected; save each alone")
    return found[0]
