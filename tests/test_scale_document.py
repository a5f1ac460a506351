"""docs/scale.md: its loop gives what one process gives, and its commands are as torchrun takes them."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import d2net

PAGE = (Path(__file__).parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")
SHELL = [block.replace("\\\n", " ") for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)]
(LOOP,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
pytestmark = pytest.mark.usefixtures("one_thread")


def losses(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"loss ([\d.]+)", text)]


def of_group(loop: str) -> str:
    """What the loop prints in processes that have a group already."""
    for line in ('dist.init_process_group("nccl" if cuda else "gloo")', "dist.destroy_process_group()"):
        assert line in loop
        loop = loop.replace(line, "")
    said = io.StringIO()
    with redirect_stdout(said):
        exec(compile(loop.replace("torch.cuda.is_available()", "False"), "docs/scale.md", "exec"), {})
    return said.getvalue()


def in_processes(processes, size: int, loop: str) -> list[float]:
    return losses(processes.run(size, of_group, loop)[0])


def test_the_loop_as_written_gives_what_one_process_gives(processes, tmp_path):
    (tmp_path / "loop.py").write_text(LOOP)
    (command,) = [block.split() for block in SHELL if "loop.py" in block]
    assert command[0] == "torchrun"
    path = os.pathsep.join(filter(None, (str(Path(d2net.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command[1:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    alone, many = in_processes(processes, 1, LOOP), losses(done.stdout)
    assert len(alone) == 5 and max(alone) - min(alone) > 0.1
    assert many == pytest.approx(alone, rel=1e-5)
    assert in_processes(processes, 3, LOOP) == pytest.approx(alone, rel=1e-5)
    apart = in_processes(processes, 2, LOOP.replace("whole=whole)", "whole=None)"))
    assert apart[0] != pytest.approx(alone[0], rel=1e-3)  # plain data-parallel training


def test_the_gradients_must_be_summed(processes):
    """Adam hardly sees a constant factor, SGD does."""
    adam = "torch.optim.Adam(network.parameters(), lr=1e-3)"
    assert adam in LOOP and "(size * result.total)" in LOOP
    loop = LOOP.replace(adam, adam.replace("Adam", "SGD"))
    alone = in_processes(processes, 1, loop)
    assert in_processes(processes, 2, loop) == pytest.approx(alone, rel=1e-5)
    mean = in_processes(processes, 2, loop.replace("(size * result.total)", "result.total"))
    assert mean[1:] != pytest.approx(alone[1:], rel=1e-5)


@pytest.mark.parametrize("block", [block for block in SHELL if "torchrun" in block])
def test_the_commands_are_as_torchrun_takes_them(block):
    for line in re.findall(r"torchrun (.*)", block):
        given = get_args_parser().parse_args(line.replace('"', "").split())
        assert given.training_script in ("loop.py", "d2net") and given.module == (given.training_script == "d2net")
