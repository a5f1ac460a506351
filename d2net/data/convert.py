"""Converts a dataset of any layout to layout 2: .npy files and a JSON."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from d2net.files import TEMPORARY, locked, one_component, sync
from d2net.reading import read_json

_PART, _EARLIER = f"{TEMPORARY}convert-", f"{TEMPORARY}earlier-"  # folders beside OUT: being built, being replaced


def convert(
    source: Dataset | str | Path,
    out: Path,
    *,
    trust_pickle: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Writes ``source`` as layout 2 and opens the result.

    The folder appears whole or not at all: it is built beside ``out``, brought to the disk, and moved there at the end,
    so that nothing of an earlier conversion stays in it. Where a conversion was killed, the next one to the same place
    removes what it left, and puts an earlier result back that was just being replaced. The training subset becomes
    ``train`` and the test subset ``test``, as the readers of that layout expect, unless another has that name; others
    keep theirs. Ambiguous segments are kept in ``gt.json``.

    Args:
        source: An open dataset, or what :func:`d2net.data.find_dataset` takes.
        out: Folder to write to; made, or replaced where it is an earlier conversion of the same dataset.
        trust_pickle: As for :func:`d2net.data.find_dataset`.
        progress: Called as ``progress(done, total)`` after every recording.

    Raises:
        InputError: as opening and reading the source; ``out`` holds anything else, is being written, or cannot be; a
            name that is no file name. What was there is as it was.
    """
    out = Path(out)
    with writing(out):
        dataset = source if isinstance(source, Dataset) else find_dataset(source, trust_pickle=trust_pickle).open()
        _check_content(out, dataset)
        names = [r.name for r in dataset.recordings] + [x.name for x in dataset.left_out]
        for name in (*names, *dataset.subsets, *(x.subset for x in dataset.left_out)):  # before hours of writing
            one_component(name, dataset.source or dataset.name)
        part, earlier = (_beside(out, f"{kind}{out.name}-{secrets.token_hex(8)}") for kind in (_PART, _EARLIER))
        try:
            part.mkdir()
            _write(dataset, part, progress)
            _sync_all(part)
            _check_readable(part, out)
            if os.path.lexists(out):
                _move_away(out, earlier, dataset)
            os.replace(part, out)  # after a kill before this line the next conversion restores the earlier one
            sync(part.parent)
        except OSError as error:
            raise InputError(
                f"{out}: cannot be written ({error.strerror}); make space, or give another folder; what was there is "
                "intact"
            ) from error
        finally:
            _tidy(out)
        return find_dataset(out).open()


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Within the block no other conversion writes to ``out``. Cleans up after killed ones, and makes the parent folder.

    Raises:
        InputError: another does; something else is there already; nothing can be written there.
    """
    with locked(out, _beside(out, f".d2net.{out.name}.lock")):
        _tidy(out)
        _check_place(out)
        yield


def _beside(out: Path, name: str) -> Path:
    return out.absolute().parent / name


def _tidy(out: Path) -> None:
    """Remove what conversions to ``out`` that have ended left; the earlier result goes back where it is missing.

    Only what is a conversion goes back, and an earlier one is removed only where there is one in its place.
    """
    ours = re.compile(f"({re.escape(_PART)}|{re.escape(_EARLIER)}){re.escape(out.name)}-[0-9a-f]{{16}}")
    for path in sorted(out.absolute().parent.iterdir()):
        if ours.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            if path.name.startswith(_PART):
                shutil.rmtree(path, ignore_errors=True)
            elif _is_conversion(path) and not os.path.lexists(out):
                os.replace(path, out)
            elif _is_conversion(path) and _is_conversion(out):
                # Under the name of what is removed whatever it holds: a kill while it is may leave half a conversion.
                part = _beside(out, path.name.replace(_EARLIER, _PART, 1))
                os.replace(path, part)
                shutil.rmtree(part, ignore_errors=True)


def _is_conversion(folder: Path) -> bool:
    """Whether the folder holds a conversion and nothing else."""
    if not (folder / "gt.json").is_file():
        return False
    tables = re.compile(r"gt\.json|split_.+\.txt")
    features = re.compile(rf"features/[^/]+/({'|'.join(STREAMS)})/[^/]+\.npy")
    return all(
        (features if name.startswith("features/") else tables).fullmatch(name)
        for place, _, names in os.walk(folder)
        for name in (Path(place, name).relative_to(folder).as_posix() for name in names)
    )


def _move_away(out: Path, earlier: Path, dataset: Dataset) -> None:
    """Move the earlier conversion to ``earlier``, but nothing that another program has put in its place.

    It is checked before the move, and again after it, when no other program can change it by its name.
    """
    _check_place(out)
    _check_content(out, dataset)
    os.replace(out, earlier)
    try:
        _check_place(earlier)
        _check_content(earlier, dataset)
    except InputError as error:
        os.replace(earlier, out)
        raise InputError(str(error).replace(str(earlier), str(out))) from None


def _sync_all(folder: Path) -> None:
    """Sync all files at the end, which is several times as fast as file by file."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def _check_readable(part: Path, out: Path) -> None:
    """Require that the result opens, before it replaces an earlier one."""
    try:
        find_dataset(part).open()
    except InputError as error:
        raise InputError(str(error).replace(str(part), str(out))) from None


def _check_place(out: Path) -> None:
    """Check that a conversion can be written to ``out``.

    Raises:
        InputError: something else is there already, or nothing can be written there.
    """
    if out.is_symlink():
        raise InputError(f"{out}: a symbolic link, which is not followed; give the folder that it leads to")
    try:
        with tempfile.TemporaryFile(dir=out.absolute().parent):
            pass
        there = list(out.iterdir()) if out.is_dir() else [out] if out.exists() else []
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); give another folder") from error
    if there and not (out.is_dir() and _is_conversion(out)):
        raise InputError(f"{out}: holds other files than a conversion; give a new folder")


def _check_content(out: Path, dataset: Dataset) -> None:
    """Raises InputError where ``out`` is the conversion of another dataset."""
    if not (out / "gt.json").is_file():
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
    for x in dataset.left_out:  # they keep their annotations: an evaluation must count them as missed
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
        with open(path, "xb") as file:  # a file system may not tell two names apart
            np.save(file, np.ascontiguousarray(part), allow_pickle=False)


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
