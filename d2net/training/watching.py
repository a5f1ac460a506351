"""Evaluations while a network is trained: to watch it, they choose nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2net.data.dataset import Dataset
from d2net.errors import InputError
from d2net.evaluation import evaluate
from d2net.localization import localize
from d2net.model import D2Net
from d2net.recipes import Recipe


def evaluate_network(model: D2Net, dataset: Dataset, recipe: Recipe) -> dict[str, Any]:
    """mAP and F1 in percent on an annotated dataset, as its protocol of the recipe reports them; or why not."""
    detections = localize(model, dataset, recipe.localization)
    settings = recipe.evaluation
    try:
        found = evaluate(detections, dataset.annotations(), protocol=settings.protocol, tiou=settings.tiou)
    except InputError as error:  # early networks may find actions only where the protocol does not look
        return {"not_evaluated": str(error)}
    result = found.to_json()
    return {**{key: result[key] for key in ("map", "average", "f1")}, "judged": found.coverage.lines()}


def in_words(found: Mapping[str, Any]) -> str:
    """What :func:`evaluate_network` found, in a line."""
    if "not_evaluated" in found:
        return f"not evaluated, {found['not_evaluated']}"
    levels = ", ".join(f"mAP@{level} {value:.1f}" for level, value in found["map"].items())
    return f"{levels}, average {found['average']:.1f}, F1@0.5 {found['f1']:.1f}; {found['judged'][0]}"
