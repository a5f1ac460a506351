"""Judges a trained network: what its raw TCAM finds, and what the TCAM refined by the bottom-up attention does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
from torch import nn

from d2net.data.dataset import Dataset
from d2net.detections import Annotations, Detections
from d2net.errors import InputError
from d2net.evaluation import evaluate, is_action, operating_points, snippet_auc
from d2net.localization import Localizer, classes_of, of_dataset, predict, propose
from d2net.recipes import EvaluationRecipe, Recipe

Tcam = Literal["raw", "refined"]
TCAMS: tuple[Tcam, ...] = get_args(Tcam)
LEVELS = (0.1, 0.3, 0.5, 0.7)  # tIoUs at which every study is judged, beside those of its recipe
F1_TIOU = 0.5


def judge(model: nn.Module, test: Dataset, recipe: Recipe) -> dict[str, Any]:
    """The measures of a network on annotated recordings, for :mod:`json`.

    Both are judged, whatever the recipe refines: "raw" is the TCAM T, "refined" is lambda' T (Sec. 3.3).
    "auc" of "raw" is that of the top-down attention lambda, of "refined" that of lambda' (Eq. 8), in percent
    (:func:`d2net.evaluation.snippet_auc`). The entries beside the two are those of the sequence that the recipe takes.
    """
    predicted = [predict(model, test.features(i)) for i in range(len(test))]
    action = [is_action(r, len(tcam)) for r, (tcam, _) in zip(test.recordings, predicted, strict=True)]
    result: dict[str, Any] = {}
    for tcam_kind in TCAMS:
        localizer = Localizer(replace(recipe.localization, attention=tcam_kind == "refined"))
        found = [propose(localizer, r, *p) for r, p in zip(test.recordings, predicted, strict=True)]
        detections = of_dataset(found, test, classes_of(model, test))
        attention = [
            (tcam.amax(1) if tcam_kind == "raw" or refining is None else refining).cpu() for tcam, refining in predicted
        ]
        auc = snippet_auc(np.concatenate(attention), np.concatenate(action)) if predicted else None
        result[tcam_kind] = {**measure(detections, test.annotations(), recipe.evaluation), "auc": auc}
    return {**result["refined" if recipe.localization.attention else "raw"], **result}


def measure(detections: Detections, annotations: Annotations, recipe: EvaluationRecipe) -> dict[str, Any]:
    """mAP, F1, and the false positives of detections."""
    protocol = recipe.protocol
    tiou = sorted({*recipe.tiou, *LEVELS})
    try:
        found = evaluate(detections, annotations, protocol=protocol, tiou=tiou, f1_tiou=F1_TIOU)
        points = operating_points(detections, annotations, protocol, F1_TIOU)
    except InputError as error:  # all detections are where the protocol does not look: all are wrong
        nothing = {f"{t:g}": 0.0 for t in tiou}
        return {
            "detections": len(detections),
            "protocol": protocol,
            "map": nothing,
            "average": 0.0,
            "f1": 0.0,
            "best_f1": 0.0,
            "best_f1_score": None,
            "false_positives": {},
            "per_class": {},
            "said": [f"every number is 0: {error}"],
        }
    values = found.to_json()
    return {
        "detections": len(detections),
        **values,
        "average": float(np.mean([values["map"][f"{t:g}"] for t in recipe.tiou])),
        "best_f1": points.f1,
        "best_f1_score": points.f1_score,
        "false_positives": points.false_positives,
        "said": found.coverage.lines(),
    }
