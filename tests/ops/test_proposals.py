"""extract_proposals against a scan that follows Sec. 3.3 word by word."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2net.errors import InputError
from d2net.ops.proposals import Proposals, extract_proposals

PAPER = [0.025 * i for i in range(1, 21)]


def rows(proposals: Proposals) -> list[tuple]:
    return list(zip(*(x.tolist() for x in proposals), strict=True))


def scan(sequence: list[float], thresholds, min_length, inflation, outer, nms_iou) -> list[tuple]:
    """Proposals (start, end, score) of one sequence, by loops."""
    found = set()
    for threshold in thresholds:
        start = None
        for t, value in enumerate([*sequence, -1e9]):
            if value > threshold and start is None:
                start = t
            elif value <= threshold and start is not None:
                if t - start >= min_length:
                    found.add((start, t))
                start = None
    scored = []
    for start, end in found:
        reach = max(1, int(inflation * (end - start)))
        sides = [sequence[max(0, start - reach) : start], sequence[end : end + reach]]
        if outer == "pooled":
            sides = [sides[0] + sides[1]]
        means = [sum(side) / len(side) for side in sides if side]
        background = sum(means) / len(means) if means else 0.0
        score = sum(sequence[start:end]) / (end - start) - background
        scored.append((start, end, torch.tensor(score, dtype=torch.float32).item()))
    kept: list[tuple] = []
    for start, end, score in sorted(scored, key=lambda s: (-s[2], s[0], s[1])):
        overlaps = [max(0, min(end, b) - max(start, a)) / (max(end, b) - min(start, a)) for a, b, _ in kept]
        if all(iou < nms_iou for iou in overlaps):
            kept.append((start, end, score))
    return kept


@st.composite
def batches(draw):
    """Activations on a grid of 1/16, so that every sum is exact and ties are common."""
    b, t, c = draw(st.integers(0, 3)), draw(st.integers(0, 24)), draw(st.integers(0, 3))
    values = draw(st.lists(st.integers(-2, 16), min_size=b * t * c, max_size=b * t * c))
    activations = torch.tensor(values, dtype=torch.float32).reshape(b, t, c) / 16
    kept = draw(st.lists(st.booleans(), min_size=b * c, max_size=b * c))
    lengths = draw(st.none() | st.lists(st.integers(0, t), min_size=b, max_size=b))
    options = {
        "thresholds": draw(st.lists(st.sampled_from([-0.0625, 0.0, 0.125, 0.3, 0.5, 0.9]), min_size=1)),
        "min_length": draw(st.integers(1, 4)),
        "inflation": draw(st.sampled_from([0.0, 0.25, 0.5, 2.0])),
        "outer": draw(st.sampled_from(["pooled", "mean_of_sides"])),
        "nms_iou": draw(st.sampled_from([0.25, 0.5, 0.75, 1.0])),
    }
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int64)
    return activations, torch.tensor(kept, dtype=torch.bool).reshape(b, c), lengths, options


@settings(max_examples=200, deadline=None)
@given(batches())
def test_equals_a_plain_scan(batch):
    activations, classes, lengths, options = batch
    expected = []
    for b, c in classes.nonzero().tolist():
        end = activations.shape[1] if lengths is None else int(lengths[b])
        expected += [(b, c, *p) for p in scan(activations[b, :end, c].tolist(), **options)]
    assert rows(extract_proposals(activations, classes, lengths, **options)) == expected


def random_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randint(0, 65, (5, 60, 4), generator=generator) / 64
    classes = torch.rand(5, 4, generator=generator) > 0.4
    return activations, classes, torch.tensor([60, 1, 0, 37, 22])


def test_what_lies_past_a_length_never_matters():
    activations, classes, lengths = random_batch()
    expected = rows(extract_proposals(activations, classes, lengths, thresholds=PAPER))
    assert len(expected) > 50
    longer = torch.cat((activations, torch.zeros(5, 9, 4)), dim=1)
    for junk in (float("nan"), float("inf"), 0.7):
        for b, length in enumerate(lengths.tolist()):
            longer[b, length:] = junk
        assert rows(extract_proposals(longer, classes, lengths, thresholds=PAPER)) == expected


def test_recordings_are_independent():
    activations, classes, lengths = random_batch(1)
    order = torch.tensor([3, 0, 4, 2, 1])
    together = rows(extract_proposals(activations, classes, lengths, thresholds=PAPER))
    permuted = rows(extract_proposals(activations[order], classes[order], lengths[order], thresholds=PAPER))
    assert sorted((int(order[r[0]]), *r[1:]) for r in permuted) == sorted(together)
    alone = [
        (b, *r[1:])
        for b in range(5)
        for r in rows(
            extract_proposals(activations[b : b + 1], classes[b : b + 1], lengths[b : b + 1], thresholds=PAPER)
        )
    ]
    assert alone == together


def test_activations_of_other_classes_are_never_read():
    activations, classes, _ = random_batch(2)
    expected = rows(extract_proposals(activations, classes, thresholds=PAPER))
    activations.masked_fill_(~classes[:, None], float("nan"))
    assert rows(extract_proposals(activations, classes, thresholds=PAPER)) == expected


def one(sequence: list[float], dtype: torch.dtype = torch.float32, **options) -> list[tuple]:
    """Proposals (start, end, score) of one recording with one class."""
    x = torch.tensor(sequence, dtype=dtype).reshape(1, -1, 1)
    return [r[2:] for r in rows(extract_proposals(x, torch.ones(1, 1, dtype=torch.bool), **options))]


def test_score_by_hand():
    sequence = [0.5, 0.25, *[1.0] * 8, 0.0, 0.0, 0.5]  # two snippets on either side
    assert one(sequence, thresholds=[0.6]) == [(2, 10, 1 - 0.75 / 4)]
    sequence = [0.5, *[1.0] * 8, 0.0, 0.0, 0.5]  # only one snippet before
    assert one(sequence, thresholds=[0.6]) == [(1, 9, pytest.approx(1 - 0.5 / 3))]
    assert one(sequence, thresholds=[0.6], outer="mean_of_sides") == [(1, 9, 1 - 0.25)]


@pytest.mark.parametrize("outer", ["pooled", "mean_of_sides"])
@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        ([], []),
        ([0.75], [(0, 1, 0.75)]),
        ([0.5], []),  # strictly above
        ([0.25] * 5, []),
        ([0.75] * 5, [(0, 5, 0.75)]),  # fills the recording: no background
        ([0.75, 0.0, 0.75], [(0, 1, 0.75), (2, 3, 0.75)]),  # equal scores: the earlier first
    ],
    ids=["T=0", "T=1", "at the threshold", "nothing above", "everything above", "tie"],
)
def test_edges(sequence, expected, outer):
    assert one(sequence, thresholds=[0.5], outer=outer) == expected


def test_a_segment_found_twice_is_one_proposal():
    assert one([0.0, 0.9, 0.9, 0.0], thresholds=[0.5, 0.1, 0.3, 0.5], nms_iou=1.0) == [(1, 3, pytest.approx(0.9))]


def test_nms_is_by_class():
    x = torch.tensor([0.0, 0.9, 0.9, 0.0]).reshape(1, 4, 1).expand(1, 4, 2)
    found = extract_proposals(x, torch.ones(1, 2, dtype=torch.bool), thresholds=[0.5])
    assert found.label.tolist() == [0, 1]


def test_nms_removes_at_the_threshold_itself():
    sequence = [0.0, 0.375, 0.375, 1.0, 1.0, 0.0]  # (3, 5) lies in (1, 5): IoU 0.5
    assert [p[:2] for p in one(sequence, thresholds=[0.25, 0.75], nms_iou=0.5)] == [(3, 5)]
    assert [p[:2] for p in one(sequence, thresholds=[0.25, 0.75], nms_iou=0.51)] == [(3, 5), (1, 5)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types(dtype):
    x = torch.rand(2, 30, 3, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = extract_proposals(x, torch.ones(2, 3, dtype=torch.bool), thresholds=PAPER)
    assert [f.dtype for f in found[:4]] == [torch.int64] * 4
    assert found.score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    upcast = extract_proposals(x.double(), torch.ones(2, 3, dtype=torch.bool), thresholds=PAPER)
    torch.testing.assert_close(found.score.double(), upcast.score, rtol=0, atol=1e-6)


def test_a_value_written_as_the_threshold_is_not_above_it():
    assert one([0.1], thresholds=[0.1]) == []  # float32(0.1) > 0.1 in float64


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0)])
def test_empty_batches(shape):
    b, _, c = shape
    found = extract_proposals(torch.zeros(shape), torch.ones(b, c, dtype=torch.bool), thresholds=[0.5])
    assert [len(f) for f in found] == [0] * 5


def test_non_contiguous_input():
    activations, classes, lengths = random_batch(4)
    strided = activations.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    assert rows(extract_proposals(strided, classes, lengths, thresholds=PAPER)) == rows(
        extract_proposals(activations, classes, lengths, thresholds=PAPER)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activations": torch.zeros(2, 5)}, "activations are"),
        ({"activations": torch.zeros(2, 5, 3, dtype=torch.int64)}, "activations are"),
        ({"activations": torch.full((2, 5, 3), float("nan"))}, "recording 0, snippet 0, class 0"),
        ({"classes": torch.ones(2, 3)}, "classes are"),
        ({"classes": torch.ones(3, 2, dtype=torch.bool)}, "classes are"),
        ({"lengths": torch.tensor([5])}, "lengths are"),
        ({"lengths": torch.tensor([5.0, 5.0])}, "lengths are"),
        ({"lengths": torch.tensor([5, 6])}, "0 to T = 5"),
        ({"lengths": torch.tensor([-1, 5])}, "0 to T = 5"),
        ({"thresholds": []}, "thresholds"),
        ({"thresholds": [float("nan")]}, "thresholds"),
        ({"min_length": 0}, "min_length"),
        ({"inflation": -0.1}, "inflation"),
        ({"inflation": float("nan")}, "inflation"),
        ({"outer": "median"}, "outer"),
        ({"nms_iou": 0.0}, "nms_iou"),
        ({"nms_iou": 1.5}, "nms_iou"),
    ],
)
def test_wrong_input_is_refused_in_one_line(change, message):
    good = {"activations": torch.zeros(2, 5, 3), "classes": torch.ones(2, 3, dtype=torch.bool), "thresholds": [0.5]}
    with pytest.raises(InputError, match=message) as error:
        extract_proposals(**{**good, **change})
    assert "\n" not in str(error.value)
