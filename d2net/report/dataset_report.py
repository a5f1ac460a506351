"""A report of the recordings of a dataset and of what was found in them: :func:`write_dataset_report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2net.data.dataset import Dataset
from d2net.detections import Detections
from d2net.errors import InputError
from d2net.evaluation import (
    THUMOS14_TIOU,
    VERDICTS,
    AverageRecall,
    ErrorAnalysis,
    Evaluation,
    LengthAnalysis,
    Protocol,
    analyse_errors,
    analyse_lengths,
    average_recall,
    error_level,
    evaluate,
)
from d2net.report.page import Table, write_report
from d2net.report.paper_tables import Comparison, compare, load_table
from d2net.report.plot import as_rows, detections_of
from d2net.report.timeline import TimelineRow, Track

__all__ = ["write_dataset_report"]


def write_dataset_report(
    path: str | Path,
    dataset: Dataset,
    detections: Detections,
    tracks: Sequence[Track] | None = None,
    *,
    title: str,
    facts: Sequence[tuple[str, str]] = (),
    protocol: Protocol = "activitynet",
    tiou: Sequence[float] = THUMOS14_TIOU,
    table: str | None = None,
    features: str | None = None,
    logs: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    videos: Mapping[str, Path] | None = None,
    recordings: Sequence[str] | None = None,
    tables: Sequence[Table] = (),
) -> Evaluation | str:
    """Judge detections where the recordings have annotations, and write ``report.html`` of all that is known.

    Args:
        path: Where to write: a ``.html``, whole or not at all.
        dataset: The recordings; it needs neither annotations nor labels.
        detections: Of them. Those in other recordings are left out of the mAP, which says how many, and not drawn.
        tracks: For every recording of ``dataset``, in its order, its detections and activations, as
            :func:`d2net.report.plot.model_tracks` gives them; None: the detections alone.
        title: See :func:`d2net.report.page.write_report`.
        facts: See there; :mod:`d2net.report.facts` makes them.
        protocol: Of the evaluation.
        tiou: Thresholds of the evaluation.
        table: Show the rows of this table too (``thumos14``, ``activitynet12``, ``activitynet13``).
        features: What the network saw, for the run's row there.
        logs: See :func:`d2net.report.page.write_report`.
        videos: See there; :func:`d2net.report.videos.find_videos` finds them.
        recordings: Names of those in the timeline; None: all. The numbers are of all, in any case.
        tables: See :func:`d2net.report.page.write_report`.

    Returns:
        The evaluation, or why there is none: no annotations, or detections that cannot be compared with them.

    Raises:
        InputError: as :func:`d2net.report.page.write_report`; an unknown recording or table.
    """
    judged = _judge(dataset, detections, protocol, tuple(tiou))
    result, errors, recall, lengths = (None,) * 4 if isinstance(judged, str) else judged
    rows = dataset_rows(dataset, detections, tracks, errors)
    if recordings is not None:
        by_name = {row.name: row for row in rows}
        if unknown := [name for name in recordings if name not in by_name]:
            raise InputError(f"recording '{unknown[0]}' is none of the {len(rows)} of '{dataset.name}'")
        rows = [by_name[name] for name in dict.fromkeys(recordings)]
    write_report(
        path,
        rows,
        title=title,
        facts=facts,
        evaluation=result,
        why_not_evaluated=judged if isinstance(judged, str) else "",
        errors=errors,
        recall=recall,
        lengths=lengths,
        comparison=_compare(table, result, dataset, detections, protocol, features) if table and result else None,
        tables=tables,
        logs=logs,
        videos=videos,
    )
    return judged if isinstance(judged, str) else judged[0]


def dataset_rows(
    dataset: Dataset,
    detections: Detections,
    tracks: Sequence[Track] | None = None,
    errors: ErrorAnalysis | None = None,
) -> list[TimelineRow]:
    """Every recording for :func:`d2net.report.page.write_report`.

    Args:
        dataset: The recordings.
        detections: In them.
        tracks: As :func:`write_dataset_report` takes them.
        errors: Gives every detection its verdict.
    """
    places = [detections_of(detections, recording.name) for recording in dataset.recordings]
    if tracks is None:
        tracks = [Track("", as_rows(detections, its)) for its in places]
    names = {c: None for c in dataset.classes}
    for track, recording in zip(tracks, dataset.recordings, strict=True):
        found = [label for _, _, label, _ in track.detections]
        truth = [label for _, _, label in recording.segments]
        names |= dict.fromkeys([*(track.classes or ()), *found, *truth])
    rows = []
    for index, (recording, track, its) in enumerate(zip(dataset.recordings, tracks, places, strict=True)):
        if errors is not None and len(its) == len(track.detections):
            verdicts = [None if (v := errors.verdict[i]) < 0 else VERDICTS[v] for i in its]
            track = replace(track, detections=as_rows(detections, its), verdicts=verdicts)
        if track.tcam is not None and track.classes is None:
            track = replace(track, classes=dataset.classes)
        rows.append(
            TimelineRow(
                name=recording.name,
                seconds_per_snippet=recording.seconds_per_snippet,
                classes=list(names),
                ground_truth=recording.segments,
                tracks=[track],
                duration=recording.duration or _length(dataset, index),
                first_snippet=recording.first_snippet,
            )
        )
    return rows


def _judge(
    dataset: Dataset, detections: Detections, protocol: Protocol, tiou: tuple[float, ...]
) -> tuple[Evaluation, ErrorAnalysis | None, AverageRecall, LengthAnalysis] | str:
    annotations = dataset.annotations()
    if len(annotations) == 0:
        return "There is no mAP, as no recording has an annotation to compare detections with."
    level = error_level(tiou)
    of = detections, annotations, protocol
    try:
        result = evaluate(*of, tiou, unknown_videos="ignore")
        errors = None if level is None else analyse_errors(*of, level, unknown_videos="ignore")
        recall = average_recall(*of, unknown_videos="ignore")
        return result, errors, recall, analyse_lengths(*of, tiou, unknown_videos="ignore")
    except InputError as error:  # classes of other names, or nothing where the protocol looks
        return f"There is no mAP, as the detections cannot be compared with the annotations: {error}"


def _compare(
    name: str, result: Evaluation, dataset: Dataset, detections: Detections, protocol: Protocol, features: str | None
) -> Comparison:
    table = load_table(name)
    if not set(table.levels) <= set(result.tiou):
        result = evaluate(detections, dataset.annotations(), protocol, table.levels, unknown_videos="ignore")
    return compare(table, result, run="this run", features=features, data=dataset.name, classes=result.coverage.classes)


def _length(dataset: Dataset, index: int) -> float:
    """Seconds of a recording that does not say how long it is."""
    recording = dataset.recordings[index]
    snippets = recording.snippets if recording.snippets is not None else len(dataset.features(index))
    return recording.first_snippet + snippets * recording.seconds_per_snippet
