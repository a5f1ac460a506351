"""Settings of the whole process that a training changes and restores: threads, and TF32."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import nn

from d2net.threads import computing, given, multiply_adds, threads_for


def threads_of_run(model: nn.Module, snippets: int, before: int, path: Path) -> AbstractContextManager[None]:
    """Sets the number of CPU threads: what a batch is worth, or that of the run so far.

    The number of threads decides the last bits of the result. A warning says so where a resumed run gets another one.

    Args:
        model: The network.
        snippets: Of a batch, on average.
        before: Threads of the run that is resumed; 0: none is.
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
    """Within the block, convolutions use TF32 if ``precision`` is "tf32", else not."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
