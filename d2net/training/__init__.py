"""Training: :class:`Trainer` is what one uses, ``loop.py`` what one reads first."""

from d2net.training.loop import denoising_is_on
from d2net.training.trainer import Trainer

__all__ = ["Trainer", "denoising_is_on"]
