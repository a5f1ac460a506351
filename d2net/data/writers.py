"""Writing a dataset into an empty folder: layout 2 and layout 4."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from d2net.data.catalog import train_and_test
from d2net.data.dataset import Dataset, Recording
from d2net.data.locate import STREAMS
from d2net.data.plain import BETWEEN_LABELS, FEATURES, LABEL_COLUMNS, LABELS, SEGMENT_COLUMNS, SEGMENTS
from d2net.data.timeline import Entry
from d2net.data.times import Times
from d2net.errors import InputError
from d2net.tables import write_table
from d2net.words import listed, quoted

Progress = Callable[[int, int], None]  # of (recordings done, all of them)


def origin(dataset: Dataset) -> str:
    """Where a dataset was found, as a conversion of it says."""
    return os.path.abspath(dataset.source) if dataset.source else ""


def write_plain(dataset: Dataset, out: Path, progress: Progress | None) -> None:
    """Layout 4 into an empty folder; a warning says what of the dataset it cannot hold."""
    entries: dict[str, Recording | Entry] = dict(_entries(dataset))
    for done, r in enumerate(dataset.recordings, start=1):
        if len(dataset.stream_widths) > 1:
            _write_streams(r, dataset.stream_widths, out)
        else:
            _write_array(out / f"{r.name}.npy", r.features(dataset.width))
        if progress:
            progress(done, len(dataset))
    labels = [(name, BETWEEN_LABELS.join(x.labels), x.subset) for name, x in entries.items()]
    _write_text(out / LABELS, write_table((*LABEL_COLUMNS, "subset"), labels))
    segments = [(name, label, start, end) for name, x in entries.items() for start, end, label in x.segments]
    segments += [(name, "Ambiguous", start, end) for name, x in entries.items() for start, end in x.ambiguous]
    if segments:
        _write_text(out / SEGMENTS, write_table(SEGMENT_COLUMNS, segments))
    recordings = {
        name: {
            **(_said(x.times) if isinstance(x, Entry) else _times(x)),
            **({} if x.duration is None else {"duration": x.duration}),
        }
        for name, x in entries.items()
    }
    top = {"name": dataset.name, "converted_from": origin(dataset), "streams": list(dataset.stream_widths)}
    _write_text(out / FEATURES, json.dumps({**top, "recordings": recordings}, indent=1) + "\n")
    used = {label for x in entries.values() for label in x.labels}
    if unused := [c for c in dataset.classes if c not in used]:
        warnings.warn(f"no recording has the classes {listed(unused)}, which {LABELS} cannot say", stacklevel=2)
    if withdrawn := [name for name, x in entries.items() if x.withdrawn]:
        warnings.warn(f"{SEGMENTS} cannot say that segments are withdrawn: {listed(withdrawn)}", stacklevel=2)


def check_plain(dataset: Dataset) -> None:
    """Raises InputError for names and segments that the CSVs of layout 4 cannot hold."""
    for name, x in _entries(dataset):
        for what, text in (("recording", name), ("subset", x.subset), *(("label", c) for c in x.labels)):
            try:
                text.encode()
                wrong = text != text.strip() or (what == "label" and BETWEEN_LABELS in text)
            except UnicodeEncodeError:
                wrong = True
            if wrong:
                raise InputError(
                    f"{dataset.source}: {what} {quoted(text)} begins or ends with a blank, holds a '{BETWEEN_LABELS}' "
                    "or is no text, which layout plain cannot hold; rename it or take layout cola"
                )
        for i, (start, end, label) in enumerate(x.segments):
            if label not in x.labels or not start < end or (start, end, label) in x.segments[:i]:
                raise InputError(
                    f"{dataset.source}: segment {start:g} to {end:g} s, '{label}', of '{name}' is empty, stands twice "
                    "or is of none of its labels, which layout plain cannot hold; mend it or take layout cola"
                )


def _entries(dataset: Dataset) -> Iterator[tuple[str, Recording | Entry]]:
    """All recordings by name; what has no features here keeps its annotations: an evaluation must miss it."""
    yield from ((r.name, r) for r in dataset.recordings)
    yield from ((x.name, x.entry) for x in dataset.left_out)


def _write_text(path: Path, text: str) -> None:
    path.write_bytes(text.encode())


def write_cola(dataset: Dataset, out: Path, progress: Progress | None) -> None:
    """Layout 2 into an empty folder."""
    there = {*dataset.subsets, *(x.subset for x in dataset.left_out)}
    train, test = train_and_test(dataset.subsets, {r.subset for r in dataset.recordings if r.segments})
    # Two subsets never become one: of train, validation and a test without annotations, all keep their names.
    rename = {} if train == test else {old: new for old, new in ((train, "train"), (test, "test")) if new not in there}
    database: dict[str, Any] = {}
    splits: dict[str, list[str]] = {}
    for r in dataset.recordings:
        database[r.name] = _times(r) | _annotations(r, rename.get(r.subset, r.subset))
    for x in dataset.left_out:  # they keep their annotations: an evaluation must count them as missed
        frames = {} if x.entry.num_frames is None else {"num_frames": x.entry.num_frames}
        database[x.name] = _said(x.entry.times) | frames | _annotations(x.entry, rename.get(x.subset, x.subset))
    for name, entry in database.items():
        splits.setdefault(entry["subset"], []).append(name)
    for done, recording in enumerate(dataset.recordings, start=1):
        _write_streams(recording, dataset.stream_widths, out / "features" / database[recording.name]["subset"])
        if progress:
            progress(done, len(dataset))
    for subset, names in splits.items():
        (out / f"split_{subset}.txt").write_bytes("".join(f"{n}\n" for n in names).encode())
    top = {"name": dataset.name, "converted_from": origin(dataset), "classes": list(dataset.classes)}
    (out / "gt.json").write_bytes((json.dumps({**top, "database": database}, indent=1) + "\n").encode())


def _write_streams(recording: Recording, widths: tuple[int, ...], folder: Path) -> None:
    features = recording.features(sum(widths))
    parts = np.split(features, np.cumsum(widths)[:-1], axis=1)
    for stream, part in zip(STREAMS, parts, strict=False):
        _write_array(folder / stream / f"{recording.name}.npy", part)


def _write_array(path: Path, features: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:  # two names may be one to a file system
        np.save(file, np.ascontiguousarray(features), allow_pickle=False)


def _times(recording: Recording) -> dict[str, Any]:
    """Times in seconds: the files do not say of which frames they are any more."""
    first = {"first_snippet": recording.first_snippet} if recording.first_snippet else {}
    return {"seconds_per_snippet": recording.seconds_per_snippet, **first}


def _said(times: Times) -> dict[str, Any]:
    """What the data said, under the names that :meth:`Times.read` knows."""
    table = {("offset_frames" if key == "middle" else key): value for key, value in asdict(times).items()}
    return {key: value for key, value in table.items() if value is not None}


def _annotations(recording: Recording | Entry, subset: str) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "subset": subset,
        "labels": list(recording.labels),
        "annotations": [{"segment": [s, e], "label": label} for s, e, label in recording.segments],
    }
    if recording.ambiguous:
        entry["ambiguous"] = [list(pair) for pair in recording.ambiguous]
    if recording.withdrawn:
        entry["withdrawn"] = True
    if recording.duration is not None:
        entry["duration"] = recording.duration
    return entry


WRITERS = {"cola": write_cola, "plain": write_plain}
