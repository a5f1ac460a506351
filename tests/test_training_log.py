"""The log of a training: only appended to, readable whatever befell it, and never in the way of a training."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from d2net.errors import InputError
from d2net.training_log import TrainingLog, read_log


def write(out: Path, iterations: list[int], resumed_at: int = 0, total: float = 1.0) -> None:
    with TrainingLog(out, resumed_at, False) as log:
        for i in iterations:
            log.write(i, {"total": total})


def iterations(out: Path) -> list[int]:
    return [entry["iteration"] for entry in read_log(out)]


def test_a_hard_link_is_not_written_to(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "log.jsonl").hardlink_to(victim)
    with pytest.warns(UserWarning, match="hard link"), TrainingLog(tmp_path, 0, False) as log:
        log.write(1, {"total": 1.0})
    assert victim.read_text() == "mine"


def test_later_lines_win(tmp_path: Path) -> None:
    write(tmp_path, [10, 20, 30])
    before = (tmp_path / "log.jsonl").read_bytes()
    write(tmp_path, [30, 40], resumed_at=20, total=2.0)
    assert (tmp_path / "log.jsonl").read_bytes().startswith(before + b'{"resumed_at": 20}\n')
    assert [(e["iteration"], e["total"]) for e in read_log(tmp_path)] == [(10, 1), (20, 1), (30, 2), (40, 2)]
    write(tmp_path, [10], total=3.0)  # a new run in place of the old one
    assert read_log(tmp_path / "log.jsonl") == [{"iteration": 10, "total": 3.0}]
    assert (tmp_path / "log.jsonl").read_bytes().startswith(before)


def test_a_run_that_died_in_place_of_another_does_not_count(tmp_path: Path) -> None:
    def run(name: str, start: int, iterations: list[int], total: float) -> None:
        with TrainingLog(tmp_path, start, False, name) as log:
            for i in iterations:
                log.write(i, {"total": total})

    run("a", 0, [10, 20], 1.0)
    run("b", 0, [10, 20, 30], 2.0)  # in its place, killed before its first checkpoint
    run("a", 20, [30], 1.0)
    assert [(e["iteration"], e["total"]) for e in read_log(tmp_path)] == [(10, 1), (20, 1), (30, 1)]
    run("a", 0, [10], 3.0)  # the same settings, begun anew
    assert read_log(tmp_path) == [{"iteration": 10, "total": 3.0}]
    run("c", 0, [10, 20], 4.0)
    run("c", 10, [20, 30], 5.0)
    assert [(e["iteration"], e["total"]) for e in read_log(tmp_path)] == [(10, 4), (20, 5), (30, 5)]


def test_an_evaluation_is_an_entry_of_its_own(tmp_path: Path) -> None:
    with TrainingLog(tmp_path, 0, False) as log:
        log.write(10, {"total": 1.0})
        log.write(10, {"map": {"0.5": 2.0}})
    assert len(read_log(tmp_path)) == 2


DAMAGE = {
    "cut": b'{"iteration": 10, "total": 1.0}\n{"itera',
    "no end": b'{"iteration": 10, "total": 1.0}',
    "binary": bytes(range(256)) * 9 + b'\n{"iteration": 10, "total": 1.0}\n\xff\xfe',
    "not UTF-8": b'{"iteration": 10, "total": 1.0, "caf\xe9": 1}\n{"iteration": 10, "total": 1.0}\n',
    "deep": b"[" * 100_000 + b'\n{"iteration": 10, "total": 1.0}\n',
    "digits": b'{"iteration": ' + b"9" * 5000 + b'}\n{"iteration": 10, "total": 1.0}\n',
    "other JSON": b'3\n[]\nnull\n{}\n{"iteration": "x"}\n{"iteration": true}\n{"iteration": 10, "total": 1.0}\n',
    "holes": b"\0" * 5000 + b'\n{"iteration": 10, "total": 1.0}\n' + b"\0" * 99,
}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_log_is_kept_and_gone_on_with(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(content)
    assert read_log(tmp_path) == [{"iteration": 10, "total": 1.0}]
    write(tmp_path, [20], resumed_at=10)
    assert iterations(tmp_path) == [10, 20]
    assert path.read_bytes().startswith(content)


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [folder, os.mkfifo])
def test_what_is_no_file_is_said_once_and_stops_nothing(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "log.jsonl")
    with pytest.warns(UserWarning, match=r"log\.jsonl: cannot be written .*; the training goes on") as warned:
        write(tmp_path, [10, 20])
    assert len(warned) == 1
    with pytest.raises(InputError, match="log.jsonl: (cannot be read|is a pipe)"):
        read_log(tmp_path)


@pytest.mark.parametrize("name", ["log.jsonl", "tensorboard"])
@pytest.mark.parametrize("there", [False, True])
def test_a_link_is_refused(tmp_path: Path, name: str, there: bool) -> None:
    target = tmp_path / "target"
    if there:
        target.write_text("mine")
    (tmp_path / name).symlink_to(target)
    with pytest.raises(InputError, match=rf"{name}: is a link"):
        TrainingLog(tmp_path, 0, None)
    assert target.exists() == there and (not there or target.read_text() == "mine")


def test_a_full_disk_loses_lines_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes part of a line: the next that fits begins a line of its own."""
    write_really, room = os.write, 45

    def full(file: int, data: memoryview) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write_really(file, data[:room])
        room -= written
        return written

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="No space left") as warned:
        patch.setattr(os, "write", full)
        with TrainingLog(tmp_path, 0, False) as log:
            for i in (10, 20, 30):
                log.write(i, {"total": 1.0})
            room = 1000
            log.write(40, {"total": 1.0})
    assert len(warned) == 1
    assert iterations(tmp_path) == [10, 40]


def test_a_file_in_place_of_the_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.warns(UserWarning, match="the training goes on"), TrainingLog(tmp_path, 0, None) as log:
        log.write(10, {"total": 1.0})
    assert iterations(tmp_path) == [10]


def test_a_missing_log(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="log.jsonl: (cannot be read|is a pipe)"):
        read_log(tmp_path)


def test_a_kill_keeps_every_line_that_was_written(tmp_path: Path) -> None:
    """Killed while it writes as fast as it can, it never loses a line that a reader has seen."""
    program = (
        "import sys, itertools; from pathlib import Path; from d2net.training_log import TrainingLog\n"
        "start = int(sys.argv[2])\n"
        "with TrainingLog(Path(sys.argv[1]), start, False) as log:\n"
        "    for i in itertools.count(start + 1): log.write(i, {'total': 1.0})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    seen: list[int] = []
    for _ in range(3):
        start = seen[-1] if seen else 0
        command = [sys.executable, "-c", program, str(tmp_path), str(start)]
        process = subprocess.Popen(command, env=environment)
        path = tmp_path / "log.jsonl"
        size = path.stat().st_size if path.exists() else 0
        while not path.exists() or path.stat().st_size < size + 2000:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = iterations(tmp_path)
        assert found[: len(seen)] == seen and found == list(range(1, len(found) + 1)) and len(found) > len(seen)
        seen = found
    lines = path.read_bytes().split(b"\n")
    assert sum(b"resumed_at" in line for line in lines) == 2
    assert all(json.loads(line) for line in lines[:-1])
