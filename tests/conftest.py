"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

# Before PyTorch is imported, and for the processes of tests: their networks are so small that more threads only wait
# for each other. Tests of threads set their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from d2net.data import watch  # noqa: E402

if importlib.util.find_spec("hypothesis") is None:
    # A GPU machine may lack it and have no package registry: only the tests of properties are skipped then.
    _absent = MagicMock()
    _absent.given = lambda *_, **__: pytest.mark.skip(reason="hypothesis is not installed")
    _absent.settings = lambda *_, **__: lambda test: test
    sys.modules["hypothesis"] = _absent

# Not a test module and not importable by name under --import-mode=importlib.
_spec = importlib.util.spec_from_file_location("ranks", Path(__file__).with_name("ranks.py"))
assert _spec is not None and _spec.loader is not None
_ranks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_ranks)

# Ignored in what a script starts in the background, and then by the children of tests too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays: looking at it for garbage took a sixth of the time."""
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of published-code oracles and real annotations, beside a developer's checkout."""
    path = Path(os.environ.get("D2NET_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not path.is_dir():
        pytest.skip(f"no folder {path}: set D2NET_SHARED to the folder with the oracles and annotations")
    return path


@pytest.fixture(scope="session", autouse=True)
def watch_made_once() -> Iterator[None]:
    """The features of ``watch`` in its full size, which many tests open, are computed once: it takes six seconds."""
    kept, make = {}, watch._Features

    def features(making: watch._Making, source: watch._Source) -> watch._Features:
        return kept.setdefault(making, make(making, source)) if making.numbers[0] >= 1000 else make(making, source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "_Features", features)
        yield


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The networks of tests are so small that more threads only wait for each other; subprocesses see the variable."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def processes() -> Iterator[Any]:
    """Processes that run a test's function as ranks of a process group."""
    started = _ranks.Processes()
    yield started
    started.end()
