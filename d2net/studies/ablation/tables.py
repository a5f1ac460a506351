"""The tables of a study as text, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from d2net.evaluation import FALSE_POSITIVES
from d2net.studies.ablation.judging import F1_TIOU
from d2net.studies.ablation.run import Ablation
from d2net.studies.ablation.table import (
    ENOUGH,
    Difference,
    Row,
    baseline,
    difference,
    equal_recall,
    plus_minus,
    shown_levels,
)

COMPARED = ("0.5", "f1")
NAMES = {"f1": "F1@0.5", "best_f1": "best F1", "auc": "AUC", "average": "average"}


@dataclass(frozen=True)
class Printed:
    """A table: its title, the names of its columns, and its cells; lines that belong below it."""

    title: str
    header: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def tables_of(study: Ablation, rows: Sequence[Row]) -> list[Printed]:
    """The measures of every variant, and the kinds of its false positives at equal recall."""
    several = len(rows[0].results) > 1
    levels = shown_levels(rows)
    columns = [*levels, "f1", "best_f1", "auc"]
    first = rows[0].variant
    compared = [c for c in COMPARED if c == "f1" or c in levels] if len(rows) > 2 else []
    header = ["variant", "TCAM", *(name(c) for c in columns), *(f"{name(c)}, above {first.name}" for c in compared)]
    cells = []
    unsettled = False
    for row in rows:
        beside = baseline(row, rows)
        found = [None if row is beside else difference(row, beside, c) for c in compared]
        unsettled |= any(d is not None and not d.settled for d in found)
        cells.append((row.variant.label, row.tcam, *(plus_minus(row.summary(c)) for c in columns), *map(_said, found)))
    protocols = {row.variant.name: row.results[0]["raw"]["protocol"] for row in rows}
    by_row = [f"{variant}: {protocol}" for variant, protocol in protocols.items()]
    notes = [
        f"protocol {' and '.join(dict.fromkeys(protocols.values()))}"
        + f" ({', '.join(by_row)})" * (len(set(protocols.values())) > 1),
        "raw: T; refined: lambda' T. AUC: how well lambda (raw) or lambda' (refined) tells action snippets from others",
        f"F1@{F1_TIOU:g}: of all detections as given; best F1: at the score threshold where it is largest",
    ]
    if several:
        notes.append("mean ± sample deviation over the trainings")
    if compared:
        notes.append(f"differences: of paired trainings, {_interval(rows)}")
    if unsettled:
        notes.append("not settled: 0 lies within the interval, or there is none")
    return [
        Printed(f"Ablation on {study.dataset.name}; {study.over}; percent", tuple(header), tuple(cells), tuple(notes)),
        *_false_positives(study, rows),
    ]


def name(measure: str) -> str:
    return NAMES.get(measure, f"mAP@{measure}")


def _interval(rows: Sequence[Row]) -> str:
    results = rows[0].results
    if len(results) < ENOUGH:
        return f"fewer than {ENOUGH}: no interval"
    seeds = len({r["seed"] for r in results})
    groups = len({tuple(r["held_out_subjects"]) for r in results})
    of = ["seeds"] * (seeds > 1) + ["groups of people"] * (groups > 1)
    alone = "" if seeds > 1 else "; of one seed alone: another would differ by more"
    return f"with a 95 % bootstrap interval over {' and '.join(of)}{alone}"


def _said(found: Difference | None) -> str:
    if found is None:
        return ""
    return str(found) if found.settled else f"{found} not settled"


def _false_positives(study: Ablation, rows: Sequence[Row]) -> list[Printed]:
    recall = equal_recall(rows)
    title = f"False positives on {study.dataset.name}"
    first = rows[0].variant.name
    if recall is None:
        why = f"not shown: a training of {first} does not find a tenth of the actions at IoU {F1_TIOU:g}"
        return [Printed(f"{title} at equal recall", ("variant",), (), (why,))]
    cells = []
    for row in rows:
        counts, runs = row.false_positives(recall)
        numbers = [*counts.values(), *([sum(counts.values())] if counts else [])]
        shown = [f"{x:.1f}" for x in numbers] or ["-"] * (len(FALSE_POSITIVES) + 1)
        cells.append((row.variant.label, row.tcam, *shown, f"{runs} of {len(row.results)}"))
    notes = [
        f"mean number among the best detections that find {100 * float(recall):g} % of the actions at IoU {F1_TIOU:g}, "
        f"the largest tenth that all trainings of {first} reach; runs: how many of a row reach it"
    ]
    if any(not row.false_positives(recall)[0] for row in rows):
        notes.append("-: not all of them do, and a mean over those that do would not be comparable")
    return [
        Printed(
            f"{title} at recall {100 * float(recall):g} %",
            ("variant", "TCAM", *(kind.replace("_", " ") for kind in FALSE_POSITIVES), "all", "runs"),
            tuple(cells),
            tuple(notes),
        )
    ]
