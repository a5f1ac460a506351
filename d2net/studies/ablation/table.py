"""The results by variant: means, deviations, and differences of paired trainings."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2net.evaluation import FALSE_POSITIVES
from d2net.studies.ablation.judging import LEVELS, TCAMS, Tcam
from d2net.studies.ablation.plan import Variant
from d2net.studies.ablation.run import Ablation

RESAMPLES = 10_000
ENOUGH = 5  # trainings, below which there is no interval: it would be far too narrow


@dataclass(frozen=True)
class Row:
    """The results of one variant's raw or refined TCAM: mean and deviation over its runs, in percent."""

    variant: Variant
    tcam: Tcam
    results: tuple[dict[str, Any], ...]

    def values(self, measure: str) -> list[float]:
        """The values of every run: ``f1``, ``best_f1``, ``auc``, ``average``, or mAP at an IoU such as ``0.5``.

        Empty for the AUC of recordings that are action or background throughout.
        """
        of = [r[self.tcam] for r in self.results]
        found = [r["map"][measure] if measure in r["map"] else r[measure] for r in of]
        return [x for x in found if x is not None]

    def summary(self, measure: str) -> tuple[float, float | None] | None:
        """Mean and sample standard deviation (None for a single run); None where there is no value."""
        values = self.values(measure)
        if not values:
            return None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

    def false_positives(self, recall: str) -> tuple[dict[str, float], int]:
        """Mean number of each kind beside this recall, over the runs that reach it, and how many do."""
        counts = [c for r in self.results if (c := r[self.tcam]["false_positives"].get(recall)) is not None]
        return {k: statistics.fmean(c[k] for c in counts) for k in FALSE_POSITIVES} if counts else {}, len(counts)


@dataclass(frozen=True)
class Difference:
    """By how much one row is above another: the mean over paired trainings, which are alike in seed and people.

    Attributes:
        mean: In points.
        interval: 95 %, by bootstrap over seeds and groups of people, both drawn anew; None for fewer than five
            trainings.
    """

    mean: float
    interval: tuple[float, float] | None

    @property
    def settled(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.mean:+.1f}"
        return f"{self.mean:+.1f} [{self.interval[0]:+.1f}, {self.interval[1]:+.1f}]"


def make_rows(study: Ablation, results: Sequence[dict[str, Any]]) -> list[Row]:
    """The results by variant, of each the raw and the refined TCAM."""
    return [Row(v, t, tuple(r for r in results if r["variant"] == v.name)) for v in study.variants for t in TCAMS]


def measures(rows: Sequence[Row]) -> list[str]:
    """The measures of every run: mAP at its IoUs, their average, F1 as retained and at the best threshold, AUC."""
    return [*rows[0].results[0][rows[0].tcam]["map"], "average", "f1", "best_f1", "auc"]


def shown_levels(rows: Sequence[Row]) -> list[str]:
    """The IoUs whose mAP tables show."""
    return [f"{t:g}" for t in LEVELS if f"{t:g}" in rows[0].results[0]["raw"]["map"]]


def baseline(row: Row, rows: Sequence[Row]) -> Row:
    """What a row is compared with: the first variant's TCAM of the same kind."""
    return next(r for r in rows if r.tcam == row.tcam)


def difference(row: Row, first: Row, measure: str) -> Difference | None:
    """By how much ``row`` is above ``first`` in a measure; None where it has no value."""
    a, b = row.values(measure), first.values(measure)
    if not a or len(a) != len(b):
        return None
    seeds = sorted({r["seed"] for r in row.results})
    groups = sorted({tuple(r["held_out_subjects"]) for r in row.results})
    table = np.empty((len(seeds), len(groups)))
    for r, x, y in zip(row.results, a, b, strict=True):
        table[seeds.index(r["seed"]), groups.index(tuple(r["held_out_subjects"]))] = x - y
    mean = float(table.mean())
    if table.size < ENOUGH:
        return Difference(mean, None)
    rng = np.random.default_rng(0)  # the same table gives the same interval
    chosen = [rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n for n in table.shape]
    means = np.einsum("ns,sg,ng->n", chosen[0], table, chosen[1])
    low, high = np.percentile(means, (2.5, 97.5))
    return Difference(mean, (float(low), float(high)))


def equal_recall(rows: Sequence[Row]) -> str | None:
    """The largest recall that at least half of the runs of every row reach; None where there is none."""
    recalls = list(rows[0].results[0]["raw"]["false_positives"])
    reached = [r for r in recalls if all(2 * row.false_positives(r)[1] >= len(row.results) for row in rows)]
    return reached[-1] if reached else None


def plus_minus(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return "-"
    mean, deviation = value
    return f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")
