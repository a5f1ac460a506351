"""Features of many recordings in a folder: an ``.npy`` file each, and how they were made in ``features.json``."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from d2net.errors import InputError
from d2net.features.extract import Features
from d2net.features.methods import Method
from d2net.files import one_component, write_whole
from d2net.reading import missing, read_json, typed
from d2net.words import quoted

NAME = "features.json"
ANNOTATIONS = ("labels.csv", "segments.csv", "detections.csv")  # beside recordings, and none themselves
_SAVED_EVERY = 5.0  # seconds


@dataclass
class Written:
    """What :func:`write_features` did, by the names of recordings.

    Attributes:
        written: Whose features were made, and these without their values.
        skipped: Whose features were there, made in the same way from the same file.
        failed: Of which none could be made, and why.
    """

    written: dict[str, Features] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def find_recordings(inputs: Iterable[Path], suffixes: frozenset[str]) -> tuple[dict[str, Path], int]:
    """Files by the names of their recordings, which are the files' without suffix.

    Args:
        inputs: Files, which are taken whatever their suffix; and folders, of which all files with one of the suffixes
            are taken, those in folders within too; not those that begin with a dot.
        suffixes: In small letters.

    Returns:
        The files in the order of the inputs and of their names; and how many files in the folders were left out.

    Raises:
        InputError: an input that is missing, a folder without such a file, two files of one name.
    """
    found: dict[str, Path] = {}
    ignored = 0
    for place in inputs:
        if not place.exists():
            raise InputError(f"{place}: {missing(place)}; give a file or a folder")
        paths = [place]
        if place.is_dir():
            everything = _files_in(place)
            paths = [p for p in everything if p.suffix.lower() in suffixes and p.name not in ANNOTATIONS]
            ignored += len(everything) - len(paths)
            if not paths:
                raise InputError(
                    f"{place}: holds none of {' '.join(sorted(suffixes))}; give a folder that does, or files"
                )
        for path in paths:
            name = one_component(path.stem, str(path))
            if name in found and not os.path.samefile(found[name], path):
                raise InputError(f"{found[name]} and {path} would both be recording {quoted(name)}; rename one")
            found.setdefault(name, path)
    return found, ignored


def write_features(
    paths: Mapping[str, Path],
    method: Method,
    out: Path,
    *,
    progress: Callable[[float, int], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Written:
    """Writes ``NAME.npy`` (T, D) float32 of each recording, and ``features.json``.

    What is there already, made in the same way from the same file, stays. A recording of which no features can be made
    does not end the others. However a run ends, all that ``features.json`` tells of is there and whole.

    Args:
        paths: As :func:`find_recordings` gives them.
        method: How.
        out: The folder, of features made in this way or new.
        progress: Called with the recordings that are done, also in part, and the number of those to do.
        tell: Called with each note about a recording.

    Raises:
        InputError: the folder holds features that were made in another way, or cannot be written.
    """
    about = json.loads(json.dumps(method.about))
    recordings = _there(out, about)
    result = Written()
    todo = []
    for name, path in paths.items():
        there = recordings.get(name)
        if isinstance(there, dict) and there.get("file") == _file(path) and (out / f"{name}.npy").is_file():
            result.skipped.append(name)
        else:
            recordings.pop(name, None)
            todo.append(name)
    saved = 0.0
    try:
        for number, name in enumerate(todo):
            path = paths[name]
            file = _file(path)

            def share(x: float, number: int = number) -> None:
                if progress is not None:
                    progress(number + x, len(todo))

            share(0.0)
            try:
                features = method.extract(path, share)
            except InputError as error:
                result.failed[name] = str(error)
                continue
            content = io.BytesIO()
            np.save(content, np.ascontiguousarray(features.values, np.float32))
            write_whole(out / f"{name}.npy", content.getbuffer())
            recordings[name] = {
                "source": os.path.relpath(path, out),
                "duration": features.duration,
                "snippets": len(features.values),
                "rate": features.rate,
                "notes": list(features.notes),
                "file": file,
            }
            result.written[name] = features
            for note in features.notes:
                if tell is not None:
                    tell(f"{path}: {note}")
            share(1.0)
            if time.monotonic() - saved > _SAVED_EVERY:
                _save(out, about, recordings)
                saved = time.monotonic()
    except KeyboardInterrupt:
        done = f"{len(result.written)} of {len(todo)} recordings are done"
        raise KeyboardInterrupt(f"{done}; the same command goes on with the others") from None
    finally:
        if todo and (recordings or (out / NAME).exists()):  # nothing is left where nothing could be made
            _save(out, about, recordings)
    return result


def _there(out: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """The recordings that a folder has of this method."""
    path = out / NAME
    if not path.exists():
        strange = next(iter(sorted(out.glob("*.npy"))), None) if out.is_dir() else None
        if strange is not None:
            raise InputError(f"{strange}: is no file of d2net features, for there is no {NAME}; choose another --out")
        return {}
    there = read_json(path)
    recordings = typed(there.pop("recordings", None), dict, f'{path}: "recordings"')
    for key in dict.fromkeys((*about, *there)):
        if about.get(key) != there.get(key):
            raise InputError(
                f"{path}: was made with {key} {quoted(there.get(key))}, and now it is {quoted(about.get(key))}; choose "
                "another --out, or the same settings"
            )
    return recordings


def _save(out: Path, about: Mapping[str, Any], recordings: Mapping[str, Any]) -> None:
    write_whole(out / NAME, json.dumps({**about, "recordings": dict(sorted(recordings.items()))}, indent=1) + "\n")


def _file(path: Path) -> dict[str, int]:
    """By which a file is known to be the same."""
    try:
        facts = path.stat()
    except OSError:
        return {}
    return {"bytes": facts.st_size, "modified": facts.st_mtime_ns}


def _files_in(folder: Path) -> list[Path]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
    return found
