"""The examples of docs/data.md do what it says."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from d2net.data import find_dataset, open_dataset
from d2net.data.describe import inspect

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "data.md"


@pytest.fixture
def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)


def test_every_example_makes_a_dataset(examples, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for example in examples:
            exec(compile(example, str(DOCUMENT), "exec"), {})
        expected = {"my-wtalc": (1024, 1024), "my-cola": (1024, 1024), "my-data": (768,), "my-own": (96,)}
        for folder, widths in expected.items():
            dataset = open_dataset(folder, trust_pickle=True)
            assert dataset.stream_widths == widths and dataset.classes == ("Jump", "Spin")
            assert [r.labels for r in dataset.recordings] == 2 * [("Jump",), ("Spin",)]
            assert inspect(find_dataset(folder, trust_pickle=True)).problems == []
    assert "(40, 768) 0.5333333333333333 0.0" in capsys.readouterr().out


def test_the_json_is_read(tmp_path):
    text = DOCUMENT.read_text(encoding="utf-8")
    (block,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    (tmp_path / "a.json").write_text(block)
    entry = find_dataset(tmp_path / "a.json").listings[0].entry
    assert entry.times.resolve() == pytest.approx((16 / 30, 8 / 30)) and entry.ambiguous == ((9, 11),)


def test_every_key_that_is_read_is_in_the_document():
    from d2net.data.times import KEYS

    text = DOCUMENT.read_text(encoding="utf-8")
    others = ("labels", "ambiguous", "withdrawn", "frame", "duration", "label_id", "classes", "streams", "name")
    for key in (*(key for keys in KEYS.values() for key in keys), *others):
        assert f"`{key}`" in text, key
