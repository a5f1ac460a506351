"""Whether ``torchrun``, or the like, has started this process with others. Nothing here imports PyTorch."""

from __future__ import annotations

import os

_SET = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by torchrun


def number(name: str) -> int | None:
    """A number of the environment; None where there is none of this name, or what it says is none."""
    try:
        return int(os.environ.get(name, ""))
    except ValueError:
        return None


def launched() -> bool:
    """Whether this process was started with others."""
    rank, size = number("RANK"), number("WORLD_SIZE")
    if rank is None or size is None or not all(os.environ.get(name) for name in _SET):
        return False
    return 0 <= rank < size > 1


def odd() -> str:
    """What of torchrun's is in the environment although it cannot be, in words; "" where nothing is."""
    if launched() or number("WORLD_SIZE") == 1 or not all(name in os.environ for name in _SET):
        return ""
    return ", ".join(f"{name}={os.environ[name]}" for name in _SET)


def launched_rank() -> int:
    """The rank that it was started as; 0 where it was started alone."""
    return (number("RANK") or 0) if launched() else 0


def restarted() -> bool:
    """Whether ``torchrun --max-restarts`` has started it again after a failure."""
    return (number("TORCHELASTIC_RESTART_COUNT") or 0) > 0
