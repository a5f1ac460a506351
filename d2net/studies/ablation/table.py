"""The results by variant: means, deviations and gains."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from d2net.studies.ablation.plan import Variant
from d2net.studies.ablation.run import Ablation


@dataclass(frozen=True)
class Row:
    """A variant's results: mean and deviation over its runs, in percent."""

    variant: Variant
    results: tuple[dict[str, Any], ...]

    def values(self, measure: str) -> list[float]:
        """The values of every run: ``f1``, ``average``, or mAP at an IoU such as ``0.5``."""
        return [r[measure] if measure in ("f1", "average") else r["map"][measure] for r in self.results]

    def summary(self, measure: str) -> tuple[float, float | None]:
        """Mean and sample standard deviation (None for a single run)."""
        values = self.values(measure)
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def make_rows(study: Ablation, results: Sequence[dict[str, Any]]) -> list[Row]:
    """The results by variant."""
    return [Row(v, tuple(r for r in results if r["variant"] == v.name)) for v in study.variants]


def measures(rows: Sequence[Row]) -> list[str]:
    """The measures of every run: mAP at its IoUs, their average, F1."""
    return [*rows[0].results[0]["map"], "average", "f1"]


def gain(row: Row, first: Row, measure: str) -> tuple[float, float | None]:
    """By how much a variant is above the first one: mean and deviation of the differences of paired runs, which are
    alike in all but the variant (seed, and who is held out)."""
    differences = [a - b for a, b in zip(row.values(measure), first.values(measure), strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) if len(differences) > 1 else None


def plus_minus(value: tuple[float, float | None], sign: str = "") -> str:
    mean, deviation = value
    return f"{mean:{sign}.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")
