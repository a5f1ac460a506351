"""AR@AN, and AP and recall by length: what published evaluators gave for generated detections, and cases by hand.

``evaluation_oracle.json`` holds the numbers of the ActivityNet toolkit's Evaluation/eval_proposal.py and of DETAD's
sensitivity analysis for :func:`case`. Both ran in Python 3 with print and iteration in its syntax, on the annotations
and detections written out as JSON; DETAD with ground truths cut into lengths by their seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2net.data import read_annotations
from d2net.detections import Annotations, Detections
from d2net.errors import InputError
from d2net.evaluation import (
    ACTIVITYNET_LENGTHS,
    ACTIVITYNET_TIOU,
    LENGTHS,
    THUMOS14_LENGTHS,
    analyse_lengths,
    average_recall,
    averages,
    evaluate,
)

ORACLE = json.loads((Path(__file__).parent / "evaluation_oracle.json").read_text(encoding="utf-8"))


def generated_truth() -> Annotations:
    """60 recordings, five without a segment; lengths of all sizes of ActivityNet."""
    random = np.random.RandomState(1)  # whose numbers are the same in every numpy
    video, label = random.randint(5, 60, 300), random.randint(0, 4, 300)
    start, length = random.uniform(0, 300, 300), random.exponential(70, 300)
    names = tuple(f"v{i:02d}" for i in range(60))
    return Annotations(names, tuple("abcd"), video, label, start, start + length, ambiguous=np.zeros((0, 3)))


def generated_detections(truth: Annotations, seed: int) -> Detections:
    """About the truth, of the right class four times in five, and as many anywhere; none in some recordings."""
    random = np.random.RandomState(seed)
    copies = np.repeat(np.arange(len(truth)), random.randint(0, 5, len(truth)))
    n, length = len(copies), (truth.end - truth.start)[copies]
    near = truth.start[copies] + length * random.normal(0, 0.25, n)
    anywhere = random.uniform(0, truth.end.max(), n)
    start = np.concatenate([near, anywhere])
    end = start + np.concatenate([length * random.uniform(0.6, 1.5, n), random.choice(length, n)])
    video = np.concatenate([truth.video[copies], random.randint(0, len(truth.videos), n)])
    classes = len(truth.classes)
    label = np.where(random.rand(n) < 0.8, truth.label[copies], random.randint(0, classes, n))
    label = np.concatenate([label, random.randint(0, classes, n)])
    score = np.concatenate([random.rand(n), 0.7 * random.rand(n)])
    kept = video % 17 != 3
    rows = (video[kept], label[kept], start[kept], end[kept])
    return Detections(truth.videos, truth.classes, *rows, score=score[kept])


def case(name: str, shared: Path | None) -> tuple[Annotations, Detections]:
    """Generated, or the test videos of THUMOS14 as they are annotated."""
    if name == "thumos14":
        assert shared is not None
        truth = read_annotations(shared / "data" / "thumos14" / "json" / "gt.json", subset="test")
    else:
        truth = generated_truth()
    return truth, generated_detections(truth, seed=2)


@pytest.mark.parametrize("max_an", [10, 40, 100])
@pytest.mark.parametrize("name", ["generated", "thumos14"])
def test_average_recall_is_the_toolkits(name: str, max_an: int, request: pytest.FixtureRequest) -> None:
    truth, found = case(name, request.getfixturevalue("shared") if name == "thumos14" else None)
    ours, published = average_recall(found, truth, max_an=max_an), ORACLE[name]["recall"][str(max_an)]
    at = [0, 4, 9, 29, 49, 99]
    for key, values in {
        "an": ours.an, "ar": ours.average, "at_0.5": ours.recall[0], "at_0.95": ours.recall[-1]
    }.items():  # fmt: skip
        np.testing.assert_allclose(values[at], published[key], rtol=1e-10, err_msg=key)
    assert ours.auc == pytest.approx(published["auc"], rel=1e-10)


@pytest.mark.parametrize("tiou", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("name", ["generated", "thumos14"])
def test_lengths_are_detads(name: str, tiou: float, request: pytest.FixtureRequest) -> None:
    truth, found = case(name, request.getfixturevalue("shared") if name == "thumos14" else None)
    ours, published = analyse_lengths(found, truth, tiou=(0.2, tiou)), ORACLE[name]["lengths"][str(tiou)]
    assert ours.ground_truth.tolist() == [*published["ground_truth"], len(truth)]
    assert ours.bounds == ((3, 6, 12, 18) if name == "thumos14" else (30, 60, 120, 180))
    np.testing.assert_allclose(ours.map_n[:, 1], published["map_n"], rtol=1e-10)
    np.testing.assert_allclose(ours.recall[:, 1], published["recall"], rtol=1e-10)


def annotations(rows, videos=("v", "w"), classes=("a", "b"), ambiguous=()) -> Annotations:
    """Rows (video, label, start, end)."""
    x = np.array(rows, np.float64).reshape(-1, 4)
    marks = np.array(ambiguous, np.float64).reshape(-1, 3)
    return Annotations(videos, classes, x[:, 0].astype(int), x[:, 1].astype(int), x[:, 2], x[:, 3], ambiguous=marks)


def detections(rows, videos=("v", "w"), classes=("a", "b")) -> Detections:
    """Rows (video, label, start, end, score)."""
    x = np.array(rows, np.float64).reshape(-1, 5)
    return Detections(videos, classes, x[:, 0].astype(int), x[:, 1].astype(int), x[:, 2], x[:, 3], score=x[:, 4])


def test_recall_by_hand() -> None:
    """Of any class; one detection finds two ground truths; how many are looked at follows what a recording has."""
    truth = annotations([(0, 0, 0, 10), (0, 1, 0, 12), (1, 1, 0, 10), (1, 1, 50, 60)])
    found = detections(
        [(0, 1, 0, 11, 0.1), (0, 0, 90, 99, 0.9), (0, 0, 80, 89, 0.8), (1, 0, 0, 5, 0.2)]
    )  # IoU 10/11 and 11/12 in v, third of three; 0.5 in w
    result = average_recall(found, truth, tiou=(0.5, 0.6), max_an=2)
    # AN 2 is all four, as N is 4 and V 2. v's third detection is looked at from AN 2 on, w's only one too.
    assert result.recall[:, -1].tolist() == [75, 50] and result.recall[:, -2].tolist() == [0, 0]
    assert result.average[-1] == 62.5 and result.per_recording == 2
    assert list(result.shown()) == ["0.02", "0.1", "0.2", "1", "2"] and result.shown()["2"] == 62.5
    assert result.auc == pytest.approx(62.5 / 2 * 0.01)  # one step of the curve, the last
    # AN 1 of each is not one of each: v has three, of which floor(3 / 2) is one; w's floor(1 / 2) is none.
    assert average_recall(detections([(1, 1, 0, 10, 1)] * 3 + [(0, 0, 0, 10, 1)]), truth, max_an=1).average[-1] == 25


def test_more_recall_than_there_are_detections() -> None:
    truth = annotations([(0, 0, 0, 10), (1, 0, 0, 10)])
    result = average_recall(detections([(0, 1, 0, 10, 0.5)]), truth)
    assert result.average[-1] == 50 and result.per_recording == 0.5
    assert "AR@1 50.0" in result.line() and "there are 0.5 a recording" in result.line()
    assert result.to_json()["ar"]["100"] == 50 and json.dumps(result.to_json())


def test_detections_where_nothing_is_annotated_take_their_share() -> None:
    """As in the toolkit: they count in N, so that fewer of the others are looked at."""
    truth = annotations([(0, 0, 0, 10)])
    right, wrong, elsewhere = (0, 0, 0, 10, 0.5), (0, 0, 50, 60, 0.9), (1, 0, 0, 10, 0.7)
    assert average_recall(detections([wrong, right]), truth, max_an=2).average[-1] == 100
    assert average_recall(detections([wrong, right, elsewhere]), truth, max_an=2).average[-1] == 0  # floor(2 * 2 / 3)


@pytest.mark.parametrize("protocol", ["activitynet", "wtalc"])
def test_without_a_detection(protocol: str) -> None:
    truth, nothing = annotations([(0, 0, 0, 10)]), detections([])
    recall = average_recall(nothing, truth, protocol)
    assert not recall.recall.any() and (recall.auc, recall.per_recording) == (0, 0)
    lengths = analyse_lengths(nothing, truth, protocol)
    assert lengths.map_n[2].tolist() == lengths.recall[2].tolist() == [0] * 7


def test_recall_under_the_wtalc_protocol() -> None:
    """IoU is that of ranges of snippets, and what touches an ambiguous segment is not there."""
    truth = annotations([(0, 0, 0, 64.0)], ambiguous=[(0, 200, 210)])
    found = detections([(0, 1, 0.3, 63.8, 0.5), (0, 0, 195, 205, 0.9)])
    assert average_recall(found, truth, "wtalc", tiou=1.0, max_an=1).average[-1] == 100
    assert average_recall(found, truth, "activitynet", tiou=1.0, max_an=1).average[-1] == 0


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 30), st.integers(1, 8), st.sampled_from([1, 3, 10, 100]))
def test_recall_equals_a_slow_restatement(seed: int, n: int, m: int, max_an: int) -> None:
    random = np.random.default_rng(seed)

    def rows(count):
        start = random.integers(0, 20, count) / 2
        return [random.integers(0, 3, count), random.integers(0, 2, count), start, start + random.integers(1, 9, count)]

    names = ("u", "v", "w")
    truth = annotations(np.stack(rows(m), 1), names)
    found = detections(np.stack([*rows(n), random.permutation(n)], 1), names)
    result = average_recall(found, truth, tiou=(0.3, 0.7), max_an=max_an)
    recordings = set(truth.video.tolist())
    kept = {v: sorted(np.nonzero(found.video == v)[0], key=lambda i: -found.score[i]) for v in recordings}
    kept = {v: its[: int(len(its) * (max_an * len(recordings) / max(n, 1)))] for v, its in kept.items()}
    total = sum(map(len, kept.values()))
    for i in (1, 4, 37, 100):
        share = i / 100 * (max_an * len(recordings) / max(total, 1))
        for row, t in enumerate((0.3, 0.7)):
            hits = 0
            for v, s, e in zip(truth.video, truth.start, truth.end, strict=True):
                for j in kept[v][: int(len(kept[v]) * share)]:
                    shared = max(0, min(e, found.end[j]) - max(s, found.start[j]))
                    if shared / (e - s + found.end[j] - found.start[j] - shared) >= t:
                        hits += 1
                        break
            assert result.recall[row, i - 1] == pytest.approx(100 * hits / m)


def test_lengths_by_hand() -> None:
    """The bounds belong to the shorter length; what takes another length's ground truth is left out."""
    truth = annotations([(0, 0, 0, 3), (0, 0, 10, 16), (0, 0, 20, 39), (1, 1, 0, 5)])
    found = detections(
        [(0, 0, 20, 39, 0.9), (0, 0, 50, 60, 0.8), (0, 0, 10, 16, 0.7), (0, 0, 0, 3, 0.6), (1, 1, 60, 70, 0.5)]
    )
    result = analyse_lengths(found, truth, tiou=0.5)
    assert result.bounds == (3, 6, 12, 18) and result.ground_truth.tolist() == [1, 2, 0, 0, 1, 4]
    # 4 ground truths in 2 classes are 2 a class: the precision of recall r after f false positives is 2 r / (2 r + f).
    found_third = 2 / (2 + 1)  # XS and S of a, each after one false positive; S of b is not found
    everything = (1 + 2 / 3 + 2 / 3) / 3  # recall 1/3, 2/3, 1: precision 1, 4/7, 2/3, of which the best that follows
    expected = [found_third, found_third / 2, np.nan, np.nan, 1, everything / 2]
    assert result.map_n[:, 0] == pytest.approx(100 * np.array(expected), nan_ok=True)
    assert result.recall[:, 0] == pytest.approx([100, 50, np.nan, np.nan, 100, 75], nan_ok=True)
    rows = result.to_json()["rows"]
    assert [row["length"] for row in rows] == [*LENGTHS] and rows[2]["map_n"] == {"0.5": None}
    assert rows[4]["recall"] == {"0.5": 100} and rows[4]["average_recall"] == 100
    assert result.seconds() == ["0-3 s", "3-6 s", "6-12 s", "12-18 s", "over 18 s", ""]


def test_bounds_of_lengths() -> None:
    """DETAD's of the dataset whose lengths are alike, or one's own; they are seconds under both protocols."""
    half_long = annotations([(0, 0, 0, 18), (0, 0, 100, 190)])
    assert analyse_lengths(detections([]), half_long).bounds == ACTIVITYNET_LENGTHS
    assert analyse_lengths(detections([]), annotations([(0, 0, 0, 18)] * 2)).bounds == THUMOS14_LENGTHS
    for protocol in ("activitynet", "wtalc"):
        own = analyse_lengths(detections([]), half_long, protocol, bounds=(1, 2, 18, 20))
        assert own.ground_truth.tolist() == [0, 0, 1, 0, 1, 2]


def test_averages() -> None:
    """Only where every level was evaluated."""
    truth, found = annotations([(0, 0, 0, 10)]), detections([(0, 0, 0, 5.5, 0.5)])  # IoU 0.55
    assert evaluate(found, truth).averages == pytest.approx({"0.1-0.5": 100, "0.3-0.7": 60, "0.1-0.7": 500 / 7})
    half = evaluate(found, truth, tiou=(0.5, 0.4, 0.3, 0.2, 0.1, 0.05))
    assert half.averages == half.to_json()["averages"] == {"0.1-0.5": 100}
    assert evaluate(found, truth, tiou=ACTIVITYNET_TIOU).averages == {}
    assert averages((0.3, 0.4, 0.5, 0.6, 0.7), (1, 2, 3, 4, 5)) == {"0.3-0.7": 3}


@pytest.mark.parametrize(
    ("judge", "options", "message"),
    [
        (average_recall, {"max_an": 0}, "max_an is 0; give a number above 0"),
        (average_recall, {"max_an": float("nan")}, "max_an is nan; give"),
        (average_recall, {"tiou": ()}, "give at least one"),
        (analyse_lengths, {"tiou": 1.5}, "above 0 and up to 1"),
        (analyse_lengths, {"bounds": (3, 6, 12)}, "give four rising numbers of seconds"),
        (analyse_lengths, {"bounds": (0, 6, 12, 18)}, "give four rising numbers of seconds above 0"),
        (analyse_lengths, {"bounds": (3, 6, 6, 18)}, "give four rising"),
        (analyse_lengths, {"bounds": (3, 6, 12, float("inf"))}, "give four rising"),
        (analyse_lengths, {"protocol": "thumos"}, "choose activitynet or wtalc"),
    ],
)
def test_errors(judge: Callable[..., object], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        judge(detections([]), annotations([(0, 0, 0, 1)]), **options)
    assert "\n" not in str(error.value)
