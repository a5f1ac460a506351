"""The CUDA kernels run on CPU tensors through the operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from d2net.ops import _native, backend_of, batched_nms_1d, extract_proposals, nms, nms_1d


def _case(n: int, dtype: torch.dtype, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    start = torch.rand(n, generator=generator, dtype=dtype) * 50
    length = torch.exp2(torch.rand(n, generator=generator, dtype=dtype) * 5)
    scores = torch.rand(n, generator=generator, dtype=dtype)
    return torch.stack([start, start + length], 1), scores, torch.randint(groups, (n,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 700])
def test_nms_equals_the_cpu(simt_module, request, n, dtype):
    segments, scores, groups = _case(n, dtype, 5)
    thresholds = [0.0, 0.3, 1.0]
    expected = [(nms_1d(segments, scores, t), batched_nms_1d(segments, scores, groups, t)) for t in thresholds]
    request.getfixturevalue("simt_kernels")
    for threshold, (alone, batched) in zip(thresholds, expected, strict=True):
        assert torch.equal(nms_1d(segments, scores, threshold), alone)
        assert torch.equal(batched_nms_1d(segments, scores, groups, threshold), batched)


def test_the_cuda_function_runs(simt_module, request, monkeypatch):
    segments, scores, groups = _case(50, torch.float32, 2)
    calls = []
    request.getfixturevalue("simt_kernels")
    kernels = _native.cuda
    monkeypatch.setattr(_native, "cuda", lambda *args: calls.append(args[0]) or kernels(*args))
    assert batched_nms_1d(segments, scores, groups, 0.5).numel() > 0
    assert calls == ["nms_1d_block"]


def test_the_cpu_kernel_is_back_afterwards(monkeypatch):
    monkeypatch.setattr(_native, "cuda", None)
    assert backend_of("batched_nms_1d", "cpu") == "cpu"
    assert batched_nms_1d(*_case(50, torch.float32, 2), 0.5).numel() > 0


def test_a_refused_launch_is_an_error_that_names_the_operator(simt_kernels):
    memory = torch.empty(1024, dtype=torch.int64)
    address = memory.data_ptr()
    n, inputs, scratch, outputs = 2**40, [address] * 3, [address, 8 * 1024], [address] * 2
    with pytest.raises(RuntimeError, match=r"batched_nms_1d on CUDA device -1: grid 4294967296x1x1, block 256x1x1"):
        simt_kernels.cuda_nms_1d_float32(*inputs, n, 0.5, *scratch, *outputs, -1, 0)


# Schedules of blocks: resident_blocks, seed (0: in turn). With one resident block each must end without the next.
SCHEDULES = [(1, 0), (1, 1), (2, 2), (3, 0), (32, 0), (32, 3)]


@pytest.fixture
def schedule(simt_module) -> Iterator[Callable[[int, int], None]]:
    yield simt_module.set_schedule
    simt_module.set_schedule()


def _adversaries() -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]:
    """Segments, scores, groups and a threshold with which many warps wait for few others."""
    step, generator = torch.arange(160.0), torch.Generator().manual_seed(0)
    chain = torch.stack([step, step + 1.5], 1)
    mixed = torch.randperm(160, generator=generator)
    dense, scores, groups = _case(300, torch.float32, 3)
    several, several_scores, several_groups = _case(2300, torch.float32, 40)  # more than one prefix
    return {
        "chain": (chain, -step, groups[:160], 0.2),
        "chain of equal scores": (chain[mixed], torch.zeros(160), groups[:160], 0.2),
        "copies": (torch.ones(160, 1) * torch.tensor([1.0, 2.0]), torch.zeros(160), groups[:160], 1.0),
        "dense": (dense, (scores * 5).floor(), groups, 0.5),
        "all overlap": (torch.stack([-step - 1, step + 1], 1), step[mixed], groups[:160], 0.0),
        "prefixes": (several, several_scores, several_groups, 0.05),
    }


@pytest.mark.parametrize(("resident_blocks", "seed"), SCHEDULES)
def test_nms_does_not_depend_on_the_schedule(schedule, request, monkeypatch, resident_blocks, seed):
    monkeypatch.setattr(nms, "_BLOCK_LIMIT", dict.fromkeys(nms._BLOCK_LIMIT, 0))  # never the one-block kernel
    cases = _adversaries()
    expected = {name: (nms_1d(s, x, t), batched_nms_1d(s, x, g, t)) for name, (s, x, g, t) in cases.items()}
    request.getfixturevalue("simt_kernels")
    schedule(resident_blocks, seed)
    for name, (segments, scores, groups, threshold) in cases.items():
        alone, batched = expected[name]
        assert torch.equal(nms_1d(segments, scores, threshold), alone), name
        assert torch.equal(batched_nms_1d(segments, scores, groups, threshold), batched), name


@pytest.mark.parametrize(("resident_blocks", "seed"), SCHEDULES)
def test_proposals_do_not_depend_on_the_schedule(schedule, request, resident_blocks, seed):
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(4, 100, 12, generator=generator) - 0.5).cumsum(1) / 4  # 48 sequences, more than blocks
    classes = torch.rand(4, 12, generator=generator) < 0.8
    thresholds = [0.1 * i for i in range(1, 10)]
    expected = extract_proposals(x, classes, thresholds=thresholds)
    assert len(expected.score) > 100
    request.getfixturevalue("simt_kernels")
    schedule(resident_blocks, seed)
    for found, e in zip(extract_proposals(x, classes, thresholds=thresholds), expected, strict=True):
        assert torch.equal(found, e)


def test_a_schedule_that_cannot_be(schedule):
    for resident_blocks in (0, 33):
        with pytest.raises(RuntimeError, match="1 to 32 blocks"):
            schedule(resident_blocks, 0)
