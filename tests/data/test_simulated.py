"""Simulated features: deterministic, lazy, and shaped by their timeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from d2net.data import open_dataset, simulate
from d2net.errors import InputError


def write(path: Path, database: dict) -> Path:
    path.write_text(json.dumps({"database": database}))
    return path


def test_made_up_timeline_is_complete():
    dataset = open_dataset("simulated")
    assert "simulated" in dataset.name
    assert dataset.subsets == ("train", "test")
    assert (len(dataset), len(dataset.classes), dataset.stream_widths) == (24, 4, (1024, 1024))
    for subset in dataset.subsets:
        assert dataset.subset(subset).label_matrix().any(axis=0).all()
    assert all(end <= r.duration for r in dataset.recordings for _, end, _ in r.segments)


def test_features_repeat_and_depend_on_video_and_seed():
    first, again, other = (
        simulate(stream_widths=(8, 3)),
        simulate(stream_widths=(8, 3)),
        simulate(stream_widths=(8, 3), seed=1),
    )
    a = first.features(2)
    assert a.shape == (int(first.recordings[2].duration / 0.64), 11) and a.dtype == np.float32
    # In another order, and after other reads: nothing hangs on a shared generator.
    again.features(5)
    np.testing.assert_array_equal(a, again.features(2))
    assert not np.array_equal(a, other.features(2))
    n = min(len(a), len(first.features(3)))
    assert not np.array_equal(a[:n], first.features(3)[:n])


def test_actions_are_recognisable_from_the_features():
    """Nearest mean of the training snippets names the action of most test snippets; chance is 1/4."""
    dataset = simulate(stream_widths=(32, 32))

    def snippets(subset: str) -> tuple[np.ndarray, np.ndarray]:
        x, y = [], []
        for i, r in enumerate(dataset.subset(subset).recordings):
            features = dataset.subset(subset).features(i)
            for start, end, label in r.segments:
                part = features[int(start / 0.64) + 1 : int(end / 0.64) - 1]
                x.append(part)
                y += [dataset.classes.index(label)] * len(part)
        return np.concatenate(x), np.array(y)

    x, y = snippets("train")
    means = np.stack([x[y == c].mean(axis=0) for c in range(4)])
    x, y = snippets("test")
    guess = np.linalg.norm(x[:, None] - means, axis=2).argmin(axis=1)
    assert (guess == y).mean() > 0.8


def test_duration_comes_from_the_last_segment_where_it_is_missing(tmp_path):
    path = write(tmp_path / "t.json", {"v": {"subset": "test", "annotations": [{"segment": [1, 64], "label": "a"}]}})
    (recording,) = simulate(path, stream_widths=(2, 2)).recordings
    assert 64 <= recording.duration <= 80
    assert len(recording.read()) == int(recording.duration / 0.64)


def test_very_short_video_has_a_snippet(tmp_path):
    path = write(tmp_path / "t.json", {"v": {"subset": "test", "duration": 0.1, "annotations": []}})
    assert simulate(path, stream_widths=(2, 2)).features(0).shape == (1, 4)


def test_only_wanted_subsets(tmp_path):
    assert open_dataset("simulated", subsets=["test"]).subsets == ("test",)
    with pytest.raises(InputError, match="there is no subset 'dev'; there are train, test"):
        open_dataset("simulated", subsets=["dev"])


def test_errors(tmp_path):
    path = write(tmp_path / "t.json", {"v": {"subset": "test", "annotations": []}})
    with pytest.raises(InputError, match="'v' has neither a duration nor a segment"):
        simulate(path)
    with pytest.raises(InputError, match="no video"):
        simulate(write(tmp_path / "none.json", {}))
    with pytest.raises(InputError, match="stream_widths"):
        simulate(stream_widths=(0, 4))
    with pytest.raises(InputError, match="nowhere.json.*check the path"):
        open_dataset(f"simulated:{tmp_path / 'nowhere.json'}")


def test_real_timeline(shared):
    path = shared / "data" / "thumos14" / "json" / "gt.json"
    if not path.exists():
        pytest.skip(f"no {path}")
    dataset = simulate(path, stream_widths=(4, 4))
    assert len(dataset.subset("train")) == 200 and len(dataset.subset("test")) == 210
    assert len(dataset.classes) == 20
    assert dataset.subset("train").label_matrix().sum() >= 200
    assert np.isfinite(dataset.features(0)).all()
