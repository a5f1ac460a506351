"""D2-Net: weakly-supervised temporal action localization, with fast CPU and CUDA operators.

Operators live in :mod:`d2net.ops`, losses in :mod:`d2net.losses`; ``d2net --help`` lists the commands. A trained
network is one object: ``d2net.localize(d2net.load_model("runs/mine"), dataset)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2net.checkpoint import load_model
    from d2net.localization import localize
    from d2net.prediction import load

__version__ = "0.2.0"  # the one place; pyproject.toml reads it here
__all__ = ["load", "load_model", "localize"]


def __getattr__(name: str) -> Any:
    """What needs PyTorch, imported when it is used: ``d2net --help`` does without."""
    if name == "load":
        from d2net.prediction import load

        return load
    if name == "load_model":
        from d2net.checkpoint import load_model

        return load_model
    if name == "localize":
        from d2net.localization import localize

        return localize
    raise AttributeError(f"module 'd2net' has no attribute '{name}'")
