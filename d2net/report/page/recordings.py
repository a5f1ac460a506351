"""What the timeline of a report shows of each recording, as little as a page can be drawn from."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from d2net.errors import InputError
from d2net.evaluation import VERDICTS
from d2net.report.timeline import TimelineRow, Track, best_scores, check_row
from d2net.words import NAME, counted, escaped

MOST_DETECTIONS = 200  # of a recording: those of the highest scores
MOST_POINTS = 1200  # of a curve: more than a screen has columns


def recordings_json(rows: Sequence[TimelineRow], videos: Mapping[str, str]) -> dict[str, Any]:
    """Plain values for the page: all recordings, and which of them to show first.

    Args:
        rows: Each with one track.
        videos: Address of each recording's video, as the page gives it to a browser.
    """
    for row in rows:
        if len(row.tracks) != 1:
            raise InputError(f"report of '{row.name}': it has {len(row.tracks)} tracks; a report shows one")
        check_row(row, [row.tracks[0].label])
    first = next((i for i, row in enumerate(rows) if row.tracks[0].detections), 0)
    return {
        "best": max([0.0, *(best_scores(rows) if rows else [])]),
        "first": first,
        "verdicts": [name.replace("_", " ") for name in VERDICTS],
        "recordings": [_recording(row, videos.get(row.name)) for row in rows],
    }


def _recording(row: TimelineRow, video: str | None) -> dict[str, Any]:
    track = row.tracks[0]
    classes, others = row.shown_classes()
    if not classes:  # nothing is there to be seen: at least its curves
        classes = _highest(row)
    place = {name: i for i, name in enumerate(classes)}
    verdicts = track.verdicts or [None] * len(track.detections)
    found = [
        (*_times(start, end), place[label], _short(score), None if verdict is None else VERDICTS.index(verdict))
        for (start, end, label, score), verdict in zip(track.detections, verdicts, strict=True)
        if label in place
    ]
    found.sort(key=lambda d: (-d[3], d[0], d[1], d[2]))
    curves = row.curves(track)
    points = {name: _curve(curves[name]) for name in classes if name in curves}
    attention = [] if track.tcam is None else [track.tcam.max(axis=1), track.attention]
    return {
        "name": escaped(row.name, 2 * NAME),
        "end": _short(row.end()),
        "from": _short(row.first_snippet),
        "to": _short(row.first_snippet + _whole_buckets(track) * row.seconds_per_snippet),
        "classes": [escaped(name, NAME) for name in classes],
        "truth": [(*_times(start, end), place[label]) for start, end, label in row.ground_truth if label in place],
        "found": found[:MOST_DETECTIONS],
        "curves": [points.get(name) for name in classes],
        "attention": [None if a is None else _curve(a) for a in attention],
        "notes": _notes(row, classes, others, len(found)),
        "video": video,
    }


def _notes(row: TimelineRow, classes: Sequence[str], others: int, found: int) -> list[str]:
    """What of a recording is not there, or not drawn."""
    track = row.tracks[0]
    notes = []
    if not row.ground_truth:
        notes.append("no annotation")
    if not track.detections:
        notes.append("no detection")
    if others:
        hidden = len(track.detections) - found
        segments = sum(label not in classes for _, _, label in row.ground_truth)
        what = [counted(hidden, "detection")] + ([counted(segments, "annotation")] if segments else [])
        notes.append(f"{counted(others, 'more class', 'more classes')} with {' and '.join(what)} not drawn")
    if found > MOST_DETECTIONS:
        notes.append(f"the {MOST_DETECTIONS} highest of {found} detections are drawn")
    if track.tcam is None:
        notes.append("activations are not known, as there are detections only")
    else:
        if track.attention is None:
            notes.append("no bottom-up attention")
        if len(track.tcam) > MOST_POINTS:
            every = f"every {_bucket(track.tcam)} of {len(track.tcam)} snippets"
            notes.append(f"the curves show the highest and the lowest of {every}")
    return notes


def _highest(row: TimelineRow) -> list[str]:
    """The class of the highest activation, of a recording without annotation and detection."""
    curves = row.curves(row.tracks[0])
    return sorted(curves, key=lambda name: -float(curves[name].max()))[:1]


def _whole_buckets(track: Track) -> int:
    """Snippets that the points of the curves stand for."""
    if track.tcam is None:
        return 0
    snippets = len(track.tcam)
    return snippets if snippets <= MOST_POINTS else snippets + -snippets % _bucket(track.tcam)


def _bucket(values: np.ndarray) -> int:
    return -(-len(values) // (MOST_POINTS // 2))


def _curve(values: np.ndarray) -> str:
    """Values in [0, 1] as bytes of 1/255, in base64; of a long curve the highest and lowest of every few."""
    values = np.nan_to_num(np.asarray(values, np.float64)).clip(0, 1)
    if len(values) > MOST_POINTS:
        bucket = _bucket(values)
        padded = np.pad(values, (0, -len(values) % bucket), mode="edge").reshape(-1, bucket)
        low, high = padded.argmin(axis=1), padded.argmax(axis=1)
        both = np.sort(np.stack([low, high], axis=1), axis=1)  # in the order of time
        values = np.take_along_axis(padded, both, axis=1).reshape(-1)
    return base64.b64encode(np.rint(values * 255).astype(np.uint8).tobytes()).decode()


def _times(start: float, end: float) -> tuple[float, float]:
    return round(start, 3), round(end, 3)


def _short(value: float) -> float:
    return float(f"{value:.4g}") if abs(value) < 1 else round(value, 3)
