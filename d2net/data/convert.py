"""Any dataset to layout 2: plain .npy files that are memory-mapped, and a JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from d2net.data.dataset import Dataset, Recording
from d2net.data.files import open_features, read_json, write_atomically
from d2net.data.layouts import open_dataset, train_and_test
from d2net.errors import InputError


def convert(
    source: Dataset | str | Path,
    out: Path,
    *,
    trust_pickle: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Writes ``source`` as layout 2 and opens the result.

    Every file appears whole or not at all, and ``gt.json`` last, so an interrupted conversion can be run again:
    feature files already there are kept. The training subset becomes ``train`` and the test subset ``test``,
    as the readers of that layout expect; others keep their names.

    Args:
        source: An open dataset, or what :func:`d2net.data.open_dataset` takes.
        out: Folder to write to; created.
        trust_pickle: As for :func:`d2net.data.open_dataset`.
        progress: Called as ``progress(done, total)`` after every recording.

    Raises:
        InputError: as opening and reading the source; ``out`` holds another dataset; a recording name that is
            no file name.
    """
    dataset = source if isinstance(source, Dataset) else open_dataset(source, trust_pickle=trust_pickle)
    finished = out / "gt.json"
    if finished.exists() and read_json(finished).get("name") != dataset.name:
        raise InputError(f"{out}: already holds another dataset; give a new folder")
    train, test = train_and_test(dataset.subsets)
    rename = {train: "train", test: "test"}
    splits: dict[str, list[str]] = {}
    for done, recording in enumerate(dataset.recordings, start=1):
        name = recording.name
        if name.split() != [name] or Path(name).name != name:
            raise InputError(f"{recording.source}: '{name}' cannot be a file name; rename the recording")
        subset = rename.get(recording.subset, recording.subset)
        splits.setdefault(subset, []).append(name)
        _write_features(recording, dataset.stream_widths, out / "features" / subset)
        if progress:
            progress(done, len(dataset))
    for subset, names in splits.items():
        _write_text(out / f"split_{subset}.txt", "".join(f"{n}\n" for n in names))
    database = {r.name: _entry(r, rename.get(r.subset, r.subset)) for r in dataset.recordings}
    top = {"name": dataset.name, "classes": list(dataset.classes), "database": database}
    _write_text(finished, json.dumps(top, indent=1) + "\n")
    return open_dataset(out)


def _write_features(recording: Recording, widths: tuple[int, int], folder: Path) -> None:
    paths = [folder / stream / f"{recording.name}.npy" for stream in ("rgb", "flow")]
    if all(path.exists() for path in paths):
        for path, width in zip(paths, widths, strict=True):
            open_features(path, width)
        return
    features = recording.features(sum(widths))
    for path, stream in zip(paths, np.split(features, [widths[0]], axis=1), strict=True):
        write_atomically(path, partial(_save, np.ascontiguousarray(stream)))


def _save(array: np.ndarray, file: Any) -> None:
    np.save(file, array, allow_pickle=False)


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def _entry(recording: Recording, subset: str) -> dict[str, Any]:
    seconds = recording.seconds_per_snippet
    ratio = Fraction(seconds).limit_denominator(100_000)
    exact = ratio.numerator / ratio.denominator == seconds  # 0.64 s is written as 16 frames at 25 fps
    entry: dict[str, Any] = {
        "subset": subset,
        "stride": ratio.numerator if exact else seconds,
        "fps": ratio.denominator if exact else 1,
        "labels": list(recording.labels),
        "annotations": [{"segment": [s, e], "label": label} for s, e, label in recording.segments],
    }
    if recording.duration is not None:
        entry["duration"] = recording.duration
    return entry
