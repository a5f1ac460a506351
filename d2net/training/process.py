"""Settings of the whole process that a training takes and gives back: its threads, and TF32."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import nn

from d2net.threads import computing, given, multiply_adds, threads_for


def threads_of_run(model: nn.Module, snippets: int, before: int, path: Path) -> AbstractContextManager[None]:
    """As many threads of a CPU as a batch is worth, or as the run has had so far: they decide the last bits.

    Args:
        model: The network.
        snippets: Of a batch.
        before: Threads of the run that is resumed, 0 for none; a warning says so where there will be others.
        path: Its checkpoint, for the message.
    """
    number = threads_for(multiply_adds(model, snippets))
    if before and not given():
        number = min(before, torch.get_num_threads())
    if before not in (0, number):
        warnings.warn(
            f"{path}: was trained in {before} threads and goes on in {number}; the result is then the same only up to "
            "rounding",
            stacklevel=6,
        )
    return computing(number)


@contextmanager
def convolutions_in(precision: str) -> Iterator[None]:
    """Whether convolutions may use TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
