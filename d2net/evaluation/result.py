"""The result of an evaluation, and what it judged and left out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from d2net.evaluation.levels import averages
from d2net.words import counted, listed

Reason = Literal["unknown_video", "ambiguous_label", "video_without_segments", "ambiguous_segment"]
CLASS = ("class", "classes")


@dataclass(frozen=True)
class Coverage:
    """What an evaluation judged and left out. Recordings are sorted by name, classes in the annotations' order.

    Attributes:
        protocol: ``activitynet`` or ``wtalc``.
        recordings: Number of recordings in the annotations.
        without_segments: Recordings of the annotations without a segment.
        judged: Number of recordings that count. Under ``wtalc`` those without segments do not, except
            ``Annotations.withdrawn``.
        without_detections: Recordings that count and have no detection.
        unlisted: Those of ``without_detections`` that the detections do not even list: perhaps they were not localized.
        renamed: How the names of the detections' recordings were changed to those of the annotations, or "".
        detections: Number of detections, with the dropped ones.
        dropped: Number of detections that do not count, by reason; each under the first reason that applies.
        false_positives: Number of detections that are false positives whatever their times, by reason.
        classes: Number of classes with ground truth; the mean is over these.
        classes_without_segments: The other classes of the annotations, which do not enter the mean.
        classes_without_detections: Classes with ground truth but no detection that counts: AP 0, in the mean.
        ambiguous_segments: Number of ambiguous segments in the annotations.
        outside_mean: Number of detections of classes without ground truth; they count in F1 only.
    """

    protocol: str
    recordings: int
    without_segments: tuple[str, ...]
    judged: int
    without_detections: tuple[str, ...]
    unlisted: tuple[str, ...]
    renamed: str
    detections: int
    dropped: dict[Reason, int]
    false_positives: dict[Reason, int]
    classes: int
    classes_without_segments: tuple[str, ...]
    classes_without_detections: tuple[str, ...]
    ambiguous_segments: int
    outside_mean: int = 0

    def lines(self) -> list[str]:
        """Lines to print: what was judged, and a line for everything that was left out or missed."""
        left = self.detections - sum(self.dropped.values())
        lines = [
            f"judged: {counted(left, 'detection')} against {counted(self.judged, 'recording')}, "
            f"{counted(self.classes, *CLASS)} with ground truth"
            + ("" if left else "; THERE IS NO DETECTION TO JUDGE, so every number is 0")
        ]
        if self.renamed:
            lines.append(f"names: the recordings of the detections are known only {self.renamed}, and are taken so")
        unlisted = set(self.unlisted)
        empty = [name for name in self.without_detections if name not in unlisted]
        of = f"of {counted(self.judged, 'recording')}"
        if unlisted:
            missed = len(unlisted - set(self.without_segments))
            lines.append(
                f"not listed in the detections: {len(unlisted)} {of} ({listed(self.unlisted)}); "
                + ("their segments are missed" if missed == len(unlisted) else f"the segments of {missed} are missed")
            )
        if empty:
            lines.append(f"listed without a detection: {len(empty)} {of} ({listed(empty)})")
        if self.without_segments:
            outcomes = {
                "dropped": self.dropped["video_without_segments"],
                "as false positives": self.false_positives["video_without_segments"],
            }
            there = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items() if n) or "none"
            lines.append(
                f"without a segment: {counted(len(self.without_segments), 'recording')} "
                f"({listed(self.without_segments)}); detections there: {there}"
            )
        for counts, outcome in ((self.dropped, "dropped"), (self.false_positives, "as false positives")):
            if n := counts["unknown_video"]:
                lines.append(f"in recordings that the annotations do not list: {counted(n, 'detection')} {outcome}")
        if n := self.dropped["ambiguous_label"]:
            lines.append(f"labelled 'Ambiguous', which is a mark and no class: {counted(n, 'detection')} dropped")
        if self.ambiguous_segments:
            there = f"{counted(self.dropped['ambiguous_segment'], 'detection')} touching one dropped"
            if self.protocol == "activitynet":
                there = "the activitynet protocol does not know them, detections there count as any other"
            lines.append(f"ambiguous segments: {self.ambiguous_segments}; {there}")
        if names := self.classes_without_segments:
            there = f"; {counted(self.outside_mean, 'detection')} there, in F1 alone" if self.outside_mean else ""
            lines.append(
                f"without ground truth, not in the mean: {counted(len(names), *CLASS)} ({listed(names)}){there}"
            )
        if (names := self.classes_without_detections) and left:
            lines.append(f"without a detection, AP 0 in the mean: {counted(len(names), *CLASS)} ({listed(names)})")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dump``."""
        return {key: list(x) if isinstance(x, tuple) else x for key, x in asdict(self).items()}


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate`. ``map``, ``average``, ``f1`` and ``per_class`` are in percent.

    Attributes:
        protocol: ``activitynet`` or ``wtalc``.
        tiou: The N temporal IoU thresholds.
        map: (N,) float64, mean AP over the classes that have ground truth.
        average: Mean of ``map``.
        f1: F1 at the IoU ``f1_tiou``, of all detections as given, over all classes.
        per_class: (N,) AP of each class that has ground truth.
        coverage: What was judged and left out.
    """

    protocol: str
    tiou: tuple[float, ...]
    map: np.ndarray
    average: float
    f1: float
    per_class: dict[str, list[float]]
    coverage: Coverage

    @property
    def averages(self) -> dict[str, float]:
        """Means of ``map`` as papers print them, where all their levels were evaluated: ``{"0.1-0.5": 51.5}``, and so
        "0.3-0.7" and "0.1-0.7"."""
        return averages(self.tiou, self.map)

    def averages_line(self) -> str:
        """``averages`` in a line to print; "" where there are none."""
        numbers = ", ".join(f"{value:.1f} at IoU {name}" for name, value in self.averages.items())
        return f"average mAP: {numbers}" if numbers else ""

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dump``; ``map`` by IoU, ``{"0.5": 36.0}``."""
        return {
            "protocol": self.protocol,
            "map": {f"{t:g}": float(m) for t, m in zip(self.tiou, self.map, strict=True)},
            "average": self.average,
            "averages": self.averages,
            "f1": self.f1,
            "per_class": self.per_class,
            "coverage": self.coverage.to_json(),
        }
