"""The number of CPU threads to compute in. With little work, more threads make it slower: they wait for each other.

Training and localization choose the number themselves (:func:`threads_for`); :func:`threads` overrides that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from d2net.errors import InputError

__all__ = ["threads"]

# Multiply-adds of a forward pass for each thread. Measured with benchmarks/threads.py: docs/benchmarks.md, "Threads".
WORK_PER_THREAD = 250_000_000

_given: ContextVar[bool] = ContextVar("given", default=False)


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Within the block everything is computed in ``number`` threads; None: d2net chooses.

    Afterwards the process uses as many threads as before.

    Raises:
        InputError: a number below 1.
    """
    if number is None:
        yield
        return
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise InputError(f"threads (--threads) is {number!r}; it must be a whole number of at least 1")
    token = _given.set(True)
    try:
        with computing(number):
            yield
    finally:
        _given.reset(token)


def given() -> bool:
    """Whether :func:`threads` sets the number here."""
    return _given.get()


def threads_for(multiply_adds: int) -> int:
    """A number of threads for so much work, at most what PyTorch uses now; within :func:`threads` exactly that."""
    most = torch.get_num_threads()
    return most if given() else max(1, min(most, multiply_adds // WORK_PER_THREAD))


@contextmanager
def computing(number: int) -> Iterator[None]:
    """Within the block PyTorch and d2net's operators compute in ``number`` threads; afterwards in as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def multiply_adds(model: nn.Module, snippets: int) -> int:
    """Multiply-adds of a forward pass of temporal convolutions, which use each weight once for every snippet."""
    return snippets * sum(p.numel() for p in model.parameters())
