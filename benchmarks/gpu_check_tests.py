"""A pytest plugin of gpu_check.sh: notes every result at once, so that neither a crash nor a time limit loses any.

The file GPU_CHECK_TESTS gets rows of test, outcome, seconds, reason. A process that a test took the CUDA context from
(a wrong address, say) stops, and one that begins with rows in the file runs only the tests that are not in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

NOTES = Path(os.environ["GPU_CHECK_TESTS"])


def note(test: str, outcome: str, seconds: float = 0, reason: str = "") -> None:
    with NOTES.open("a") as file:
        file.write(f"{test}\t{outcome}\t{seconds:.2f}\t{' '.join(reason.split())}\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    begun = {line.split("\t")[0] for line in NOTES.read_text().splitlines()}
    items[:] = [item for item in items if item.nodeid not in begun]


def pytest_collection_finish(session: pytest.Session) -> None:
    note("", "collected", reason=str(len(session.items)))


def pytest_runtest_logstart(nodeid: str) -> None:
    note(nodeid, "never ended")


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
            note(item.nodeid, "failed", reason=f"took the CUDA context with it: {str(error).splitlines()[0]}")
            item.session.shouldstop = "the CUDA context is lost"
    return result


def pytest_sessionfinish(exitstatus: int) -> None:
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        note("", "finished")
