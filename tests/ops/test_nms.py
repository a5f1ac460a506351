"""NMS of segments: every backend against the naive definition, published numbers and ugly inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2net.errors import InputError
from d2net.ops import nms

# (device, whether to call the plain-PyTorch twin there)
BACKENDS = [
    pytest.param(("cpu", True), id="reference"),
    pytest.param(("cpu", False), id="cpu"),
    pytest.param(("cuda", False), id="cuda", marks=pytest.mark.gpu),
]


class Backend:
    """The three operators on one backend; takes and returns CPU tensors."""

    def __init__(self, device: str, reference: bool) -> None:
        self.device = device
        suffix = "_reference" if reference else ""
        self._nms = getattr(nms, f"nms_1d{suffix}")
        self._batched = getattr(nms, f"batched_nms_1d{suffix}")
        self._soft = getattr(nms, f"soft_nms_1d{suffix}")

    def nms(self, segments, scores, threshold):
        return self._nms(segments.to(self.device), scores.to(self.device), threshold).cpu()

    def batched(self, segments, scores, groups, threshold):
        device = self.device
        return self._batched(segments.to(device), scores.to(device), groups.to(device), threshold).cpu()

    def soft(self, segments, scores, **options):
        keep, new_scores = self._soft(segments.to(self.device), scores.to(self.device), **options)
        return keep.cpu(), new_scores.cpu()


@pytest.fixture(params=BACKENDS)
def backend(request) -> Backend:
    device, reference = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return Backend(device, reference)


def naive(segments: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """The definition, word for word, in the segments' own precision."""
    kept: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        start, end = segments[i]
        collides = False
        for k in kept:
            overlap = min(end, segments[k][1]) - max(start, segments[k][0])
            if overlap > 0:
                union = (end - start) + (segments[k][1] - segments[k][0]) - overlap
                collides |= bool(overlap / union >= segments.dtype.type(threshold))
        if not collides:
            kept.append(i)
    return kept


def random_case(n: int, seed: int, span: float, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(n, generator=generator, dtype=dtype) * span
    # Lengths over five octaves, so that short segments nest in long ones.
    length = torch.exp2(torch.rand(n, generator=generator, dtype=dtype) * 5)
    return torch.stack([start, start + length], 1), torch.rand(n, generator=generator, dtype=dtype)


def test_oracle(backend: Backend, shared: Path) -> None:
    oracle = np.load(shared / "oracles" / "nms_1d.npz")
    segments, scores = torch.from_numpy(oracle["segments"]), torch.from_numpy(oracle["scores"])
    assert backend.nms(segments, scores, float(oracle["iou_threshold"])).tolist() == oracle["keep"].tolist()
    keep, new_scores = backend.soft(segments, scores, iou_threshold=0.1, sigma=0.5, min_score=0.01, method="gaussian")
    assert keep.tolist() == oracle["soft_keep"].tolist()
    np.testing.assert_allclose(new_scores.numpy(), oracle["soft_segments_scores"][:, 2], atol=1e-5)


def test_hand_made(backend: Backend) -> None:
    segments = torch.tensor([[0.0, 10], [0, 5], [6, 10], [20, 30]])
    scores = torch.tensor([0.5, 0.9, 0.3, 0.1])
    # [0, 5] has IoU 0.5 with [0, 10], which goes at exactly the threshold and so cannot suppress [6, 10] (IoU 0.4).
    assert backend.nms(segments, scores, 0.5).tolist() == [1, 2, 3]
    assert backend.nms(segments, scores, 0.51).tolist() == [1, 0, 2, 3]
    assert backend.nms(segments, scores, 0.0).tolist() == [1, 2, 3]
    groups = torch.tensor([7, -3, 7, 7])
    assert backend.batched(segments, scores, groups, 0.4).tolist() == [1, 0, 3]
    keep, new = backend.soft(segments, scores, iou_threshold=0.5, sigma=1.0, min_score=0.0, method="linear")
    assert keep.tolist() == [1, 2, 0, 3]  # [6, 10] at 0.3 overtakes [0, 10] at 0.5 * (1 - 0.5)
    torch.testing.assert_close(new, torch.tensor([0.9, 0.3, 0.25, 0.1]))
    keep, new = backend.soft(segments, scores, iou_threshold=0.5, sigma=1.0, min_score=0.2, method="linear")
    assert keep.tolist() == [1, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [0.0, 1e-3, 0.3, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("n", [1, 30, 400])
def test_equals_definition(backend: Backend, n: int, threshold: float, dtype: torch.dtype) -> None:
    segments, scores = random_case(n, seed=n, span=n / 2, dtype=dtype)
    assert backend.nms(segments, scores, threshold).tolist() == naive(segments.numpy(), scores.numpy(), threshold)


# Small integers make ties, copies, touching, empty and reversed segments common; their IoU is exact.
integer_cases = st.integers(0, 200).flatmap(
    lambda n: st.tuples(
        st.lists(st.tuples(st.integers(0, 12), st.integers(-1, 9)), min_size=n, max_size=n),
        st.lists(st.integers(-3, 6), min_size=n, max_size=n),
        st.lists(st.integers(0, 2), min_size=n, max_size=n),
        st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]),
    )
)


@given(integer_cases)
@settings(deadline=None, max_examples=80)
def test_property(case) -> None:
    rows, score_list, group_list, threshold = case
    segments = torch.tensor([(s, s + length) for s, length in rows], dtype=torch.float32).reshape(-1, 2)
    scores, groups = torch.tensor(score_list, dtype=torch.float32), torch.tensor(group_list, dtype=torch.int64)
    keep = nms.nms_1d(segments, scores, threshold)
    assert keep.tolist() == naive(segments.numpy(), scores.numpy(), threshold)
    assert nms.nms_1d(segments[keep], scores[keep], threshold).tolist() == list(range(len(keep)))
    batched = nms.batched_nms_1d(segments, scores, groups, threshold)
    assert batched.tolist() == nms.batched_nms_1d_reference(segments, scores, groups, threshold).tolist()
    for g in range(3):
        members = torch.nonzero(groups == g).flatten()
        alone = members[nms.nms_1d(segments[members], scores[members], threshold)]
        assert batched[groups[batched] == g].tolist() == alone.tolist()


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("min_score", [0.0, 0.05])
def test_soft_equals_reference(backend: Backend, method: str, min_score: float) -> None:
    # float64: a rounding of exp must not swap two nearly equal scores.
    segments, scores = random_case(500, seed=3, span=300.0, dtype=torch.float64)
    options = {"iou_threshold": 0.2, "sigma": 0.4, "min_score": min_score, "method": method}
    keep, new = backend.soft(segments, scores, **options)
    expected, expected_new = nms.soft_nms_1d_reference(segments, scores, **options)
    assert keep.tolist() == expected.tolist()
    torch.testing.assert_close(new, expected_new)
    assert torch.all(new[:-1] >= new[1:])
    assert torch.all(new <= scores[keep])


def test_empty(backend: Backend) -> None:
    segments, scores = torch.zeros(0, 2), torch.zeros(0)
    assert backend.nms(segments, scores, 0.5).shape == (0,)
    keep = backend.batched(segments, scores, torch.zeros(0, dtype=torch.int64), 0.5)
    assert keep.shape == (0,) and keep.dtype == torch.int64
    keep, new = backend.soft(segments, scores, iou_threshold=0.5, sigma=0.5, min_score=0.1)
    assert keep.shape == new.shape == (0,) and keep.dtype == torch.int64
    # Every score under the floor is as good as no segment.
    keep, new = backend.soft(torch.rand(3, 2), torch.zeros(3), iou_threshold=0.5, sigma=0.5, min_score=0.1)
    assert keep.shape == new.shape == (0,)


def test_ties_and_degenerate_segments(backend: Backend) -> None:
    copies = torch.tensor([[1.0, 2.0]]).repeat(300, 1)
    assert backend.nms(copies, torch.ones(300), 1.0).tolist() == [0]
    points = torch.tensor([[1.0, 1.0], [1, 1], [2, 1], [0, 3], [3, 4]])
    assert backend.nms(points, torch.ones(5), 0.1).tolist() == [0, 1, 2, 3, 4]
    huge = torch.tensor([[-3e38, 3e38], [-3e38, 3e38], [0, 1]])  # the length overflows float32: IoU counts as 0
    assert backend.nms(huge, torch.ones(3), 0.1).tolist() == [0, 1, 2]


def test_non_contiguous_and_infinite_scores() -> None:
    segments, scores = random_case(200, seed=1, span=50.0)
    scores[7], scores[9] = torch.inf, -torch.inf
    expected = nms.nms_1d(segments, scores, 0.3)
    wide = torch.stack([segments, segments + 1], 2)[:, :, 0]
    assert not wide.is_contiguous()
    assert nms.nms_1d(wide, torch.stack([scores, scores], 1)[:, 0], 0.3).tolist() == expected.tolist()
    assert expected[0] == 7


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.9])
def test_large(threshold: float) -> None:
    segments, scores = random_case(50_000, seed=5, span=5_000.0)
    keep = nms.nms_1d(segments, scores, threshold)
    groups = torch.zeros(len(scores), dtype=torch.int32)
    assert torch.equal(nms.batched_nms_1d(segments, scores, groups, threshold), keep)
    assert torch.all(scores[keep][:-1] >= scores[keep][1:])
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[keep] = True
    # The result is the one set in which a segment is missing exactly when a kept one of higher rank collides with it.
    rank = torch.empty(len(scores), dtype=torch.int64)
    rank[torch.sort(scores, descending=True, stable=True).indices] = torch.arange(len(scores))
    for i in torch.randint(len(scores), (60,), generator=torch.Generator().manual_seed(0)).tolist():
        overlap, iou = nms._overlap_iou(segments[i], segments)
        blockers = chosen & (overlap > 0) & (iou >= threshold) & (rank < rank[i])
        assert bool(blockers.any()) != bool(chosen[i])


@pytest.mark.parametrize(
    ("segments", "scores", "threshold", "words"),
    [
        (torch.zeros(3), torch.zeros(3), 0.5, "segments must be"),
        (torch.zeros(3, 3), torch.zeros(3), 0.5, "segments must be"),
        (torch.zeros(3, 2), torch.zeros(4), 0.5, "scores must be"),
        (torch.zeros(3, 2), torch.zeros(3, 1), 0.5, "scores must be"),
        (torch.zeros(3, 2).half(), torch.zeros(3).half(), 0.5, "float"),
        (torch.zeros(3, 2).double(), torch.zeros(3), 0.5, "float"),
        (torch.zeros(3, 2).long(), torch.zeros(3).long(), 0.5, "float"),
        (torch.zeros(3, 2, device="meta"), torch.zeros(3), 0.5, "meta"),
        (torch.zeros(3, 2), torch.zeros(3), 1.5, "iou_threshold"),
        (torch.zeros(3, 2), torch.zeros(3), float("nan"), "iou_threshold"),
        (torch.full((3, 2), torch.nan), torch.zeros(3), 0.5, "NaN"),
        (torch.full((3, 2), torch.inf), torch.zeros(3), 0.5, "finite"),
        (torch.zeros(3, 2), torch.full((3,), torch.nan), 0.5, "NaN"),
    ],
)
def test_wrong_input(segments, scores, threshold, words) -> None:
    groups = torch.zeros(3, dtype=torch.int64)
    for call in (
        lambda: nms.nms_1d(segments, scores, threshold),
        lambda: nms.batched_nms_1d(segments, scores, groups, threshold),
        lambda: nms.soft_nms_1d(segments, scores, iou_threshold=threshold, sigma=0.5, min_score=0.0),
    ):
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_wrong_options() -> None:
    segments, scores = random_case(3, seed=0, span=1.0)
    with pytest.raises(InputError, match="groups"):
        nms.batched_nms_1d(segments, scores, torch.zeros(2, dtype=torch.int64), 0.5)
    with pytest.raises(InputError, match="groups"):
        nms.batched_nms_1d(segments, scores, torch.zeros(3), 0.5)
    for options in ({"sigma": 0.0}, {"min_score": -1.0}, {"method": "cubic"}):
        with pytest.raises(InputError, match=next(iter(options))):
            nms.soft_nms_1d(segments, scores, **({"iou_threshold": 0.5, "sigma": 0.5, "min_score": 0.0} | options))
