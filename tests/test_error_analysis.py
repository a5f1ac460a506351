"""What is wrong with a detection: cases counted by hand, DETAD's rule restated, and what each error costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2net.detections import Annotations, Detections
from d2net.errors import InputError
from d2net.evaluation import VERDICTS, analyse_errors, error_level, evaluate

PROTOCOLS = ["activitynet", "wtalc"]


def detections(rows, videos=("v", "w"), classes=("a", "b")) -> Detections:
    """Rows (video, label, start, end, score)."""
    x = np.array(rows, np.float64).reshape(-1, 5)
    return Detections(videos, classes, x[:, 0].astype(int), x[:, 1].astype(int), x[:, 2], x[:, 3], score=x[:, 4])


def annotations(rows, videos=("v", "w"), classes=("a", "b"), ambiguous=()) -> Annotations:
    """Rows (video, label, start, end)."""
    x = np.array(rows, np.float64).reshape(-1, 4)
    marks = np.array(ambiguous, np.float64).reshape(-1, 3)
    return Annotations(videos, classes, x[:, 0].astype(int), x[:, 1].astype(int), x[:, 2], x[:, 3], ambiguous=marks)


# In v: a at 0-10 and 20-30, b at 40-50. In w: b at 0-10, which nothing finds.
TRUTH = annotations([(0, 0, 0, 10), (0, 0, 20, 30), (0, 1, 40, 50), (1, 1, 0, 10)])
BY_HAND = [
    ((0, 0, 0, 10, 0.9), "true_positive"),
    ((0, 0, 1, 10, 0.8), "double_detection"),  # the same place again
    ((0, 0, 41, 49, 0.7), "wrong_label"),  # there is b
    ((0, 0, 20, 24, 0.6), "localization"),  # IoU 0.4
    ((0, 0, 48, 58, 0.5), "confusion"),  # IoU 1/9 with b
    ((0, 0, 33, 38, 0.4), "background"),
    ((0, 0, 29.5, 39.5, 0.35), "background"),  # IoU 0.5 / 19.5
    ((0, 0, 20, 25, 0.3), "true_positive"),  # IoU 0.5 reaches the threshold
    ((0, 1, 40, 50, 0.2), "true_positive"),
    ((1, 0, 50, 60, 0.1), "background"),
]  # fmt: skip


def test_every_kind_by_hand() -> None:
    found = analyse_errors(detections([row for row, _ in BY_HAND]), TRUTH)
    assert [VERDICTS[i] for i in found.verdict] == [name for _, name in BY_HAND]
    # G of a is 2: of its nine detections two are in each slice.
    expected = np.zeros((10, 6), int)
    for g, name in enumerate([name for (_, label, *_), name in BY_HAND if label == 0]):
        expected[g // 2, VERDICTS.index(name)] += 1
    expected[0, VERDICTS.index("true_positive")] += 1  # b's only one
    np.testing.assert_array_equal(found.counts, expected)
    assert (found.missed, found.ground_truth) == (1, 4)
    # Hits of a at ranks 1 and 8 of 9: AP (1 + 2/8) / 2; of b 1 of 2 found at rank 1: AP 1/2.
    assert found.map == pytest.approx(100 * (0.625 + 0.5) / 2)
    # Without the kinds that come before rank 8 (n of them) a's second hit is at rank 8 - n.
    for name, n in {
        "double_detection": 1,
        "wrong_label": 1,
        "localization": 1,
        "confusion": 1,
        "background": 2,
    }.items():
        assert found.gain[name] == pytest.approx(100 * ((1 + 2 / (8 - n)) / 2 - 0.625) / 2), name
    assert found.gain["missed"] == pytest.approx(100 * (1 - 0.5) / 2)  # b's other one
    assert found.to_json()["counts"]["wrong_label"] == expected[:, 2].tolist()


def test_another_iou_is_another_verdict() -> None:
    one = detections([(0, 0, 20, 24, 0.5)])  # IoU 0.4
    assert VERDICTS[analyse_errors(one, TRUTH, tiou=0.4).verdict[0]] == "true_positive"
    assert VERDICTS[analyse_errors(one, TRUTH, tiou=0.41).verdict[0]] == "localization"


def test_of_equal_ious_its_own_class_decides() -> None:
    truth = annotations([(0, 1, 0, 10), (0, 0, 0, 10)])
    found = analyse_errors(detections([(0, 0, 0, 10, 0.9), (0, 0, 0, 10, 0.8), (0, 0, 0, 4, 0.7)]), truth)
    assert [VERDICTS[i] for i in found.verdict] == ["true_positive", "double_detection", "localization"]


def test_a_true_positive_is_one_although_another_class_is_nearer() -> None:
    truth = annotations([(0, 1, 0, 10), (0, 0, 2, 12)])
    assert VERDICTS[analyse_errors(detections([(0, 0, 0, 10, 0.9)]), truth).verdict[0]] == "true_positive"


def test_only_ten_times_as_many_as_ground_truths_are_counted() -> None:
    truth = annotations([(0, 0, 0, 10)])
    found = analyse_errors(detections([(0, 0, 50, 60, -i) for i in range(25)] + [(0, 1, 0, 10, 1)]), truth)
    np.testing.assert_array_equal(found.counts.sum(1), np.ones(10))  # b has no ground truth, and so no top
    assert len(found.verdict) == 26 and VERDICTS[found.verdict[-1]] == "wrong_label"


def test_dropped_detections_have_no_verdict() -> None:
    truth = replace(TRUTH, ambiguous=np.array([[0, 60, 70.0]]))
    rows = [(0, 0, 0, 10, 0.9), (0, 0, 62, 66, 0.8)]
    assert analyse_errors(detections(rows), truth, "wtalc").verdict.tolist() == [0, -1]
    assert analyse_errors(detections(rows), truth).verdict.tolist() == [0, VERDICTS.index("background")]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_without_detections_all_is_missed(protocol: str) -> None:
    found = analyse_errors(detections([]), TRUTH, protocol)
    assert found.map == 0 and found.missed == 4 and found.counts.sum() == 0
    assert found.gain == dict.fromkeys([*VERDICTS[1:], "missed"], 0)


@pytest.mark.parametrize("tiou", [0, 0.09, 1.1, float("nan")])
def test_an_iou_that_tells_nothing_apart(tiou: float) -> None:
    with pytest.raises(InputError, match="one IoU from 0.1 to 1"):
        analyse_errors(detections([]), TRUTH, tiou=tiou)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [([0.1, 0.5, 0.7], 0.5), ([0.4, 0.6], 0.4), ([0.05, 0.95], 0.95), ([0.05], None), ([], None)],
)
def test_the_iou_of_the_analysis(levels: list[float], expected: float | None) -> None:
    assert error_level(levels) == expected


def slow_verdict(i: int, found: Detections, truth: Annotations, taken: bool, tiou: float) -> str:
    """The rule again, one detection at a time."""
    best = (0.0, False)
    for g in range(len(truth)):
        if truth.video[g] == found.video[i]:
            shared = min(found.end[i], truth.end[g]) - max(found.start[i], truth.start[g])
            whole = max(found.end[i], truth.end[g]) - min(found.start[i], truth.start[g])
            iou = shared / whole if shared > 0 else 0.0
            best = max(best, (iou, bool(truth.label[g] == found.label[i])))
    if taken:
        return "true_positive"
    if best[0] >= tiou:
        return "double_detection" if best[1] else "wrong_label"
    if best[0] >= 0.1:
        return "localization" if best[1] else "confusion"
    return "background"


SEGMENT = st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 12), st.integers(1, 8))


@settings(max_examples=150, deadline=None)
@given(st.lists(SEGMENT, min_size=1, max_size=6), st.lists(SEGMENT, max_size=12), st.sampled_from([0.3, 0.5, 0.7]))
def test_the_rule_and_what_is_always_true(truths, founds, tiou) -> None:
    truth = annotations([(v, c, s, s + n) for v, c, s, n in truths])
    found = detections([(v, c, s, s + n, -i) for i, (v, c, s, n) in enumerate(founds)])
    errors = analyse_errors(found, truth, tiou=tiou)
    names = [VERDICTS[i] for i in errors.verdict]
    assert names == [slow_verdict(i, found, truth, names[i] == "true_positive", tiou) for i in range(len(found))]
    assert errors.map == pytest.approx(evaluate(found, truth, tiou=tiou).map[0])
    assert errors.missed == len(truth) - names.count("true_positive")
    assert min(errors.gain.values()) >= -1e-9
    # What it costs is what an evaluation without those detections finds.
    for name in VERDICTS[1:]:
        keep = np.array([n != name for n in names], bool)
        rest = replace(found, **{k: getattr(found, k)[keep] for k in ("video", "label", "start", "end", "score")})
        assert errors.map + errors.gain[name] == pytest.approx(evaluate(rest, truth, tiou=tiou).map[0])
