"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

if importlib.util.find_spec("hypothesis") is None:
    # A GPU machine may lack it and have no package registry: only the tests of properties are skipped then.
    _absent = MagicMock()
    _absent.given = lambda *_, **__: pytest.mark.skip(reason="hypothesis is not installed")
    _absent.settings = lambda *_, **__: lambda test: test
    sys.modules["hypothesis"] = _absent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of published-code oracles and real annotations, beside a developer's checkout."""
    path = Path(os.environ.get("D2NET_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not path.is_dir():
        pytest.skip(f"no folder {path}: set D2NET_SHARED to the folder with the oracles and annotations")
    return path
