"""Any dataset to layout 2: plain .npy files that are memory-mapped, and a JSON."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from d2net.data.catalog import train_and_test
from d2net.data.dataset import Dataset, Recording
from d2net.data.files import one_component, read_json
from d2net.data.layouts import find_dataset
from d2net.data.locate import STREAMS
from d2net.data.timeline import Entry
from d2net.errors import InputError


def convert(
    source: Dataset | str | Path,
    out: Path,
    *,
    trust_pickle: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Writes ``source`` as layout 2 and opens the result.

    The folder appears whole or not at all: it is built beside ``out`` and moved there at the end, so that nothing of an
    earlier conversion stays in it. The training subset becomes ``train`` and the test subset ``test``, as the readers
    of that layout expect; others keep their names. Ambiguous segments are kept in ``gt.json``.

    Args:
        source: An open dataset, or what :func:`d2net.data.find_dataset` takes.
        out: Folder to write to; made, or replaced where it is an earlier conversion of a dataset of this name.
        trust_pickle: As for :func:`d2net.data.find_dataset`.
        progress: Called as ``progress(done, total)`` after every recording.

    Raises:
        InputError: as opening and reading the source; ``out`` holds anything else; a name that is no file name.
        OSError: a full disk.
    """
    out = Path(out)
    check_place(out, None)
    dataset = source if isinstance(source, Dataset) else find_dataset(source, trust_pickle=trust_pickle).open()
    check_place(out, dataset.name)
    part = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=".d2net-convert-"))
    try:
        _write(dataset, part, progress)
        os.chmod(part, 0o777 & ~_umask())  # mkdtemp's 0700 would keep colleagues out of a shared folder
        if out.exists():
            os.replace(out, part / ".earlier")
        os.replace(part, out)
        shutil.rmtree(out / ".earlier", ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return find_dataset(out).open(check_durations=False)  # what was opened with other durations is as it was


def check_place(out: Path, name: str | None) -> None:
    """Make the folder that ``out`` is to lie in, and see whether it can be written.

    Args:
        name: Of the dataset to write; None where it is not known yet.

    Raises:
        InputError: something else is there already, or nothing can be written there.
    """
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.absolute().parent):
            pass
        there = list(out.iterdir()) if out.is_dir() else [out] if out.exists() else []
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); give another folder") from error
    if not there:
        return
    if not out.is_dir() or not (out / "gt.json").is_file() or not (out / "features").is_dir():
        raise InputError(f"{out}: holds other files; give a new folder, or remove it")
    if name is not None and read_json(out / "gt.json").get("name") != name:
        raise InputError(f"{out}: already holds another dataset; give a new folder")


def _write(dataset: Dataset, out: Path, progress: Callable[[int, int], None] | None) -> None:
    annotated = {r.subset for r in dataset.recordings if r.segments}
    train, test = train_and_test(dataset.subsets, annotated)
    rename = {train: "train", test: "test"}
    splits: dict[str, list[str]] = {}
    for done, recording in enumerate(dataset.recordings, start=1):
        name = one_component(recording.name, recording.source)
        subset = one_component(rename.get(recording.subset, recording.subset), f"{recording.source}: subset")
        splits.setdefault(subset, []).append(name)
        _write_features(recording, dataset.stream_widths, out / "features" / subset)
        if progress:
            progress(done, len(dataset))
    database = {r.name: _entry(r, rename.get(r.subset, r.subset)) for r in dataset.recordings}
    # What has no features here keeps its annotations: an evaluation must miss it.
    usual = {key: database[dataset.recordings[0].name][key] for key in ("stride", "fps")}
    for each in dataset.left_out:
        subset = one_component(rename.get(each.subset, each.subset), f"'{each.name}': subset")
        splits.setdefault(subset, []).append(one_component(each.name, dataset.name))
        database[each.name] = {**usual, **_annotations(each.entry, subset)}
    for subset, names in splits.items():
        (out / f"split_{subset}.txt").write_bytes("".join(f"{n}\n" for n in names).encode())
    top = {"name": dataset.name, "classes": list(dataset.classes), "database": database}
    (out / "gt.json").write_bytes((json.dumps(top, indent=1) + "\n").encode())


def _write_features(recording: Recording, widths: tuple[int, ...], folder: Path) -> None:
    features = recording.features(sum(widths))
    parts = np.split(features, np.cumsum(widths)[:-1], axis=1)
    for stream, part in zip(STREAMS, parts, strict=False):
        path = folder / stream / f"{recording.name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.ascontiguousarray(part), allow_pickle=False)


def _entry(recording: Recording, subset: str) -> dict[str, Any]:
    seconds = recording.seconds_per_snippet
    ratio = Fraction(seconds).limit_denominator(100_000)
    exact = ratio.numerator / ratio.denominator == seconds  # 0.64 s is written as 16 frames at 25 fps
    entry: dict[str, Any] = {
        "stride": ratio.numerator if exact else seconds,
        "fps": ratio.denominator if exact else 1,
        **_annotations(recording, subset),
    }
    if recording.first_snippet:
        entry["first_snippet"] = recording.first_snippet
    return entry


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
