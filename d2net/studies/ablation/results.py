"""The JSON files of a study: writes them, reads them with every value checked, and compares them with a new study."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2net.files import write_whole
from d2net.reading import load_json, number, typed


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_table(path: Path) -> dict[str, Any]:
    return typed(load_json(path), dict, f"{path}: not a file of this study: its content")


def numbers(result: dict[str, Any], levels: Sequence[str]) -> dict[str, Any]:
    """The entries of a result file that the tables need, checked."""
    maps = typed(result.get("map"), dict, '"map"')
    lines = typed(result.get("said", []), list, '"said"')
    return {
        "protocol": typed(result.get("protocol"), str, '"protocol"'),
        "map": {level: number(maps.get(level), f'"map" at IoU {level}') for level in levels},
        **{key: number(result.get(key), f'"{key}"') for key in ("average", "f1")},
        "said": [typed(line, str, 'a line of "said"') for line in lines],
    }


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
