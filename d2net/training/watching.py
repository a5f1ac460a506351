"""Evaluations during training. They are only reported: no checkpoint is chosen by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2net.data.dataset import Dataset
from d2net.distributed import ALONE, Ranks
from d2net.errors import InputError
from d2net.evaluation import evaluate
from d2net.localization import localize
from d2net.model import D2Net
from d2net.recipes import Recipe


def evaluate_network(model: D2Net, dataset: Dataset, recipe: Recipe, ranks: Ranks = ALONE) -> dict[str, Any]:
    """mAP and F1 in percent on an annotated dataset, by the recipe's protocol; or why it could not be evaluated.

    Of several ranks all must call this: each localizes its share, and rank 0 evaluates; the others get nothing.
    """
    detections = localize(model, dataset, recipe.localization, ranks=ranks)
    settings = recipe.evaluation
    if not ranks.leads:
        return {}
    try:
        found = evaluate(detections, dataset.annotations(), protocol=settings.protocol, tiou=settings.tiou)
    except InputError as error:  # an early network may detect only what the protocol leaves out
        return {"not_evaluated": str(error)}
    result = found.to_json()
    return {**{key: result[key] for key in ("map", "average", "f1")}, "judged": found.coverage.lines()}


def in_words(found: Mapping[str, Any]) -> str:
    """The result of :func:`evaluate_network` as a line of text."""
    if "not_evaluated" in found:
        return f"not evaluated, {found['not_evaluated']}"
    levels = ", ".join(f"mAP@{level} {value:.1f}" for level, value in found["map"].items())
    return f"{levels}, average {found['average']:.1f}, F1@0.5 {found['f1']:.1f}; {found['judged'][0]}"
