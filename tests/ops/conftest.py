"""Runs the same cases on every backend that is built here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch

from d2net.ops import use_backend
from d2net.threads import computing

# Not a test module and not importable by name under --import-mode=importlib.
_spec = importlib.util.spec_from_file_location("simt", Path(__file__).with_name("simt.py"))
simt = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(simt)


@pytest.fixture(scope="session")
def simt_module(request) -> ModuleType:
    """The CUDA kernels compiled for the CPU; built once and kept in pytest's cache."""
    return simt.build(Path(request.config.cache.mkdir("simt")))


@pytest.fixture
def simt_kernels(simt_module) -> Iterator[ModuleType]:
    """Operators on CPU tensors run their CUDA kernels."""
    with simt.kernels_on_the_cpu(simt_module):
        yield simt_module


@pytest.fixture(params=["reference", "cpu", "simt", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> Iterator[torch.device]:
    """The device for a test's tensors. With "reference" operators run in plain PyTorch on the CPU, with "simt" they run
    their CUDA kernels on the CPU (tests/simt), with "cpu" their own in two threads where they are large enough."""
    if request.param == "simt":
        request.getfixturevalue("simt_kernels")
    with (
        use_backend("reference") if request.param == "reference" else nullcontext(),
        computing(2) if request.param == "cpu" else nullcontext(),
    ):
        yield torch.device("cuda" if request.param == "cuda" else "cpu")
