"""Commands that several processes run together, as ``torchrun -m d2net COMMAND`` starts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import typer

if TYPE_CHECKING:
    from d2net.distributed import Ranks

_Command = TypeVar("_Command", bound=Callable[..., None])


def in_ranks(command: _Command) -> _Command:
    """Marks a command that several processes can run together; all others refuse that."""
    command.in_ranks = True  # type: ignore[attr-defined]
    return command


def join(context: typer.Context, device: str) -> tuple[Ranks, str]:
    """The processes that run this command together, for as long as it runs, and the device of this one.

    Args:
        context: Of the command.
        device: As :func:`d2net.cli.options.choose_device` gives it.

    Raises:
        InputError: versions of torch or d2net that differ.
    """
    from d2net.distributed import device_of_rank, joined

    device = device_of_rank(device)
    return context.with_resource(joined(device)), device
