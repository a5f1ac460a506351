"""Pictures of what a model found, and the paper's tables to compare it with."""

from d2net.report.timeline import TimelineRow, Track, draw_timeline

__all__ = ["TimelineRow", "Track", "draw_timeline"]
