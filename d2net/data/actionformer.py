"""Layout 3: ActionFormer, OpenTAD, mmaction2: one file of features per video and an annotations JSON."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from d2net.data.catalog import Catalog, Listing
from d2net.data.locate import FeatureFinder, visible
from d2net.data.timeline import Timeline, is_annotations, read_timeline
from d2net.errors import InputError
from d2net.reading import load_json

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
    timelines = [read_timeline(annotations)] if annotations else _timelines(spec)
    names = {name for timeline in timelines for name in timeline.videos}
    finder = FeatureFinder(spec if spec.is_dir() else spec.parent, names)
    listings: dict[str, Listing] = {}
    for timeline in timelines:
        for name, entry in timeline.videos.items():
            if name in listings:
                raise InputError(f"{timeline.path}: video '{name}' is in another of the JSONs too; keep it in one")
            listings[name] = Listing(name, entry, partial(finder.open, name))
    first = timelines[0]
    return Catalog(
        name=first.name or first.path.resolve().parent.name,
        source=first.path if len(timelines) == 1 else first.path.parent,
        classes=first.classes if len(timelines) == 1 else tuple(sorted({c for t in timelines for c in t.classes})),
        listings=tuple(listings.values()),
        streams=first.streams,
        divide=lambda width, source: (width // 2, width // 2) if width == I3D else (width,),
        remarks=tuple(remark for timeline in timelines for remark in timeline.remarks),
        unused=lambda: finder.folder.unused(),
    )


def _timelines(spec: Path) -> list[Timeline]:
    """The annotations in a folder: one JSON, or BMN's for each subset. Other JSONs there are no annotations."""
    if not spec.is_dir():
        return [read_timeline(spec)]
    found: dict[Path, Any] = {}
    broken: InputError | None = None
    for path in (p for p in visible(spec) if p.suffix.lower() == ".json"):
        try:
            content = load_json(path)
        except InputError as error:
            broken = error
            continue
        if is_annotations(content):
            found[path] = content
    if len(found) > 1:
        found = {p: x for p, x in found.items() if not p.stem.endswith("_full")}  # of BMN's: all subsets once more
    if len(found) == 1 or (found and not any("database" in x for x in found.values())):  # a file a subset, as BMN's
        return [read_timeline(path, content) for path, content in found.items()]
    if broken is not None and not found:
        raise broken
    names = ", ".join(p.name for p in found) or "none"
    raise InputError(f"{spec}: expected exactly one annotations JSON, found {names}; give its path instead")
