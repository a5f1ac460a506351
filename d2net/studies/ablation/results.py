"""The JSON files of a study: writes them, reads them with every value checked, and compares them with a new study."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2net.evaluation import FALSE_POSITIVES, RECALLS
from d2net.files import write_whole
from d2net.reading import load_json, number, typed
from d2net.recipes import Recipe
from d2net.studies.ablation.judging import LEVELS


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_table(path: Path) -> dict[str, Any]:
    return typed(load_json(path), dict, f"{path}: not a file of this study: its content")


def measures_of(result: Any, recipe: Recipe) -> dict[str, Any]:
    """What a result file says of one TCAM, with the entries that the tables need checked."""
    result = typed(result, dict, '"raw" or "refined"')
    maps = typed(result.get("map"), dict, '"map"')
    lines = typed(result.get("said", []), list, '"said"')
    counts = typed(result.get("false_positives"), dict, '"false_positives"')
    levels = [f"{t:g}" for t in sorted({*recipe.evaluation.tiou, *LEVELS})]
    return {
        **result,
        "protocol": typed(result.get("protocol"), str, '"protocol"'),
        "detections": int(number(result.get("detections"), '"detections"')),
        "map": {level: number(maps.get(level), f'"map" at IoU {level}') for level in levels},
        **{key: number(result.get(key), f'"{key}"') for key in ("average", "f1", "best_f1")},
        "auc": None if result.get("auc") is None else number(result["auc"], '"auc"'),
        "false_positives": {r: _kinds(counts.get(r)) for r in map("{:g}".format, RECALLS)},
        "said": [typed(line, str, 'a line of "said"') for line in lines],
    }


def _kinds(counts: Any) -> dict[str, float] | None:
    if counts is None:  # the recall is not reached
        return None
    counts = typed(counts, dict, 'a recall of "false_positives"')
    return {kind: number(counts.get(kind), f'"{kind}"') for kind in FALSE_POSITIVES}


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    """The first value of ``new`` that differs from ``old``, in words; "" if none does."""
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            # Compare the keys of both: one table may be empty.
            inner = difference(before, value, f"{prefix}{key}.") or difference(
                {k: value.get(k) for k in before}, before, f"{prefix}{key}."
            )
            if inner:
                return inner
        elif before != value:
            return f"{prefix}{key} was {before} and is {value}"
    return ""
