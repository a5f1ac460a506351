"""Runs the same cases on every backend that is built here."""

from __future__ import annotations

import pytest
import torch

from d2net.ops import _library


@pytest.fixture(params=["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> torch.device:
    """Where a test puts its tensors. With "reference" the operators run in plain PyTorch on the CPU."""
    if request.param == "reference":
        monkeypatch.setattr(_library, "_DEVICES", {name: frozenset() for name in _library._DEVICES})
        return torch.device("cpu")
    return torch.device(request.param)
