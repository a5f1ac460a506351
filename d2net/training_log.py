"""``log.jsonl``, the log of a training, one JSON object a line; and the same as TensorBoard scalars.

The file is only appended to, one whole line at a time, so a kill at any moment leaves every earlier line. A run that
begins or resumes in a file with lines first writes ``{"resumed_at": N, "run": ID}``. Earlier entries of that run past
iteration N were lost with the kill, or are replaced, and are logged again below: later lines win. Entries of another
run, which began in between and left no checkpoint, do not count. :func:`read_log` applies these rules.
"""

from __future__ import annotations

import json
import os
import stat
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from d2net.errors import InputError
from d2net.reading import read_bytes

__all__ = ["LOG_NAME", "read_log"]

LOG_NAME = "log.jsonl"
_RESUMED = "resumed_at"
_END = 65_536  # bytes at the end of a log in which its last line is


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log by iteration, without those that were logged again later.

    Lines that are no entry are left out: a kill, a full disk or a damaged file system can leave such lines.

    Args:
        path: The file, or the folder of the run.

    Returns:
        Each with its "iteration" and what was logged then: the terms of the loss, or what an evaluation found.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = path / LOG_NAME
    entries: list[dict[str, Any]] = []
    runs: dict[str, list[dict[str, Any]]] = {"": entries}  # "": the lines before the first that names a run
    for line in read_bytes(path).split(b"\n"):
        try:
            entry = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            continue
        if not isinstance(entry, dict):
            continue
        iteration = entry.get(_RESUMED, entry.get("iteration"))
        if not isinstance(iteration, int) or isinstance(iteration, bool):
            continue
        run = entry.get("run")
        if _RESUMED in entry and isinstance(run, str):
            # A run that is resumed and has not been named before is the first one. One that begins has no entries yet.
            entries = runs.setdefault(run, [] if iteration == 0 else runs[""])
        while entries and entries[-1]["iteration"] > iteration:
            entries.pop()
        if _RESUMED not in entry:
            entries.append(entry)
    return entries


def last_iteration(folder: Path) -> int:
    """How far the training in a folder is, by the end of its log, without reading the rest; 0 where nothing says it."""
    path = folder / LOG_NAME
    if not path.is_file():
        return 0
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _END))
            lines = file.read(_END).split(b"\n")
    except OSError:
        return 0
    for line in reversed(lines):
        with suppress(ValueError, AttributeError, TypeError, RecursionError):  # cut, or no entry
            entry = json.loads(line)
            return int(entry.get("iteration", entry.get(_RESUMED)))
    return 0


class TrainingLog:
    """Appends to ``log.jsonl`` and to TensorBoard's events; a context manager.

    If something cannot be written, it warns once and the training goes on.

    Args:
        out: Folder of the run.
        iteration: At which the run begins or resumes.
        tensorboard: Write events for TensorBoard; None: if it is installed.
        run: Identifies the run among others in the same folder; "" where there are none.

    Raises:
        InputError: the log or the folder of the events is a symbolic link; TensorBoard is wanted and not installed.
    """

    def __init__(self, out: Path, iteration: int, tensorboard: bool | None, run: str = "") -> None:
        self.path = out / LOG_NAME
        events = out / "tensorboard"
        for place in (self.path, events):
            if place.is_symlink():
                raise InputError(f"{place}: is a link, which no log follows; remove it or choose another --out")
        self._lost = False  # whether it has warned
        self._cut = False  # whether the last line is incomplete
        self._file: int | None = None
        try:
            self._file = _open(self.path)
            size = os.fstat(self._file).st_size
            if size:
                os.lseek(self._file, -1, os.SEEK_END)
                self._cut = os.read(self._file, 1) != b"\n"
        except OSError as error:
            self._lose(error)
            size = 0
        if size:
            self._append({_RESUMED: iteration, **({"run": run} if run else {})})
        self._events = self._open_events(events, iteration, tensorboard)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with suppress(OSError):
                os.close(self._file)
        if self._events is not None:
            try:
                self._events.close()
            except OSError as error:
                self._lose(error)

    def write(self, iteration: int, values: Mapping[str, Any]) -> None:
        """Append numbers; a nested mapping becomes one scalar per key."""
        self._append({"iteration": iteration, **values})
        if self._events is None:
            return
        try:
            for key, value in values.items():
                scalars = {f"{key}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
                for name, scalar in scalars.items():
                    if not isinstance(scalar, (str, list)):
                        self._events.add_scalar(name, scalar, iteration)
        except OSError as error:
            self._lose(error)

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        left = memoryview(("\n" * self._cut + json.dumps(entry) + "\n").encode())
        try:
            while left:
                written = os.write(self._file, left)
                self._cut = written < len(left)
                left = left[written:]
        except OSError as error:
            self._lose(error)

    def _open_events(self, folder: Path, iteration: int, wanted: bool | None) -> Any:
        """A TensorBoard writer that hides events past ``iteration``, or None."""
        if wanted is False:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            if wanted:
                raise InputError("TensorBoard is not installed; run: pip install tensorboard") from error
            return None
        try:
            return SummaryWriter(str(folder), purge_step=iteration + 1)
        except OSError as error:
            self._lose(error)
            return None

    def _lose(self, error: OSError) -> None:
        if not self._lost:
            self._lost = True
            why = error.strerror or error
            warnings.warn(f"{self.path}: cannot be written ({why}); the training goes on without that", stacklevel=3)


def _open(path: Path) -> int:
    """Opens the file for appending, and makes it where it is missing. Follows no link, and does not wait on a pipe."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):  # those that the platform has
        flags |= getattr(os, name, 0)
    file = os.open(path, flags, 0o666)
    found = os.fstat(file)
    if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
        return file
    os.close(file)
    raise OSError("not an ordinary file, or another's too, by a hard link")
