"""``features.json``: what it tells of the recordings in a folder, from what the ranks that make features say."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from d2net.distributed import RankEnded
from d2net.errors import InputError
from d2net.files import write_whole
from d2net.reading import read_json, typed
from d2net.shares import Mailbox, deal
from d2net.words import quoted

NAME = "features.json"
_SAVED_EVERY = 5.0  # seconds
_HEARD_EVERY = 0.2  # during a long recording


@dataclass
class Written:
    """What :func:`d2net.features.write_features` did, by the names of recordings.

    Attributes:
        written: Whose features were made, and what ``features.json`` says of each.
        skipped: Whose features were there, made in the same way from the same file.
        failed: Of which none could be made, and why.
    """

    written: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Log:
    """What ``features.json`` is to tell, by what rank 0 hears of all; on the other ranks nothing.

    Args:
        paths: As :func:`d2net.features.write_features` takes them.
        out: See there.
        about: What ``features.json`` says of the method.
        mail: In which each rank tells of each recording its name, what ``features.json`` is to say of it or None, and
            why it failed.
        progress: As for ``paths``.
        tell: As for ``paths``.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        out: Path,
        about: Mapping[str, Any],
        mail: Mailbox,
        progress: Callable[[float, int], None] | None,
        tell: Callable[[str], None] | None,
    ) -> None:
        self.paths, self.out, self.about, self.mail = paths, out, about, mail
        self.progress, self.tell = progress, tell
        self.recordings: dict[str, Any] = {}
        self.todo: list[str] = []
        self.result = Written()
        self.heard = self.saved = -math.inf  # when
        self.news = False  # since it was saved

    def plan(self, ranks: int) -> list[list[str]]:
        """The recordings that each rank is to do.

        Raises:
            InputError: the folder holds features that were made in another way.
        """
        self.recordings = _there(self.out, self.about)
        for name, path in self.paths.items():
            there = self.recordings.get(name)
            same = isinstance(there, dict) and there.get("file") == file_facts(path)
            if same and (self.out / f"{name}.npy").is_file():
                self.result.skipped.append(name)
            else:
                self.recordings.pop(name, None)
                self.todo.append(name)
        shares = deal([file_facts(self.paths[name]).get("bytes", 0) for name in self.todo], ranks)
        return [[self.todo[i] for i in share] for share in shares]

    def show(self, share: float) -> None:
        """Show progress, with this share of the recording that rank 0 works on, which may take long."""
        if share == 0 or time.monotonic() - self.heard > _HEARD_EVERY:
            self.hear()
            with suppress(InputError):  # which is no fault of this recording; the next time says so
                self.save_at_times()
        if self.progress is not None and self.mail.ranks.leads:
            self.progress(len(self.result.written) + len(self.result.failed) + share, len(self.todo))

    def hear(self) -> None:
        """Take what the ranks have told; where they are gone, only what was heard before."""
        with suppress(RankEnded):
            for name, made, why in self.mail.received():
                if made is None:
                    self.result.failed[name] = why
                    continue
                self.result.written[name] = self.recordings[name] = made
                self.news = True
                for note in made["notes"]:
                    if self.tell is not None:
                        self.tell(f"{self.paths[name]}: {note}")
        self.heard = time.monotonic()

    def save_at_times(self) -> None:
        """Write ``features.json`` where there is something new, unless that was done a moment ago."""
        if self.news and time.monotonic() - self.saved > _SAVED_EVERY:
            self.save()

    def save(self) -> None:
        """Write ``features.json``."""
        if self.todo and (self.recordings or (self.out / NAME).exists()):  # nothing is left where none could be made
            content = {**self.about, "recordings": dict(sorted(self.recordings.items()))}
            write_whole(self.out / NAME, json.dumps(content, indent=1) + "\n")
        self.saved, self.news = time.monotonic(), False

    def said(self) -> bytes:
        """The result as JSON, in the order of the recordings, whoever did which."""
        in_order = Written(skipped=self.result.skipped)
        for name in self.todo:
            if name in self.result.failed:
                in_order.failed[name] = self.result.failed[name]
            else:
                in_order.written[name] = self.result.written[name]
        return json.dumps(asdict(in_order)).encode()


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


def file_facts(path: Path) -> dict[str, int]:
    """By which a file is known to be the same."""
    try:
        facts = path.stat()
    except OSError:
        return {}
    return {"bytes": facts.st_size, "modified": facts.st_mtime_ns}
