"""``torchrun -m d2net train`` when something goes wrong: one message, and the last checkpoint is good."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import d2net
from d2net import launch
from d2net.checkpoint import load_checkpoint
from d2net.cli.ranks import goes_on
from d2net.distributed import ALONE
from d2net.errors import InputError
from d2net.files import write_whole
from d2net.meeting import joined
from d2net.training_log import read_log

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TRAIN = ["train", "--data", "simulated,width=16", "--out", "run", "--save-every", "20", "--device", "cpu"]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    own = str(Path(d2net.__file__).parents[1])
    path = os.pathsep.join(filter(None, (own, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [*TORCHRUN, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], path: Path, iteration: int) -> None:
    """Until a training has logged so many iterations."""
    for _ in range(3000):
        if path.exists() and any(line["iteration"] >= iteration for line in read_log(path)):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise AssertionError(f"no iteration {iteration}: {process.communicate()[0]}")


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes of the ranks, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for pid in children:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks = [int(x[5:]) for x in environment if x.startswith(b"RANK=")]
        if ranks:
            found[ranks[0]] = int(pid)
    return [found[rank] for rank in sorted(found)]


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")


@needs_proc
def test_a_killed_rank_is_said_once_and_torchrun_goes_on_from_the_checkpoint(tmp_path):
    run = start(tmp_path, "--max-restarts", "1", "-m", "d2net", *TRAIN, "--set", "training.iterations=300")
    wait_for(run, tmp_path / "run" / "log.jsonl", 40)
    os.kill(workers(run)[1], signal.SIGKILL)
    printed, _ = run.communicate(timeout=400)
    assert run.returncode == 0, printed
    (line,) = [line for line in printed.splitlines() if "error:" in line.lower() and "d2net" not in line[:5]]
    assert line == (
        "error: another process of this run has ended before its time; what was saved last is "
        "run/checkpoint.safetensors; the same command with --resume goes on from there"
    )
    saved = load_checkpoint(tmp_path / "run")
    assert (saved.iteration, saved.ranks) == (300, 2)
    resumed = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["resumed_at"] % 20 for line in resumed if "resumed_at" in line] == [0]
    assert all(line["resumed_at"] >= 40 for line in resumed if "resumed_at" in line)


def test_ctrl_c_stops_all_ranks_after_one_checkpoint(tmp_path):
    run = start(tmp_path, "-m", "d2net", *TRAIN, "--set", "training.iterations=100000")
    wait_for(run, tmp_path / "run" / "log.jsonl", 10)
    run.send_signal(signal.SIGINT)  # torchrun hands it on to each rank
    printed, _ = run.communicate(timeout=400)
    (line,) = [line for line in printed.splitlines() if "interrupted" in line]
    saved = load_checkpoint(tmp_path / "run")
    assert line.startswith(f"interrupted; stopped at iteration {saved.iteration}; saved run/checkpoint.safetensors; ")
    assert line.endswith("--resume") and "torchrun OPTIONS -m d2net train" in line
    assert not (tmp_path / "run" / ".d2net.lock").exists()


OTHER_TORCH = """
import os, sys
import torch
if os.environ["RANK"] == "1":
    torch.__version__ = "2.0.0"
sys.argv[0] = "d2net"
from d2net.__main__ import main
main()
"""


def test_another_torch_on_a_rank_is_one_line(tmp_path):
    (tmp_path / "other.py").write_text(OTHER_TORCH)
    run = start(tmp_path, "other.py", *TRAIN)
    printed, _ = run.communicate(timeout=400)
    import torch

    assert run.returncode != 0
    (line,) = [line for line in printed.splitlines() if "has torch" in line]
    assert line.startswith("error: rank 1 on ")
    assert line.endswith(f"has torch 2.0.0, rank 0 has {torch.__version__}; install the same everywhere")


@pytest.fixture
def torchrun(monkeypatch):
    """As torchrun tells a process of one that it starts the n-th time."""

    def start(n: int, run_id: str = "a") -> None:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(n))
        monkeypatch.setenv("GROUP_WORLD_SIZE", "1")

    return start


def test_only_what_the_same_torchrun_has_saved_is_gone_on_with(tmp_path, torchrun):
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_text("of an earlier run")
    torchrun(0)
    assert not goes_on(ALONE, checkpoint)
    torchrun(1)  # it failed before it saved anything
    assert not goes_on(ALONE, checkpoint)
    write_whole(checkpoint, "its own")
    torchrun(2)
    assert goes_on(ALONE, checkpoint)
    torchrun(1, "b")  # another torchrun, of which an earlier start ended before it noted anything
    assert not goes_on(ALONE, checkpoint)
    torchrun(2, "b")
    assert not goes_on(ALONE, checkpoint)


def test_without_restarts_nothing_is_noted(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    assert not goes_on(ALONE, tmp_path / "checkpoint.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "is_launched", "is_odd"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, True, False),
        ({"RANK": "0", "WORLD_SIZE": "1"}, False, False),
        ({"RANK": "2", "WORLD_SIZE": "2"}, False, True),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, False, True),
        ({"RANK": "x", "WORLD_SIZE": "2"}, False, True),
        ({"RANK": "0", "WORLD_SIZE": ""}, False, True),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": ""}, False, True),
        ({}, False, False),
    ],
)
def test_numbers_of_the_environment(monkeypatch, environment, is_launched, is_odd):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    if environment:
        for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", **environment}.items():
            monkeypatch.setenv(name, value)
    assert launch.launched() is is_launched
    assert bool(launch.odd()) is is_odd
    if is_odd:
        with pytest.raises(InputError, match="unset these"), joined("cpu"):
            pass


def test_a_port_that_is_none_is_one_line(monkeypatch):
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "xx", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="do not meet at 'localhost:xx'"), joined("cpu"):
        pass
