"""Features of many recordings in a folder: an ``.npy`` file each, and how they were made in ``features.json``."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from d2net.distributed import ALONE, Ranks
from d2net.errors import InputError
from d2net.features.log import Log, Written, file_facts
from d2net.features.methods import Method
from d2net.files import TEMPORARY, one_component, write_whole
from d2net.reading import missing
from d2net.shares import Mailbox
from d2net.words import counted, quoted

ANNOTATIONS = ("labels.csv", "segments.csv", "detections.csv")  # beside recordings, and none themselves


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
    ranks: Ranks = ALONE,
) -> Written:
    """Writes ``NAME.npy`` (T, D) float32 of each recording, and ``features.json``.

    What is there already, made in the same way from the same file, stays. A recording of which no features can be made
    does not end the others. However a run ends, all that ``features.json`` tells of is there and whole.

    Of several ranks each makes and writes the features of a share, of about as many bytes of the files. All tell rank 0
    what they have done, and it writes ``features.json`` of that, every few seconds and at the end.

    Args:
        paths: As :func:`find_recordings` gives them.
        method: How.
        out: The folder, of features made in this way or new.
        progress: Called with the recordings that are done, also in part, and the number of those to do. Of several
            ranks on the first, with what all have done and the part that is done of its own recording.
        tell: Called with each note about a recording; of several ranks on the first, with the notes of all.
        ranks: The processes that make features together; all must call this with the same arguments.

    Returns:
        What was done, by all ranks.

    Raises:
        InputError: the folder holds features that were made in another way, or cannot be written; other files or
            another method on another rank, or one that does not see the folder that rank 0 writes in.
    """
    about = json.loads(json.dumps(method.about))
    _check_same(paths, about, ranks)
    mail = Mailbox(ranks)
    log = Log(paths, out, about, mail, progress, tell)
    mine = json.loads(ranks.from_first(json.dumps(log.plan(ranks.size)).encode() if ranks.leads else None))[ranks.rank]
    _check_folder(out, ranks)
    try:
        for name in mine:
            path = paths[name]
            file = file_facts(path)
            log.show(0.0)
            try:
                features = method.extract(path, log.show)
            except InputError as error:
                mail.send((name, None, str(error)))
                continue
            content = io.BytesIO()
            np.save(content, np.ascontiguousarray(features.values, np.float32))
            write_whole(out / f"{name}.npy", content.getbuffer())
            made = {
                "source": os.path.relpath(path, out),
                "duration": features.duration,
                "snippets": len(features.values),
                "rate": features.rate,
                "notes": list(features.notes),
                "file": file,
            }
            log.show(1.0)
            mail.send((name, made, ""))
            log.hear()
            log.save_at_times()
        mail.wait(lambda: log.show(0.0))
    except KeyboardInterrupt:
        if not ranks.leads:
            raise
        log.hear()
        done = f"{len(log.result.written)} of {len(log.todo)} recordings are done"
        raise KeyboardInterrupt(f"{done}; the same command goes on with the others") from None
    finally:
        log.hear()
        log.save()
    return Written(**json.loads(ranks.from_first(log.said() if ranks.leads else None)))


def _check_same(paths: Mapping[str, Path], about: Mapping[str, Any], ranks: Ranks) -> None:
    """Raises InputError on rank 0 where another one has other files or another way to make features."""
    files = json.dumps([(name, file_facts(path).get("bytes")) for name, path in paths.items()])
    for what, text, way_out in (
        ("inputs of", f"{counted(len(paths), 'file')}, hash {_hash(files)}", "give all machines the same files"),
        ("settings of", f"hash {_hash(json.dumps(about))}", "give all the same options and files of weights"),
    ):
        ranks.check_same(what, text, way_out)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_folder(out: Path, ranks: Ranks) -> None:
    """Raises InputError on rank 0 where another one does not see what it writes in the folder."""
    if ranks.size == 1:
        return
    if ranks.leads:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out, prefix=TEMPORARY) as file:
            ranks.from_first(Path(file.name).name.encode())
            seen = ranks.from_each(b"seen")
    else:
        name = ranks.from_first(None).decode()
        seen = ranks.from_each(b"seen" if (out / name).exists() else b"")
    if b"" in seen:
        ranks.refuse(
            f"{out}: rank {seen.index(b'')} does not see what rank 0 writes there; give --out a folder that all "
            "machines share"
        )


def _files_in(folder: Path) -> list[Path]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
    return found
