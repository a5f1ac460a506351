"""What a file must be by docs/data.md and docs/evaluation.md, read by other libraries than d2net.

A damaged file can still be such a file: with another number, another name, a row less. Nobody can tell, since most of
these formats carry no checksum. Every function here raises where a file is none, and is stricter than d2net where the
documents leave that open. Nothing of d2net is imported.
"""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    assert len(table) == len(pairs), "a key comes twice"
    return table


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_unique)


def _text(value: Any) -> None:
    assert isinstance(value, str), f"{value!r} is no text"
    value.encode()  # not with half a surrogate


def _number(value: Any) -> float:
    """Numbers may be strings."""
    assert isinstance(value, (int, float, str)) and not isinstance(value, bool), f"{value!r} is no number"
    assert math.isfinite(float(value)), f"{value!r} is not finite"
    return float(value)


def _pair(value: Any) -> None:
    assert isinstance(value, list) and len(value) == 2, f"{value!r} is no pair"
    assert _number(value[0]) <= _number(value[1]), f"{value!r} ends before it starts"


def _list_of(check, value: Any) -> None:
    assert isinstance(value, list), f"{value!r} is no list"
    for each in value:
        check(each)


def _optional(table: dict[str, Any], key: str, check) -> None:
    if table.get(key) is not None:  # null stands for nothing
        check(table[key])


def _annotation(row: Any) -> None:
    _text(row["label"])
    _optional(row, "segment", _pair)
    _optional(row, "label_id", _number)


def annotations(path: Path) -> None:
    top = _json(path)
    _optional(top, "classes", lambda value: _list_of(_text, value))
    _optional(top, "streams", lambda value: _list_of(_number, value))
    for key in ("fps", "feat_stride"):
        _optional(top, key, _number)
    for name, video in top["database"].items():
        _text(name)
        _text(video["subset"])
        _list_of(_annotation, video["annotations"])
        _optional(video, "duration", lambda value: _number(value) > 0)
        _optional(video, "labels", lambda value: _list_of(_text, value))


def bmn(path: Path) -> None:
    for name, video in _json(path).items():
        _text(name)
        _list_of(_annotation, video["annotations"])
        for key in ("duration_second", "duration"):
            _optional(video, key, _number)


def detections(path: Path) -> None:
    for name, rows in _json(path)["results"].items():
        _text(name)
        for row in rows or []:
            _text(row["label"])
            _number(row["score"])
            _pair(row["segment"])


def detections_csv(path: Path) -> None:
    text = path.read_bytes().decode("utf-8-sig")
    header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = [column.strip().lower() for column in header]
    place = [header.index(column) for column in ("recording", "label", "start", "end", "score")]
    for row in rows:
        if not any(cell.strip() for cell in row):
            continue
        name, label, start, end, score = (row[i] for i in place)
        assert len(row) == len(header) and name and label
        _pair([start, end])
        _number(score)


def signed_checkpoint(path: Path) -> None:
    """Metadata of the types that they must be; settings of a recipe are numbers, words, lists of numbers or null."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    (text,) = header["__metadata__"].values()
    values = json.loads(text, object_pairs_hook=_unique)
    for key in ("dataset", "version"):
        _text(values[key])
    _list_of(_text, values["classes"])
    assert len(set(values["classes"])) == len(values["classes"]) == 2
    for key in ("iteration", "seed", "threads"):
        assert type(values[key]) is int and values[key] >= 0
    for section in ("model", "loss", "training", "localization", "evaluation"):
        for value in values["recipe"][section].values():
            assert (
                value is None
                or isinstance(value, (str, bool))
                or _list_of(_number, value if isinstance(value, list) else [value]) is None
            )


def lines(path: Path) -> None:
    """A name in each line."""
    text = path.read_bytes().decode("utf-8-sig")
    assert text.strip() and "\0" not in text


def marks(path: Path) -> None:
    """Lines of a name and two numbers."""
    for line in path.read_bytes().decode("utf-8-sig").splitlines():
        if line.strip():
            _, start, end = line.rsplit(maxsplit=2)  # a name may hold blanks
            _pair([start, end])


def _features(array: np.ndarray) -> None:
    assert array.dtype.kind in "fiu" and array.ndim == 2 and min(array.shape) >= 1, f"{array.shape} {array.dtype}"
    assert np.isfinite(np.asarray(array, np.float64)).all(), "NaN or Inf"


def npy(path: Path) -> None:
    _features(np.load(path, allow_pickle=False))


def npz(path: Path) -> None:
    with np.load(path, allow_pickle=False) as archive:
        (name,) = archive.files
        _features(archive[name])  # its CRC is checked


def torch_file(path: Path) -> None:
    import torch

    _features(torch.load(path, weights_only=True).numpy())


def h5(path: Path) -> None:
    import h5py

    with h5py.File(path, "r") as file:
        for name in file:
            _features(np.asarray(file[name]))


def pickled(path: Path) -> None:
    """An array of as many entries as the others have: videos, or classes."""
    folder = path.parent if path.parent.name.endswith("-Annotations") else next(path.parent.glob("*-Annotations"))
    other = {"videoname.npy": "subset.npy", "classlist.npy": "test_gt_segments.npy"}.get(path.name, "videoname.npy")
    other = "classlist.npy" if path.name == "test_gt_segments.npy" else other
    array, like = (np.load(p, allow_pickle=True, encoding="latin1") for p in (path, folder / other))
    assert isinstance(array, np.ndarray) and array.ndim >= 1 and len(array) == len(like)


def picture(path: Path) -> None:
    from PIL import Image

    with Image.open(path) as image:
        image.load()


def settings(path: Path) -> None:
    import yaml

    for line in path.read_bytes().decode().splitlines():
        key, sign, value = line.partition("=")
        assert sign and key.count(".") == 1
        assert isinstance(yaml.safe_load(value), (int, float, str, list))


def study(path: Path) -> None:
    """Numbers of a finished training, which may be others; of what the file must say, nothing may be missing."""
    result = _json(path)
    for value in (*result["map"].values(), result["average"], result["f1"]):
        assert isinstance(value, float) and 0 <= value <= 100
