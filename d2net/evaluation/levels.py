"""Temporal IoUs: those of the two benchmarks, the averages that papers print, and the check of those asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from d2net.errors import InputError

THUMOS14_TIOU = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
ACTIVITYNET_TIOU = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
AVERAGES = {"0.1-0.5": THUMOS14_TIOU[:5], "0.3-0.7": THUMOS14_TIOU[2:], "0.1-0.7": THUMOS14_TIOU}


def averages(tiou: Sequence[float], values: Iterable[float]) -> dict[str, float]:
    """Means over IoU 0.1 to 0.5, 0.3 to 0.7 and 0.1 to 0.7, in steps of 0.1, where ``tiou`` has all their levels.

    Args:
        tiou: The levels.
        values: A number at each of them.
    """
    found = dict(zip(tiou, values, strict=True))
    return {
        name: math.fsum(float(found[t]) for t in levels) / len(levels)
        for name, levels in AVERAGES.items()
        if found.keys() >= set(levels)
    }


def span(tiou: Sequence[float]) -> str:
    """The levels in a few letters: 0.5-0.95."""
    return f"{min(tiou):g}-{max(tiou):g}" if len(tiou) > 1 else f"{tiou[0]:g}"


def check_tiou(tiou: float | Iterable[float]) -> tuple[float, ...]:
    """One or several temporal IoUs as a tuple. Raises InputError for none, or one that is not in (0, 1]."""
    try:
        levels = (float(tiou),) if isinstance(tiou, (int, float, str)) else tuple(float(t) for t in tiou)
    except (TypeError, ValueError):
        raise InputError(f"tiou is {tiou!r}; give one IoU threshold or several, as (0.3, 0.5)") from None
    if not levels or not all(0 < t <= 1 for t in levels):
        raise InputError(f"IoU thresholds {[*levels]}: give at least one, each above 0 and up to 1")
    return levels
