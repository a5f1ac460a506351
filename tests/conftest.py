"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of published-code oracles and real annotations, beside a developer's checkout."""
    path = Path(os.environ.get("D2NET_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not path.is_dir():
        pytest.skip(f"no folder {path}: set D2NET_SHARED to the folder with the oracles and annotations")
    return path
