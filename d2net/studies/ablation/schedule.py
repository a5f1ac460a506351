"""Has an executor do the trainings of a study, and those again whose worker was lost."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from typing import Any, Protocol

from d2net.errors import D2NetError, InputError
from d2net.studies.ablation.job import Job, Outcome, work
from d2net.studies.ablation.plan import Run
from d2net.training.interruption import Stop
from d2net.words import NAME, escaped, reason

TRIES = 3  # workers that may be lost with the same run
WAIT = 0.1  # seconds between two looks


class Pending(Protocol):
    """What an executor gives for a call, as :class:`concurrent.futures.Future` has it."""

    def done(self) -> bool: ...
    def result(self) -> Outcome: ...
    def cancel(self) -> object: ...


class Submits(Protocol):
    """What is asked of an executor: any of :class:`concurrent.futures.Executor` has it, and those of ``submitit``."""

    def submit(self, fn: Callable[[Job, int], Outcome], job: Job, attempt: int, /) -> Pending: ...


def train_in(
    executor: Submits,
    runs: Sequence[Run],
    job_of: Callable[[Run, Collection[Run]], Job | None],
    finished: Callable[[Run, dict[str, Any], Collection[Run]], None],
    look: Callable[[Collection[Run]], None],
) -> None:
    """Do the trainings of ``runs``.

    Args:
        executor: Where.
        runs: In the order in which they are given to it.
        job_of: The job of a run, given the runs that are under way; None: one of those must end first.
        finished: Called with each run that is done, its result, and the runs under way.
        look: Called now and then with the runs under way.

    Raises:
        InputError, D2NetError: of a training, with its name; of a run whose workers were lost too often; of an executor
            that takes no more work. The other trainings are cancelled where they have not begun.
        KeyboardInterrupt: after SIGINT or SIGTERM.
    """
    waiting = list(runs)
    flying: dict[Run, Pending] = {}
    given, lost = Counter[Run](), Counter[Run]()
    changed = True
    try:
        with Stop() as stop:
            while waiting or flying:
                if stop.requested:
                    raise KeyboardInterrupt
                for run in waiting if changed else ():
                    job = job_of(run, flying)
                    if job is not None:
                        flying[run] = _submit(executor, job, given[run])
                        given[run] += 1
                waiting = [run for run in waiting if run not in flying]
                ended = [run for run, future in flying.items() if future.done()]
                for run in ended:
                    result = _result(run, flying.pop(run), lost)
                    if result is None:
                        waiting.insert(0, run)
                    else:
                        finished(run, result, flying)
                changed = bool(ended)
                if not changed:
                    look(flying)
                    time.sleep(WAIT)
    finally:
        for future in flying.values():
            with suppress(Exception):  # of a scheduler that does not answer; what ended the study is said
                future.cancel()


def _submit(executor: Submits, job: Job, attempt: int) -> Pending:
    try:
        return executor.submit(work, job, attempt)
    except (BrokenExecutor, RuntimeError) as error:  # broken, or shut down
        raise _broken(error) from error


def _broken(error: BaseException) -> D2NetError:
    return D2NetError(
        f"the executor takes no more work ({reason(error)}); what is trained is kept: the same again, with a new "
        "executor, goes on from there"
    )


def _result(run: Run, future: Pending, lost: Counter[Run]) -> dict[str, Any] | None:
    """The result of a run that has ended; None where it must go on in another worker. Counts those that were lost."""
    try:
        outcome = future.result()
    except BrokenExecutor as error:
        raise _broken(error) from error
    except Exception as error:
        lost[run] += 1
        why = escaped(" ".join(str(error).split()) or type(error).__name__, 4 * NAME)
        if lost[run] == TRIES:
            raise D2NetError(
                f"{run}: {TRIES} workers ended without its result, the last: {why}; what is trained is kept: with "
                "fewer workers, or more memory for each, the same command goes on from there"
            ) from error
        warnings.warn(f"{run}: a worker ended without its result: {why}; the run goes on in another", stacklevel=3)
        return None
    for text in outcome.said:
        warnings.warn(text, stacklevel=3)
    if outcome.error:
        cause = RuntimeError(f"in a worker:\n{outcome.trace}")
        if outcome.of_input:
            raise InputError(f"{run}: {outcome.error}") from cause
        raise D2NetError(f"{run}: {outcome.error}; or leave this variant out") from cause
    return outcome.result  # None where a signal stopped the worker alone; the training has saved itself
