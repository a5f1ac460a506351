"""Best F1, false positives by kind at equal recall, and AUC of snippets, against slow definitions and known cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2net.data.dataset import Recording
from d2net.detections import Annotations, Detections
from d2net.errors import InputError
from d2net.evaluation import FALSE_POSITIVES, evaluate, is_action, operating_points, snippet_auc


def annotations(rows: list[tuple[int, int, float, float]]) -> Annotations:
    video, label, start, end = (np.array(x) for x in zip(*rows, strict=True))
    times = start.astype(float), end.astype(float)
    return Annotations(("v0", "v1"), ("a", "b"), video, label, *times, np.empty((0, 3)))


def detections(rows: list[tuple[int, int, float, float, float]]) -> Detections:
    columns = [np.array([row[i] for row in rows]) for i in range(5)]
    video, label = (c.astype(np.int64) for c in columns[:2])
    return Detections(("v0", "v1"), ("a", "b"), video, label, *(c.astype(float) for c in columns[2:]))


TRUTH = annotations([(0, 0, 0, 10), (0, 1, 20, 30), (1, 0, 50, 60)])


@pytest.mark.parametrize(
    ("segment", "kind"),
    [
        ((0, 0, 0.5, 10.5), "double"),
        ((0, 0, 20, 31), "other_class"),
        ((0, 0, 26, 40), "other_class"),  # IoU 0.2 with b
        ((0, 0, 29.0, 29.9), "other_class"),  # within b, too short for any IoU
        ((0, 0, 2, 5), "fragment"),
        ((0, 0, 2, 2.5), "fragment"),  # IoU below 0.1
        ((0, 0, 7, 14), "boundary"),
        ((0, 0, 9.4, 10.4), "boundary"),  # IoU below 0.1, most of it inside
        ((0, 0, 0, 60), "boundary"),
        ((0, 0, 12, 18), "background"),
        ((0, 0, 9.5, 19), "background"),
        ((1, 1, 0, 5), "background"),
        ((1, 1, 51, 60), "other_class"),
    ],
)
def test_kinds(segment: tuple[float, ...], kind: str) -> None:
    found = operating_points(detections([(0, 0, 0, 10, 0.9), (*segment, 0.8), (0, 1, 20, 30, 0.7)]), TRUTH)
    counts = found.false_positives["0.6"]  # both true positives and what lies between them
    assert counts == {k: int(k == kind) for k in FALSE_POSITIVES}
    assert found.false_positives["0.3"] == dict.fromkeys(FALSE_POSITIVES, 0)
    assert found.false_positives["0.7"] is None


def test_best_f1_takes_all_of_one_score() -> None:
    rows = [(0, 0, 0, 10, 0.9), (0, 0, 12, 18, 0.5), (0, 1, 20, 30, 0.5), (1, 0, 0, 5, 0.2)]
    found = operating_points(detections(rows), TRUTH)
    # At 0.9: one of one, 2 / (1 + 3). At 0.5: two of three, 4 / (3 + 3). At 0.2: two of four, 4 / 7.
    assert found.f1 == pytest.approx(100 * 4 / 6) and found.f1_score == 0.5
    assert evaluate(detections(rows), TRUTH).f1 == pytest.approx(100 * 4 / 7)


@pytest.mark.parametrize("tiou", [0.05, 0, -1, 2, float("nan")])
def test_an_iou_without_kinds(tiou: float) -> None:
    with pytest.raises(InputError, match="kinds of false positives are told apart at one IoU from 0.1 to 1"):
        operating_points(detections([]), TRUTH, tiou=tiou)


def test_without_detections() -> None:
    found = operating_points(detections([]), TRUTH)
    assert (found.f1, found.f1_score, set(found.false_positives.values())) == (0.0, None, {None})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["activitynet", "wtalc"]))
def test_best_f1_is_the_largest_f1_of_any_threshold(seed: int, protocol: str) -> None:
    rng = np.random.default_rng(seed)
    gt = np.sort(rng.uniform(0, 60, (5, 2)), axis=1) + [0, 2]
    truth = annotations([(int(rng.integers(2)), int(rng.integers(2)), *row) for row in gt])
    rows = []
    for _ in range(12):
        start, end = gt[rng.integers(5)] + rng.normal(0, 2, 2)
        where = (int(rng.integers(2)), int(rng.integers(2)), max(start, 0.0), max(start, 0.0) + abs(end - start) + 1)
        rows.append((*where, float(rng.choice([0.2, 0.4, 0.6, 0.8]))))
    found = operating_points(detections(rows), truth, protocol)
    by_threshold = {}
    for score in {row[4] for row in rows}:
        kept = [row for row in rows if row[4] >= score]
        try:
            by_threshold[score] = evaluate(detections(kept), truth, protocol).f1
        except ValueError:  # wtalc: all lie in recordings without segments
            by_threshold[score] = 0.0
    assert found.f1 == pytest.approx(max(by_threshold.values()))
    counted = [sum(c.values()) for c in found.false_positives.values() if c is not None]
    assert counted == sorted(counted)


def test_auc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(0)
    score, action = rng.integers(0, 6, 80).astype(float), rng.integers(-1, 2, 80)
    a, b = score[action == 1], score[action == 0]
    expected = ((a[:, None] > b).sum() + 0.5 * (a[:, None] == b).sum()) / (len(a) * len(b))
    assert snippet_auc(score, action) == pytest.approx(100 * expected)
    for bad in (np.append(score[1:], np.nan), score[1:]):
        with pytest.raises(InputError, match="no NaN"):
            snippet_auc(bad, action)
    assert snippet_auc(score, np.ones(80)) is None and snippet_auc(score, np.zeros(80)) is None


def test_a_snippet_is_of_an_action_where_its_middle_is() -> None:
    recording = Recording(
        name="r",
        subset="test",
        labels=("a",),
        segments=((2.0, 4.0, "a"),),
        seconds_per_snippet=1.0,
        source="",
        read=lambda: np.zeros((8, 1), np.float32),
        first_snippet=0.6,
        ambiguous=((5.0, 6.0),),
    )
    # Middles: 1.1, 2.1, 3.1, 4.1, 5.1, 6.1
    assert is_action(recording, 6).tolist() == [0, 1, 1, 0, -1, 0]
