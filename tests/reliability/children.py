"""Runs work in forked children: real processes, to be killed and starved, that need not import torch each time.

The parent imports everything once and never starts a thread, so that a fork is a whole d2net at the first line of its
command. What a child prints comes back through pipes, which no limit on files touches.
"""

from __future__ import annotations

import os
import re
import resource
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before torch and numpy are imported
os.environ.pop("D2NET_DEBUG", None)

_KEPT = 1 << 20  # bytes of each stream that are kept; the rest is only counted
# Audit events of Python that change what lies on a disk; "open" is one where it opens for writing.
_CHANGES = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "os.truncate",
    "os.link",
    "os.symlink",
)


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        code: Exit code; minus the number of the signal that ended it.
        stdout, stderr: What it printed, the first MiB of each.
        printed: Bytes it printed, of both.
        seconds: From its first line on, or from its first change of a file.
        late: Whether it was ended because its time was over.
    """

    code: int
    stdout: str
    stderr: str
    printed: int
    seconds: float
    late: bool

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.stdout + self.stderr


def import_all() -> None:
    """What the commands import: once, here."""
    import d2net.checkpoint
    import d2net.cli
    import d2net.data.convert
    import d2net.data.describe
    import d2net.evaluation
    import d2net.losses
    import d2net.report.plot
    import d2net.report.timeline
    import d2net.studies.ablation
    import d2net.training  # noqa: F401

    for optional in ("h5py", "torch._dynamo", "torch.utils.tensorboard"):
        try:
            __import__(optional)
        except ImportError:
            pass


def environment() -> dict[str, str]:
    """When and at which commit something ran."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"date": f"{datetime.now(timezone.utc):%Y-%m-%d}", "commit": commit}


def command(*arguments: object) -> Callable[[], None]:
    """The command line ``d2net ARGUMENTS``, as :func:`run` takes it."""

    def main() -> None:
        from d2net.__main__ import main

        sys.argv = ["d2net", *map(str, arguments)]
        main()

    return main


def run(
    work: Callable[[], object],
    *,
    limit: float = 120,
    blow: tuple[int, float] | None = None,
    at_work: bool = False,
    before_change: int | None = None,
    changes: Path | None = None,
    memory: int | None = None,
    file_size: int | None = None,
) -> Outcome:
    """Does ``work`` in a child and waits for its end.

    Args:
        limit: Seconds, after which it is killed.
        blow: Signal, and the second at which the child gets it.
        at_work: Count seconds from its first change of a file or folder on, not from its first line.
        before_change: Kill it right before its so manyth change (from 1) of a file or folder.
        changes: File that gets a byte for every such change, for counting.
        memory: Bytes of address space that it may take above what it has.
        file_size: Bytes above which no file can grow: writing on is an error, as on a full disk.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pipes = [os.pipe() for _ in range(3)]  # stdout, stderr, and one that says that the work begins
    pid = os.fork()
    if pid == 0:
        _be_child(work, [w for _, w in pipes], at_work, before_change, changes, memory, file_size)
    for _, w in pipes:
        os.close(w)
    (out, _), (err, _), (ready, _) = pipes
    os.read(ready, 1)
    os.close(ready)
    begun = time.monotonic()
    kept: dict[int, bytearray] = {out: bytearray(), err: bytearray()}
    printed, late = 0, False
    with selectors.DefaultSelector() as selector:
        for stream in (out, err):
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            now = time.monotonic() - begun
            if blow is not None and now >= blow[1]:
                os.kill(pid, blow[0])
                blow = None
            if now >= limit and not late:
                os.kill(pid, signal.SIGKILL)
                late = True
            for key, _ in selector.select(max(0.0, min(limit, blow[1] if blow else limit) - now) if not late else 1):
                part = os.read(key.fd, 1 << 16)
                printed += len(part)
                if len(kept[key.fd]) < _KEPT:
                    kept[key.fd] += part
                if not part:
                    selector.unregister(key.fd)
                    os.close(key.fd)
    _, status = os.waitpid(pid, 0)
    texts = [kept[stream].decode(errors="backslashreplace") for stream in (out, err)]
    return Outcome(os.waitstatus_to_exitcode(status), *texts, printed, time.monotonic() - begun, late)


def _be_child(
    work: Callable[[], object],
    streams: list[int],
    at_work: bool,
    before_change: int | None,
    changes: Path | None,
    memory: int | None,
    file_size: int | None,
) -> None:
    code = 1
    try:
        for fd, stream in zip((1, 2), streams, strict=False):
            os.dup2(stream, fd)
        sys.stdout = open(1, "w", closefd=False)  # the parent's may be of a file, in which it can seek
        sys.stderr = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")
        os.setsid()  # a signal to it is to it alone
        if memory is not None:
            size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
            resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
        if file_size is not None:  # Python ignores SIGXFSZ, so that a write beyond it is the error EFBIG
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if at_work or before_change is not None or changes is not None:
            _watch_changes(before_change, changes, streams[2])
        if not at_work:
            os.write(streams[2], b"!")
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else end.code is not None
    except BaseException:
        traceback.print_exc()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watch_changes(before: int | None, counted: Path | None, begun: int) -> None:
    """Counts changes, each before it is made: to ``counted``, the first one to the pipe ``begun``."""
    log = os.open(counted, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if counted else -1
    done = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal done
        if event not in _CHANGES:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR) or str(path).startswith("/dev/"):
                return
        done += 1
        if done == 1:
            os.write(begun, b"!")
        if log >= 0:
            os.write(log, b".")
        if done == before:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
