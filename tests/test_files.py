"""Files written whole, folders that one command at a time writes in, and names that become files."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from d2net.cli import app
from d2net.cli.outputs import check_output
from d2net.data import simulate
from d2net.data.convert import convert
from d2net.errors import InputError
from d2net.files import LOCK_NAME, inside, locked, one_component, write_whole
from d2net.studies.ablation import Ablation, Variant

# A process that does what its first line says, tells so, and waits to be killed.
WAITING = (
    "import time; from pathlib import Path; from d2net import files; {}; print('ready', flush=True); time.sleep(60)"
)


@contextmanager
def process(code: str) -> Iterator[subprocess.Popen]:
    child = subprocess.Popen([sys.executable, "-c", WAITING.format(code)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.communicate()


def writer(folder: Path) -> str:
    return f"handle, path = files._create(Path({str(folder)!r}))"


def holder(lock: Path) -> str:
    return f"held = files.locked(Path({str(lock.parent)!r}), Path({str(lock)!r})); held.__enter__()"


# --- names ---


@pytest.mark.parametrize("name", ["a", "v_-1.x", ".hidden", " blank ", "é\u0301", "動画", "a b%2F", "x" * 240, "-rf"])
def test_a_name_stays_as_it_is(name: str) -> None:
    assert one_component(name, "data") == name


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "/", "a/b", "../a", "/etc/x", "a\\b", "a\0", "a\nb", "\x1b[2J", "\x85", "a\u2028b", "\ud800"]
    + ["x" * 241, "é" * 121],
)
def test_no_name_leaves_its_folder(name: str) -> None:
    with pytest.raises(InputError, match=r"\Adata: .* cannot be the name of a file; rename it\Z"):
        one_component(name, "data")


def test_no_link_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert inside(tmp_path / "out", "a", "b") == tmp_path / "out/a/b"
    (tmp_path / "out/a").symlink_to(tmp_path)
    with pytest.raises(InputError, match="out/a: a symbolic link, which is not followed"):
        inside(tmp_path / "out", "a", "b")


def test_a_study_refuses_names_and_links_that_lead_out_of_it(tmp_path: Path) -> None:
    from d2net.recipes import load_recipe

    recipe = load_recipe("watch").override(["training.iterations=1", "training.batch_size=2", "model.embedding_dim=8"])
    data = simulate(stream_widths=(2, 2))
    study = tmp_path / "study"
    with pytest.raises(InputError, match=r"variant: '\.\./x' cannot be the name"):
        Ablation(study, recipe, [Variant("../x", "x")], seeds=1, data=data)
    mine = Ablation(study, recipe, [Variant("x", "x")], seeds=1, data=data)
    (tmp_path / "victim").mkdir()
    (study / "x").symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match="study/x: a symbolic link"):
        mine.execute()
    assert not list((tmp_path / "victim").iterdir())


# --- files ---


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_rights_are_those_of_a_new_file(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "made/a.json", "{}")
        convert(simulate(stream_widths=(2, 2)), tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "made/a.json").stat().st_mode & 0o777 == mode
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 & ~umask if path.is_dir() else mode), path


def test_a_link_is_replaced_and_never_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for target in (victim, tmp_path / "absent"):
        path = tmp_path / "a.json"
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        write_whole(path, "new")
        assert path.read_text() == "new" and not path.is_symlink()
    assert victim.read_text() == "precious" and not (tmp_path / "absent").exists()


def test_the_file_and_then_its_folder_are_brought_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, real = [], os.fsync

    def fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced.append((path, sorted(p.name for p in tmp_path.iterdir())))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "a.json", "{}")
    (file, before), (folder, after) = synced
    assert file.parent == tmp_path and before == [file.name] and folder == tmp_path and after == ["a.json"]
    synced.clear()
    convert(simulate(stream_widths=(2, 2)), tmp_path / "out")
    # All of it before it moves to its place, and then the place.
    there = {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*")}
    assert {p.relative_to(p.parents[-len(tmp_path.parts) - 1]) for p, _ in synced[:-1] if p.parent != tmp_path} == there
    assert synced[-1][0] == tmp_path and "out" in synced[-1][1] and all("out" not in names for _, names in synced[:-1])


def test_what_a_killed_writer_left_is_swept_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    with process(writer(tmp_path)) as child:
        write_whole(tmp_path / "a.json", "{}")
        with locked(tmp_path):
            pass
        (temporary,) = (p for p in tmp_path.iterdir() if p.name != "a.json")
        child.kill()
        child.wait()
        assert temporary.exists()
        write_whole(tmp_path / "a.json", "[]")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_sweeping_follows_no_link_and_waits_for_no_pipe(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / ".d2net-link").symlink_to(victim)
    os.mkfifo(folder / ".d2net-pipe")
    write_whole(folder / "a.json", "{}")
    assert victim.read_text() == "precious"


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(TypeError):
        write_whole(tmp_path / "a", object())  # type: ignore[arg-type]
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))


@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        make_socket,
        Path.mkdir,
        lambda p: p.symlink_to("/dev/null"),
        lambda p: p.symlink_to("/dev/stdout"),
        lambda p: p.symlink_to("absent"),
    ],
)
def test_only_an_ordinary_file_is_written(
    tmp_path: Path, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    path = Path("x.json")
    make(path)
    before = path.lstat()
    with pytest.raises(InputError, match=r"--out x\.json: (not an ordinary file|a symbolic link)"):
        check_output(path)
    result = CliRunner().invoke(app, ["localize", "absent", "--data", "simulated", "--out", "x.json"])
    assert result.exit_code == 2 and "x.json" in result.stderr
    assert os.path.samestat(before, path.lstat())


# --- folders ---


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "run"
    with process(holder(folder / LOCK_NAME)) as child:
        begun = time.monotonic()
        refused = rf"run: is being written by another d2net \(pid {child.pid}\); wait for it or choose another --out"
        with pytest.raises(InputError, match=refused), locked(folder):
            pass
        assert time.monotonic() - begun < 1
        with locked(folder.parent):  # another folder
            pass
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert (folder / LOCK_NAME).exists()
        with locked(folder):
            assert int((folder / LOCK_NAME).read_text()) == os.getpid()
    assert not list(folder.iterdir())


def test_a_thread_enters_again_and_another_does_not(tmp_path: Path) -> None:
    found = []

    def other() -> None:
        try:
            with locked(tmp_path):
                found.append("entered")
        except InputError:
            found.append("refused")

    def ask() -> str:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return found.pop()

    link = tmp_path.with_name("link")
    link.symlink_to(tmp_path)
    with locked(tmp_path):
        with locked(link):
            assert ask() == "refused"
        assert ask() == "refused"
    assert ask() == "entered"


@pytest.mark.parametrize("make", [lambda p: p.symlink_to(p.parent / "victim"), Path.mkdir])
def test_a_lock_that_is_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / LOCK_NAME)
    with pytest.raises(InputError, match=r"cannot be written \(.*\); choose another --out"), locked(tmp_path):
        pass
    assert not (tmp_path / "victim").exists()


def test_every_command_that_writes_a_folder_refuses_one_that_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    train = ["--data", "simulated", "--recipe", "watch", "--out", str(out)]
    with process(holder(out / LOCK_NAME)) as child:
        for command in (
            ["demo", "--out", str(out)],
            ["train", *train],
            ["train", *train, "--resume"],
            ["train", *train, "--overwrite"],
            ["study", "ablation", *train],
            ["study", "condition-number", *train],
        ):
            result = CliRunner().invoke(app, command)
            assert result.exit_code == 2 and f"another d2net (pid {child.pid})" in result.stderr, result.output
        assert [p.name for p in out.iterdir()] == [LOCK_NAME]
    with process(holder(tmp_path / ".d2net.out.lock")) as child:
        result = CliRunner().invoke(app, ["convert", "simulated", str(out)])
        assert result.exit_code == 2 and f"another d2net (pid {child.pid})" in result.stderr


def test_a_users_own_file_is_not_swept(tmp_path):
    notes = tmp_path / ".d2net-notes.txt"
    notes.write_text("mine")
    write_whole(tmp_path / "a.json", "{}")
    assert notes.read_text() == "mine"


def test_a_lock_that_is_a_hard_link_is_not_written_to(tmp_path):
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    out.mkdir()
    (out / LOCK_NAME).hardlink_to(victim)
    with pytest.raises(InputError, match="is a link to another file"), locked(out):
        pass
    assert victim.read_text() == "mine"


def test_a_byte_order_mark_is_no_part_of_a_name():
    with pytest.raises(InputError, match="cannot be the name of a file"):
        one_component("\ufeffa", "gt.json")
