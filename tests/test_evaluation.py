"""mAP and F1: published numbers, cases done by hand, and a slow restatement of both protocols."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2net.data import read_annotations
from d2net.detections import Annotations, Detections, read_detections
from d2net.errors import InputError
from d2net.evaluation import evaluate

PROTOCOLS = ["activitynet", "wtalc"]
REASONS = ["unknown_video", "ambiguous_label", "video_without_segments", "ambiguous_segment"]


def detections(rows, videos=("v", "w"), classes=("a", "b")) -> Detections:
    """Rows (video, label, start, end, score)."""
    x = np.array(rows, np.float64).reshape(-1, 5)
    return Detections(videos, classes, x[:, 0].astype(int), x[:, 1].astype(int), x[:, 2], x[:, 3], score=x[:, 4])


def annotations(rows, videos=("v", "w"), classes=("a", "b"), ambiguous=(), withdrawn=()) -> Annotations:
    """Rows (video, label, start, end)."""
    x = np.array(rows, np.float64).reshape(-1, 4)
    return Annotations(
        videos,
        classes,
        x[:, 0].astype(int),
        x[:, 1].astype(int),
        x[:, 2],
        x[:, 3],
        ambiguous=np.array(ambiguous, np.float64).reshape(-1, 3),
        withdrawn=withdrawn,
    )


@pytest.fixture(scope="module")
def published(shared: Path):
    """The released code's detections on THUMOS14 test (seconds) and the mAP that published evaluators gave them."""
    data = np.load(shared / "oracles" / "release_localization.npz")
    classes = tuple(k.removeprefix("detections_") for k in data if k.startswith("detections_"))
    rows = np.concatenate([np.insert(data[f"detections_{c}"], 1, i, axis=1) for i, c in enumerate(classes)])
    rows[:, 2:4] = rows[:, 2:4] * 16 / 25  # in this order: some IoUs sit on a threshold, to the last bit
    return detections(rows, tuple(map(str, data["video"])), classes), data


def test_published_activitynet_protocol(published, shared):
    found, data = published
    truth = read_annotations(shared / "data" / "thumos14" / "json" / "gt.json", subset="test")
    # The file lacks 2 of the 212 videos; the published evaluator counted detections there as false positives.
    result = evaluate(found, truth, unknown_videos="false_positive")
    np.testing.assert_allclose(result.map, 100 * data["map_activitynet_protocol"], atol=1e-12)
    assert result.coverage.false_positives["unknown_video"] == 35
    with pytest.raises(InputError, match="2 recordings of the detections: 'video_test_0000270', 'video_test_0001496'"):
        evaluate(found, truth)


def test_published_wtalc_protocol(published, shared):
    found, data = published
    truth = read_annotations(shared / "data" / "thumos14" / "wtalc", subset="test", trust_pickle=True)
    result = evaluate(found, truth, "wtalc", tiou=(0.1, 0.2, 0.3, 0.4, 0.5))
    np.testing.assert_allclose(result.map, data["map_wtalc"], atol=1e-12)
    assert result.average == pytest.approx(data["map_wtalc"].mean(), abs=1e-12)
    coverage = result.coverage
    assert (coverage.recordings, coverage.judged, coverage.ambiguous_segments) == (212, 212, 96)
    # Their segments are no ground truth any more, but the published evaluator counts detections there.
    assert coverage.without_segments == ("video_test_0000270", "video_test_0001496")
    assert coverage.false_positives["video_without_segments"] == 35 and not any(coverage.dropped.values())
    strict = evaluate(found, replace(truth, withdrawn=()), "wtalc", tiou=(0.5,))
    assert strict.coverage.dropped["video_without_segments"] == 35 and strict.map[0] > result.map[-1] + 0.3


def test_by_hand():
    truth = annotations([(0, 0, 0, 10), (0, 0, 20, 30), (1, 1, 0, 10)])
    found = detections(
        [(0, 0, 20, 30, 0.5), (0, 0, 50, 60, 0.7), (0, 0, 0, 8, 0.9), (0, 0, 0, 10, 0.1)]  # TP, FP, TP at 0.8, FP
    )
    result = evaluate(found, truth, tiou=(0.5, 0.8, 0.9))
    # a at 0.5 and 0.8: precision 1, then 2/3. At 0.9 the hits are ranks 3 and 4: envelope 2/4 at both steps.
    assert result.per_class["a"] == pytest.approx([100 * 5 / 6, 100 * 5 / 6, 50])
    assert result.per_class["b"] == [0, 0, 0]
    np.testing.assert_allclose(result.map, [100 * 5 / 12, 100 * 5 / 12, 25])
    assert result.f1 == pytest.approx(100 * 2 * 2 / (2 * 2 + 2 + 1))
    assert result.average == pytest.approx(result.map.mean())


def test_second_best_ground_truth_is_taken():
    """The better detection of two comes second: it takes what is left and still reaches the IoU."""
    truth = annotations([(0, 0, 0, 10), (0, 0, 2, 12)])
    found = detections([(0, 0, 0, 10, 0.9), (0, 0, 0, 10, 0.8)])
    assert evaluate(found, truth, tiou=[0.6]).map == pytest.approx([100])
    assert evaluate(found, truth, tiou=[0.7]).map == pytest.approx([50])


def test_protocols_differ_in_whom_a_detection_takes():
    """First in order (wtalc) against highest IoU (activitynet); 0.64 s are one snippet."""
    s = 0.64
    truth = annotations([(0, 0, 0, 8 * s), (0, 0, 2 * s, 10 * s)])
    # The first detection equals the second truth; the other reaches only the first truth.
    found = detections([(0, 0, 2 * s, 10 * s, 0.9), (0, 0, 0, 5 * s, 0.8)])
    assert evaluate(found, truth, "activitynet", [0.6]).map == pytest.approx([100])
    assert evaluate(found, truth, "wtalc", [0.6]).map == pytest.approx([50])


def test_wtalc_rounds_to_snippets():
    truth = annotations([(0, 0, 0, 64.0)])  # snippets 0 … 99
    found = detections([(0, 0, 0.3, 63.8, 0.9)])  # 0.47 and 99.69: the same range
    assert evaluate(found, truth, "wtalc", [1.0]).map == pytest.approx([100])
    assert evaluate(found, truth, "activitynet", [1.0]).map == pytest.approx([0])


@dataclass(frozen=True)
class Case:
    """A row of the table in docs/evaluation.md: mAP at the IoU, or the error, of each protocol."""

    found: list[tuple]
    activitynet: float | str
    wtalc: float | str
    truth: tuple[tuple, ...] = ((0, 0, 0, 64),)
    names: dict[str, Any] = field(default_factory=dict)  # of the detections
    marks: dict[str, Any] = field(default_factory=dict)  # of the annotations
    options: dict[str, Any] = field(default_factory=dict)
    coverage: dict[str, Any] = field(default_factory=dict)
    says: str = ""  # what one of the printed lines holds


HIT, MISS = (0, 0, 0, 64, 0.5), (0, 0, 128, 192, 0.9)  # whole snippets, so that the protocols agree on times
ELSEWHERE = (1, 0, 0, 64, 0.9)  # in the other video
CASES = {
    "recording missing from the results": Case(
        [(0, 0, 0, 64, 0.5)], 50, 50, ((0, 0, 0, 64), (1, 0, 0, 64)), names={"videos": ("v",)},
        coverage={"unlisted": ("w",), "without_detections": ("w",)},
        says="not listed in the detections: 1 of 2 recordings ('w'); their segments are missed",
    ),
    "recording with an empty list": Case(
        [(0, 0, 0, 64, 0.5)], 50, 50, ((0, 0, 0, 64), (1, 0, 0, 64)),
        coverage={"unlisted": (), "without_detections": ("w",)},
        says="listed without a detection: 1 of 2 recordings ('w')",
    ),
    "recording without segments": Case(
        [ELSEWHERE, HIT], 50, 100, coverage={"without_segments": ("w",), "detections": 2},
        says="without a segment: 1 recording ('w'); detections there: 1 ",
    ),
    "recording of withdrawn segments": Case(
        [ELSEWHERE, HIT], 50, 50, marks={"withdrawn": ("w",)}, coverage={"without_segments": ("w",), "judged": 2},
        says="without a segment: 1 recording ('w'); detections there: 1 as false positives",
    ),
    "recording not in the annotations": Case(
        [ELSEWHERE, HIT],
        "1 recording of the detections: 'w'",
        "1 recording of the detections: 'w'",
        marks={"videos": ("v",)},
    ),
    "the same, ignored": Case(
        [ELSEWHERE, HIT], 100, 100, marks={"videos": ("v",)}, options={"unknown_videos": "ignore"},
        says="in recordings that the annotations do not list: 1 detection dropped",
    ),
    "the same, as false positives": Case(
        [ELSEWHERE, HIT], 50, 50, marks={"videos": ("v",)}, options={"unknown_videos": "false_positive"},
        says="in recordings that the annotations do not list: 1 detection as false positives",
    ),
    "class without ground truth": Case(
        [HIT, (0, 1, 0, 64, 0.9)], 100, 100, coverage={"classes": 1, "classes_without_segments": ("b",)},
        says="without ground truth, not in the mean: 1 class ('b')",
    ),
    "class without detections": Case(
        [HIT], 50, 50, ((0, 0, 0, 64), (1, 1, 0, 64)), coverage={"classes_without_detections": ("b",)},
        says="without a detection, AP 0 in the mean: 1 class ('b')",
    ),
    "class unknown to the annotations": Case(
        [HIT, (0, 1, 0, 64, 0.9)], "1 class of the detections: 'b'", "1 class of the detections: 'b'",
        marks={"classes": ("a",)},
    ),
    "ambiguous segment": Case(
        [HIT, (0, 1, 128, 192, 0.9), (0, 0, 128, 192, 0.9)], 50, 100, marks={"ambiguous": [(0, 190, 200)]},
        coverage={"ambiguous_segments": 1}, says="ambiguous segments: 1; ",
    ),
    "detection labelled Ambiguous": Case(
        [HIT, (0, 1, 0, 64, 0.9)], 100, 100, names={"classes": ("a", "aMBIguous")}, marks={"classes": ("a",)},
        coverage={"detections": 2}, says="labelled 'Ambiguous', which is a mark and no class: 1 detection dropped",
    ),
    "detection past the end": Case([(0, 0, 0, 96, 0.5)], 0, 0, options={"tiou": [0.7]}),
    "segment without length": Case([(0, 0, 64, 64, 0.9), HIT], 25, 25, ((0, 0, 0, 64), (0, 0, 64, 64))),
    "equal scores": Case([(0, 0, 128, 192, 0.5), HIT], 100, 100),
    "duplicate": Case([HIT, HIT, (1, 0, 0, 64, 0.4)], 250 / 3, 250 / 3, ((0, 0, 0, 64), (1, 0, 0, 64))),
    "no detection": Case([], 0, 0, coverage={"detections": 0}, says="THERE IS NO DETECTION TO JUDGE"),
    "no detection left": Case(
        [(0, 0, 0, 64, 0.9)], "no detection is left to judge, all 1 are dropped: 1 labelled 'Ambiguous'",
        "no detection is left to judge", names={"classes": ("ambiguous",)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", CASES)
def test_table(name, protocol):
    case = CASES[name]
    found, truth = detections(case.found, **case.names), annotations(case.truth, **case.marks)
    options = {"tiou": [0.5], **case.options}
    expected = getattr(case, protocol)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=re.escape(expected)) as error:
            evaluate(found, truth, protocol, **options)
        assert "\n" not in str(error.value)
        return
    result = evaluate(found, truth, protocol, **options)
    assert result.map == pytest.approx([expected])
    for key, value in case.coverage.items():
        assert getattr(result.coverage, key) == value, key
    assert any(case.says in line for line in result.coverage.lines()), result.coverage.lines()


def test_document_has_every_case():
    """The first column of the table in docs/evaluation.md is the list above."""
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = text.split("| |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == list(CASES)


def test_wtalc_drops_what_touches_an_ambiguous_segment():
    """Of any class; in no other video."""
    hit, touching, other_video = (0, 0, 0, 64, 0.5), (0, 0, 70, 81, 0.9), (1, 0, 70, 81, 0.9)
    truth = annotations([(0, 0, 0, 64), (1, 0, 0, 64)], ambiguous=[(0, 80, 90)])
    result = evaluate(detections([hit, touching, other_video]), truth, "wtalc", [0.5])
    assert result.map == pytest.approx([25])  # the second of two
    assert result.coverage.dropped == {**dict.fromkeys(REASONS, 0), "ambiguous_segment": 1}
    assert "ambiguous segments: 1; 1 detection touching one dropped" in result.coverage.lines()
    # What a model found may all touch one: that is a score of 0, not a mistake of whoever asks.
    result = evaluate(detections([touching]), truth, "wtalc", [0.5])
    assert result.map.tolist() == [0] and "THERE IS NO DETECTION TO JUDGE" in result.coverage.lines()[0]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 0, 0, 64, 0.5), (0, 0, 64, 128, 0.5)),  # by start
        ((0, 0, 0, 64, 0.5), (0, 0, 0, 640, 0.5)),  # then by end
        ((0, 0, 0, 64, 0.5), (1, 0, 0, 6.4, 0.5)),  # the recording's name before both
    ],
)
def test_equal_scores(first, second, protocol):
    """A hit and a miss: AP says which came first, whatever the order of the file."""
    for videos, expected in ((("v", "w"), 50), (("w", "v"), 50 if first[0] == second[0] else 25)):
        truth = annotations([(0, 0, 0, 64), (1, 0, 640, 700)], videos=videos)
        for rows in ([first, second], [second, first]):
            assert evaluate(detections(rows, videos=videos), truth, protocol, [0.5]).map == pytest.approx([expected])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("unknown_videos", ["ignore", "false_positive"])
def test_the_order_of_the_files_says_nothing(protocol, unknown_videos):
    """Quantized scores and a coarse grid of times, so that nearly everything is tied."""
    rng = np.random.default_rng(5)
    videos, classes = tuple(f"v{i}" for i in rng.permutation(12)), ("a", "b", "c")

    def rows(n, *more):
        start = rng.integers(0, 40, n) / 2
        return np.stack(
            [rng.integers(0, 12, n), rng.integers(0, 3, n), start, start + rng.integers(1, 12, n), *more], 1
        )

    found, truth = rows(900, rng.integers(1, 4, 900) / 4), rows(90)[rng.random(90) < 0.8]
    truth = truth[truth[:, 0] > 1]  # two recordings without a segment

    def shuffled(names, table):
        """The same, with rows and names in another order."""
        order = rng.permutation(len(names))
        table = table[rng.permutation(len(table))].copy()
        table[:, 0] = np.argsort(order)[table[:, 0].astype(int)]
        return table, tuple(names[i] for i in order)

    def judged():
        its, there = shuffled(videos, found)
        marks = np.array([(4.0, 3, 5), (5.0, 0, 2)])
        known = videos[:11]  # detections are in one more
        ours, listed = shuffled(known, truth[truth[:, 0] < 11])
        marks[:, 0] = [listed.index(known[int(v)]) for v in marks[:, 0]]
        ours = annotations(ours, listed, classes, ambiguous=marks[rng.permutation(2)])
        result = evaluate(detections(its, there, classes), ours, protocol, unknown_videos=unknown_videos)
        return json.dumps(result.to_json()), result.coverage.lines()

    first = judged()
    assert not any("every number is 0" in line for line in first[1])
    for _ in range(10):
        assert judged() == first


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_files_in_another_order(tmp_path, protocol):
    """Annotations and detections as JSON: recordings, segments and detections shuffled."""
    rng = np.random.default_rng(3)

    def entries(n, scored):
        for _ in range(n):
            start = int(rng.integers(0, 20))
            row = {"label": str(rng.choice(["b", "a"])), "segment": [start, start + int(rng.integers(1, 9))]}
            yield row | ({"score": int(rng.integers(1, 3)) / 2} if scored else {})

    found = {f"v{i}": list(entries(30, True)) for i in range(6)}
    truth = {f"v{i}": {"subset": "test", "annotations": list(entries(6, False))} for i in range(6)}

    def judged():
        for rows in (*found.values(), *(entry["annotations"] for entry in truth.values())):
            rng.shuffle(rows)
        results = {v: found[v] for v in rng.permutation(list(found)).tolist()}
        database = {v: truth[v] for v in rng.permutation(list(truth)).tolist()}
        (tmp_path / "found.json").write_text(json.dumps({"results": results}))
        (tmp_path / "gt.json").write_text(json.dumps({"database": database}))
        there = read_annotations(tmp_path / "gt.json")
        return json.dumps(evaluate(read_detections(tmp_path / "found.json"), there, protocol).to_json())

    assert len({judged() for _ in range(8)}) == 1


def test_wtalc_offers_ground_truth_in_the_order_of_its_files():
    """By time where there is no such order; 0.64 s are one snippet."""
    s = 0.64
    first, second = (0, 0, 0, 8 * s), (0, 0, 2 * s, 10 * s)
    found = detections([(0, 0, 2 * s, 8 * s, 0.9), (0, 0, 0, 5 * s, 0.8)])  # both truths; the first alone
    truth = annotations([second, first])
    assert evaluate(found, truth, "wtalc", [0.6]).map == pytest.approx([50])
    by_file = replace(truth, rank=np.array([0, 1]))
    assert evaluate(found, by_file, "wtalc", [0.6]).map == pytest.approx([100])
    assert evaluate(found, by_file, "activitynet", [0.6]) == evaluate(found, truth, "activitynet", [0.6])


def test_class_without_ground_truth_counts_in_f1():
    result = evaluate(detections([(0, 0, 0, 10, 0.5), (0, 1, 0, 10, 0.5)]), annotations([(0, 0, 0, 10)]))
    assert result.f1 == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_detections(protocol):
    result = evaluate(detections([], videos=(), classes=()), annotations([(0, 0, 0, 10)]), protocol, [0.1, 0.5])
    assert result.map.tolist() == [0, 0]
    assert (result.average, result.f1, result.per_class) == (0, 0, {"a": [0, 0]})
    assert "every number is 0" in result.coverage.lines()[0]


def test_full_coverage_is_one_line():
    truth = annotations([(0, 0, 0, 10), (1, 1, 0, 10)])
    result = evaluate(detections([(0, 0, 0, 10, 0.5), (1, 1, 0, 10, 0.5)]), truth)
    assert result.coverage.lines() == ["judged: 2 detections against 2 recordings, 2 classes with ground truth"]


def test_long_lists_of_names_are_cut():
    names = tuple(f"v{i}" for i in range(9))
    truth = annotations([(i, 0, 0, 10) for i in range(9)], videos=names)
    lines = evaluate(detections([(0, 0, 0, 10, 0.5)], videos=("v4",)), truth).coverage.lines()
    assert "not listed in the detections: 8 of 9 recordings ('v0', 'v1', 'v2' and 5 more); their segments" in lines[1]


def test_names_join_whatever_their_order():
    truth = annotations([(0, 0, 0, 10), (1, 1, 0, 10)])
    found = detections([(1, 1, 0, 10, 0.5), (0, 0, 0, 10, 0.5)], videos=("w", "v"), classes=("b", "a"))
    assert evaluate(found, truth).average == pytest.approx(100)


UNKNOWN = {
    "v_a": "the detections name 'v_a', the annotations 'a' (2 of 3 differ like that: rename",
    "a.mp4": "the detections name 'a.mp4', the annotations 'a' (2 of 3",
    "A": "the detections name 'A', the annotations 'a' (2 of 3",
}


@pytest.mark.parametrize("unknown_videos", ["error", "ignore"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_names_that_differ_systematically(name, unknown_videos):
    truth = annotations([(0, 0, 0, 10)], videos=("a", "b"))
    videos = (name, name.replace("a", "b").replace("A", "B"), "elsewhere")
    found = detections([(i, 0, 0, 10, 0.9) for i in range(3)], videos=videos)
    with pytest.raises(InputError, match=re.escape(UNKNOWN[name])) as error:
        evaluate(found, truth, unknown_videos=unknown_videos)
    assert "--ignore-unknown-videos" in str(error.value) and "unknown_videos='ignore'" in str(error.value)


def test_names_in_the_annotations_with_a_suffix():
    truth, found = annotations([(0, 0, 0, 10)], videos=("a.mp4",)), detections([(0, 0, 0, 10, 0.9)], videos=("a",))
    with pytest.raises(InputError, match=r"the detections name 'a', the annotations 'a\.mp4' \(1 of 1"):
        evaluate(found, truth)


@pytest.mark.parametrize(
    ("name", "other"), [("clip.left", "clip.right"), ("take_1_23", "take_12_3"), ("video_1", "video_2")]
)
def test_names_that_only_look_alike(name, other):
    with pytest.raises(InputError, match="the annotations do not list 1 recording") as error:
        evaluate(detections([(0, 0, 0, 10, 0.9)], videos=(name,)), annotations([(0, 0, 0, 10)], videos=(other,)))
    assert "rename" not in str(error.value)


@pytest.mark.parametrize(("have", "want"), [("v_", ""), ("", "v_")])
@pytest.mark.parametrize("unknown_videos", ["error", "ignore", "false_positive"])
def test_the_prefix_of_activitynets_files(have, want, unknown_videos):
    """Where it explains all names it is taken, and said."""
    truth = annotations([(0, 0, 0, 10), (1, 0, 0, 10)], videos=(f"{want}x", f"{want}y"))
    found = detections([(0, 0, 0, 10, 0.9)], videos=(f"{have}x", f"{have}y"))
    result = evaluate(found, truth, tiou=[0.5], unknown_videos=unknown_videos)
    assert result.map == pytest.approx([50]) and result.coverage.unlisted == ()
    assert result.coverage.renamed == f"with{'' if want else 'out'} the prefix 'v_'"
    assert any(f"known only with{'' if want else 'out'} the prefix 'v_'" in line for line in result.coverage.lines())


def test_exact_names_win_over_the_prefix():
    truth = annotations([(0, 0, 0, 10)], videos=("x", "v_x"))
    result = evaluate(detections([(0, 0, 0, 10, 0.9)], videos=("v_x",)), truth, tiou=[0.5])
    assert result.map.tolist() == [0] and result.coverage.renamed == ""
    # One known name, though without a detection, says that the names are as they should be.
    truth, found = (
        annotations([(0, 0, 0, 10)], videos=("x", "y")),
        detections([(0, 0, 0, 10, 0.9)], videos=("v_x", "y")),
    )
    with pytest.raises(InputError, match="1 recording of the detections: 'v_x'"):
        evaluate(found, truth)


@pytest.mark.parametrize(
    ("label", "hint"),
    [
        ("High Jump", "'High Jump' (is 'HighJump' in the annotations: rename it)"),
        ("high_jump", "'high_jump' (is 'HighJump' in the annotations: rename it)"),
        ("HighJumb", "'HighJumb' (did you mean 'HighJump'?)"),
        ("7", "'7'; they have 'HighJump'"),
    ],
)
def test_unknown_classes(label, hint):
    truth, found = annotations([(0, 0, 0, 1)], classes=("HighJump",)), detections([(0, 0, 0, 1, 1)], classes=(label,))
    with pytest.raises(InputError, match=re.escape(hint)):
        evaluate(found, truth)


def test_unknown_classes_in_dropped_videos_do_not_matter():
    truth = annotations([(0, 0, 0, 10)], videos=("v",), classes=("a",))
    found = detections([(1, 1, 0, 10, 0.9), (0, 0, 0, 10, 0.5)])
    assert evaluate(found, truth, tiou=[0.5], unknown_videos="ignore").map == pytest.approx([100])


@pytest.mark.parametrize(
    ("found", "protocol", "reason"),
    [
        (
            [(1, 0, 0, 10, 1)] * 2,
            "wtalc",
            "all 2 are dropped: 2 in recordings without a segment, which the wtalc protocol",
        ),
        ([(2, 0, 0, 10, 1)], "activitynet", "1 in recordings that the annotations do not list"),
        ([(1, 0, 0, 10, 1), (2, 0, 0, 10, 1)], "wtalc", "all 2 are dropped: 1 in recordings that the annotations"),
        ([(0, 1, 0, 10, 1)], "wtalc", "1 labelled 'Ambiguous', which is a mark and no class"),
    ],
)
def test_nothing_left(found, protocol, reason):
    truth = annotations([(0, 0, 0, 10)], classes=("a",))
    found = detections(found, videos=("v", "w", "elsewhere"), classes=("a", "Ambiguous "))
    with pytest.raises(InputError, match=f"no detection is left to judge.*{re.escape(reason)}") as error:
        evaluate(found, truth, protocol, unknown_videos="ignore")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("found", "truth", "options", "message"),
    [
        ([(0, 1, 0, 1, 1)], [(0, 0, 0, 1)], {}, "1 class of the detections: 'b'; they have 'a'$"),
        ([(0, 0, 0, 1, np.nan)], [(0, 0, 0, 1)], {}, "detection 0, in 'v'.*finite"),
        ([(0, 0, 2, 1, 1)], [(0, 0, 0, 1)], {}, "end not before the start"),
        ([], [(0, 0, 0, np.inf)], {}, "annotation 0, in 'v'.*finite"),
        ([(0, 0, -1e308, 1e308, 1)], [(0, 0, 0, 1)], {}, "detection 0, in 'v'.*times within 1e\\+300"),
        ([], [], {}, "no segment"),
        ([], [(0, 0, 0, 1)], {"protocol": "thumos"}, "choose activitynet or wtalc"),
        ([], [(0, 0, 0, 1)], {"tiou": []}, "at least one"),
        ([], [(0, 0, 0, 1)], {"tiou": [0.0]}, "above 0"),
        ([], [(0, 0, 0, 1)], {"f1_tiou": 50}, "up to 1"),
        ([], [(0, 0, 0, 1)], {"unknown_videos": "drop"}, "choose error, ignore, false_positive"),
    ],
)
def test_errors(found, truth, options, message):
    with pytest.raises(InputError, match=message) as error:
        evaluate(detections(found), annotations(truth, classes=("a",)), **options)
    assert "\n" not in str(error.value)


def test_to_json():
    truth = annotations([(0, 0, 0, 10)], ambiguous=[(1, 2, 3)])
    result = evaluate(detections([(0, 0, 0, 10, 0.5)]), truth, tiou=(0.5, 0.55))
    assert json.loads(json.dumps(result.to_json())) == {
        "protocol": "activitynet",
        "map": {"0.5": 100, "0.55": 100},
        "average": 100,
        "averages": {},
        "f1": 100,
        "per_class": {"a": [100, 100]},
        "coverage": {
            "protocol": "activitynet",
            "recordings": 2,
            "without_segments": ["w"],
            "judged": 2,
            "without_detections": ["w"],
            "unlisted": [],
            "renamed": "",
            "detections": 1,
            "dropped": dict.fromkeys(REASONS, 0),
            "false_positives": dict.fromkeys(REASONS, 0),
            "classes": 1,
            "classes_without_segments": ["b"],
            "classes_without_detections": [],
            "ambiguous_segments": 1,
            "outside_mean": 0,
        },
    }


def test_ambiguous_is_no_class_of_the_annotations():
    with pytest.raises(InputError, match="class 'Ambiguous', which is a mark"):
        evaluate(detections([]), annotations([(0, 0, 0, 1)], classes=("a", "Ambiguous")))


def slow(found: Detections, truth: Annotations, protocol: str, tiou: float) -> tuple[dict[int, float], float]:
    """AP of each class and F1, in percent, as the protocols are told: one detection after the other."""

    def time(seconds):
        return round(seconds * 25 / 16) if protocol == "wtalc" else seconds

    def iou(a, b):
        shared = max(0, min(a[1], b[1]) - max(a[0], b[0]))
        return shared / ((a[1] - a[0]) + (b[1] - b[0]) - shared) if shared else 0

    ap, hits, retained = {}, 0, 0
    for c in range(len(truth.classes)):
        free = [
            (truth.video[j], (time(float(truth.start[j])), time(float(truth.end[j]))))
            for j in range(len(truth))
            if truth.label[j] == c
        ]
        free.sort()  # by recording and time
        positives, flags = len(free), []
        names = [found.videos[v] for v in found.video]
        ranked = sorted(
            np.nonzero(found.label == c)[0], key=lambda i: (-found.score[i], names[i], found.start[i], found.end[i])
        )
        for i in ranked:
            segment = (time(float(found.start[i])), time(float(found.end[i])))
            if protocol == "wtalc" and (
                found.video[i] not in truth.video
                or any(
                    v == found.video[i] and iou(segment, (time(float(s)), time(float(e)))) > 0
                    for v, s, e in truth.ambiguous
                )
            ):
                continue
            options = [(iou(segment, s), j) for j, (v, s) in enumerate(free) if v == found.video[i]]
            options = [o for o in options if o[0] >= tiou]
            flags.append(bool(options))
            if options:
                free.pop(options[0][1] if protocol == "wtalc" else max(options)[1])
        precision = np.cumsum(flags) / np.arange(1, len(flags) + 1)
        ap[c] = 100 * sum(precision[k:].max() for k, hit in enumerate(flags) if hit) / positives if positives else None
        hits += sum(flags)
        retained += len(flags)
    return ap, 100 * 2 * hits / (retained + len(truth))


# Times on a coarse grid make equal IoUs, touching and empty segments common.
segment = st.tuples(st.integers(0, 24), st.integers(0, 12)).map(lambda x: (x[0] / 2, (x[0] + x[1]) / 2))
row = st.tuples(st.integers(0, 1), st.integers(0, 1), segment)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(row, st.integers(0, 5)), max_size=25),
    st.lists(row, min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 1), segment), max_size=2),
    st.sampled_from(["activitynet", "wtalc"]),
    st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]),
)
def test_equals_the_slow_restatement(found_rows, truth_rows, ambiguous, protocol, tiou):
    found = detections([(v, c, *s, score) for (v, c, s), score in found_rows])
    truth = annotations([(v, c, *s) for v, c, s in truth_rows], ambiguous=[(v, *s) for v, s in ambiguous])
    if protocol == "wtalc" and len(found) and not np.isin(found.video, truth.video).any():
        with pytest.raises(InputError, match="no detection is left to judge"):
            evaluate(found, truth, protocol, tiou=(tiou,), f1_tiou=tiou)
        return
    result = evaluate(found, truth, protocol, tiou=(tiou,), f1_tiou=tiou)
    ap, f1 = slow(found, truth, protocol, tiou)
    assert result.per_class == {truth.classes[c]: [pytest.approx(x)] for c, x in ap.items() if x is not None}
    assert result.f1 == pytest.approx(f1)
