"""Finds names that probably mean the same: ``High Jump``, ``high_jump``, ``HighJump``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from d2net.errors import InputError
from d2net.words import plain

if TYPE_CHECKING:
    from d2net.data.catalog import Catalog


def near_duplicates(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of names that differ only in case, blanks, underscores or Unicode normalisation."""
    groups: dict[str, dict[str, None]] = {}
    for name in names:
        groups.setdefault(plain(name), {})[name] = None
    return [tuple(group) for group in groups.values() if len(group) > 1]


def check_labels(catalog: Catalog) -> None:
    """Raises InputError for labels that probably mean the same: each would be trained on a part of its recordings."""
    problems = label_problems(catalog)
    if problems:
        more = f" ({len(problems)} such problems)" if len(problems) > 1 else ""
        raise InputError(f"{catalog.source}: {problems[0]}{more}")


def label_problems(catalog: Catalog) -> list[str]:
    """A sentence for every group of labels or subsets that probably mean the same, and for a class listed twice."""
    twice = [c for c, n in Counter(catalog.classes).items() if n > 1]
    problems = [f"class '{c}' is listed twice; list it once" for c in twice]
    names = [label for r in catalog.listings for label in {*r.entry.labels, *(c for _, _, c in r.entry.segments)}]
    subsets = [r.subset for r in catalog.listings]
    for what, found, also in (("labels", names, catalog.classes), ("subsets", subsets, ())):
        count = Counter(found)
        for group in near_duplicates([*also, *found]):
            ordered = sorted(group, key=lambda name: -count[name])  # noqa: B023 (used at once)
            said = " and ".join(f"{name!r} ({count[name]} recordings)" for name in ordered)
            problems.append(f"the {what} {said} are probably one; write {ordered[0]!r} everywhere")
    return problems
