"""Studies in executors: the same bytes whatever the workers, and what happens when those are killed or told to stop."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import d2net
from d2net.checkpoint import CHECKPOINT_NAME
from d2net.cli.study_ablation import say_crowding
from d2net.data import simulate
from d2net.errors import D2NetError, InputError
from d2net.files import LOCK_NAME
from d2net.recipes import load_recipe
from d2net.studies import workers
from d2net.studies.ablation import LOSSES, Ablation, Variant, make_rows, run, write_tables
from d2net.studies.ablation.job import Outcome
from d2net.studies.workers import Workers
from d2net.threads import threads
from d2net.training_log import LOG_NAME, last_iteration

ROOT = Path(__file__).parents[1]
SMALL = ["training.batch_size=3", "training.max_snippets=60", "model.embedding_dim=8", "training.learning_rate=0.02"]
OPENS = partial(simulate, stream_widths=(8, 8))
FOCAL, DIS = LOSSES["focal"], LOSSES["dis"]
PLAIN = Variant("plain", "plain", (*FOCAL.settings, "localization.attention=false"))  # shares focal's training

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def two() -> Iterator[Workers]:
    """Two processes for all tests that leave them alive."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    with Workers(2) as executor:
        yield executor
    os.environ.pop("OMP_NUM_THREADS")
    os.environ.update({} if before is None else {"OMP_NUM_THREADS": before})


def study(out: Path, variants: list[Variant], *, iterations: int = 40, seeds: int = 1, **options: Any) -> Ablation:
    recipe = load_recipe("watch").override([*SMALL, f"training.iterations={iterations}"])
    return Ablation(out, recipe, variants, seeds=seeds, **{"data": OPENS(), "reopen": OPENS, **options})


def files(out: Path) -> dict[str, bytes]:
    """Everything a study writes that says no time of day."""
    found = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    return {name: content for name, content in found.items() if "tensorboard" not in name}


class Inline(Executor):
    """Calls at once, in this thread; the first calls are lost."""

    def __init__(self, lost: int = 0, error: Exception | None = None) -> None:
        self.lost, self.error, self.calls = lost, error or OSError("the node is gone\nand more"), 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        self.calls += 1
        if self.calls <= self.lost:
            future.set_exception(self.error)
        else:
            future.set_result(fn(*args, **kwargs))
        return future


def spawned(number: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(number, multiprocessing.get_context("spawn"))


# --- Results ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a study writes without workers, in two threads."""
    out = tmp_path_factory.mktemp("here")
    with threads(2):
        write(study(out, [FOCAL, PLAIN, DIS], iterations=12))
    return files(out)


def write(experiment: Ablation, executor: Executor | None = None) -> None:
    write_tables(experiment, make_rows(experiment, experiment.execute(executor=executor)))


@pytest.mark.parametrize("make", [partial(ThreadPoolExecutor, 2), partial(spawned, 2), None])
def test_the_same_bytes_whatever_the_executor(
    make: Callable[[], Executor] | None, two: Workers, here: dict[str, bytes], tmp_path: Path
) -> None:
    with make() if make else nullcontext() as executor, threads(2):
        write(study(tmp_path, [FOCAL, PLAIN, DIS], iterations=12), executor or two)
    assert files(tmp_path) == here
    names = set(here)
    assert {"ablation.csv", "ablation.json", "dis/seed-0/result.json", f"dis/seed-0/{CHECKPOINT_NAME}"} <= names
    assert [name for name in names if name.startswith("plain")] == ["plain/seed-0/result.json"]  # trained once


def test_runs_that_share_a_training_wait_for_it_alone(tmp_path: Path) -> None:
    """Of two that share one and one of its own, the first and the last are given at once."""
    given: list[tuple[str, bool]] = []

    class Noting(Inline):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
            given.append((args[0].run.variant.name, args[0].checkpoint is None))
            return super().submit(fn, *args, **kwargs)

    study(tmp_path, [FOCAL, PLAIN, DIS]).execute(executor=Noting())
    assert given == [("focal", True), ("dis", True), ("plain", False)]


def test_progress_is_over_all_workers(two: Workers, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int, bool]] = []
    study(tmp_path, [FOCAL, DIS], iterations=200).execute(lambda *c: calls.append((*c[:3], c[3] is not None)), two)
    assert [done for _, done, *_ in calls] == sorted(done for _, done, *_ in calls)
    assert calls[-1][1:] == (400, 400, True) and {total for _, _, total, _ in calls} == {400}
    assert "2 trainings in workers" in {what for what, *_ in calls}
    assert {what for what, *_, done in calls if done} == {"focal, seed 0", "dis, seed 0"}


def test_the_end_of_a_log(tmp_path: Path) -> None:
    assert last_iteration(tmp_path) == 0
    for text, expected in (
        ("", 0),
        ('{"iteration": 10}\n', 10),
        ('{"iteration": 10}\n{"resumed_at": 7}\n', 7),
        ('{"iteration": 10}\n{"iter', 10),
        (100_000 * " " + '\n{"iteration": 10}\n[]\n3\n{"iteration": "x"}\n' + 2000 * "[", 10),
    ):
        (tmp_path / LOG_NAME).write_text(text)
        assert last_iteration(tmp_path) == expected, text[-60:]


# --- What a worker finds ----------------------------------------------------------------------------------------------


def test_a_worker_must_find_the_data_of_the_study(two: Workers, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="focal, seed 0: .*has other recordings or annotations than the study found"):
        study(tmp_path, [FOCAL], reopen=partial(OPENS, subsets=["train"])).execute(executor=two)
    with pytest.raises(InputError, match="give Ablation reopen, a function"):
        study(tmp_path, [FOCAL], reopen=None).execute(executor=two)
    with pytest.raises(InputError, match="reopen cannot be sent to a worker .*a function of a module"):
        study(tmp_path, [FOCAL], reopen=lambda: OPENS()).execute(executor=two)


def test_a_worker_must_have_the_versions_of_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "environment", lambda: {"threads": 1, "versions": ("0.0", "1.0")})
    with pytest.raises(InputError, match=r"has d2net .* with torch 2.*, the study d2net 0.0 with torch 1.0; install"):
        study(tmp_path, [FOCAL]).execute(executor=Inline())


@pytest.mark.parametrize("given", [False, True])
def test_a_worker_takes_the_threads_of_the_study(given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def open_data():
        seen.update(threads=torch.get_num_threads())
        return OPENS()

    monkeypatch.setattr("d2net.studies.ablation.job.pickle.loads", lambda _: open_data)
    torch.set_num_threads(2)
    with threads(3 if given else None):
        reopen = partial(OPENS, seed=0) if given else partial(OPENS, subsets=None)  # none that is kept
        experiment = study(tmp_path, [FOCAL], iterations=2, reopen=reopen)
        torch.set_num_threads(3 if given else 2)
        with ThreadPoolExecutor(1) as executor:
            assert experiment.threads() == (3 if given else 1)  # so small a network is worth one
            experiment.execute(executor=executor)
    assert seen == {"threads": 3 if given else 2}


def test_several_gpus_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for gpus in (0, 1, 3):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        for place in range(4):
            workers.take_gpu(place)
    assert taken == [0, 1, 2, 0]


def test_warnings_of_a_worker_are_the_studys(tmp_path: Path) -> None:
    experiment = study(tmp_path, [FOCAL])
    (tmp_path / "focal" / "seed-0" / LOG_NAME).mkdir(parents=True)  # no log can be written there
    with ThreadPoolExecutor(1) as executor, pytest.warns(UserWarning, match="the training goes on without that"):
        experiment.execute(executor=executor)


# --- Errors and lost workers ------------------------------------------------------------------------------------------


def test_an_error_of_a_training_names_its_run(two: Workers, tmp_path: Path) -> None:
    wild = Variant("wild", "wild", ("training.learning_rate=1e30",))
    with pytest.raises(D2NetError) as without:
        study(tmp_path / "here", [wild]).execute()
    with pytest.raises(D2NetError) as within:
        study(tmp_path / "there", [wild]).execute(executor=two)
    assert str(within.value) == str(without.value).replace(str(tmp_path / "here"), str(tmp_path / "there"))
    assert str(within.value).startswith("wild, seed 0: the training is not finite")
    assert "Traceback" in str(within.value.__cause__)  # for --debug


@pytest.mark.parametrize("lost", [1, 2])
def test_a_lost_run_is_done_again(lost: int, tmp_path: Path) -> None:
    executor = Inline(lost)
    with pytest.warns(
        UserWarning, match="focal, seed 0: a worker ended .*: the node is gone and more; the run"
    ) as said:
        (result,) = study(tmp_path, [FOCAL]).execute(executor=executor)
    assert result["variant"] == "focal" and executor.calls == lost + 1 and len(said) == lost


def test_a_run_that_loses_every_worker_ends_the_study(tmp_path: Path) -> None:
    executor = Inline(99)
    with pytest.warns(UserWarning), pytest.raises(D2NetError, match="focal, seed 0: 3 workers ended without its re"):
        study(tmp_path, [FOCAL]).execute(executor=executor)
    assert executor.calls == 3


def test_a_worker_that_a_signal_stopped_goes_on(tmp_path: Path) -> None:
    """As where a cluster takes a node back: the training has saved itself, and nothing is lost or counted."""
    attempts: list[int] = []

    class Preempting(Inline):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
            attempts.append(args[1])
            return super().submit(fn if len(attempts) > 4 else lambda *_: Outcome(), *args, **kwargs)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(study(tmp_path, [FOCAL]).execute(executor=Preempting())) == 1
    assert attempts == [0, 1, 2, 3, 4]  # no two calls are equal: Dask would give the result of the first


def test_a_broken_executor_is_said_at_once(tmp_path: Path) -> None:
    broken = Inline(99, BrokenProcessPool("a process was terminated"))
    closed = ThreadPoolExecutor(1)
    closed.shutdown()
    for executor in (broken, closed):
        with pytest.raises(D2NetError, match="takes no more work .*with a new executor, goes on from there"):
            study(tmp_path, [FOCAL]).execute(executor=executor)
    assert broken.calls == 1


def killer(folder: Path) -> tuple[Callable[..., None], list[int]]:
    """A progress that kills the process that trains in ``folder``, once, and the process that it killed."""
    killed: list[int] = []

    def kill(*_: Any) -> None:
        with suppress(OSError, ValueError):  # there is no lock, or it is not signed yet
            process = int((folder / LOCK_NAME).read_text())
            if not killed:
                os.kill(process, signal.SIGKILL)
                killed.append(process)

    return kill, killed


def test_a_killed_worker_is_replaced(two: Workers, tmp_path: Path) -> None:
    study(tmp_path / "here", [FOCAL, DIS], iterations=600).execute()
    kill, killed = killer(tmp_path / "there" / "dis" / "seed-0")
    with pytest.warns(UserWarning, match="dis, seed 0: a worker ended without its result: it was killed, or") as said:
        study(tmp_path / "there", [FOCAL, DIS], iterations=600).execute(kill, two)
    assert len(killed) == len(said) == 1 and killed[0] != os.getpid()
    for name in ("result.json", CHECKPOINT_NAME):  # and the other run never knew
        for variant in ("focal", "dis"):
            path = Path(variant, "seed-0", name)
            assert (tmp_path / "there" / path).read_bytes() == (tmp_path / "here" / path).read_bytes()


def test_an_error_of_one_training_has_the_others_save_themselves(tmp_path: Path) -> None:
    wild = Variant("wild", "wild", ("training.learning_rate=1e30",))
    with pytest.raises(D2NetError, match="wild, seed 0: the training is not finite"):
        with Workers(2) as executor:
            study(tmp_path, [FOCAL, wild], iterations=10**6).execute(executor=executor)
    assert not list(tmp_path.rglob(".d2net*"))
    assert (tmp_path / "focal" / "seed-0" / CHECKPOINT_NAME).exists() or not last_iteration(tmp_path / "focal/seed-0")


def test_no_process() -> None:
    with pytest.raises(InputError, match="--workers 0"):
        Workers(0)
    with Workers(1):
        pass


# --- Signals ----------------------------------------------------------------------------------------------------------


def test_goes_on_after_ctrl_c_with_another_number_of_workers(tmp_path: Path) -> None:
    study(tmp_path / "whole", [FOCAL, DIS], iterations=300).execute()

    def interrupt(_: str, done: int, *rest: Any) -> None:
        if done:
            os.kill(os.getpid(), signal.SIGINT)

    experiment = study(tmp_path / "broken", [FOCAL, DIS], iterations=300)
    with pytest.raises(KeyboardInterrupt, match="[01] of 2 trainings are done; the same command goes on from there"):
        with Workers(2) as executor:
            experiment.execute(interrupt, executor)
    experiment.execute()
    for path in ("focal/seed-0/result.json", "dis/seed-0/result.json", f"dis/seed-0/{CHECKPOINT_NAME}"):
        assert (tmp_path / "broken" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()


def test_ctrl_c_while_a_worker_begins_does_not_end_it() -> None:
    before = {process.pid for process in multiprocessing.active_children()}
    with Workers(1) as executor:
        future = executor.submit(os.getpid)
        wait_for(lambda: {p.pid for p in multiprocessing.active_children()} > before, 0.001)
        (begun,) = {p.pid for p in multiprocessing.active_children()} - before
        os.kill(begun, signal.SIGINT)
        assert future.result() == begun


def environment() -> dict[str, str]:
    """In which a process has the d2net of the tests, installed or not."""
    own = str(Path(d2net.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (own, os.environ.get("PYTHONPATH"))))}


@contextmanager
def command(out: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """``d2net study ablation --workers 2`` of two endless trainings, in a session of its own, and its workers."""
    settings = [x for s in (*SMALL, "training.iterations=1000000") for x in ("--set", s)]
    options = ["--data", "simulated,width=8", "--losses", "focal,dis", "--seeds", "1", "--device", "cpu"]
    words = [sys.executable, "-m", "d2net", "study", "ablation", *options, *settings, "--workers", "2"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        [*words, "--out", str(out)], cwd=out.parent, env=environment(), text=True, start_new_session=True, **pipes
    )
    folders = [out / name / "seed-0" for name in ("focal", "dis")]
    try:
        wait_for(lambda: process.poll() is not None or all(last_iteration(folder) > 0 for folder in folders))
        yield process, [int((folder / LOCK_NAME).read_text()) for folder in folders]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition: Callable[[], bool], every: float = 0.1) -> None:
    """Until it holds; two minutes are far beyond what it takes."""
    for _ in range(int(120 / every)):
        if condition():
            return
        time.sleep(every)
    pytest.fail("it did not happen")


def ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux for the state of processes")


@needs_proc
def test_ctrl_c_on_a_terminal_and_sigkill(tmp_path: Path) -> None:
    with command(tmp_path / "a") as (process, pids):
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all of them
        _, said = process.communicate(timeout=400)
        assert process.returncode == 130
        assert said.splitlines() == ["interrupted; 0 of 2 trainings are done; the same command goes on from there"]
        assert all(map(ended, pids))
    with command(tmp_path / "b") as (process, pids):
        os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: all(map(ended, pids)))
    for folder in (tmp_path / name / variant / "seed-0" for name in "ab" for variant in ("focal", "dis")):
        assert (folder / CHECKPOINT_NAME).exists()  # saved, long before one is due


# --- The command and the page -----------------------------------------------------------------------------------------


def test_too_many_threads_are_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    for number, of_each in ((4, 1), (1, 4), (2, 0)):
        say_crowding(number, of_each)
    assert capsys.readouterr().err == ""
    say_crowding(4, 4)
    assert (
        "4 workers of 4 threads wait for each other on 4 cores; --workers 1 is faster, or --threads 1, which gives "
        in (capsys.readouterr().err)
    )
    say_crowding(8, 1)
    assert "8 workers of 1 thread wait for each other on 4 cores; --workers 4 is faster\n" in capsys.readouterr().err


def scripts() -> list[str]:
    """Those of docs/studies.md: the first is whole, the lines of the others stand for its last three."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "studies.md").read_text(encoding="utf-8"), re.DOTALL)
    begin = "".join(blocks[0].splitlines(keepends=True)[:-3])
    return [blocks[0], *(begin + block for block in blocks[1:])]


SCRIPTS = [(0, None), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, "submitit"), (2, "distributed")))]


@pytest.mark.parametrize(("number", "needs"), SCRIPTS)
def test_the_scripts_of_the_page(number: int, needs: str | None, tmp_path: Path) -> None:
    if needs is not None and importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed: pip install submitit 'dask[distributed]'")
    script = scripts()[number]
    assert (needs or "Workers(2)") in script
    (tmp_path / "study.py").write_text(script)
    done = subprocess.run([sys.executable, "study.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = sorted(p.parent.name for p in (tmp_path / "runs" / "ablation").glob("*/*/result.json"))
    assert results == ["seed-0", "seed-0", "seed-1", "seed-1"]
    assert (tmp_path / "runs" / "ablation" / "ablation.csv").exists()
