"""Layout 3: ActionFormer, OpenTAD: one (T, 2048) .npy per video and an ActivityNet-style JSON."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from d2net.data.dataset import Dataset, Recording
from d2net.data.files import halves, open_features
from d2net.data.timeline import choose, read_timeline
from d2net.errors import InputError


def open_actionformer(
    spec: Path,
    *,
    annotations: Path | None = None,
    subsets: Sequence[str] | None = None,
    snippet_stride: float = 4,
) -> Dataset:
    """Opens layout 3; checks that every feature file is there and whole, without reading its data.

    Args:
        spec: The JSON, or a folder with exactly one JSON; features are ``VIDEO.npy`` in ``features`` beside
            the JSON, in the only other folder there with .npy files, or beside the JSON itself.
        annotations: The JSON, when ``spec`` is the folder of features.
        subsets: Open only these.
        snippet_stride: Frames from one snippet to the next where the JSON has no ``stride`` or ``feat_stride``;
            4 is that of ActionFormer's THUMOS14 features (about 30 frames per second). Seconds per snippet
            are stride / fps.

    Raises:
        InputError: a missing or broken file, no fps, an empty subset.
    """
    timeline = read_timeline(annotations or _json(spec))
    folder = _features(spec if spec.is_dir() else spec.parent)
    chosen = choose(subsets, tuple(e.subset for e in timeline.videos.values()), timeline.path)
    width: int | None = None
    recordings = []
    for name, entry in timeline.videos.items():
        if entry.subset not in chosen:
            continue
        path = folder / f"{name}.npy"
        width = open_features(path, width).shape[1]
        recordings.append(
            Recording(
                name=name,
                subset=entry.subset,
                labels=entry.labels,
                segments=entry.segments,
                seconds_per_snippet=timeline.seconds_per_snippet(name, stride=snippet_stride, fps=None),
                source=str(path),
                read=partial(open_features, path),
                duration=entry.duration,
            )
        )
    assert width is not None  # choose() names only subsets that have a video
    return Dataset(timeline.name or timeline.path.stem, timeline.classes, halves(width, str(folder)), tuple(recordings))


def _json(spec: Path) -> Path:
    if not spec.is_dir():
        return spec
    found = sorted(spec.glob("*.json"))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise InputError(f"{spec}: expected exactly one annotations JSON, found {names}; give its path instead")
    return found[0]


def _features(folder: Path) -> Path:
    """The folder that holds the .npy files."""
    named = folder / "features"
    if named.is_dir() or any(folder.glob("*.npy")):
        return named if named.is_dir() else folder
    found = [p for p in sorted(folder.iterdir()) if p.is_dir() and any(p.glob("*.npy"))]
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise InputError(f"{folder}: expected one folder of .npy features, found {names}; name yours 'features'")
    return found[0]
