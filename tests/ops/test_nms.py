"""NMS of segments: every backend against the naive definition and published numbers, with hard inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from d2net.errors import InputError
from d2net.ops import backend_of, batched_nms_1d, nms, nms_1d, soft_nms_1d

THRESHOLDS = [0.0, 1e-3, 0.1, 0.3, 0.5, 0.75, 0.95, 1.0]
SOFT = {"iou_threshold": 0.2, "sigma": 0.4, "min_score": 0.05}


def naive(segments: Tensor, scores: Tensor, threshold: float, groups: Tensor | None = None) -> list[int]:
    """The definition, written out, in the segments' own dtype."""
    rows, falling = segments.cpu().numpy(), (-scores.cpu()).tolist()
    group = np.zeros(len(rows), np.int64) if groups is None else groups.cpu().numpy()
    kept: list[int] = []
    with np.errstate(all="ignore"):
        for i in sorted(range(len(rows)), key=lambda i: (falling[i], i)):
            others = rows[[k for k in kept if group[k] == group[i]]]
            overlap = np.minimum(rows[i, 1], others[:, 1]) - np.maximum(rows[i, 0], others[:, 0])
            iou = overlap / ((rows[i, 1] - rows[i, 0]) + (others[:, 1] - others[:, 0]) - overlap)
            if not np.any((overlap > 0) & ((iou >= rows.dtype.type(threshold)) | (threshold == 0))):
                kept.append(i)
    return kept


def greedy(segments: Tensor, scores: Tensor, threshold: float, groups: Tensor | None = None) -> Tensor:
    """The operator's result. On CUDA one block does few segments; checks that the kernel for many gives the same."""

    def run() -> Tensor:
        if groups is None:
            return nms_1d(segments, scores, threshold)
        return batched_nms_1d(segments, scores, groups, threshold)

    keep = run()
    if backend_of("nms_1d", scores.device.type) == "reference":
        return keep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nms, "_BLOCK_LIMIT", dict.fromkeys(nms._BLOCK_LIMIT, 0))
        assert torch.equal(run(), keep)
    return keep


def naive_soft(segments: Tensor, scores: Tensor, iou_threshold, sigma, min_score, method) -> tuple[list, list]:
    rows, current = segments.cpu().double().numpy(), scores.cpu().double().tolist()
    left, keep, new = [i for i, s in enumerate(current) if s >= min_score], [], []
    while left:
        best = max(left, key=lambda i: (current[i], -i))
        left.remove(best)
        keep.append(best)
        new.append(current[best])
        for i in left:
            overlap = min(rows[i][1], rows[best][1]) - max(rows[i][0], rows[best][0])
            if overlap > 0:
                iou = overlap / ((rows[i][1] - rows[i][0]) + (rows[best][1] - rows[best][0]) - overlap)
                if method == "gaussian":
                    current[i] *= np.exp(-(iou * iou) / sigma)
                elif iou >= iou_threshold:
                    current[i] *= 1 - iou
        left = [i for i in left if current[i] >= min_score]
    return keep, new


def random_case(n: int, seed: int, span: float, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(n, generator=generator, dtype=dtype) * span
    # Lengths over five octaves, so that short segments nest in long ones.
    length = torch.exp2(torch.rand(n, generator=generator, dtype=dtype) * 5)
    segments = torch.stack([start, start + length], 1)
    return segments.to(device), torch.rand(n, generator=generator, dtype=dtype).to(device)


def test_oracle(device, shared: Path):
    oracle = np.load(shared / "oracles" / "nms_1d.npz")
    segments, scores = (torch.from_numpy(oracle[name]).to(device) for name in ("segments", "scores"))
    assert greedy(segments, scores, float(oracle["iou_threshold"])).tolist() == oracle["keep"].tolist()
    keep, new = soft_nms_1d(segments, scores, iou_threshold=0.1, sigma=0.5, min_score=0.01, method="gaussian")
    assert keep.tolist() == oracle["soft_keep"].tolist()
    np.testing.assert_allclose(new.cpu().numpy(), oracle["soft_segments_scores"][:, 2], atol=1e-5)


def test_hand_made(device):
    segments = torch.tensor([[0.0, 10], [0, 5], [6, 10], [20, 30]], device=device)
    scores = torch.tensor([0.5, 0.9, 0.3, 0.1], device=device)
    # [0, 5] has IoU 0.5 with [0, 10], exactly the threshold, so it is removed and cannot suppress [6, 10] (IoU 0.4).
    assert nms_1d(segments, scores, 0.5).tolist() == [1, 2, 3]
    assert nms_1d(segments, scores, 0.51).tolist() == [1, 0, 2, 3]
    assert nms_1d(segments, scores, 0.0).tolist() == [1, 2, 3]
    groups = torch.tensor([7, -3, 7, 7], device=device)
    assert batched_nms_1d(segments, scores, groups, 0.4).tolist() == [1, 0, 3]
    keep, new = soft_nms_1d(segments, scores, iou_threshold=0.5, sigma=1.0, min_score=0.0, method="linear")
    assert keep.tolist() == [1, 2, 0, 3]  # [6, 10] at 0.3 overtakes [0, 10] at 0.5 * (1 - 0.5)
    torch.testing.assert_close(new.cpu(), torch.tensor([0.9, 0.3, 0.25, 0.1]))
    keep, new = soft_nms_1d(segments, scores, iou_threshold=0.5, sigma=1.0, min_score=0.2, method="linear")
    assert keep.tolist() == [1, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_equals_definition(device, threshold, dtype):
    for n, span in ((1, 1.0), (30, 15.0), (400, 200.0), (400, 4000.0)):  # few are kept, then all
        segments, scores = random_case(n, n, span, dtype, device)
        groups = torch.arange(n, device=device) % 3 - 1
        keep = greedy(segments, scores, threshold)
        assert keep.dtype == torch.int64 and keep.device.type == device.type
        assert keep.tolist() == naive(segments, scores, threshold)
        assert greedy(segments, scores, threshold, groups).tolist() == naive(segments, scores, threshold, groups)


# More segments than fit into the kernels' list of kept segments, so that the index that replaces it is tested too.
FILLERS = torch.stack([torch.arange(130.0), torch.arange(130.0) + 1], 1)


def integer_rows(n: int):
    """Small integers make ties, copies, touching, zero-length and reversed segments common; their IoU is exact."""
    return st.tuples(
        st.lists(st.tuples(st.integers(0, 40), st.integers(-2, 15)), min_size=n, max_size=n),
        st.lists(st.integers(-3, 6), min_size=n, max_size=n),
        st.lists(st.sampled_from([-(2**62), 0, 1, 2**62]), min_size=n, max_size=n),
        st.sampled_from(THRESHOLDS),
        # Steps of the smallest positive number, of 1, and of numbers so large that lengths overflow.
        st.sampled_from([2.0**-149, 1.0, 2.0**123, 2.0**124]),
    )


@given(case=st.integers(0, 150).flatmap(integer_rows), fill=st.booleans())
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
def test_integers_equal_definition(device, case, fill):
    rows, score_list, group_list, threshold, scale = case
    start = torch.tensor([s for s, _ in rows], dtype=torch.float64) - 12
    length = torch.tensor([length for _, length in rows], dtype=torch.float64)
    segments = (torch.stack([start, start + length], 1) * scale).clamp(-3.4e38, 3.4e38).float()
    scores, groups = torch.tensor(score_list, dtype=torch.float32), torch.tensor(group_list, dtype=torch.int64)
    if fill:
        segments = torch.cat([FILLERS * (scale if scale <= 1 else scale / 256), segments])
        scores, groups = torch.cat([torch.full((130,), 9.0), scores]), torch.cat([torch.ones(130).long(), groups])
    segments, scores, groups = segments.to(device), scores.to(device), groups.to(device)
    keep = greedy(segments, scores, threshold)
    assert keep.tolist() == naive(segments, scores, threshold)
    assert nms_1d(segments[keep], scores[keep], threshold).tolist() == list(range(len(keep)))
    assert greedy(segments, scores, threshold, groups).tolist() == naive(segments, scores, threshold, groups)


finite = st.floats(-(2.0**100), 2.0**100, width=32)


@given(
    rows=st.lists(st.tuples(finite, finite, finite), min_size=1, max_size=200),
    few=st.lists(finite, min_size=1, max_size=6),
    threshold=st.floats(0, 1, width=32),
)
@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
def test_any_numbers_equal_definition(device, rows, few, threshold):
    """Any magnitude; with few distinct values many IoUs are at the threshold or just below it."""
    values = np.array(rows, np.float32)
    some = np.random.default_rng(len(rows)).random(values.shape) < 0.4
    values[some] = np.resize(np.float32(few), some.sum())
    segments = torch.cat([FILLERS * 2.0**110, torch.from_numpy(values[:, :2])])
    scores = torch.cat([torch.full((130,), 2.0**101), torch.from_numpy(values[:, 2])])
    for x, y in ((segments, scores), (segments.double(), scores.double())):
        assert greedy(x.to(device), y.to(device), threshold).tolist() == naive(x, y, threshold)


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("min_score", [0.0, 0.05])
def test_soft_equals_definition(device, method, min_score):
    # float64: a rounding of exp must not swap two nearly equal scores.
    segments, scores = random_case(400, 3, 150.0, torch.float64, device)
    for options in ({"iou_threshold": 0.2, "sigma": 0.4}, {"iou_threshold": 0.0, "sigma": 1e-3}):
        options |= {"min_score": min_score, "method": method}
        keep, new = soft_nms_1d(segments, scores, **options)
        expected, expected_new = naive_soft(segments, scores, **options)
        assert keep.tolist() == expected
        np.testing.assert_allclose(new.cpu().numpy(), expected_new, rtol=1e-12, atol=1e-300)
        assert torch.all(new[:-1] >= new[1:]) and torch.all(new <= scores[keep])


@given(case=st.integers(0, 120).flatmap(integer_rows), min_score=st.sampled_from([0.0, 0.5]))
@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
def test_soft_of_integers_equals_definition(device, case, min_score):
    rows, score_list, _, threshold, _ = case
    segments = torch.tensor([(s, s + length) for s, length in rows], dtype=torch.float64).reshape(-1, 2).to(device)
    scores = torch.tensor(score_list, dtype=torch.float64, device=device)
    options = {"iou_threshold": threshold, "sigma": 0.5, "min_score": min_score, "method": "linear"}
    keep, new = soft_nms_1d(segments, scores, **options)
    assert (keep.tolist(), new.tolist()) == naive_soft(segments, scores, **options)


def test_soft_gaussian_in_float32(device):
    segments, scores = random_case(300, 4, 100.0, torch.float32, device)
    keep, new = soft_nms_1d(segments, scores, **SOFT)
    expected, expected_new = naive_soft(segments, scores, **SOFT, method="gaussian")
    order = np.argsort(expected)
    assert keep.sort().values.tolist() == sorted(expected)
    np.testing.assert_allclose(new[keep.argsort()].cpu().numpy(), np.array(expected_new)[order], rtol=1e-5)


# On CUDA one block does few segments. For more, all blocks do the 2048 of highest score, then as many as before again
# and again, and each warp takes several segments.


@pytest.fixture(params=["simt", pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda_device(request) -> torch.device:
    if request.param == "simt":
        request.getfixturevalue("simt_kernels")
    return torch.device("cpu" if request.param == "simt" else "cuda")


def check_against_the_cpu(device, segments: Tensor, scores: Tensor, threshold: float, groups: Tensor) -> Tensor:
    """Both greedy operators on ``device`` give what the CPU kernels give; returns the result without groups."""
    on_device = segments.to(device), scores.to(device)
    keep = nms._nms_1d_cpu(segments, scores, threshold)
    assert torch.equal(greedy(*on_device, threshold).cpu(), keep)
    batched = nms._batched_nms_1d_cpu(segments, scores, groups, threshold)
    assert torch.equal(greedy(*on_device, threshold, groups.to(device)).cpu(), batched)
    return keep


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "span", "threshold"), [(9000, 900.0, 0.5), (5000, 30000.0, 0.05), (3000, 300.0, 0.0)])
def test_cuda_over_several_prefixes(cuda_device, n, span, threshold, dtype):
    segments, scores = random_case(n, n, span, dtype)
    for number in (2, n):
        groups = torch.randint(number, (n,), generator=torch.Generator().manual_seed(number)) - 50
        check_against_the_cpu(cuda_device, segments, scores, threshold, groups)


@pytest.mark.parametrize("n", [1000, 3000])
@pytest.mark.parametrize("scores", [torch.arange(3000.0), -torch.arange(3000.0), torch.zeros(3000)])
def test_cuda_decides_a_chain(cuda_device, scores, n):
    """Each segment overlaps its neighbours only, so every decision depends on the one before it."""
    start = torch.arange(float(n))
    segments = torch.stack([start, start + 1.5], 1)
    keep = check_against_the_cpu(cuda_device, segments, scores[:n], 0.2, torch.arange(n) // 700)
    assert len(keep) == n // 2


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 64, 65, 1023, 1024, 1025, 2047, 2048, 2049])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_of_any_number(cuda_device, n, dtype):
    """Numbers of segments around multiples of warps and blocks, and the limit of one block; many equal scores."""
    segments, scores = random_case(n, n, n / 4, dtype)
    check_against_the_cpu(cuda_device, segments, (8 * scores).floor() - 4, 0.3, torch.arange(n) % 5 - 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("step", "kept"), [(0.0, 1), (0.1, 100), (2.0, 1000)])
def test_cuda_keeps_one_some_or_all(cuda_device, step, kept, dtype):
    start = step * torch.arange(1000, dtype=dtype)
    segments, scores = torch.stack([start, start + 0.95], 1), -torch.arange(1000, dtype=dtype)
    assert len(check_against_the_cpu(cuda_device, segments, scores, 0.0, torch.arange(1000) // 10)) == kept


@pytest.mark.parametrize(("dtype", "limit"), nms._BLOCK_LIMIT.items())
def test_one_block_refuses_more_than_it_can_take(cuda_device, monkeypatch, dtype, limit):
    monkeypatch.setattr(nms, "_BLOCK_LIMIT", {dtype: limit + 1})
    segments, scores = random_case(limit + 1, 0, 100.0, dtype, cuda_device)
    assert len(nms_1d(segments[:-1], scores[:-1], 0.5)) > 0
    with pytest.raises(RuntimeError, match=f"at most {limit} segments, not {limit + 1}"):
        nms_1d(segments, scores, 0.5)


@pytest.mark.parametrize("threshold", [1e-3, 0.1, 1 / 3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 0), (torch.float64, 0), (torch.float64, 1.7e9)])
def test_cuda_looks_as_far_as_needed(cuda_device, threshold, dtype, offset):
    """Pairs whose IoU is at the threshold or just below: one segment within the other, at either end."""
    long = torch.exp2(torch.arange(-5, 15, dtype=torch.float64))
    start, short = offset + 2.0**16 * torch.arange(20), long * threshold
    outer = torch.stack([start, start + long], 1)
    left, right = torch.stack([start, start + short], 1), torch.stack([start + long - short, start + long], 1)
    segments = torch.cat([outer, left, outer - 2.0**40, right - 2.0**40]).to(dtype)
    for scores in (torch.arange(80.0, dtype=dtype), -torch.arange(80.0, dtype=dtype)):
        keep = check_against_the_cpu(cuda_device, segments, scores, threshold, torch.arange(80) // 40)
        assert len(keep) < 80


def test_cuda_tells_groups_of_one_hash_apart(cuda_device):
    # Multiplied by the multiplier of the kernel's hash these are 0, 1, 2 and 3 modulo 2^64: they collide.
    inverse = pow(0x9E3779B97F4A7C15, -1, 2**64)
    chip = torch.tensor([(k * inverse + 2**63) % 2**64 - 2**63 for k in range(4)])
    block = torch.arange(4) * (2**32 + 1)  # the one-block kernel hashes the xor of the halves
    segments, scores = random_case(400, 9, 20.0)
    for dtype in (torch.float32, torch.float64):
        for values in (chip, block):
            groups = values[torch.arange(400) % 4]
            check_against_the_cpu(cuda_device, segments.to(dtype), scores.to(dtype), 0.3, groups)


def test_cuda_takes_rows_that_are_not_aligned(cuda_device):
    segments, scores = random_case(300, 10, 50.0)
    odd = torch.cat([torch.zeros(1), segments.flatten()]).to(cuda_device)[1:].view(300, 2)
    assert odd.is_contiguous() and odd.data_ptr() % 8 == 4
    scores = scores.to(cuda_device)
    assert torch.equal(greedy(odd, scores, 0.4), greedy(odd.clone(), scores, 0.4))
    assert torch.equal(soft_nms_1d(odd, scores, **SOFT)[1], soft_nms_1d(odd.clone(), scores, **SOFT)[1])


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_with_several_segments_a_thread_and_little_shared_memory(simt_kernels, method):
    segments, scores = random_case(1500, 11, 2000.0, torch.float64)
    options = {"iou_threshold": 0.1, "sigma": 0.5, "min_score": 0.3}
    keep, new = nms._soft_nms_1d_cpu(segments, scores, **options, gaussian=method == "gaussian")
    for limit in (227 * 1024, 8 * 1024):
        simt_kernels.set_shared_memory_limit(limit)
        found, found_new = soft_nms_1d(segments, scores, **options, method=method)
        simt_kernels.set_shared_memory_limit(227 * 1024)
        assert torch.equal(found, keep)
        torch.testing.assert_close(found_new, new, rtol=1e-12, atol=0)


def test_soft_drops_what_infinity_times_nothing_gives_and_keeps_endless_segments(device):
    segments = torch.tensor([[0.0, 1], [0, 1], [-3e38, 3e38], [-3e38, 3e38]], device=device)
    scores = torch.tensor([torch.inf, torch.inf, 0.5, 0.4], device=device)
    keep, new = soft_nms_1d(segments, scores, iou_threshold=0.5, sigma=0.5, min_score=0.0, method="linear")
    assert keep.tolist() == [0, 2, 3] and new.tolist() == scores[[0, 2, 3]].tolist()
    keep, new = soft_nms_1d(segments, scores, iou_threshold=0.5, sigma=0.5, min_score=0.0)
    assert keep.tolist() == [0, 1, 2, 3] and new.tolist() == scores.tolist()


@pytest.mark.parametrize("exponent", [-149, -128, -76, 100, 115])
def test_the_smallest_and_the_largest_segments(device, exponent):
    """Scaling times by a power of two, from 1e-45 to 4e34, changes nothing."""
    generator = torch.Generator().manual_seed(exponent)
    start, length = (
        torch.randint(0, 400, (300,), generator=generator),
        torch.randint(0, 60, (300,), generator=generator),
    )
    whole = torch.stack((start, start + length), 1).float().to(device)
    scores = torch.rand(300, generator=generator).to(device)
    groups = torch.arange(300, device=device) % 2
    scaled = torch.ldexp(whole.cpu(), torch.tensor(exponent)).to(device)
    assert scaled.any() and scaled.isfinite().all()
    for threshold in (0.0, 0.3, 0.7, 1.0):
        assert torch.equal(nms_1d(scaled, scores, threshold), nms_1d(whole, scores, threshold))
        found, expected = (batched_nms_1d(x, scores, groups, threshold) for x in (scaled, whole))
        assert torch.equal(found, expected)
    for method in ("linear", "gaussian"):
        options = {"iou_threshold": 0.3, "sigma": 0.5, "min_score": 0.2, "method": method}
        for found, expected in zip(*(soft_nms_1d(x, scores, **options) for x in (scaled, whole)), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("n", [1000, 5000])
def test_results_hold_little_memory(device, n):
    """A small result may be a view of memory for all segments, a large one must be a copy."""
    segments, scores = random_case(n, 13, 10.0, device=device)
    for result in (nms_1d(segments, scores, 0.0), *soft_nms_1d(segments, scores, **SOFT | {"min_score": 0.9})):
        assert len(result) < n / 5 and result.untyped_storage().nbytes() <= max(16 * 1024, result.nbytes)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [500, 5000])
def test_cuda_synchronizes_once(n):
    segments, scores = random_case(n, 12, 500.0, device="cuda")
    groups = torch.arange(n, device="cuda") % 30
    for run in (
        lambda: nms_1d(segments, scores, 0.5),
        lambda: batched_nms_1d(segments, scores, groups, 0.5),
        lambda: soft_nms_1d(segments, scores, **SOFT),
    ):
        run()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="called a synchronizing CUDA operation") as caught:
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len([w for w in caught if "called a synchronizing CUDA operation" in str(w.message)]) == 1


@pytest.mark.gpu
def test_cuda_decides_few_segments_in_one_launch():
    segments, scores = random_case(900, 14, 90.0, device="cuda")
    groups = torch.arange(900, device="cuda") % 30
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for run in (lambda: nms_1d(segments, scores, 0.5), lambda: batched_nms_1d(segments, scores, groups, 0.5)):
        run()
        with torch.profiler.profile(activities=activities) as profile:
            run()
        calls = [e.name for e in profile.events() if e.name.startswith(("cudaLaunch", "cudaMemset", "cudaMemcpy"))]
        assert len([name for name in calls if not name.startswith("cudaMemcpy")]) == 1, calls
        assert len(calls) == 2, calls  # one of them copies the count to the host


def test_empty(device):
    segments, scores = torch.zeros(0, 2, device=device), torch.zeros(0, device=device)
    assert nms_1d(segments, scores, 0.5).shape == (0,)
    keep = batched_nms_1d(segments, scores, torch.zeros(0, dtype=torch.int64, device=device), 0.5)
    assert keep.shape == (0,) and keep.dtype == torch.int64
    keep, new = soft_nms_1d(segments, scores, iou_threshold=0.5, sigma=0.5, min_score=0.1)
    assert keep.shape == new.shape == (0,) and keep.dtype == torch.int64
    # If every score is below min_score, nothing is kept.
    low = torch.rand(3, 2, device=device), torch.zeros(3, device=device)
    keep, new = soft_nms_1d(*low, iou_threshold=0.5, sigma=0.5, min_score=0.1)
    assert keep.shape == new.shape == (0,)


def test_ties_and_degenerate_segments(device):
    copies = torch.tensor([[1.0, 2.0]], device=device).repeat(300, 1)
    assert greedy(copies, torch.ones(300, device=device), 1.0).tolist() == [0]
    points = torch.tensor([[1.0, 1.0], [1, 1], [2, 1], [0, 3], [3, 4]], device=device)
    assert greedy(points, torch.ones(5, device=device), 0.1).tolist() == [0, 1, 2, 3, 4]
    huge = torch.tensor([[-3e38, 3e38], [-3e38, 3e38], [0, 1]], device=device)  # its length overflows: IoU 0
    assert greedy(huge, torch.ones(3, device=device), 0.1).tolist() == [0, 1, 2]
    assert greedy(huge, torch.ones(3, device=device), 0.0).tolist() == [0]  # with threshold 0 any overlap suppresses
    zeros = torch.tensor([-0.0, 0.0, -0.0], device=device)  # equal scores
    assert greedy(copies[:3] + torch.arange(3, device=device)[:, None], zeros, 0.5).tolist() == [0, 1, 2]


def test_views_are_read_by_their_strides_and_scores_may_be_infinite(device):
    segments, scores = random_case(200, 1, 50.0, device=device)
    scores[7], scores[9] = torch.inf, -torch.inf
    wide, twice = torch.stack([segments, segments + 1], 2)[:, :, 0], torch.stack([scores, scores], 1)[:, 0]
    groups = torch.arange(400, device=device)[::2] % 4
    assert not wide.is_contiguous() and not twice.is_contiguous()
    keep = greedy(wide, twice, 0.3)
    assert keep.tolist() == nms_1d(segments, scores, 0.3).tolist() and keep[0] == 7
    assert torch.equal(greedy(wide, twice, 0.3, groups), greedy(segments, scores, 0.3, groups.contiguous()))
    assert torch.equal(soft_nms_1d(wide, twice, **SOFT)[0], soft_nms_1d(segments, scores, **SOFT)[0])


def test_permutation(device):
    segments, scores = random_case(500, 6, 100.0, torch.float64, device)
    mixed = torch.randperm(500, generator=torch.Generator().manual_seed(0)).to(device)
    for result, expected in (
        (nms_1d(segments[mixed], scores[mixed], 0.4), nms_1d(segments, scores, 0.4)),
        (soft_nms_1d(segments[mixed], scores[mixed], **SOFT)[0], soft_nms_1d(segments, scores, **SOFT)[0]),
    ):
        assert torch.equal(mixed[result], expected)


@pytest.mark.parametrize(
    ("segments_dtype", "scores_dtype", "computed"),
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.int64, torch.float32, torch.float64),
        (torch.float16, torch.int32, torch.float64),
    ],
)
def test_any_types_are_computed_in_float32_or_float64(device, segments_dtype, scores_dtype, computed):
    """The same result as after converting the inputs."""
    segments, scores = random_case(300, 4, 100.0, device=device)
    segments, scores = (8 * segments).round().to(segments_dtype), (200 * scores).round().to(scores_dtype)
    groups = torch.arange(300, device=device) % 3
    wide = segments.to(computed), scores.to(computed)
    for threshold in (0.3, 1 / 3, 0.5):
        keep = nms_1d(segments, scores, threshold)
        assert keep.tolist() == naive(*wide, threshold)
        keep = batched_nms_1d(segments, scores, groups, threshold)
        assert keep.tolist() == naive(*wide, threshold, groups)
    keep, new = soft_nms_1d(segments, scores, **SOFT)
    expected, expected_new = soft_nms_1d(*wide, **SOFT)
    assert torch.equal(keep, expected) and torch.equal(new, expected_new) and new.dtype == computed


def test_large_integers_stay_apart(device):
    start = 2**24 + torch.arange(4, device=device)  # float32 holds only the even ones of these
    assert nms_1d(torch.stack([start, start + 1], 1), torch.ones(4, device=device), 0.5).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8])
def test_groups_of_any_integer_type(device, dtype):
    segments, scores = random_case(100, 2, 20.0, device=device)
    groups = torch.arange(100, device=device) % 5
    expected = batched_nms_1d(segments, scores, groups, 0.4)
    assert torch.equal(batched_nms_1d(segments, scores, groups.to(dtype), 0.4), expected)


@pytest.mark.parametrize(("n", "threshold"), [(50_000, 0.05), (1_000_000, 0.5), (50_000, 0.9)])
def test_large(n, threshold):
    segments, scores = random_case(n, 5, n / 10)
    keep = nms_1d(segments, scores, threshold)
    groups = torch.zeros(len(scores), dtype=torch.int32)
    assert torch.equal(batched_nms_1d(segments, scores, groups, threshold), keep)
    assert torch.all(scores[keep][:-1] >= scores[keep][1:])
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[keep] = True
    # The result is the only set in which a segment is missing exactly if a kept one of higher score suppresses it.
    rank = torch.empty(len(scores), dtype=torch.int64)
    rank[torch.sort(scores, descending=True, stable=True).indices] = torch.arange(len(scores))
    for i in torch.randint(len(scores), (20,), generator=torch.Generator().manual_seed(0)).tolist():
        overlap, iou = nms._overlap_iou(segments[i], segments)
        blockers = chosen & (overlap > 0) & (iou >= threshold) & (rank < rank[i])
        assert bool(blockers.any()) != bool(chosen[i])


def test_unfriendly_data_is_no_slower():
    """200,000 segments for which pruning by start or by length alone is quadratic, which would take minutes."""
    n = 200_000
    step = torch.arange(n, dtype=torch.float64)
    side_by_side = torch.stack([step, step + 1], 1)
    fan = torch.stack([torch.zeros(n, dtype=torch.float64), 1.0001**step], 1)  # one start, every length
    fan = fan[fan[:, 1] < 1e300]
    # Many short segments, all kept, and long ones that overlap thousands of them, with an IoU below the threshold.
    nested = torch.cat([side_by_side[: n // 2], torch.stack([step, step + 5000], 1)[: n // 2]])
    for segments, threshold, kept in ((side_by_side, 0.5, n), (side_by_side, 0.0, n), (fan, 0.5, None)):
        for scores in (-segments[:, 0] - segments[:, 1], segments[:, 0]):
            found = nms_1d(segments, scores, threshold)
            assert len(found) == (kept or len(found)) and len(found) > 0
    assert n // 2 <= len(nms_1d(nested, -torch.arange(n, dtype=torch.float64), 0.3)) < n


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_number_of_threads_does_not_matter(threads):
    segments, scores = random_case(20_000, 8, 300.0)
    groups = torch.randint(40, (20_000,), generator=torch.Generator().manual_seed(0)) ** 2 // 50
    expected, before = batched_nms_1d(segments, scores, groups, 0.4), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            assert torch.equal(batched_nms_1d(segments, scores, groups, 0.4), expected)
    finally:
        torch.set_num_threads(before)


def test_registration():
    segments, scores = random_case(50, 0, 20.0)
    groups = torch.arange(50) % 3
    operators = torch.ops.d2net
    for operator, arguments in (
        (operators.nms_1d, (segments, scores, 0.5)),
        (operators.batched_nms_1d, (segments, scores, groups, 0.5)),
        (operators.soft_nms_1d, (segments, scores, 0.3, 0.5, 0.01, True)),
    ):
        torch.library.opcheck(operator.default, arguments)


def test_compiles_to_one_graph():
    def run(segments, scores, groups):
        first = nms_1d(segments, scores, 0.5)
        second = batched_nms_1d(segments, scores, groups, 0.5)
        return first, second, *soft_nms_1d(segments, scores, **SOFT)

    segments, scores = random_case(60, 0, 20.0)
    arguments = (segments, scores, torch.arange(60) % 3)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for found, expected in zip(compiled(*arguments), run(*arguments), strict=True):
            assert torch.equal(found, expected)


def test_inputs_that_require_grad_give_plain_results(device):
    segments, scores = random_case(20, 0, 20.0, device=device)
    keep, new = soft_nms_1d(segments.requires_grad_(), scores.requires_grad_(), **SOFT)
    assert not keep.requires_grad and not new.requires_grad
    assert not nms_1d(segments, scores, 0.5).requires_grad


@pytest.mark.parametrize(
    ("segments", "scores", "threshold", "words"),
    [
        (torch.zeros(3), torch.zeros(3), 0.5, "segments must be"),
        (torch.zeros(3, 3), torch.zeros(3), 0.5, "segments must be"),
        (torch.zeros(3, 2), torch.zeros(4), 0.5, "scores must be"),
        (torch.zeros(3, 2), torch.zeros(3, 1), 0.5, "scores must be"),
        (torch.zeros(3, 2).cfloat(), torch.zeros(3), 0.5, "segments has dtype torch.complex64"),
        (torch.zeros(3, 2), torch.zeros(3).cfloat(), 0.5, "scores has dtype torch.complex64"),
        (torch.zeros(3, 2, device="meta"), torch.zeros(3), 0.5, "meta"),
        (torch.zeros(3, 2), torch.zeros(3), 1.5, "iou_threshold"),
        (torch.zeros(3, 2), torch.zeros(3), float("nan"), "iou_threshold"),
        (torch.full((3, 2), torch.nan), torch.zeros(3), 0.5, "NaN"),
        (torch.full((3, 2), torch.inf), torch.zeros(3), 0.5, "finite"),
        (torch.zeros(3, 2), torch.full((3,), torch.nan), 0.5, "NaN"),
    ],
)
def test_wrong_input(device, segments, scores, threshold, words):
    segments, scores = (x if x.device.type == "meta" else x.to(device) for x in (segments, scores))
    groups = torch.zeros(3, dtype=torch.int64, device=device)
    for call in (
        lambda: nms_1d(segments, scores, threshold),
        lambda: batched_nms_1d(segments, scores, groups, threshold),
        lambda: soft_nms_1d(segments, scores, iou_threshold=threshold, sigma=0.5, min_score=0.0),
    ):
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n", [900, 3000])
def test_the_kernels_name_the_first_bad_row(device, n):
    if backend_of("nms_1d", device.type) == "reference":
        pytest.skip("plain PyTorch only says that there is one")
    segments, scores = random_case(n, 0, 20.0)
    scores[n - 100], segments[470, 1], segments[n - 50, 0] = torch.nan, torch.inf, -torch.inf
    segments, scores = segments.to(device), scores.to(device)
    with pytest.raises(InputError, match="^nms_1d: .*row 470 "):
        nms_1d(segments, scores, 0.5)
    with pytest.raises(InputError, match="batched_nms_1d: .*row 470 "):
        batched_nms_1d(segments, scores, torch.arange(n, device=device) % 7, 0.0)
    with pytest.raises(InputError, match="soft_nms_1d: .*row 470 "):
        soft_nms_1d(segments, scores, **SOFT)


def test_wrong_options(device):
    segments, scores = random_case(3, 0, 1.0, device=device)
    with pytest.raises(InputError, match="groups"):
        batched_nms_1d(segments, scores, torch.zeros(2, dtype=torch.int64, device=device), 0.5)
    with pytest.raises(InputError, match="groups"):
        batched_nms_1d(segments, scores, torch.zeros(3, device=device), 0.5)
    for options in ({"sigma": 0.0}, {"sigma": 1e-50}, {"min_score": -1.0}, {"method": "cubic"}):
        with pytest.raises(InputError, match=next(iter(options))):
            soft_nms_1d(segments, scores, **({"iou_threshold": 0.5, "sigma": 0.5, "min_score": 0.0} | options))
