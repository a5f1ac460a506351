"""Training: use :class:`Trainer`; to read the code, begin with ``loop.py``."""

from d2net.training.loop import denoising_is_on
from d2net.training.trainer import Trainer

__all__ = ["Trainer", "denoising_is_on"]
