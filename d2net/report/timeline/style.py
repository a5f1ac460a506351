"""Colours and sizes of the timeline picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GREEN, BLUE, GREY = "#1b8a5a", "#2f6db5", "#9a9a9a"
TRACK_COLOURS = (BLUE, "#b8455a", "#6f6f6f", "#8a7a1f", "#3f9a9a")  # every lane is labelled too
# After Okabe and Ito: told apart with every kind of colour vision, and none is the green or blue of the bars.
CLASS_COLOURS = ("#d55e00", "#7a4ea3", "#e69f00", "#cc79a7", "#000000", "#56b4e9", "#8c510a")
LINE_STYLES = ("-", "--", ":", "-.")  # the next style each time the colours are used up

WIDTH = 7.0  # inches: the two columns of a paper
LANE, CURVES, FRAMES = 0.36, 0.85, 0.62  # heights in inches: ground truth and one track, activations, frames
BESIDE, IN_LEGEND = 1.5, 2.9  # inches for a name beside its lane, and for an entry of the legend


@dataclass(frozen=True)
class Style:
    """What is the same in the whole picture.

    Attributes:
        classes: (colour, line style) of each class shown.
        best: The highest score of each track.
        head: Height of a lane above the detections, for ground truth and the class's name.
    """

    classes: dict[str, tuple[str, str]]
    best: Sequence[float]
    head: float


def track_colour(track: int) -> str:
    return TRACK_COLOURS[track % len(TRACK_COLOURS)]
