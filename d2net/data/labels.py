"""Labels that are probably one: ``High Jump``, ``high_jump``, ``HighJump``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from d2net.errors import InputError

if TYPE_CHECKING:
    from d2net.data.catalog import Catalog


def near_duplicates(labels: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of labels that differ in case, blanks and underscores alone."""
    groups: dict[str, dict[str, None]] = {}
    for label in labels:
        groups.setdefault(re.sub(r"[\s_]+", "", label).casefold(), {})[label] = None
    return [tuple(group) for group in groups.values() if len(group) > 1]


def check_labels(catalog: Catalog) -> None:
    """Raises InputError for labels that are probably one: each would be learned from a part of its recordings."""
    problems = label_problems(catalog)
    if problems:
        more = f" ({len(problems)} such groups)" if len(problems) > 1 else ""
        raise InputError(f"{catalog.source}: {problems[0]}{more}")


def label_problems(catalog: Catalog) -> list[str]:
    """A sentence for every group of labels that are probably one."""
    names = [label for r in catalog.listings for label in {*r.entry.labels, *(c for _, _, c in r.entry.segments)}]
    count = Counter(names)
    problems = []
    for group in near_duplicates([*catalog.classes, *names]):
        ordered = sorted(group, key=lambda label: -count[label])
        said = " and ".join(f"'{label}' ({count[label]} recordings)" for label in ordered)
        problems.append(f"the labels {said} are probably one; write '{ordered[0]}' everywhere")
    return problems
