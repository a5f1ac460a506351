"""Simulated features: deterministic, lazy, and shaped by their timeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from d2net.cli.options import absolute
from d2net.data import open_dataset, simulate
from d2net.data.simulated import DIFFICULTIES
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


PLAIN = {"action": 6.0, "context": 0.0, "noise": 0.0}  # of a dataset in which nothing else is to be seen


def one_video(path: Path, **making: float) -> np.ndarray:
    """(T, 1024) RGB and flow features of a minute with an action from second 16 to 32, where nothing is noise."""
    entry = {"subset": "test", "duration": 64, "annotations": [{"segment": [16, 32], "label": "a"}]}
    data = simulate(write(path / "one.json", {"v": entry}), stream_widths=(512, 512), **{**PLAIN, **making})
    return data.features(0)


def size(features: np.ndarray) -> np.ndarray:
    return np.linalg.norm(features, axis=1)


def test_a_scene_is_all_over_the_rgb_stream(tmp_path):
    plain, scene = one_video(tmp_path), one_video(tmp_path, scene=2.0)
    rgb, flow = np.split(scene, 2, axis=1)
    assert (size(np.split(plain, 2, axis=1)[0])[[0, 5, -1]] == 0).all()
    # What is negative is cut off: about half of the squared length stays.
    np.testing.assert_allclose(size(rgb)[[0, 5, -1]], 2 / np.sqrt(2), rtol=0.1)
    np.testing.assert_array_equal(flow, np.split(plain, 2, axis=1)[1])


def test_an_action_fades_half_way_at_its_ends(tmp_path):
    rgb = size(one_video(tmp_path, fade=6.4)[:, :512])  # over 10 snippets
    inside = rgb[35:40].mean()
    assert rgb[18] == 0 and rgb[57] == 0 and inside > 0
    np.testing.assert_allclose(rgb[[22, 27, 47, 52]] / inside, [0.25, 0.75, 0.75, 0.25], atol=0.06)


def test_lookalikes_are_outside_of_actions_and_differ_by_stream(tmp_path):
    plain, with_them = one_video(tmp_path), one_video(tmp_path, lookalikes=30.0)
    added = size((with_them - plain)[:, :512]) > 0, size((with_them - plain)[:, 512:]) > 0
    for stream in added:
        assert 5 < stream.sum() and not stream[27:48].any()
    assert (added[0] != added[1]).any()
    action = with_them[30]
    at = np.flatnonzero(added[0])[0]
    shown = [x[:512] / np.linalg.norm(x[:512]) for x in (action, with_them[at])]
    assert shown[0] @ shown[1] > 0.999  # the very action


def test_variation_has_its_standard_deviation(tmp_path):
    segments = [{"segment": [t, t + 10], "label": "a"} for t in range(10, 10_000, 20)]
    path = write(tmp_path / "t.json", {"v": {"subset": "test", "duration": 10_020, "annotations": segments}})
    data = simulate(path, stream_widths=(64, 64), variation=0.6, **PLAIN)
    rgb, flow = (size(x) for x in np.split(data.features(0), 2, axis=1))
    inside = np.array([int(s["segment"][0] / 0.64) + 7 for s in segments])  # one snippet of each
    a, b = np.log(rgb[inside]), np.log(flow[inside])
    assert 0.5 < a.std() < 0.7 and 0.5 < b.std() < 0.7 and abs(np.corrcoef(a, b)[0, 1]) < 0.2


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_kept_is_what_is_made_and_nobody_changes_it(kept, monkeypatch):
    if not kept:
        monkeypatch.setattr("d2net.data.simulated.KEPT", 0)
    data = simulate(stream_widths=(8, 8), **DIFFICULTIES["hard"])
    first = data.features(0)
    kind = data.recordings[0].read
    assert (kind.features is not None) == kept
    copy = first.copy()
    first[:] = -1
    np.testing.assert_array_equal(data.features(0), copy)


def test_settings_of_the_command_line(tmp_path):
    data = open_dataset("simulated,width=8,difficulty=hard,seed=3")
    assert data.name == "simulated made-up timeline (hard, seed 3)" and data.stream_widths == (8, 8)
    same = simulate(stream_widths=(8, 8), seed=3, **DIFFICULTIES["hard"])
    np.testing.assert_array_equal(data.features(1), same.features(1))
    assert open_dataset("simulated,width=8").name == "simulated made-up timeline"
    path = write(tmp_path / "a,b=c.json", {"v": {"subset": "test", "duration": 9, "annotations": []}})
    assert len(open_dataset(f"simulated,width=2:{path}")) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("simulated,widht=8", "unknown setting 'widht' .did you mean 'width'"),
        ("simulated,width=0", "width is '0'; give a whole number from 1"),
        ("simulated,width=1e3", "width is '1e3'"),
        ("simulated,seed=-1", "seed is '-1'"),
        ("simulated,width", "width is ''"),
        ("simulated,difficulty=medium", "difficulty is 'medium'; give easy or hard"),
    ],
)
def test_settings_that_cannot_be(spec, message):
    with pytest.raises(InputError, match=message):
        open_dataset(spec)
    with pytest.raises(InputError, match="variation=-1; give a number of 0 to 1000"):
        simulate(variation=-1)


def test_a_run_keeps_the_settings_and_the_whole_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert absolute("simulated,width=4:gt.json") == f"simulated,width=4:{tmp_path}/gt.json"
    assert absolute("simulated,seed=2") == "simulated,seed=2"
