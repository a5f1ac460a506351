"""Launches of CUDA kernels: how many there are, and the shared memory that they request."""

from __future__ import annotations

import itertools

import pytest
import torch

from d2net.errors import D2NetError
from d2net.losses import D2NetLoss
from d2net.ops import _native, attention_pool, condition_number, nms, proposals, runs_on


@pytest.fixture(params=["simt", pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda_device(request) -> torch.device:
    if request.param == "simt":
        request.getfixturevalue("simt_kernels")
    return torch.device("cpu" if request.param == "simt" else "cuda")


# A launch that needs more than 48 KiB of shared memory, with static arrays, must request it. Without static arrays
# these sizes are just below 48 KiB: 49144 bytes of proposals' working memory, 48960 of a matrix, 49000 of scores.


def test_proposals_just_below_48_kib(cuda_device):
    x = torch.rand(1, 1531, 2, generator=torch.Generator().manual_seed(0))
    settings = {"thresholds": (0.3, 0.6, 0.9), "nms_iou": 0.5}
    classes = torch.ones(1, 2, dtype=torch.bool)
    found = proposals.extract_proposals(x.to(cuda_device), classes.to(cuda_device), **settings)
    expected = proposals.extract_proposals_ref(x, classes, **settings)
    assert torch.equal(found.start.cpu(), expected.start) and torch.equal(found.end.cpu(), expected.end)


def test_matrices_just_below_48_kib(cuda_device):
    u = torch.rand(2, 76, 68, generator=torch.Generator().manual_seed(0))
    found = condition_number.log_condition_number(u.to(cuda_device)).cpu()
    torch.testing.assert_close(found, condition_number.log_condition_number_ref(u), rtol=1e-4, atol=1e-5)


def test_soft_nms_just_below_48_kib(cuda_device):
    x = torch.rand(12250, 2, generator=torch.Generator().manual_seed(0))
    segments, settings = torch.stack((1000 * x[:, 0], 1000 * x[:, 0] + 5), 1), (0.5, 0.5, 0.98, False)
    keep, scores = nms.soft_nms_1d(
        segments.to(cuda_device), x[:, 1].to(cuda_device), iou_threshold=0.5, sigma=0.5, min_score=0.98, method="linear"
    )
    expected, expected_scores = nms._soft_nms_1d_cpu(segments, x[:, 1], *settings)
    assert torch.equal(keep.cpu(), expected)
    torch.testing.assert_close(scores.cpu(), expected_scores)


def test_a_launch_that_cannot_be_names_operator_and_sizes_and_breaks_nothing(cuda_device):
    x, attention = torch.ones(1, 1, 128 * 65535 + 1, device=cuda_device), torch.ones(1, 1, device=cuda_device)
    with pytest.raises(RuntimeError, match=r"attention_pool .*grid 1x65536x1, block 128x1x1.*must be within"):
        attention_pool(x, attention)
    assert attention_pool(x[:, :, :3], attention).x_fg.tolist() == [[1, 1, 1]]
    segments = torch.tensor([[0.0, 2], [1, 3], [7, 8]], device=cuda_device)
    assert nms.nms_1d(segments, torch.tensor([0.1, 0.3, 0.2], device=cuda_device), 0.3).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("recipe", "sizes", "forward", "backward"),
    [
        # Pooling of the TCAM, U_2, pooling of embeddings, Eq. 3 and 4, Eq. 8 and 9.
        ("thumos14-paper", (3, 50, 20, 64), 5, 2),
        ("thumos14-release", (3, 50, 20, 64), 5, 2),
        ("activitynet12-paper", (3, 50, 100, 64), 5, 2),
        ("thumos14-paper", (70, 2, 100, 8), 5, 2),
        ("thumos14-paper", (1, 17000, 2, 8), 5, 2),  # the TCAM is too long for registers
    ],
)
def test_the_loss_takes_few_launches(simt_kernels, recipe, sizes, forward, backward):
    b, t, c, d = sizes
    loss, generator = D2NetLoss.from_recipe(recipe, num_classes=c, embedding_dim=d), torch.Generator().manual_seed(0)
    leaves = [torch.rand(b, t, n, generator=generator).requires_grad_() for n in (c, d)]
    counts = [simt_kernels.enqueued()]
    total = loss(*leaves, None, torch.ones(b, c)).total
    counts.append(simt_kernels.enqueued())
    torch.autograd.grad(total, leaves)
    counts.append(simt_kernels.enqueued())
    assert [y - x for x, y in itertools.pairwise(counts)] == [forward, backward]


@pytest.mark.parametrize(
    ("archs", "runs", "does_not"),
    [
        ("75-real 80-real 90", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], [(7, 0), (6, 1)]),
        ("80-real", [(8, 0), (8, 6)], [(7, 5), (9, 0)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0)]),
        ("80-virtual", [(8, 0), (9, 0)], [(7, 5)]),
        ("90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("100f-virtual", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("native", [(7, 0), (9, 0)], []),
        ("", [], [(9, 0)]),
    ],
)
def test_which_chips_kernels_run_on(archs, runs, does_not):
    assert all(runs_on(archs, chip) for chip in runs)
    assert not any(runs_on(archs, chip) for chip in does_not)


@pytest.mark.parametrize(
    ("capability", "driver", "said"),
    [
        ((7, 0), 13000, r"built for CUDA architectures 80-real, Tesla V100 is 7.0: .*ARCHITECTURES=70"),
        ((8, 0), 12080, r"built with CUDA 13, its driver is for CUDA 12.8: update the driver, or build"),
    ],
)
def test_what_keeps_kernels_from_a_gpu_is_said_before_the_launch(monkeypatch, capability, driver, said):
    built = {"cuda": True, "cuda_archs": "80-real", "cuda_compiler": "nvcc 13.0.88"}
    monkeypatch.setattr(_native, "build_info", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    with pytest.raises(D2NetError, match=rf"do not run on cuda:5: they were {said}"):
        _native.cuda("topk_pool", torch.float32, torch.device("cuda:5"))


@pytest.mark.parametrize("driver", [13000, 13020, 14000])
def test_a_newer_driver_runs_the_kernels(monkeypatch, driver):
    built = {"cuda": True, "cuda_archs": "80-real", "cuda_compiler": "nvcc 13.0.88"}
    monkeypatch.setattr(_native, "build_info", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    assert _native.obstacle(torch.device("cuda:0")) == ""
