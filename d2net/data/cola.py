"""Layout 2: UM, CoLA, BaS-Net and what ``d2net convert`` writes.

``features/SUBSET/{rgb,flow}/VIDEO.npy``, ``gt.json`` and one ``split_SUBSET.txt`` per subset. RGB alone, or flow alone,
will do.
"""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from functools import partial
from pathlib import Path

from d2net.data.catalog import TRAINING, Catalog, Listing
from d2net.data.locate import FeatureFolder, visible
from d2net.data.timeline import Entry, Timeline, read_timeline
from d2net.data.times import Times
from d2net.errors import InputError
from d2net.files import one_component
from d2net.reading import read_text
from d2net.words import listed

CONVENTION = Times(fps=25, stride=16)  # how these features are extracted


def list_cola(folder: Path, *, annotations: Path | None = None) -> Catalog:
    """Layout 2. Test videos that gt.json does not know stay, without labels and segments (THUMOS14 has such).

    Args:
        folder: Holds ``features``, ``gt.json`` and ``split_*.txt``.
        annotations: Another JSON in place of ``gt.json``.

    Raises:
        InputError: a missing or broken file, an empty split, a video in two splits.
    """
    timeline = read_timeline(annotations or folder / "gt.json")
    # Training first, as everywhere: the names of the subsets fall the other way.
    splits = {
        path.stem.removeprefix("split_"): path
        for path in reversed(visible(folder))
        if path.name.startswith("split_") and path.suffix == ".txt"
    }
    if not splits:
        raise InputError(f"{folder}: no split_train.txt or split_test.txt; write one video name per line")
    listings: list[Listing] = []
    place: dict[str, Path] = {}
    names = {subset: read_split(path, timeline) for subset, path in splits.items()}
    finders = {
        subset: FeatureFolder(folder / "features" / one_component(subset, str(path)), names[subset])
        for subset, path in splits.items()
    }
    for subset, path in splits.items():
        for name in names[subset]:
            if name in place:
                raise InputError(f"{folder}: '{name}' is in {place[name].name} and {path.name}; keep it in one of them")
            place[name] = path
            entry, why_not = timeline.videos.get(name), ""
            if entry is None and subset.lower() in TRAINING:
                why_not = (
                    f"{timeline.path}: has no labels for '{name}' of {path.name}; annotate it, or take it out there"
                )
            entry = replace(entry, subset=subset) if entry else Entry(subset)
            known = name in timeline.videos
            listings.append(Listing(name, entry, partial(finders[subset].open, name), why_not, known))
    return Catalog(
        name=timeline.name or folder.resolve().name,
        source=folder,
        classes=timeline.classes,
        listings=tuple(listings),
        convention=CONVENTION,
        remarks=tuple(timeline.remarks + _remarks(timeline, listings)),
        unused=lambda: [path for finder in finders.values() for path in finder.unused()],
    )


def _remarks(timeline: Timeline, listings: list[Listing]) -> list[str]:
    """Videos of a split that the annotations do not know, and the other way round."""
    strange = [x.name for x in listings if not x.known and not x.why_not]
    names = {x.name for x in listings}
    unsplit = [name for name in timeline.videos if name not in names]
    remarks = []
    if strange:
        remarks.append(
            f"{len(strange)} recordings are not in {timeline.path.name}, and so without segments: {listed(strange)}"
        )
    if unsplit:
        remarks.append(
            f"{len(unsplit)} recordings of {timeline.path.name} are in no split, and not used: {listed(unsplit)}"
        )
    return remarks


def read_split(path: Path, timeline: Timeline) -> list[str]:
    """Names of a split, one a line, as the annotations spell them. Raises InputError when there are none."""
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n") if line.strip()]
    # Blanks at the ends are an editor's, unless the annotations know the name with them; and some file systems take
    # Unicode's letters apart.
    known = {unicodedata.normalize("NFC", name): name for name in timeline.videos}
    composed = [unicodedata.normalize("NFC", line) for line in lines]
    names = dict.fromkeys(
        known.get(c) or known.get(c.strip()) or line.strip() for c, line in zip(composed, lines, strict=True)
    )
    if not names:
        raise InputError(f"{path}: the split is empty; write one video name per line or delete the file")
    return list(names)
