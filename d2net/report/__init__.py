"""Pictures of what a model found, and the paper's tables to compare it with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2net.report.timeline import TimelineRow, Track, draw_timeline

__all__ = ["TimelineRow", "Track", "draw_timeline"]


def __getattr__(name: str) -> Any:
    """What needs matplotlib, imported when it is used: a training does without."""
    if name in __all__:
        from d2net.report import timeline

        return getattr(timeline, name)
    raise AttributeError(f"module 'd2net.report' has no attribute '{name}'")
