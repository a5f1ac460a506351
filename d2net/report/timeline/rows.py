"""What is drawn: recordings, and the results of each model or file of detections for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from d2net.errors import InputError
from d2net.evaluation import Verdict

MAX_CLASSES = 5  # classes shown of one recording


@dataclass(frozen=True)
class Track:
    """What one model, or one file of detections, says of a recording.

    Attributes:
        label: Its name in the picture; not shown where a picture has one track only.
        detections: (start s, end s, class name, score) rows.
        tcam: (T, C) temporal class activation map, in [0, 1], or None where only the detections are known.
        attention: (T,) bottom-up attention in [0, 1], or None.
        classes: (C,) names of the columns of ``tcam``, some of the row's; None: all of them, in its order.
        verdicts: What an error analysis says of each detection (:class:`d2net.evaluation.ErrorAnalysis`), or None; the
            picture does not show it, a report does.
    """

    label: str
    detections: Sequence[tuple[float, float, str, float]]
    tcam: np.ndarray | None = None
    attention: np.ndarray | None = None
    classes: Sequence[str] | None = None
    verdicts: Sequence[Verdict | None] | None = None


@dataclass(frozen=True)
class TimelineRow:
    """One recording of the picture.

    Attributes:
        name: Written above the recording's block.
        seconds_per_snippet: Seconds from one snippet to the next.
        classes: Names of all that is drawn, in the order of the lanes.
        ground_truth: (start s, end s, class name) rows.
        tracks: What is compared; the same labels in the same order in every recording of a picture.
        duration: Length in seconds; the block is longer where a segment or an activation lies past it.
        frames: Images of the recording in order of time, evenly spaced from its beginning to its end.
        first_snippet: Seconds at which snippet 0 begins.
    """

    name: str
    seconds_per_snippet: float
    classes: Sequence[str]
    ground_truth: Sequence[tuple[float, float, str]]
    tracks: Sequence[Track]
    duration: float = 0.0
    frames: Sequence[Path] = ()
    first_snippet: float = 0.0

    def shown_classes(self) -> tuple[list[str], int]:
        """The classes to draw, in the order of ``classes``, and how many others there are.

        Those of the ground truth come first, then the detected ones by falling score (as a share of the track's best
        one; of equal ones by name), up to ``MAX_CLASSES``.
        """
        detected = []
        for track in self.tracks:
            best = max((d[3] for d in track.detections), default=0.0)
            detected += [(d[3] / best if best > 0 else 0.0, d[2]) for d in track.detections]
        detected.sort(key=lambda d: (-d[0], d[1]))
        truth = {g[2] for g in self.ground_truth}
        relevant = list(dict.fromkeys([c for c in self.classes if c in truth] + [d[1] for d in detected]))
        shown = set(relevant[:MAX_CLASSES])
        return [c for c in self.classes if c in shown], len(relevant) - len(shown)

    def end(self) -> float:
        """Seconds from the beginning to the end of all that is drawn."""
        return max(
            [
                self.duration,
                *(g[1] for g in self.ground_truth),
                *(d[1] for t in self.tracks for d in t.detections),
                *(
                    self.first_snippet + len(t.tcam) * self.seconds_per_snippet
                    for t in self.tracks
                    if t.tcam is not None
                ),
            ]
        )

    def curves(self, track: Track) -> dict[str, np.ndarray]:
        """(T,) activations of each class that the track has."""
        if track.tcam is None:
            return {}
        return dict(zip(self.classes if track.classes is None else track.classes, track.tcam.T, strict=True))


def check_row(row: TimelineRow, labels: Sequence[str]) -> None:
    """Raises InputError for a row that cannot be drawn; ``labels`` are the tracks of the first one."""
    where = f"timeline of '{row.name}'"
    if [t.label for t in row.tracks] != labels:
        raise InputError(f"{where}: tracks are {[t.label for t in row.tracks]}, those of the first row {labels}")
    for track in row.tracks:
        classes = row.classes if track.classes is None else track.classes
        shape = None if track.tcam is None else track.tcam.shape
        if shape is not None and (len(shape) != 2 or shape[1] != len(classes) or shape[0] == 0):
            raise InputError(f"{where}: tcam has shape {tuple(shape)}, expected (T, {len(classes)}), T > 0")
        if track.attention is not None and (shape is None or track.attention.shape != shape[:1]):
            expected = "none without a tcam" if shape is None else f"({shape[0]},)"
            raise InputError(f"{where}: attention has shape {tuple(track.attention.shape)}, expected {expected}")
    if not row.seconds_per_snippet > 0:
        raise InputError(f"{where}: seconds_per_snippet is {row.seconds_per_snippet}; give a positive number")
    names = [g[2] for g in row.ground_truth]
    for track in row.tracks:
        names += [*(d[2] for d in track.detections), *(track.classes or ())]
    for label in names:
        if label not in row.classes:
            raise InputError(f"{where}: '{label}' is none of its classes: {', '.join(row.classes)}")
    if not row.end() > 0:
        raise InputError(f"{where}: nothing in it says how long it is; give its duration")


def best_scores(rows: Sequence[TimelineRow]) -> list[float]:
    """The highest score of each track; 0 for one without detections."""
    tracks = range(len(rows[0].tracks))
    return [max((d[3] for row in rows for d in row.tracks[k].detections), default=0.0) for k in tracks]
