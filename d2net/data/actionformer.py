"""Layout 3: ActionFormer, OpenTAD, mmaction2: one file of features per video and an annotations JSON."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path

from d2net.data.catalog import Catalog, Listing
from d2net.data.containers import FeatureArray
from d2net.data.locate import STREAMS, FeatureFolder, feature_files, visible
from d2net.data.timeline import Timeline, is_annotations, read_timeline
from d2net.errors import InputError

I3D = 2048  # columns of I3D features of RGB and flow in one array, 1024 each


def list_actionformer(spec: Path, *, annotations: Path | None = None) -> Catalog:
    """Layout 3.

    Args:
        spec: The JSON, or a folder with one (or one of each subset, as BMN has them); features are ``VIDEO.npy`` or
            another container in ``features`` beside the JSON, in the only other folder there with such files, or
            beside the JSON itself; or in ``rgb`` and ``flow`` in that folder.
        annotations: The JSON, when ``spec`` is the folder of features.

    Raises:
        InputError: a missing or broken file; a video in two files.
    """
    paths = [annotations] if annotations else _jsons(spec)
    timelines = [read_timeline(path) for path in paths]
    finder = _Finder(spec if spec.is_dir() else spec.parent)
    listings: dict[str, Listing] = {}
    for timeline in timelines:
        for name, entry in timeline.videos.items():
            if name in listings:
                raise InputError(f"{timeline.path}: video '{name}' is in another of the JSONs too; keep it in one")
            listings[name] = Listing(name, entry, partial(finder.open, name))
    first = timelines[0]
    return Catalog(
        name=first.name or (first.path.stem if len(paths) == 1 else first.path.parent.resolve().name),
        source=first.path if len(paths) == 1 else first.path.parent,
        classes=_classes(timelines),
        listings=tuple(listings.values()),
        streams=first.streams,
        divide=lambda width, source: (width // 2, width // 2) if width == I3D else (width,),
        unused=lambda: finder.unused(set(listings)),
    )


def _jsons(spec: Path) -> list[Path]:
    if not spec.is_dir():
        return [spec]
    found = [p for p in visible(spec) if p.suffix == ".json" and is_annotations(p)]
    if len(found) > 1:
        found = [p for p in found if not p.stem.endswith("_full")]  # of BMN's: all subsets once more
    if len(found) == 1 or (found and all(p.stem.startswith("anet_anno_") for p in found)):
        return found
    names = ", ".join(p.name for p in found) or "none"
    raise InputError(f"{spec}: expected exactly one annotations JSON, found {names}; give its path instead")


def _features(folder: Path) -> Path:
    """The folder that holds the feature files, or their folders ``rgb`` and ``flow``."""
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


class _Finder:
    """Features in one folder, or each stream's in one of its own; looked for when the first of them is wanted."""

    def __init__(self, place: Path) -> None:
        self.place = place

    @cached_property
    def folders(self) -> list[FeatureFolder]:
        folder = _features(self.place)
        there = [folder / s for s in STREAMS if (folder / s).is_dir()]
        return [FeatureFolder(f) for f in (there or [folder])]

    def open(self, name: str) -> tuple[FeatureArray, ...]:
        return tuple(array for folder in self.folders for array in folder.open(name))

    def unused(self, names: set[str]) -> list[Path]:
        return [path for folder in self.folders for path in folder.unused(names)]


def _classes(timelines: list[Timeline]) -> tuple[str, ...]:
    """Those of the only file, or of all of them, sorted: a class may be in one subset alone."""
    if len(timelines) == 1:
        return timelines[0].classes
    return tuple(sorted({c for t in timelines for c in t.classes}))
