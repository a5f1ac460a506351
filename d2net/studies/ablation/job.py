"""One training of a study and its judgement, here or in a worker that knows nothing of the study."""

from __future__ import annotations

import os
import pickle
import platform
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from d2net import __version__
from d2net.checkpoint import CHECKPOINT_NAME, load_model
from d2net.data.batches import BatchSampler
from d2net.data.dataset import Dataset
from d2net.data.watch import TRAIN_SUBJECTS, load_watch
from d2net.errors import D2NetError, InputError
from d2net.files import locked
from d2net.model import D2Net
from d2net.studies.ablation.judging import judge
from d2net.studies.ablation.plan import Run
from d2net.studies.ablation.results import write_json
from d2net.studies.workers import stopping
from d2net.threads import computing, given, multiply_adds, threads, threads_for
from d2net.training import Trainer

RESULT_NAME = "result.json"

# PyTorch's random generator and its number of threads are of the whole process.
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Opened:
    """How a worker opens the study's data, and what it must find.

    Attributes:
        open: A function without arguments, pickled.
        found: What the study found: :meth:`of` its dataset.
    """

    open: bytes
    found: tuple[Any, ...]

    @staticmethod
    def of(data: Dataset) -> tuple[Any, ...]:
        return data.name, data.stream_widths, data.fingerprint()


@dataclass(frozen=True)
class Job:
    """A training and what a worker must know for it; small, and made of plain values.

    Attributes:
        run: The training.
        folder: Its own; nothing else is written to.
        identity: The entries of its result file about the training.
        subsets: To train on and to judge on.
        device: Where.
        checkpoint: Of a finished training with the same network, in place of one.
        data: None: ``watch``, as the run makes it.
        threads: Of the CPU at most, or exactly where ``given``: the last bits of a result depend on it.
        given: Whether somebody chose ``threads``.
        versions: Of d2net and PyTorch in the study.
    """

    run: Run
    folder: Path
    identity: Mapping[str, Any]
    subsets: tuple[tuple[str, ...], tuple[str, ...]]
    device: str
    checkpoint: Path | None = None
    data: Opened | None = None
    threads: int = 1
    given: bool = False
    versions: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its result; an error; or neither, where a signal stopped it and it has saved itself.

    Errors come as values: not every executor hands exceptions on as they were.

    Attributes:
        result: As in the result file.
        error: Message of a D2NetError.
        of_input: Whether that was an InputError.
        trace: Its traceback.
        said: Warnings.
    """

    result: dict[str, Any] | None = None
    error: str = ""
    of_input: bool = False
    trace: str = ""
    said: tuple[str, ...] = ()


def environment() -> dict[str, Any]:
    """The fields of a :class:`Job` that say how this process computes."""
    return {"threads": torch.get_num_threads(), "given": given(), "versions": (__version__, torch.__version__)}


def threads_of(run: Run, train: Dataset) -> int:
    """Threads of the CPU that a training takes: of ``train``, from its beginning."""
    with torch.device("meta"):
        model = D2Net.from_recipe(run.recipe.model, num_classes=len(train.classes), stream_widths=train.stream_widths)
    settings = run.recipe.training
    sampler = BatchSampler(
        train,
        batch_size=settings.batch_size,
        max_snippets=settings.max_snippets,
        layout=model,
        seed=run.seed,
        allow_unlabelled=run.recipe.loss.skip_unlabelled,
    )
    return threads_for(multiply_adds(model, sampler.usual_rows))


def train_and_judge(job: Job, train: Dataset, test: Dataset, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Train a run, or go on with it, judge it on ``test`` and write its result.

    Args:
        job: The run. How to open data, threads and versions are not looked at.
        train: To train on.
        test: To judge on.
        progress: Of the training.

    Raises:
        InputError, D2NetError: as :meth:`d2net.training.Trainer.run`.
        KeyboardInterrupt: as there, and where a signal came in its last iteration.
    """
    with locked(job.folder):
        checkpoint = job.checkpoint
        if checkpoint is None:
            trainer = Trainer(
                train, job.run.recipe, out=job.folder, seed=job.run.seed, device=job.device, progress=progress
            )
            checkpoint = trainer.run(resume=(job.folder / CHECKPOINT_NAME).exists())
            if trainer.interrupted:  # too late to stop this run, in time to stop before the next
                raise KeyboardInterrupt
        # The run's own settings: the checkpoint may be of a run that differs in localization or evaluation.
        result = {**job.identity, **judge(load_model(checkpoint, job.device), test, job.run.recipe)}
        write_json(job.folder / RESULT_NAME, result)
    return result


def work(job: Job, attempt: int) -> Outcome:
    """Do a job in a worker: this is what a study gives to an executor.

    In one process jobs run one after another, whatever its threads.

    Args:
        job: What to do.
        attempt: Which of several; some executors take two equal calls for one.
    """
    with _one_at_a_time, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UserWarning)
        outcome = _work(job)
    return Outcome(**{**vars(outcome), "said": tuple(str(w.message) for w in caught)})


def _work(job: Job) -> Outcome:
    try:
        _check_versions(job)
        with threads(job.threads) if job.given else computing(job.threads):
            train, test = split(job.run, None if job.data is None else _open(job.data), *job.subsets)
            return Outcome() if stopping() else Outcome(train_and_judge(job, train, test, _stop_if_told))
    except KeyboardInterrupt:
        return Outcome()
    except D2NetError as error:
        return Outcome(None, str(error), isinstance(error, InputError), traceback.format_exc())


def _stop_if_told(*_: int) -> None:
    """Progress of a training in a worker: what told it to stop may have come right before the training listened."""
    if stopping():
        os.kill(os.getpid(), signal.SIGINT)


def _check_versions(job: Job) -> None:
    here = (__version__, torch.__version__)
    if here != job.versions:
        said = [f"d2net {d2net} with torch {torch_version}" for d2net, torch_version in (here, job.versions)]
        raise InputError(f"a worker on {platform.node()} has {said[0]}, the study {said[1]}; install the same on both")


@lru_cache(maxsize=1)
def _open(data: Opened) -> Dataset:
    with warnings.catch_warnings():  # the study has said them
        warnings.simplefilter("ignore")
        dataset: Dataset = pickle.loads(data.open)()
    if Opened.of(dataset) != data.found:
        raise InputError(
            f"{dataset.source or dataset.name}: on {platform.node()} it has other recordings or annotations than the "
            "study found; give all workers the same files"
        )
    return dataset


def split(run: Run, data: Dataset | None, train: tuple[str, ...], test: tuple[str, ...]) -> tuple[Dataset, Dataset]:
    """Recordings to train on and to judge on.

    Args:
        run: The training.
        data: None: the ``watch`` recordings, as the run makes them.
        train: Subsets.
        test: Subsets.
    """
    if data is None:
        data = _watch(run.held_out, run.making)
    return data.subset(*train), data.subset(*test)


@lru_cache(maxsize=2)  # of 130 MB each; a study runs all variants before it leaves out the next people
def _watch(held_out: tuple[int, ...], making: tuple[tuple[str, float | str], ...]) -> Dataset:
    values: dict[str, Any] = dict(making)
    if not held_out:
        return load_watch(**values)
    others = [s for s in TRAIN_SUBJECTS if s not in held_out]
    return load_watch(train_subjects=others, test_subjects=held_out, **values)
