"""Pictures of what a model found."""

from d2net.report.timeline import TimelineRow, draw_timeline

__all__ = ["TimelineRow", "draw_timeline"]
