"""On a GPU: streams, several devices, memory that runs out, tensors on different devices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d2net import ops
from d2net.errors import InputError
from d2net.losses import D2NetLoss

pytestmark = pytest.mark.gpu


def batch(device: str = "cuda") -> list[Tensor]:
    """TCAM, embeddings, lengths, labels."""
    generator = torch.Generator().manual_seed(0)
    tcam, embeddings = torch.rand(4, 300, 5, generator=generator), torch.randn(4, 300, 64, generator=generator)
    lengths, labels = torch.tensor([300, 170, 0, 31]), torch.eye(5)[:4]
    return [x.to(device) for x in (tcam, embeddings, lengths, labels)]


def prepare(inputs: list[Tensor]) -> tuple[D2NetLoss, list[Tensor], Tensor]:
    """What :func:`run` needs; waits for the device."""
    loss = D2NetLoss(5, 64).to(inputs[0].device)
    return loss, [x.clone().requires_grad_() for x in inputs[:2]], torch.tensor([1, 2, 3, 0], device=inputs[0].device)


def run(loss: D2NetLoss, leaves: list[Tensor], partners: Tensor, lengths: Tensor, labels: Tensor) -> list[Tensor]:
    total = loss(*leaves, lengths, labels, partners).total
    return [total.detach(), loss.reference, *torch.autograd.grad(total, leaves)]


def loss_and_gradients(inputs: list[Tensor]) -> list[Tensor]:
    return [x.cpu() for x in run(*prepare(inputs), *inputs[2:])]


def test_another_stream_is_used_and_kept():
    inputs = batch()
    expected = loss_and_gradients(inputs)
    loss, leaves, partners = prepare([torch.zeros_like(x) for x in inputs])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # whoever used another stream would read zeros
        with torch.no_grad():
            for leaf, x in zip(leaves, inputs, strict=False):
                leaf.copy_(x)
        results = run(loss, leaves, partners, *inputs[2:])
        assert torch.cuda.current_stream() == stream
        found = [x.cpu() for x in results]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_the_tensors_device_is_used_and_the_callers_kept():
    expected = loss_and_gradients(batch())
    found = loss_and_gradients(batch("cuda:1"))
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with torch.cuda.device(1):
        loss_and_gradients(batch("cuda:0"))
        assert torch.cuda.current_device() == 1


def test_memory_that_runs_out_is_an_error_and_breaks_nothing():
    expected = loss_and_gradients(batch())
    x = torch.rand(1, 1000, 4096, device="cuda").expand(64, -1, -1)  # a contiguous copy of it takes 1 GiB
    torch.cuda.empty_cache()
    used = torch.cuda.memory_reserved() + 2**28
    torch.cuda.set_per_process_memory_fraction(used / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            ops.topk_pool(x)
        segments = torch.rand(2**24, 2, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            ops.nms_1d(segments, segments[:, 0], 0.5)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(loss_and_gradients(batch()), expected, rtol=1e-5, atol=1e-6)


def test_tensors_on_different_devices_are_named():
    tcam, embeddings, lengths, labels = batch()
    loss = D2NetLoss(5, 64).cuda()
    segments, scores = torch.rand(3, 2, device="cuda"), torch.rand(3, device="cuda")
    for call in (
        lambda: ops.topk_pool(tcam, lengths.cpu()),
        lambda: ops.tcam_pool(tcam, lengths.cpu()),
        lambda: ops.attention_pool(embeddings, tcam[..., 0].cpu()),
        lambda: ops.bottom_up_attention(embeddings, torch.rand(64)),
        lambda: ops.joint_log_condition_number(tcam, tcam.mT.cpu()),
        lambda: ops.snippet_pdmi(tcam[..., 0], tcam[..., 1].cpu()),
        lambda: ops.extract_proposals(tcam, torch.ones(4, 5, dtype=torch.bool), thresholds=[0.5]),
        lambda: ops.nms_1d(segments, scores.cpu(), 0.5),
        lambda: ops.batched_nms_1d(segments, scores, torch.zeros(3, dtype=torch.int64), 0.5),
        lambda: ops.soft_nms_1d(segments.cpu(), scores, iou_threshold=0.5, sigma=0.5, min_score=0.1),
        lambda: ops.iou_1d(segments, segments.cpu()),
        lambda: loss(tcam, embeddings.cpu(), lengths, labels),
        lambda: loss(tcam, embeddings, lengths, labels.cpu()),
        lambda: D2NetLoss(5, 64)(tcam, embeddings, lengths, labels),
    ):
        with pytest.raises(InputError, match="on cuda|on cpu"):
            call()
