"""Commands that several processes run together, as ``torchrun -m d2net COMMAND`` starts them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

from d2net.errors import InputError
from d2net.launch import launched, number, restarted

if TYPE_CHECKING:
    from d2net.distributed import Ranks

MARK = ".d2net.launch"  # in the folder of a training that torchrun may start anew

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
    from d2net.distributed import RankEnded
    from d2net.meeting import device_of_rank, joined

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # not before it is said
        raise RankEnded("ended by SIGTERM, which torchrun sends where another process has failed")

    if launched():
        signal.signal(signal.SIGTERM, end)
    device = device_of_rank(device)
    return context.with_resource(joined(device)), device


def goes_on(ranks: Ranks, checkpoint: Path) -> bool:
    """Whether ``torchrun --max-restarts`` has started all anew, and a start before this one has saved a checkpoint.

    The first start notes in the folder which checkpoint was there before it, so that no other run is gone on with.
    """
    from d2net.files import identity, write_whole
    from d2net.reading import read_json

    found = False
    if ranks.leads and (number("TORCHELASTIC_MAX_RESTARTS") or 0) > 0:
        path, now = checkpoint.parent / MARK, identity(checkpoint)
        launch = [os.environ.get("TORCHELASTIC_RUN_ID", ""), os.getppid() if number("GROUP_WORLD_SIZE") == 1 else 0]
        known = {}
        if restarted() and path.exists():
            with suppress(InputError):
                known = read_json(path)
        if known.get("launch") == launch:
            found = now is not None and list(now) != known.get("before")
        else:
            write_whole(path, json.dumps({"launch": launch, "before": now}))
    return bool(ranks.most(found)[0])
