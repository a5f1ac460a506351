"""Any dataset to layout 2: plain .npy files that are memory-mapped, and a JSON."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from d2net.data.catalog import train_and_test
from d2net.data.dataset import Dataset, Recording
from d2net.data.layouts import find_dataset
from d2net.data.locate import STREAMS
from d2net.data.timeline import Entry
from d2net.data.times import Times
from d2net.errors import InputError
from d2net.files import one_component
from d2net.reading import read_json


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
    of that layout expect, unless another has that name; others keep theirs. Ambiguous segments are kept in ``gt.json``.

    Args:
        source: An open dataset, or what :func:`d2net.data.find_dataset` takes.
        out: Folder to write to; made, or replaced where it is an earlier conversion of the same dataset.
        trust_pickle: As for :func:`d2net.data.find_dataset`.
        progress: Called as ``progress(done, total)`` after every recording.

    Raises:
        InputError: as opening and reading the source; ``out`` holds anything else; a name that is no file name.
        OSError: a full disk.
    """
    out = Path(out)
    check_place(out, None)
    dataset = source if isinstance(source, Dataset) else find_dataset(source, trust_pickle=trust_pickle).open()
    check_place(out, dataset)
    names = [r.name for r in dataset.recordings] + [x.name for x in dataset.left_out]
    for name in (*names, *dataset.subsets, *(x.subset for x in dataset.left_out)):  # before hours of writing
        one_component(name, dataset.source or dataset.name)
    part = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=".d2net-convert-"))
    try:
        _write(dataset, part, progress)
        os.chmod(part, 0o777 & ~_umask())  # mkdtemp's 0700 would keep colleagues out of a shared folder
        earlier = out.with_name(f"{part.name}-earlier")
        if out.exists():
            os.replace(out, earlier)
        try:
            os.replace(part, out)
        except BaseException:
            if earlier.exists():
                os.replace(earlier, out)
            raise
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return find_dataset(out).open()


def check_place(out: Path, dataset: Dataset | None) -> None:
    """Make the folder that ``out`` is to lie in, and see whether it can be written.

    Args:
        dataset: To write; None where it is not known yet.

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
    own = {"gt.json", "features", *(p.name for p in out.glob("split_*.txt"))} if out.is_dir() else set()
    if not own >= {p.name for p in there} or not (out / "gt.json").is_file():
        raise InputError(f"{out}: holds other files than a conversion; give a new folder")
    if dataset is None:
        return
    written = read_json(out / "gt.json")
    if (written.get("name"), written.get("converted_from")) != (dataset.name, _origin(dataset)):
        raise InputError(f"{out}: already holds another dataset; give a new folder")


def _origin(dataset: Dataset) -> str:
    return os.path.abspath(dataset.source) if dataset.source else ""


def _write(dataset: Dataset, out: Path, progress: Callable[[int, int], None] | None) -> None:
    there = {*dataset.subsets, *(x.subset for x in dataset.left_out)}
    train, test = train_and_test(dataset.subsets, {r.subset for r in dataset.recordings if r.segments})
    # Two subsets never become one: of train, validation and a test without annotations, all keep their names.
    rename = {} if train == test else {old: new for old, new in ((train, "train"), (test, "test")) if new not in there}
    database: dict[str, Any] = {}
    splits: dict[str, list[str]] = {}
    for r in dataset.recordings:
        database[r.name] = _times(r) | _annotations(r, rename.get(r.subset, r.subset))
    for x in dataset.left_out:  # what has no features here keeps its annotations: an evaluation must miss it
        frames = {} if x.entry.num_frames is None else {"num_frames": x.entry.num_frames}
        database[x.name] = _said(x.entry.times) | frames | _annotations(x.entry, rename.get(x.subset, x.subset))
    for name, entry in database.items():
        splits.setdefault(entry["subset"], []).append(name)
    for done, recording in enumerate(dataset.recordings, start=1):
        _write_features(recording, dataset.stream_widths, out / "features" / database[recording.name]["subset"])
        if progress:
            progress(done, len(dataset))
    for subset, names in splits.items():
        (out / f"split_{subset}.txt").write_bytes("".join(f"{n}\n" for n in names).encode())
    top = {"name": dataset.name, "converted_from": _origin(dataset), "classes": list(dataset.classes)}
    (out / "gt.json").write_bytes((json.dumps({**top, "database": database}, indent=1) + "\n").encode())


def _write_features(recording: Recording, widths: tuple[int, ...], folder: Path) -> None:
    features = recording.features(sum(widths))
    parts = np.split(features, np.cumsum(widths)[:-1], axis=1)
    for stream, part in zip(STREAMS, parts, strict=False):
        path = folder / stream / f"{recording.name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.ascontiguousarray(part), allow_pickle=False)


def _times(recording: Recording) -> dict[str, Any]:
    """In seconds: the frames that they came from are not known to be those of these features any longer."""
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
