"""Whether ``torchrun``, or the like, has started this process with others. Nothing here imports PyTorch."""

from __future__ import annotations

import os

_SET = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by torchrun


def launched() -> bool:
    """Whether this process was started with others."""
    return all(name in os.environ for name in _SET) and os.environ["WORLD_SIZE"] != "1"


def launched_rank() -> int:
    """The rank that it was started as; 0 where it was started alone."""
    return int(os.environ["RANK"]) if launched() else 0


def restarted() -> bool:
    """Whether ``torchrun --max-restarts`` has started it again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
