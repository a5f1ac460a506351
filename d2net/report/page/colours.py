"""Colours of the report, each told from the page in light and in dark."""

from __future__ import annotations

ANNOTATION = "#2a9d67"
CLASSES = ("#dd6f1f", "#8f6ad8", "#c79200", "#d1559c", "#3f93c9")  # in the order of a recording's lanes
TOP_DOWN, BOTTOM_UP = "#8a9099", "#d2504b"
CURVES = ("#3f83d1", "#dd6f1f", "#8f6ad8", "#2a9d67", "#c79200", "#d1559c", "#3aa6a6", "#8a9099")
VERDICTS = {
    "true_positive": ANNOTATION,
    "double_detection": "#3f93c9",
    "wrong_label": "#8f6ad8",
    "localization": "#c79200",
    "confusion": "#d1559c",
    "background": "#8a9099",
    "missed": "#c8502f",
}
