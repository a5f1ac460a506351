"""From TCAMs to detections."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import d2net
from d2net.checkpoint import load_model
from d2net.data import read_annotations
from d2net.data.dataset import Dataset, Recording
from d2net.detections import Detections
from d2net.errors import InputError
from d2net.evaluation import evaluate
from d2net.localization import Localizer, localize, of_dataset, predict, propose, to_detections
from d2net.localization import network as network_module
from d2net.model import D2Net
from d2net.ops.proposals import Proposals, extract_proposals
from d2net.recipes import LocalizationRecipe, Recipe, load_recipe
from d2net.threads import multiply_adds

# Coarse numbers, so that the cases below can be done by hand: k = ceil(8 / 4) = 2.
RECIPE = LocalizationRecipe(topk_divisor=4, thresholds=(0.25, 0.75), nms_iou=0.5, score_floor=0.1)
TCAM = torch.tensor(
    [  # class 0    1     2       p = 1.0, 0.625, 0.5
        [0.0, 0.0, 0.5],
        [0.5, 0.0, 0.5],
        [1.0, 0.75, 0.5],
        [1.0, 0.5, 0.5],
        [0.5, 0.0, 0.5],
        [0.0, 0.0, 0.5],
        [0.375, 0.0, 0.5],
        [0.125, 0.0, 0.5],
    ]
)


def rows(proposals: Proposals) -> list[tuple]:
    return list(zip(*(x.tolist() for x in proposals), strict=True))


def test_by_hand():
    # Class 2 is out: p = 0.5 is not above half of the best. Class 0 at 0.25: (1, 5) with 0.75 - 0 and (6, 7) with
    # 0.375 - 0.125 / 2; at 0.75: (2, 4) with 1 - 0.5, which NMS removes (IoU 0.5 with (1, 5)).
    assert rows(Localizer(RECIPE)(TCAM)) == [
        (0, 0, 1, 5, 0.75),
        (0, 0, 6, 7, 0.3125),
        (0, 1, 2, 4, 0.625),
    ]


def test_attention_refines_but_does_not_choose_classes():
    attention = torch.ones(8)
    attention[6:] = 0  # r_0 loses (6, 7)
    attention[2:4] = 0.5  # r_0 is 0.5 in all of (1, 5), r_1 0.375 and 0.25
    assert rows(Localizer(RECIPE)(TCAM, attention)) == [(0, 0, 1, 5, 0.5), (0, 1, 2, 3, 0.25)]
    plain = replace(RECIPE, attention=False)
    assert rows(Localizer(plain)(TCAM, attention)) == rows(Localizer(RECIPE)(TCAM))


def test_score_floor_is_a_share_of_the_recordings_best_and_strict():
    best = 0.75
    for floor, kept in ((0.3125 / best - 1e-6, 3), (0.5, 2), (0.9, 1)):
        assert len(Localizer(replace(RECIPE, score_floor=floor))(TCAM).score) == kept
    equal = torch.tensor([[0.0, 0.5, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]).T  # S = 0.5 is not above 0.5 * 1
    assert rows(Localizer(replace(RECIPE, score_floor=0.5))(equal)) == [(0, 0, 4, 5, 1.0)]


def test_a_batch_equals_its_recordings_whatever_lies_past_their_lengths():
    generator = torch.Generator().manual_seed(0)
    tcam = torch.randint(0, 65, (4, 50, 3), generator=generator) / 64
    attention = torch.randint(0, 9, (4, 50), generator=generator) / 8
    lengths = torch.tensor([50, 0, 1, 33])
    expected = []
    for b, length in enumerate(lengths.tolist()):
        alone = Localizer(LocalizationRecipe())(tcam[b, :length], attention[b, :length])
        expected += [(b, *r[1:]) for r in rows(alone)]
        tcam[b, length:] = float("nan")
        attention[b, length:] = float("inf")
    assert rows(Localizer(LocalizationRecipe())(tcam, attention, lengths)) == expected
    assert {r[0] for r in expected} == {0, 2, 3}


def in_rows(x: torch.Tensor, lengths: list[int], gaps: list[int], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The recordings of ``x`` (B, T, ...) one after another, NaN in all other rows, and where each begins."""
    ends = torch.tensor([2, *(n + gap for n, gap in zip(lengths, gaps, strict=True))]).cumsum(0)
    packed = torch.full((rows, *x.shape[2:]), float("nan"))
    for recording, first, n in zip(x, ends.tolist(), lengths, strict=False):
        packed[first : first + n] = recording[:n]
    return packed, ends


@pytest.mark.parametrize("recipe", ["thumos14-paper", "thumos14-release", "activitynet12-release"])
@pytest.mark.parametrize("gaps", [[0, 0, 0, 0, 0], [2, 0, 3, 1, 4]])
def test_a_packed_batch_equals_its_recordings(recipe, gaps):
    generator = torch.Generator().manual_seed(1)
    lengths = [50, 0, 1, 33, 7]
    tcam, attention = torch.rand(5, 50, 4, generator=generator) ** 0.7, torch.rand(5, 50, generator=generator)
    localizer = Localizer.from_recipe(recipe)
    expected = []
    for b, n in enumerate(lengths):
        expected += [(b, *r[1:]) for r in rows(localizer(tcam[b, :n], attention[b, :n]))]
    packed_tcam, offsets = in_rows(tcam, lengths, gaps, sum(lengths) + sum(gaps) + 8)
    packed_attention, _ = in_rows(attention, lengths, gaps, len(packed_tcam))
    given = None if sum(gaps) == 0 else torch.tensor(lengths)
    for max_length in (None, 50, 60):
        found = localizer(packed_tcam, packed_attention, given, offsets=offsets, max_length=max_length)
        assert rows(found) == expected
    refined, classes = packed_tcam * packed_attention[:, None], torch.ones(5, 4, dtype=torch.bool)
    settings = {"thresholds": (0.2, 0.4, 0.6)}
    found = extract_proposals(refined, classes, given, **settings, offsets=offsets)
    each = [
        extract_proposals((tcam * attention[..., None])[b : b + 1, :n], classes[:1], **settings)
        for b, n in enumerate(lengths)
    ]
    assert rows(found) == [(b, *r[1:]) for b, proposals in enumerate(each) for r in rows(proposals)]
    assert {r[0] for r in expected} >= {0, 3}


@pytest.mark.parametrize("count", [0, 1])
def test_packed_batches_of_nothing(count):
    offsets = torch.zeros(count + 1, dtype=torch.int64)
    assert rows(Localizer(RECIPE)(torch.full((5, 3), float("nan")), torch.ones(5), offsets=offsets)) == []
    assert rows(extract_proposals(torch.ones(0, 3), torch.ones(count, 3) > 0, thresholds=[0.5], offsets=offsets)) == []


@pytest.mark.parametrize(
    ("tcam", "attention", "lengths", "offsets", "max_length", "message"),
    [
        ((8, 3), (8,), [4, 5], [0, 4, 8], None, r"recording 1 has 5 snippets and lies in rows 4 to 8 of 8; .*offsets"),
        ((8, 3), (8,), [-1, 4], [0, 4, 8], None, "recording 0 has -1 snippets"),
        ((8, 3), (8,), None, [0, 4, 9], None, r"offsets\[2\] is 9, past the 8 rows"),
        ((8, 3), (8,), [4, 4], [0, 4, 8], 3, "max_length is 3, but a recording has 4 snippets"),
        ((8, 3), (8,), [4, 4], None, 4, "max_length is given without offsets"),
        ((8, 3), (8,), [4], [0, 4, 8], None, r"lengths has shape \(1,\)"),
        ((8, 3), (7,), None, [0, 4, 8], None, r"attention has shape \(7,\), expected one value a row, \(8,\)"),
        ((1, 8, 3), (1, 8), None, [0, 4, 8], None, r"tcam has shape \(1, 8, 3\), expected \(N, C\) with offsets"),
    ],
)
def test_a_packing_that_does_not_fit_is_refused_in_one_line(tcam, attention, lengths, offsets, max_length, message):
    with pytest.raises(InputError, match=message) as error:
        Localizer(RECIPE)(torch.ones(tcam), torch.ones(attention), lengths, offsets=offsets, max_length=max_length)
    assert "\n" not in str(error.value)


def test_what_is_not_finite_in_a_packed_batch_is_named_by_its_recording():
    tcam, attention = torch.rand(9, 3), torch.ones(9)
    tcam[6, 1] = float("nan")
    with pytest.raises(InputError, match="tcam holds NaN or Inf .first in recording 1, snippet 2"):
        Localizer(RECIPE)(tcam, attention, [4, 4], offsets=[0, 4, 9])


@pytest.mark.parametrize("shape", [(0, 8, 3), (2, 0, 3), (2, 8, 0), (0, 3)])
def test_empty_batches(shape):
    assert [len(x) for x in Localizer(RECIPE)(torch.zeros(shape))] == [0] * 5


def test_nothing_to_find():
    assert len(Localizer(RECIPE)(torch.zeros(8, 3)).score) == 0
    assert len(Localizer(replace(RECIPE, thresholds=(-0.5,)))(torch.full((8, 1), -0.25)).score) == 0


@pytest.mark.parametrize(
    ("tcam", "attention", "lengths", "message"),
    [
        (torch.zeros(8), None, None, "tcam is"),
        (torch.zeros(8, 3, dtype=torch.int64), None, None, "tcam is"),
        (torch.full((8, 3), float("nan")), None, None, "tcam holds NaN or Inf .first in recording 0, snippet 0"),
        (torch.zeros(8, 3), torch.full((8,), float("inf")), None, "attention holds NaN or Inf"),
        (torch.zeros(8, 3), torch.ones(7), None, "attention has shape"),
        (torch.zeros(2, 8, 3), torch.ones(8), None, "attention has shape"),
        (torch.zeros(2, 8, 3), None, torch.tensor([8]), "lengths have shape"),
    ],
)
def test_wrong_input_is_refused_in_one_line(tcam, attention, lengths, message):
    with pytest.raises(InputError, match=message) as error:
        Localizer(RECIPE)(tcam, attention, lengths)
    assert "\n" not in str(error.value)


def test_from_recipe():
    assert Localizer.from_recipe("thumos14-paper").recipe == load_recipe("thumos14-paper").localization
    changed = Localizer.from_recipe("thumos14-paper", nms_iou=0.3, thresholds=(0.1, 0.2)).recipe
    assert (changed.nms_iou, changed.thresholds) == (0.3, (0.1, 0.2))
    with pytest.raises(InputError, match="did you mean 'nms_iou'"):
        Localizer.from_recipe("thumos14-paper", nms_iuo=0.3)
    with pytest.raises(InputError, match="score_floor"):
        Localizer.from_recipe("thumos14-paper", score_floor=10)


def naive_release(tcam: np.ndarray, activitynet: bool) -> dict[tuple, float]:
    """The released code's rules for one refined sequence (T, C): {(class, start, end): score}."""
    count, classes = tcam.shape
    p = np.sort(tcam, axis=0)[::-1][: max(1, count // (4 if activitynet else 8))].mean(0)
    if activitynet:
        kept = p > max(1.0 if (p > 1).any() else 0.5, np.sort(p)[-3])
    else:
        kept = p > p.max() / 2
    found = {}
    for c in np.flatnonzero(kept):
        r = tcam[:, c]
        candidates = {}
        for threshold in range(1, 20):
            inside = np.concatenate(([False], r > np.float32(threshold / 40), [False]))
            edges = np.flatnonzero(inside[1:] != inside[:-1])
            for s, e in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                if e - s >= 2:
                    reach = max(1, (e - s) // 4)
                    sides = [x.mean() for x in (r[max(0, s - reach) : s], r[e : e + reach]) if len(x)]
                    score = r[s:e].mean() - (np.mean(sides) if sides else 0)
                    if score >= -0.4:
                        candidates[s, e] = score
        picked: list[tuple[int, int]] = []
        for s, e in sorted(candidates, key=lambda k: -candidates[k]):
            overlaps = (max(0, min(e, b) - max(s, a)) for a, b in picked)
            if all(o / (e - s + b - a - o) < 0.3 for o, (a, b) in zip(overlaps, picked, strict=True)):
                picked.append((s, e))
        found.update({(c, *k): candidates[k] for k in picked if candidates[k] >= 0.1 * candidates[picked[0]]})
    return found


@pytest.mark.parametrize("name", ["thumos14-release", "activitynet12-release"])
def test_release_rules_one_recording_at_a_time(name):
    generator = torch.Generator().manual_seed(0)
    localizer = Localizer.from_recipe(name)
    lengths = torch.tensor([60, 200, 3, 41, 1, 200])
    tcam = torch.rand(6, 200, 5, generator=generator) ** 0.5
    tcam = nn.functional.avg_pool1d(tcam.transpose(1, 2), 5, 1, 2).transpose(1, 2)
    tcam *= torch.rand(6, 1, 5, generator=generator) ** 0.3  # classes and recordings of different strength
    attention = torch.rand(6, 200, generator=generator)
    found = localizer(tcam, attention, lengths)
    result = {tuple(row[:4]): row[4] for row in rows(found)}
    expected = {}
    for b, n in enumerate(lengths.tolist()):
        a = attention[b, :n]
        refined = tcam[b, :n] * (a * 2 / a.max() if "activity" in name else a)[:, None]
        expected |= {(b, *k): v for k, v in naive_release(refined.numpy(), "activity" in name).items()}
    assert len(expected) > 50 and len(result) == len(found.score)
    assert result.keys() == expected.keys()
    assert all(result[k] == pytest.approx(v, abs=1e-5) for k, v in expected.items())


def test_published_localization(shared):
    data = np.load(shared / "oracles" / "release_localization.npz")
    localizer = Localizer.from_recipe("thumos14-release")
    names = [k.removeprefix("detections_") for k in data if k.startswith("detections_")]
    videos = [str(v) for v in data["video"]]
    tcams = [torch.from_numpy(data[f"tcam_{v}"]) for v in videos]
    lengths = torch.tensor([len(t) for t in tcams])
    found = localizer(nn.utils.rnn.pad_sequence(tcams, batch_first=True), lengths=lengths)
    assert (found.recording.diff() >= 0).all()
    detected = to_detections(found, videos=videos, classes=names, seconds_per_snippet=[16 / 25] * len(videos))
    truth = read_annotations(shared / "data" / "thumos14" / "wtalc", subset="test", trust_pickle=True)
    result = evaluate(detected, truth, "wtalc", tiou=(0.1, 0.2, 0.3, 0.4, 0.5))
    np.testing.assert_allclose(result.map, data["map_wtalc"], atol=1e-6)

    # The published detections are without those that touch an ambiguous segment, which evaluate drops.
    ambiguous: dict[int, list[tuple[int, int]]] = {}
    for video, start, end in truth.ambiguous.tolist():
        segment = (round(start * 25 / 16), round(end * 25 / 16))
        ambiguous.setdefault(videos.index(truth.videos[int(video)]), []).append(segment)
    ours = {
        (label, video, start, end): score
        for video, label, start, end, score in rows(found)
        if all(end <= a or b <= start for a, b in ambiguous.get(video, []))
    }
    published = {(c, *map(int, r[:3])): r[3] for c, n in enumerate(names) for r in data[f"detections_{n}"]}
    assert ours.keys() == published.keys()
    assert max(abs(ours[k] - v) for k, v in published.items()) < 1e-5


def test_classes_by_an_absolute_threshold():
    recipe = replace(RECIPE, class_rule="absolute", class_threshold=0.55)
    assert {r[1] for r in rows(Localizer(recipe)(TCAM))} == {0, 1}  # p = 1, 0.625, 0.5
    assert {r[1] for r in rows(Localizer(replace(recipe, class_threshold=0.4))(TCAM))} == {0, 1, 2}
    high = replace(recipe, class_threshold_high=0.9)
    assert {r[1] for r in rows(Localizer(high)(TCAM))} == {0}
    assert {r[1] for r in rows(Localizer(high)(TCAM[:, 1:]))} == {0}  # nothing above 0.9: 0.55 decides
    two = replace(recipe, class_threshold=0.0, max_classes=2)
    assert {r[1] for r in rows(Localizer(two)(TCAM))} == {0, 1}
    assert {r[1] for r in rows(Localizer(two)(TCAM[:, [0, 1, 1]]))} == {0}  # a tie for the second place
    assert {r[1] for r in rows(Localizer(replace(two, max_classes=3))(TCAM))} == {0, 1, 2}


def test_class_scores_of_the_refined_sequence_and_rounding():
    attention = torch.ones(8)
    attention[2:4] = 0.25  # class 0 falls to 0.5 (its sides), class 1 to 0.156
    refined = replace(RECIPE, class_scores="refined", class_threshold=0.9)
    assert {r[1] for r in rows(Localizer(refined)(TCAM, attention))} == {0, 2}
    assert {r[1] for r in rows(Localizer(replace(refined, class_scores="tcam"))(TCAM, attention))} == {0}
    # k = ceil(8 / 5) = 2 or floor = 1: class 1 has p = 0.625 or 0.75.
    up = replace(RECIPE, topk_divisor=5, class_threshold=0.7)
    assert {r[1] for r in rows(Localizer(up)(TCAM))} == {0}
    assert {r[1] for r in rows(Localizer(replace(up, topk_rounding="floor"))(TCAM))} == {0, 1}


def test_attention_peak():
    attention = torch.linspace(0.1, 0.5, 8)
    scaled = Localizer(replace(RECIPE, attention_peak=2.0))(TCAM, attention)
    assert rows(scaled) == rows(Localizer(RECIPE)(TCAM, attention * 2 / attention.max()))
    none = Localizer(replace(RECIPE, attention_peak=2.0))(TCAM, torch.zeros(8))
    assert len(none.score) == 0


def test_score_floor_of_the_class_includes_what_is_equal():
    best = {0: 0.75, 1: 0.625}  # test_by_hand
    floor = replace(RECIPE, score_floor=0.9)
    assert [r[1] for r in rows(Localizer(floor)(TCAM))] == [0]
    by_class = rows(Localizer(replace(floor, score_floor_scope="class"))(TCAM))
    assert {r[1]: r[4] for r in by_class} == best
    equal = torch.tensor([[0.0, 0.5, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]).T
    half = replace(RECIPE, score_floor=0.5, score_floor_scope="class")
    assert len(Localizer(half)(equal).score) == 2


def test_min_contrast():
    # The valley (0.25) between high sides has S = 0.25 - 1.
    valley = torch.tensor([[1.0, 1.0, 0.5, 0.5, 1.0, 1.0, 0.0, 0.0]]).T
    valley = torch.cat((torch.zeros(1, 1), valley))
    low = replace(RECIPE, thresholds=(0.25, 0.75), score_floor=0.0, nms_iou=1.0)
    assert len(Localizer(low)(valley).score) == 3
    assert len(Localizer(replace(low, min_contrast=0.8))(valley).score) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_classes": 0}, "max_classes is 0; it must be at least 1"),
        ({"attention_peak": 0.0}, "attention_peak is 0.0; it must be above 0"),
        ({"class_threshold": 1.5}, "class_threshold is 1.5; it must be at least 0 and below 1, a fraction"),
    ],
)
def test_settings_that_cannot_work(change, message):
    with pytest.raises(InputError, match=message):
        Localizer(replace(RECIPE, **change))


def test_to_detections():
    proposals = Proposals(*(torch.tensor(x) for x in ([0, 1], [1, 0], [2, 3], [4, 8], [0.5, 0.25])))
    found = to_detections(proposals, videos=["a", "b"], classes=["x", "y"], seconds_per_snippet=[0.5, 2.0])
    assert found.videos == ("a", "b") and found.classes == ("x", "y")
    assert found.start.tolist() == [1.0, 6.0] and found.end.tolist() == [2.0, 16.0]
    assert found.video.tolist() == [0, 1] and found.label.tolist() == [1, 0] and found.score.tolist() == [0.5, 0.25]
    assert {x.dtype for x in (found.start, found.end, found.score)} == {np.dtype(np.float64)}
    with pytest.raises(InputError, match="seconds_per_snippet"):
        to_detections(proposals, videos=["a", "b"], classes=["x", "y"], seconds_per_snippet=[0.5])
    with pytest.raises(InputError, match="a proposal has recording 1"):
        to_detections(proposals, videos=["a"], classes=["x", "y"], seconds_per_snippet=[0.5])
    with pytest.raises(InputError, match="a proposal has class 1"):
        to_detections(proposals, videos=["a", "b"], classes=["x"], seconds_per_snippet=[0.5, 0.5])


class Output(NamedTuple):
    tcam: torch.Tensor
    embeddings: torch.Tensor


class Columns(nn.Module):
    """A model whose TCAM is the first three features and whose embeddings are the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.9)  # shows whether it runs in evaluation mode
        self.register_buffer("x_ref", torch.tensor([1.0, 0.0]))

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> Output:
        assert lengths.tolist() == [x.shape[1]]
        return Output(self.dropout(x[..., :3]), x[..., 3:])


def features() -> np.ndarray:
    """TCAM with embeddings that are opposite to x_ref (lambda' = 1), but aligned with it (0) from 6 on."""
    embeddings = torch.tensor([[-1.0, 0.0]] * 6 + [[1.0, 0.0]] * 2)
    return torch.cat((TCAM, embeddings), dim=1).numpy()


def dataset(*arrays: np.ndarray) -> Dataset:
    recordings = tuple(
        Recording(f"r{i}", "test", (), (), 0.5 * (i + 1), f"r{i}.npy", lambda x=x: x) for i, x in enumerate(arrays)
    )
    return Dataset("d", ("x", "y", "z"), (3, 2), recordings)


def test_predict_gives_tcam_and_bottom_up_attention_and_leaves_the_mode():
    model = Columns().train()
    tcam, attention = predict(model, features())
    assert torch.equal(tcam, TCAM)
    torch.testing.assert_close(attention, torch.tensor([1.0] * 6 + [0.0] * 2))
    assert model.training and not attention.requires_grad


def test_localize():
    seen = []
    data = dataset(features(), features()[:1], features())
    found = localize(Columns(), data, RECIPE, progress=lambda i, n: seen.append((i, n)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert found.videos == ("r0", "r1", "r2") and found.classes == ("x", "y", "z")
    # r1 is one snippet of class 2 at 0.5; in r0 and r2, the attention removes (6, 7) of test_by_hand.
    assert found.video.tolist() == [0, 0, 1, 2, 2]
    assert found.label.tolist() == [0, 1, 2, 0, 1]
    np.testing.assert_allclose(found.start, [0.5, 1.0, 0.0, 1.5, 3.0])
    np.testing.assert_allclose(found.end, [2.5, 2.0, 1.0, 7.5, 6.0])
    np.testing.assert_allclose(found.score, [0.75, 0.625, 0.5, 0.75, 0.625], rtol=1e-6)
    plain = localize(Columns(), data, replace(RECIPE, attention=False))
    assert len(plain) == 7


def network(**settings) -> D2Net:
    torch.manual_seed(0)
    model = D2Net(3, (3, 2), replace(load_recipe("thumos14-paper").model, embedding_dim=6, **settings))
    with torch.no_grad():
        for x in (*model.parameters(), model.x_ref):
            x.normal_(std=0.4)
    return model.train()


def random_dataset(*lengths: int) -> Dataset:
    generator = np.random.default_rng(0)
    return dataset(*(generator.normal(0, 3, (n, 5)).astype(np.float32) for n in lengths))


def one_at_a_time(model: nn.Module, data: Dataset, recipe: LocalizationRecipe) -> Detections:
    found = [propose(Localizer(recipe), r, *predict(model, data.features(i))) for i, r in enumerate(data.recordings)]
    return of_dataset(found, data, data.classes)


def forwards(model: nn.Module) -> list[tuple[int, ...]]:
    """The shapes of the features that the network is called with from now on."""
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    return shapes


MANY = (40, 1, 7, 30, 2, 55, 3, 3, 18)


@pytest.mark.parametrize("settings", [{}, {"kernel_size": 5, "dilation": 2}, {"classifier_kernel_size": 1}])
@pytest.mark.parametrize(("most", "calls"), [(network_module.GROUP_ROWS, {1}), (60, {3, 4}), (1, {9})])
def test_recordings_that_run_together_are_localized_as_alone(monkeypatch, settings, most, calls):
    monkeypatch.setattr(network_module, "GROUP_ROWS", most)
    model, data, seen = network(**settings), random_dataset(*MANY), []
    recipe = replace(RECIPE, thresholds=(0.1, 0.2, 0.4, 0.6), class_threshold=0.2, score_floor=0.0)
    expected = one_at_a_time(model, data, recipe)
    shapes = forwards(model)
    found = localize(model, data, recipe, progress=lambda i, n: seen.append((i, n)))
    assert model.training
    assert seen == [(i + 1, len(MANY)) for i in range(len(MANY))]
    assert found.videos == expected.videos and len(found) > 20 and len(set(found.video)) > 5
    for name in ("video", "label", "start", "end"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
    np.testing.assert_allclose(found.score, expected.score, rtol=0, atol=1e-6)
    assert len(shapes) in calls and all(shape[0] <= most for shape in shapes if len(shape) == 2)


def test_a_group_ends_before_it_is_too_long_and_a_long_recording_runs_alone(monkeypatch):
    monkeypatch.setattr(network_module, "GROUP_ROWS", 40)
    model = network()
    shapes = forwards(model)
    localize(model, random_dataset(10, 10, 50, 30, 3, 20, 20, 1), RECIPE)
    assert shapes == [(20, 5), (1, 50, 5), (33, 5), (40, 5), (1, 1, 5)]


def test_a_group_is_not_padded_to_a_multiple_of_its_rows(monkeypatch):
    monkeypatch.setattr(network_module, "GROUP_ROWS", 40)
    model = network()
    shapes = forwards(model)
    localize(model, random_dataset(*[1] * 5, 20, *[1] * 9), RECIPE)  # 8 times 20 snippets are 160
    assert shapes == [(27, 5), (7, 5)]


def test_on_a_cpu_recordings_with_enough_work_run_alone_with_the_bits_of_predict(monkeypatch):
    model, data = network(), random_dataset(*MANY)
    monkeypatch.setattr(network_module, "WORK_PER_THREAD", multiply_adds(model, 1))
    expected, shapes = one_at_a_time(model, data, RECIPE), forwards(model)
    found = localize(model, data, RECIPE)
    assert shapes == [(1, n, 5) for n in MANY]
    assert found.score.tolist() == expected.score.tolist()


def test_a_network_of_another_kind_runs_alone():
    class Shifted(D2Net):
        def forward(self, features, lengths=None):
            return super().forward(features + 1, lengths)

    model = Shifted(3, (3, 2))
    shapes = forwards(model)
    localize(model, random_dataset(4, 9), replace(RECIPE, attention=False))
    assert shapes == [(1, 4, 5), (1, 9, 5)]


def test_of_recordings_that_run_together_the_one_that_is_not_finite_is_named():
    model = network()
    data = random_dataset(4, 9, 5)
    data.recordings[1].read()[:] = 3e38  # finite, but no sum of them is
    with pytest.raises(InputError, match="r1.npy: 'r1': .* NaN or Inf .first in recording 0, snippet"):
        localize(model, data, RECIPE)


def test_localize_without_recordings():
    found = localize(Columns(), dataset(), RECIPE)
    assert len(found) == 0 and found.videos == ()


def test_localize_names_the_recording_whose_activations_are_not_finite():
    class Broken(Columns):
        def forward(self, x, lengths):
            return Output(x[..., :3] / 0, x[..., 3:])

    with pytest.raises(InputError, match="r0.npy: 'r0': tcam holds NaN or Inf"):
        localize(Broken(), dataset(features()), RECIPE)


def without_x_ref() -> nn.Module:
    model = Columns()
    del model.x_ref
    return model


def test_a_model_without_x_ref_is_told_what_is_missing():
    missing = (
        r"Columns has no x_ref, .* \(D,\) .* model.register_buffer\('x_ref', loss.reference\), or .* attention=False"
    )
    with pytest.raises(InputError, match=missing):  # before features are read
        localize(without_x_ref(), dataset(), replace(RECIPE, attention=True))


def test_a_model_without_x_ref_is_localized_without_attention():
    without = replace(RECIPE, attention=False)
    found, expected = (localize(m, dataset(features()), without) for m in (without_x_ref(), Columns()))
    assert len(found) and (found.start.tolist(), found.score.tolist()) == (
        expected.start.tolist(),
        expected.score.tolist(),
    )
    tcam, attention = predict(without_x_ref(), features())
    assert attention is None and torch.equal(tcam, predict(Columns(), features())[0])


def test_an_x_ref_of_another_width_is_refused():
    model = Columns()
    model.x_ref = torch.ones(3)
    with pytest.raises(InputError, match="x_ref has shape"):
        localize(model, dataset(features()), RECIPE)


def test_an_untrained_x_ref_is_said_where_it_counts(recwarn):
    model = Columns()
    model.x_ref.zero_()
    localize(model, dataset(features()), replace(RECIPE, attention=False))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="x_ref of the network is 0, .* train with loss.reference = model.x_ref"):
        localize(model, dataset(features()), RECIPE)


def test_a_model_may_bring_its_classes_and_settings():
    data = dataset(features())
    with pytest.raises(InputError, match="Columns does not say how to localize, .* give recipe"):
        localize(Columns(), data)
    model = Columns()
    model.classes = ("c", "b", "a")  # by which its outputs are counted, whatever the dataset's
    model.recipe = Recipe("of the model", localization=RECIPE)
    found, given = localize(model, data), localize(Columns(), data, RECIPE)
    assert found.classes == ("c", "b", "a") and given.classes == ("x", "y", "z")
    assert found.label.tolist() == given.label.tolist() and found.score.tolist() == given.score.tolist()


def test_streams_of_other_widths_are_refused_where_their_sum_is_the_same():
    model = D2Net(3, (2, 3)).eval()
    with pytest.raises(InputError, match=r"streams of widths \(2, 3\), dataset 'd' has \(3, 2\)"):
        localize(model, dataset(features()), RECIPE)


def test_from_the_package():
    assert d2net.localize is localize and d2net.load_model is load_model
    with pytest.raises(AttributeError, match="module 'd2net' has no attribute 'lokalize'"):
        d2net.lokalize  # noqa: B018
