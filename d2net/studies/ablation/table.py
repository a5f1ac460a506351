"""The results by variant: means, deviations, and differences of paired trainings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2net.evaluation import FALSE_POSITIVES, RECALLS
from d2net.studies.ablation.judging import LEVELS, TCAMS, Tcam
from d2net.studies.ablation.plan import Variant
from d2net.studies.ablation.run import Ablation

RESAMPLES = 10_000
ENOUGH = 5  # trainings, below which there is no interval
NORMAL = 1.960  # 97.5 % quantiles: of the normal distribution, and of Student's t for 1, 2, ... degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


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
        """Mean number of each kind beside this recall, over all runs, and how many reach it.

        Empty where a run does not reach it: a mean over the better runs alone would compare them with all of others.
        """
        counts = [r[self.tcam]["false_positives"].get(recall) for r in self.results]
        reached = [c for c in counts if c is not None]
        whole = len(reached) == len(counts)
        return {k: statistics.fmean(c[k] for c in reached) for k in FALSE_POSITIVES} if whole else {}, len(reached)


@dataclass(frozen=True)
class Difference:
    """By how much one row is above another: the mean over paired trainings, which are alike in seed and people.

    Attributes:
        mean: In points.
        interval: 95 %, by bootstrap over seeds and groups of people, both drawn anew (see :func:`difference`); None
            for fewer than five trainings.
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
    """What all rows have: mAP at the IoUs of all, F1 as retained and at the best threshold, AUC; the average of the
    recipe's IoUs where these are the same in all."""
    levels = [set(row.results[0][row.tcam]["map"]) for row in rows]
    common = [t for t in rows[0].results[0][rows[0].tcam]["map"] if all(t in of for of in levels)]
    average = ["average"] * all(of == levels[0] for of in levels)
    return [*common, *average, "f1", "best_f1", "auc"]


def shown_levels(rows: Sequence[Row]) -> list[str]:
    """The IoUs whose mAP tables show."""
    common = measures(rows)
    return [f"{t:g}" for t in LEVELS if f"{t:g}" in common]


def baseline(row: Row, rows: Sequence[Row]) -> Row:
    """What a row is compared with: the first variant's TCAM of the same kind."""
    return next(r for r in rows if r.tcam == row.tcam)


def difference(row: Row, first: Row, measure: str) -> Difference | None:
    """By how much ``row`` is above ``first`` in a measure; None where one lacks a value or had another protocol.

    The interval is the bootstrap's, widened to what few draws deserve: n means of normal numbers vary by a factor of
    sqrt(n / (n - 1)) more than their bootstrap says, and 95 % of them lie within Student's quantile for n - 1 instead
    of the normal one. n is the lesser of the numbers of seeds and of groups, where there are more than one.
    """
    protocols = {r[x.tcam]["protocol"] for x in (row, first) for r in x.results}
    a, b = row.values(measure), first.values(measure)
    if len(protocols) > 1 or not len(a) == len(b) == len(row.results) or not a:
        return None
    seeds = sorted({r["seed"] for r in row.results})
    groups = sorted({tuple(r["held_out_subjects"]) for r in row.results})
    table = np.empty((len(seeds), len(groups)))
    for r, x, y in zip(row.results, a, b, strict=True):
        table[seeds.index(r["seed"]), groups.index(tuple(r["held_out_subjects"]))] = round(x - y, 9)
    mean = float(table.mean())
    if table.size < ENOUGH:
        return Difference(mean, None)
    rng = np.random.default_rng(0)  # the same table gives the same interval
    chosen = [rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n for n in table.shape]
    low, high = np.percentile(np.einsum("ns,sg,ng->n", chosen[0], table, chosen[1]), (2.5, 97.5))
    n = min(size for size in table.shape if size > 1)
    wider = math.sqrt(n / (n - 1)) * student(n - 1) / NORMAL
    return Difference(mean, (mean - wider * (mean - float(low)), mean + wider * (float(high) - mean)))


def student(degrees: int) -> float:
    """The 97.5 % quantile of Student's t distribution, from 30 degrees of freedom on to 0.01."""
    return STUDENT[degrees - 1] if degrees <= len(STUDENT) else NORMAL + 2.5 / degrees


def equal_recall(rows: Sequence[Row]) -> str | None:
    """The largest recall that all runs of the first variant reach, raw and refined; None where there is none."""
    first = [row for row in rows if row.variant is rows[0].variant]
    reached = [r for r in map("{:g}".format, RECALLS) if all(row.false_positives(r)[0] for row in first)]
    return reached[-1] if reached else None


def plus_minus(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return "-"
    mean, deviation = value
    return f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")
