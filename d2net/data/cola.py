"""Layout 2: UM, CoLA, BaS-Net and what ``d2net convert`` writes.

``features/SUBSET/{rgb,flow}/VIDEO.npy``, ``gt.json`` and one ``split_SUBSET.txt`` per subset.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from d2net.data.dataset import Dataset, Recording
from d2net.data.files import open_features
from d2net.data.timeline import choose, read_timeline
from d2net.errors import InputError

STRIDE, FPS = 16, 25.0


def open_cola(folder: Path, *, annotations: Path | None = None, subsets: Sequence[str] | None = None) -> Dataset:
    """Opens layout 2; checks that every feature file is there and whole, without reading its data.

    Test videos that gt.json does not know stay, without labels and segments (THUMOS14 has such).

    Args:
        folder: Holds ``features``, ``gt.json`` and ``split_*.txt``.
        annotations: Another JSON in place of ``gt.json``.
        subsets: Open only these.

    Raises:
        InputError: a missing or broken file, an empty subset, a training video without annotation.
    """
    timeline = read_timeline(annotations or folder / "gt.json")
    splits = {path.stem.removeprefix("split_"): path for path in sorted(folder.glob("split_*.txt"), reverse=True)}
    if not splits:
        raise InputError(f"{folder}: no split_train.txt or split_test.txt; write one video name per line")
    widths: tuple[int, int] | None = None
    recordings = []
    for subset in choose(subsets, tuple(splits), folder):
        names = dict.fromkeys(splits[subset].read_text(encoding="utf-8").split())
        if not names:
            raise InputError(f"{splits[subset]}: the split is empty; write one video name per line or delete the file")
        for name in names:
            entry = timeline.videos.get(name)
            if entry is None and subset == "train":
                raise InputError(
                    f"{timeline.path}: no label for training video '{name}' of {splits[subset].name}; "
                    "annotate it or take it out of the split"
                )
            rgb, flow = (folder / "features" / subset / stream / f"{name}.npy" for stream in ("rgb", "flow"))
            widths = _check(rgb, flow, widths)
            recordings.append(
                Recording(
                    name=name,
                    subset=subset,
                    labels=entry.labels if entry else (),
                    segments=entry.segments if entry else (),
                    seconds_per_snippet=timeline.seconds_per_snippet(name, stride=STRIDE, fps=FPS),
                    source=str(rgb),
                    read=partial(_read, rgb, flow),
                    duration=entry.duration if entry else None,
                )
            )
    assert widths is not None  # choose() returned at least one subset and each has a video
    return Dataset(timeline.name or folder.resolve().name, timeline.classes, widths, tuple(recordings))


def _check(rgb: Path, flow: Path, widths: tuple[int, int] | None) -> tuple[int, int]:
    """Widths of one video's two streams, after checking both headers against the earlier videos."""
    a = open_features(rgb, widths and widths[0])
    b = open_features(flow, widths and widths[1])
    # Optical flow needs a next frame, so some extractors give one snippet fewer; more means a mix-up.
    if abs(len(a) - len(b)) > 1:
        raise InputError(
            f"{flow}: has {len(b)} snippets but {rgb.parent.name}/{rgb.name} has {len(a)}; "
            "extract both streams with the same stride"
        )
    return a.shape[1], b.shape[1]


def _read(rgb: Path, flow: Path) -> np.ndarray:
    """(T, rgb width + flow width) float32."""
    a, b = open_features(rgb), open_features(flow)
    length = min(len(a), len(b))
    return np.concatenate((a[:length], b[:length]), axis=1, dtype=np.float32, casting="unsafe")
