"""The embedded watch dataset: what it promises about subjects, labels, time, features and the file it opens."""

from __future__ import annotations

import pickle
import re
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2net.data import open_dataset
from d2net.data import watch as watch_module
from d2net.data.dataset import Dataset
from d2net.data.statistics import window_statistics
from d2net.data.watch import JOININGS, Joining, load_watch, played_faster, rotation_matrix
from d2net.errors import InputError


@pytest.fixture(scope="module", autouse=True)
def installed() -> Path:
    try:
        listed = files("seglearn") or []
    except PackageNotFoundError:
        pytest.skip("the package seglearn is not installed: pip install 'd2net[demo]'")
    return Path(next(f for f in listed if f.name == "watch_dataset.npy").locate())


@pytest.fixture(scope="module")
def watch() -> Dataset:
    return load_watch(train_recordings=120)


def subject(name: str) -> str:
    found = re.fullmatch(r"watch_(?:train|test)_(s\d\d)_\d{4}", name)
    assert found
    return found[1]


def test_sizes_and_classes(watch: Dataset) -> None:
    assert watch.classes == ("ABD", "FEL", "IR", "ER", "ROW")
    assert not set(watch.classes) & set(JOININGS["easy"].background)
    assert watch.stream_widths == (48, 48)
    assert len(watch.subset("train")) == 120
    assert len(watch.subset("test")) == 40
    assert len({r.name for r in watch.recordings}) == 160


def test_subjects_are_disjoint(watch: Dataset) -> None:
    train, test = ({subject(r.name) for r in watch.subset(s).recordings} for s in ("train", "test"))
    assert (len(train), len(test)) == (7, 3)
    assert not train & test


def test_labels_are_the_classes_of_the_segments(watch: Dataset) -> None:
    for r in watch.recordings:
        assert r.labels == tuple(sorted({label for *_, label in r.segments}))
        assert len(r.labels) in (1, 2)
    assert (watch.subset("train").label_matrix().sum(axis=0) >= 10).all()
    assert (watch.subset("test").label_matrix().sum(axis=0) >= 3).all()


def test_segments_are_ordered_apart_and_inside() -> None:
    for r in load_watch(train_recordings=40, tempo=0).recordings:
        times = [0.0, *(t for start, end, _ in r.segments for t in (start, end)), r.duration]
        lengths = np.diff(times)
        assert (lengths >= 6).all() and (lengths <= 20 + 1e-9).all()  # stretches of both kinds


def test_features_cover_the_duration_and_are_finite(watch: Dataset) -> None:
    for i, r in enumerate(watch.recordings):
        x = watch.features(i)  # checks width and finiteness
        assert x.dtype == np.float32
        assert -1e-9 <= r.duration - len(x) * r.seconds_per_snippet < r.seconds_per_snippet


def test_standardised_by_the_training_recordings_only(watch: Dataset) -> None:
    x = np.concatenate([watch.features(i) for i in range(120)]).astype(np.float64)
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(x.std(axis=0), 1, atol=1e-3)
    without_test = load_watch(train_recordings=120, test_recordings=0)
    np.testing.assert_array_equal(without_test.features(5), watch.features(5))


def test_deterministic_in_the_seed(watch: Dataset) -> None:
    again, other = load_watch(train_recordings=120), load_watch(seed=1, train_recordings=120)
    for i in (0, 60, 159):
        assert again.recordings[i].segments == watch.recordings[i].segments
        np.testing.assert_array_equal(again.features(i), watch.features(i))
    assert any(a.segments != b.segments for a, b in zip(watch.recordings, other.recordings, strict=True))


def test_a_larger_set_contains_the_smaller(watch: Dataset) -> None:
    small = load_watch(train_recordings=3, test_recordings=2)
    segments = {r.name: r.segments for r in watch.recordings}
    assert all(segments[r.name] == r.segments for r in small.recordings)


def test_only_training_recordings_are_turned_and_played_faster() -> None:
    sizes = {"train_recordings": 7, "test_recordings": 3}
    plain = load_watch(**sizes, tilt=0, tempo=0)
    turned, played = load_watch(**sizes, tempo=0), load_watch(**sizes, tilt=0)
    # Standardised differently, the test features of two are the same up to a scale and shift of each column.
    for changed in (turned, played):
        for i in range(7, 10):
            assert changed.recordings[i].segments == plain.recordings[i].segments
            x, y = changed.features(i), plain.features(i)
            for column in range(0, 96, 7):
                assert np.corrcoef(x[:, column], y[:, column])[0, 1] > 0.999
    assert turned.recordings[0].segments == plain.recordings[0].segments
    assert np.corrcoef(turned.features(0)[:, 0], plain.features(0)[:, 0])[0, 1] < 0.999
    for i in range(7):
        x, y = played.recordings[i], plain.recordings[i]
        factor = y.segments[0][0] / x.segments[0][0]
        assert factor != pytest.approx(1, abs=1e-4)
        assert y.duration == pytest.approx(factor * x.duration, abs=0.04)  # whole samples
        for (start, end, label), other in zip(x.segments, y.segments, strict=True):
            assert (factor * start, factor * end, label) == (pytest.approx(other[0]), pytest.approx(other[1]), other[2])


def test_a_signal_played_faster() -> None:
    t = np.arange(1000) / 50
    signal = np.stack([np.sin(2 * np.pi * t)] * 6, axis=1)
    played = played_faster(signal, 1.25)
    expected = np.sin(2 * np.pi * 1.25 * t[:800])
    assert played.shape == (800, 6)
    for axis in range(6):  # 0.01: signals are interpolated linearly
        np.testing.assert_allclose(played[:, axis], expected * (1 if axis < 3 else 1.25), atol=0.01)
    np.testing.assert_array_equal(played_faster(signal, 1.0), signal)
    assert len(played_faster(signal, 0.9)) == 1111


def test_a_turned_signal_keeps_its_magnitude() -> None:
    rotation = rotation_matrix(np.array([0.3, -0.2, 1.0]))
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)
    np.testing.assert_allclose(rotation_matrix(np.array([0, 0, np.pi / 2])) @ [1, 0, 0], [0, 1, 0], atol=1e-12)


def test_other_people_may_train_and_test() -> None:
    made = load_watch(train_recordings=4, test_recordings=2, train_subjects=[3, 9], test_subjects=[1])
    assert {subject(r.name) for r in made.subset("train").recordings} == {"s03", "s09"}
    assert {subject(r.name) for r in made.subset("test").recordings} == {"s01"}


def test_reading_gives_a_copy(watch: Dataset) -> None:
    before = watch.features(0)
    watch.features(0)[:] = 7
    np.testing.assert_array_equal(watch.features(0), before)


def test_statistics_of_a_known_signal() -> None:
    t = np.arange(800) / 50
    # 2 Hz, moved off the samples: no sample is zero
    signal = np.stack([np.sin(2 * np.pi * 2 * t + 0.3), np.full(800, 5.0), t], axis=1)
    x = window_statistics(signal, rate=50, window=50, stride=16)
    assert x.shape == (50, 48)
    mid = x[25].reshape(12, 4)  # statistic, channel
    assert mid[0, 0] == pytest.approx(0, abs=1e-5)
    assert mid[1, 0] == pytest.approx(np.sqrt(0.5), abs=1e-5)
    assert mid[8, 0] * 49 == pytest.approx(4, abs=0.01)  # two periods cross the mean four times
    assert mid[9, 0] > mid[10, 0] + 5  # the energy is in the lowest band
    np.testing.assert_allclose(mid[:9, 1], [5, 0, 5, 5, 5, 5, 5, 0, 0], atol=1e-5)
    # A ramp shows where a window lies: its mean is the time of the snippet's middle sample pair.
    np.testing.assert_allclose(x[2:-2, 2], (np.arange(50)[2:-2] * 16 + 7.5) / 50, rtol=1e-5)


def test_a_tampered_file_is_refused_and_not_opened(installed: Path, tmp_path: Path) -> None:
    flipped = bytearray(installed.read_bytes())
    flipped[-1000] ^= 1
    (tmp_path / "flipped.npy").write_bytes(flipped)
    with pytest.raises(InputError, match=r"flipped\.npy.*SHA-256"):
        load_watch(path=tmp_path / "flipped.npy")

    trace = tmp_path / "trace"
    (tmp_path / "bomb.npy").write_bytes(pickle.dumps(_Bomb(str(trace))))
    with pytest.raises(InputError, match="SHA-256"):
        load_watch(path=tmp_path / "bomb.npy")
    assert not trace.exists()


class _Bomb:
    """Makes a file when unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self.path, "w")


def test_missing_package_or_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent.npy.*cannot be read"):
        load_watch(path=tmp_path / "absent.npy")
    monkeypatch.delitem(sys.modules, "seglearn", raising=False)
    # leave the standard library, drop every folder that holds the package
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not Path(p, "seglearn").is_dir()])
    with pytest.raises(InputError, match=re.escape("pip install 'd2net[demo]'")):
        load_watch()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"seed": -1}, "seed=-1"),
        ({"train_recordings": 0}, "train_recordings=0"),
        ({"test_recordings": -1}, "test_recordings=-1"),
        ({"tilt": -1.0}, "tilt=-1"),
        ({"tilt": float("nan")}, "tilt=nan"),
        ({"tempo": -0.1}, "tempo=-0.1"),
        ({"tempo": 2.0}, "a tempo of 0 to 1"),
        ({"train_subjects": [1, 2], "test_subjects": [2]}, "nobody twice"),
        ({"train_subjects": []}, "at least one of each"),
        ({"train_subjects": [11]}, "no subject 11"),
    ],
)
def test_numbers_out_of_range(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_watch(**bad)


def test_hard_recordings_are_of_the_same_people_and_signals() -> None:
    sizes = dict(train_recordings=60, test_recordings=20)
    hard, easy = load_watch(difficulty="hard", **sizes), load_watch(**sizes)
    joining = JOININGS["hard"]
    assert hard.name == "watch (hard)" and easy.name == "watch"
    assert set(hard.classes) == {"PEN", "FEL", "IR", "TRAP", "ROW"} and not set(hard.classes) & set(joining.background)
    assert [r.name for r in hard.recordings] == [r.name for r in easy.recordings]
    two = np.mean([len(r.labels) > 1 for r in hard.recordings])
    assert 0.05 < two < 0.4
    for r in hard.subset("test").recordings:  # played at their own tempo
        ends = [0.0, *(t for start, end, _ in r.segments for t in (start, end)), r.duration]
        lengths = np.diff(ends)
        fade = joining.fade / 50
        assert (lengths[1::2] >= 2 - fade - 1e-9).all() and (lengths[1::2] <= 6 + 1e-9).all()
        assert (lengths[0::2] >= 3 - fade - 1e-9).all() and (lengths[0::2] <= 8 + 1e-9).all()


def test_a_fade_goes_from_one_stretch_to_the_next() -> None:
    """Of constant signals the joint is a straight line, and the boundary is in its middle."""
    signals = {(e, 1, side): np.full((2000, 6), float(i)) for i, e in enumerate("xyz") for side in (0, 1)}
    source = watch_module._Source(("x", "y", "z"), signals)
    joining = Joining(("x",), (150, 150), (200, 200), (1,), (2, 2), 40)
    made, segments = watch_module._join(source, joining, 1, np.random.default_rng(0))
    level = made.max()  # of the action, above the background's 0
    assert len(made) == 3 * 200 + 2 * 150 - 4 * 40 and len(segments) == 2
    for start, end, _ in segments:
        for boundary in (start, end):
            middle = round(boundary * 50)
            assert made[middle - 1 : middle + 1, 0].mean() == pytest.approx(level / 2)
            assert abs(np.diff(made[middle - 19 : middle + 19, 0])).max() == pytest.approx(level / 40)
        assert (made[round(start * 50) + 20 : round(end * 50) - 20] == level).all()


def test_hard_recordings_by_the_name_of_the_data() -> None:
    assert open_dataset("watch,difficulty=hard", subsets=["test"]).name == "watch (hard)"
    with pytest.raises(InputError, match="unknown difficulty 'hrd'; give easy or hard"):
        open_dataset("watch,difficulty=hrd")
