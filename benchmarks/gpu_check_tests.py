"""A pytest plugin of gpu_check.sh: notes every result at once, so that neither a crash nor a time limit loses any.

The file GPU_CHECK_TESTS gets rows of test, outcome, seconds, reason. A process that a test took the CUDA context from
(a wrong address, say) stops, and one that begins with rows in the file runs only the tests that are not in it, last
those of a file where a process ended.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

NOTES = Path(os.environ["GPU_CHECK_TESTS"])
NEVER_ENDED = "never ended"
LOST = "took the CUDA context"


def note(test: str, outcome: str, seconds: float = 0, reason: str = "") -> None:
    with NOTES.open("a") as file:
        file.write(f"{test}\t{outcome}\t{seconds:.2f}\t{' '.join(reason.split())}\n")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        note(report.nodeid, "failed", reason=f"its tests cannot be collected: {str(report.longrepr).splitlines()[-1]}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    outcomes = dict(line.split("\t")[:2] for line in NOTES.read_text().splitlines())
    files = {name.split("::")[0] for name, outcome in outcomes.items() if outcome in (NEVER_ENDED, LOST)}
    items[:] = [item for item in items if item.nodeid not in outcomes]
    items.sort(key=lambda item: item.nodeid.split("::")[0] in files)


def pytest_collection_finish(session: pytest.Session) -> None:
    note("", "collected", reason=str(len(session.items)))


def pytest_runtest_logstart(nodeid: str) -> None:
    note(nodeid, NEVER_ENDED)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message if crash else report.longrepr[2] if report.skipped else str(report.longrepr or "")
        note(report.nodeid, report.outcome, report.duration, reason[:300])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    result = yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            note(item.nodeid, LOST, reason=str(error).splitlines()[0])
            item.session.shouldstop = "the CUDA context is lost"
    return result


def pytest_sessionfinish(exitstatus: int) -> None:
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        note("", "finished")
