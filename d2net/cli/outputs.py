"""Checks, before anything is computed, that a command can write its output and overwrites nothing that it reads."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from d2net.cli.terminal import notes, say
from d2net.errors import InputError
from d2net.files import LOCK_NAME, check_unlocked, locked
from d2net.launch import launched_rank
from d2net.spec import is_made

if TYPE_CHECKING:
    from d2net.detections import Detections

LOG_NAME = "log.jsonl"
REPORT_NAME = "report.html"
RUN_FILES = ("checkpoint.safetensors", "checkpoint.json", LOG_NAME, LOCK_NAME)  # written by train alone
_OURS = (*RUN_FILES, "run.json", "study.json")  # no other output may have these names: a run would overwrite it


def check_output(
    path: Path,
    option: str = "--out",
    *,
    reads: Iterable[str | Path] = (),
    suffixes: Iterable[str] = (),
) -> None:
    """Check, before anything is computed, that a file can be written; makes its folder.

    Args:
        path: The file.
        option: The option that gave it, for messages.
        reads: What the command reads: files, folders of datasets, ``simulated:FILE``.
        suffixes: What the name may end in, in lower case.

    Raises:
        InputError: the file is read here, or is one that a run is made of; another suffix; a folder, a link or a device
            of that name is there; its folder cannot be made or written to, or another d2net writes in it.
    """
    if launched_rank():  # which writes nothing
        return
    _check_place(path, option)
    for place in _paths(reads):
        if place.is_dir() and path.exists():
            found = _among(path, place)
        else:
            found = _same(path, place)
        if found:
            raise InputError(f"{option} {path}: is a file that is read here; give another path")
    if path.name in _OURS:
        raise InputError(f"{option} {path}: is the name of a file that d2net train or study keeps; give another path")
    if (known := list(suffixes)) and path.suffix.lower() not in known:
        raise InputError(f"{option} {path}: cannot be written as '{path.suffix}'; name it {' or '.join(known)}")
    check_unlocked(path.absolute().parent, option)


def detection_files(out: Path, option: str = "--out", *, reads: Iterable[str | Path] = ()) -> list[Path]:
    """Where detections go: ``out``, and, where that is a JSON, a CSV of the same name beside it, for spreadsheets.

    Raises:
        InputError: as :func:`check_output`, for either of them.
    """
    reads = list(reads)
    check_output(out, option, reads=reads, suffixes=[".json", ".csv"])
    if out.suffix.lower() == ".csv":
        return [out]
    check_output(out.with_suffix(".csv"), option, reads=reads)
    return [out, out.with_suffix(".csv")]


def write_all(files: Iterable[Path], detections: Detections, features: str | None = None) -> list[Path]:
    """Writes detections to :func:`detection_files`; the files that were written, the first of them always.

    A CSV beside a JSON is left out, with a word on stderr, where a name holds bytes that are no text.
    """
    from d2net.detections import write_detections

    first, *others = files
    write_detections(first, detections, features=features)
    try:
        "".join((*detections.videos, *detections.classes)).encode()
    except UnicodeEncodeError:
        for path in others:
            say(f"note: {path} is not written, since a name holds bytes that are no UTF-8", err=True)
        return [first]
    for path in others:
        write_detections(path, detections)
    return [first, *others]


def claim_folder(context: typer.Context, folder: Path, *names: str, reads: Iterable[str | Path] = ()) -> None:
    """See that files called ``names`` can be written in ``folder``; and no other d2net writes there while the command
    runs.

    Raises:
        InputError: they cannot, as :func:`check_output` says; ``folder`` is a dataset that is read here; another d2net
            writes in it.
    """
    if launched_rank():  # which writes nothing
        return
    for name in names:
        if name != LOG_NAME:  # without which a training goes on, and says so
            _check_place(folder / name, "--out")
    check_apart(folder, names, reads)
    with notes():
        context.with_resource(locked(folder))


def check_apart(folder: Path, names: Iterable[str], reads: Iterable[str | Path]) -> None:
    """Raises InputError where ``folder``, or a file in it of one of the ``names``, is what is read."""
    for place in _paths(reads):
        if _same(folder, place):
            raise InputError(f"{folder}: is a dataset that is read here; give another folder")
        for name in names:
            if _same(folder / name, place):
                raise InputError(f"{folder / name}: is a file that is read here; give another folder")


def command_of(context: typer.Context) -> str:
    """The command that runs, as it was typed."""
    return shlex.join(["d2net", *context.meta.get("d2net.arguments", [])])


def _check_place(path: Path, option: str) -> None:
    import tempfile

    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written ({error.strerror}); give another path") from error
    if path.is_symlink():
        raise InputError(f"{option} {path}: a symbolic link, which is not followed; give the path that it leads to")
    if path.exists() and not path.is_file():
        raise InputError(f"{option} {path}: not an ordinary file; give the path of a file to write")


def _paths(reads: Iterable[str | Path]) -> Iterator[Path]:
    """The paths among what is read; of a dataset that d2net makes, its annotations."""
    for each in reads:
        if is_made(each):
            if rest := str(each).partition(":")[2]:
                yield Path(rest)
        else:
            yield Path(each)


def _same(one: Path, other: Path) -> bool:
    """Whether they are one file or folder, by whatever links; or one path, where nothing is yet."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):  # ValueError: a NUL
        return os.path.realpath(one) == os.path.realpath(other)


def _among(path: Path, folder: Path) -> bool:
    """Whether a file is one of those in a dataset's folder, links followed; folders of runs are no part of it."""
    from d2net.data.containers import SUFFIXES

    wanted, seen = path.stat(), set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen or any(name in files for name in RUN_FILES):
            folders.clear()  # a link that leads around, or a run
            continue
        seen.add(real)
        # Features are most of the files, and no command that writes a file gives it such a name.
        for name in (n for n in files if not n.lower().endswith(SUFFIXES)):
            try:
                if os.path.samestat(os.stat(os.path.join(place, name)), wanted):
                    return True
            except OSError:  # a link that leads nowhere
                continue
    return False
