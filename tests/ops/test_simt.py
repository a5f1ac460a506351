"""The CUDA kernels run on CPU tensors through the operators."""

from __future__ import annotations

import pytest
import torch

from d2net.ops import _library, _native, batched_nms_1d, nms_1d


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
    assert _library.backend("batched_nms_1d", "cpu") == "cpu"
    assert batched_nms_1d(*_case(50, torch.float32, 2), 0.5).numel() > 0


def test_a_refused_launch_is_an_error_that_names_the_operator(simt_kernels):
    memory = torch.empty(1024, dtype=torch.int64)
    address = memory.data_ptr()
    n, inputs, scratch, outputs = 2**40, [address] * 3, [address, 8 * 1024], [address] * 2
    with pytest.raises(RuntimeError, match=r"batched_nms_1d on CUDA device -1: grid 4294967296x1x1, block 256x1x1"):
        simt_kernels.cuda_nms_1d_float32(*inputs, n, 0.5, *scratch, *outputs, -1, 0)
