"""Layout 2: UM, CoLA, BaS-Net and what ``d2net convert`` writes.

``features/SUBSET/{rgb,flow}/VIDEO.npy``, ``gt.json`` and one ``split_SUBSET.txt`` per subset. RGB alone, or flow alone,
will do.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from d2net.data.catalog import TRAINING, Catalog, Listing
from d2net.data.containers import FeatureArray
from d2net.data.locate import STREAMS, FeatureFolder, MissingFeatures, visible
from d2net.data.timeline import Entry, Timeline, read_timeline
from d2net.data.times import Times
from d2net.errors import InputError

STRIDE, FPS = 16, 25.0


def list_cola(folder: Path, *, annotations: Path | None = None) -> Catalog:
    """Layout 2. Test videos that gt.json does not know stay, without labels and segments (THUMOS14 has such).

    Args:
        folder: Holds ``features``, ``gt.json`` and ``split_*.txt``.
        annotations: Another JSON in place of ``gt.json``.

    Raises:
        InputError: a missing or broken file, an empty split, a video in two splits.
    """
    timeline = read_timeline(annotations or folder / "gt.json")
    splits = {
        path.stem.removeprefix("split_"): path
        for path in reversed(visible(folder))
        if path.name.startswith("split_") and path.suffix == ".txt"
    }
    if not splits:
        raise InputError(f"{folder}: no split_train.txt or split_test.txt; write one video name per line")
    listings: list[Listing] = []
    place: dict[str, Path] = {}
    finders = []
    for subset, path in splits.items():
        finder = _Features(folder / "features" / subset)
        finders.append(finder)
        for name in read_split(path, timeline):
            if name in place:
                raise InputError(f"{folder}: '{name}' is in {place[name].name} and {path.name}; keep it in one of them")
            place[name] = path
            entry = timeline.videos.get(name)
            unknown = entry is None and subset.lower() in TRAINING
            entry = replace(entry, subset=subset) if entry else Entry(subset)
            why = (
                f"{timeline.path}: has no labels for '{name}' of {path.name}; annotate it, or take it out of the split"
            )
            listings.append(Listing(name, entry, partial(finder.open, name), why if unknown else ""))
    return Catalog(
        name=timeline.name or folder.resolve().name,
        source=folder,
        classes=timeline.classes,
        listings=tuple(listings),
        times=_conventional(listings),
        notes=_notes(listings),
        unused=lambda: [path for finder in finders for path in finder.unused(set(place))],
    )


def read_split(path: Path, timeline: Timeline) -> list[str]:
    """Names of a split, one a line, as the annotations spell them. Raises InputError when there are none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); write one video name per line, in UTF-8") from None
    lines = [line.removesuffix("\r") for line in lines if line.strip()]
    # Blanks at the ends are an editor's, unless the annotations know the name with them.
    names = dict.fromkeys(line if line in timeline.videos else line.strip() for line in lines)
    if not names:
        raise InputError(f"{path}: the split is empty; write one video name per line or delete the file")
    return list(names)


def _conventional(listings: list[Listing]) -> Times:
    """16 frames at 25 fps, the convention of these features, where the annotations give neither."""
    said = [x.entry.times for x in listings]
    if any((t.fps is None) != (t.stride is None) and t.seconds_per_snippet is None for t in said):
        return Times()  # one of the two without the other: the other is not known
    return Times(fps=FPS, stride=STRIDE)


def _notes(listings: list[Listing]) -> tuple[str, ...]:
    count = sum(x.entry.times == Times() for x in listings)
    usual = f"a snippet of {count} recordings is taken as {STRIDE} frames at {FPS:g} fps, as is usual in this layout"
    return (f"{usual}; --stride, --fps say otherwise",) if count else ()


class _Features:
    """The streams of a subset, each a folder; what is not there is asked for when a recording is opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.streams = {s: FeatureFolder(folder / s) for s in STREAMS if (folder / s).is_dir()}

    def open(self, name: str) -> tuple[FeatureArray, ...]:
        if not self.streams:
            raise MissingFeatures(f"{self.folder}: no such folder of features; add them")
        arrays: list[FeatureArray] = []
        for stream in self.streams.values():
            found = stream.open(name)
            if len(found) > 1:
                raise InputError(f"{found[0].source}: holds two streams, expected one; keep each in its folder")
            arrays += found
        return tuple(arrays)

    def unused(self, names: set[str]) -> list[Path]:
        return [path for stream in self.streams.values() for path in stream.unused(names)]
