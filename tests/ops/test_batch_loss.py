"""What the loss sums over the recordings of a batch, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from d2net.ops.batch_loss import total_loss, update_reference, video_factors


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def batch(b: int, c: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return uniform(b, c, dtype=dtype), (uniform(b, c, seed=1) > 0.6).to(dtype), uniform(b, seed=2) > 0.3


@pytest.mark.parametrize("peak_share", [None, 0.0, 0.2, 0.9])
@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize(("b", "c"), [(1, 1), (4, 3), (10, 20), (3, 300), (300, 5)])
def test_video_factors_equal_equation_10(device, peak_share, per_class, b, c):
    pooled, labels, counted = batch(b, c)
    pooled[0, 0] = 0.0  # is clamped
    p, y = video_factors(
        pooled.to(device),
        labels.to(device),
        counted.to(device),
        probability_floor=1e-3,
        peak_share=peak_share,
        per_class=per_class,
    )
    expected_p, expected_y = torch.zeros(c, b).double(), torch.zeros(b, c).double()
    for i in range(b):
        row = [min(max(x, 1e-3), 1 - 1e-3) for x in pooled[i].tolist()]
        if peak_share is not None:
            kept = [x if x > peak_share * max(row) else 0.0 for x in row]
            row = [x / sum(kept) for x in kept]
        for k in range(c):
            expected_p[k, i] = row[k]
            size = sum(labels[j, k].item() for j in range(b) if counted[j]) if per_class else int(counted.sum())
            expected_y[i, k] = labels[i, k] / max(size, 1) if counted[i] else 0.0
    torch.testing.assert_close((p.cpu(), y.cpu()), (expected_p, expected_y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("peak_share", [None, 0.5])
def test_gradient_of_the_factors(device, peak_share):
    pooled, labels, counted = (x.to(device) for x in batch(4, 5))
    pooled = 0.1 + 0.8 * pooled
    assert torch.autograd.gradcheck(
        lambda x: video_factors(x, labels, counted, peak_share=peak_share)[0], pooled.requires_grad_()
    )
    edge = torch.tensor([[0.0, 1.0, 0.5]], device=device, requires_grad=True)
    video_factors(edge, torch.ones(1, 3, device=device), torch.ones(1, device=device).bool())[0].sum().backward()
    assert edge.grad.tolist() == [[0, 0, 1]]  # clamped scores have none


def test_factors_of_a_nan(device):
    pooled, labels, counted = (x.to(device) for x in batch(3, 4))
    pooled[1, 2] = math.nan
    for share in (None, 0.2):
        p, _ = video_factors(pooled, labels, counted, peak_share=share)
        assert p[:, 1].isnan().any() and p[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("b", [1, 2, 10, 700])
def test_total_is_the_weighted_sum_of_means(device, b):
    dis, snippet, video = uniform(b), uniform(b, seed=1), torch.tensor(0.7, dtype=torch.float64)
    counted, valid = uniform(b, seed=2) > 0.3, uniform(b, seed=3) > 0.5
    snippet[~valid] = math.nan  # does not count
    to = [x.to(device) for x in (dis, counted, snippet, valid, video)]
    weights = {"alpha_snippet": 0.2, "alpha_video": 0.3, "weight": 0.4}
    total, mean, snippet_mean, *rest = total_loss(*to, 2 * to[-1], **weights)
    expected = dis[counted].mean().item() if counted.any() else 0.0
    of_snippets = snippet[valid].mean().item() if valid.any() else 0.0
    assert mean.item() == pytest.approx(expected) and snippet_mean.item() == pytest.approx(of_snippets)
    assert [x.item() for x in rest] == [0.7, 1.4]
    assert total.item() == pytest.approx(expected + 0.2 * of_snippets + 0.3 * 0.7 + 0.4 * 1.4)
    alone = total_loss(*to[:2], **weights)
    assert alone.total.item() == alone.discriminative.item() == mean.item()
    assert alone.snippet.item() == alone.video.item() == alone.other.item() == 0
    assert total_loss(*to[:3], **weights).total.item() == mean.item()  # terms without saying which count


def test_gradient_of_the_total(device):
    dis, snippet, video, other = (uniform(n, seed=n).to(device).requires_grad_() for n in (6, 6, 1, 1))
    counted = torch.tensor([1, 1, 0, 1, 0, 1], device=device).bool()

    def function(d, s, v, o):
        weights = {"alpha_snippet": 0.2, "alpha_video": 0.3, "weight": 0.4}
        return total_loss(d, counted, s, ~counted, v.view(()), o.view(()), **weights)

    assert torch.autograd.gradcheck(function, (dis, snippet, video, other))
    assert torch.autograd.gradcheck(lambda d: total_loss(d, counted).total, dis)
    assert torch.autograd.gradcheck(lambda v: total_loss(dis, counted, video=v.view(()), alpha_video=0.5).total, video)
    assert torch.autograd.gradcheck(lambda s: total_loss(dis, counted, s, counted).snippet, snippet)


def test_over_nothing_it_is_zero(device):
    dis = uniform(3).to(device).requires_grad_()
    nothing = torch.zeros(3, dtype=torch.bool, device=device)
    total = total_loss(dis, nothing).total
    total.backward()
    assert total.item() == 0 and (dis.grad == 0).all()
    empty = torch.zeros(0, device=device, requires_grad=True)
    assert total_loss(empty, nothing[:0]).total.item() == 0


@pytest.mark.parametrize(("b", "d"), [(1, 1), (4, 33), (10, 1024)])
def test_the_reference_moves_towards_the_mean(device, b, d):
    start, background, valid = uniform(d), uniform(b, d, seed=1), uniform(b, seed=2) > 0.4
    valid[0] = True
    background[~valid] = math.nan
    updated = start.to(device, copy=True)
    update_reference(updated, background.to(device), valid.to(device), 0.9)
    torch.testing.assert_close(updated.cpu(), 0.9 * start + 0.1 * background[valid].mean(0))
    unchanged = start.to(device, copy=True)
    update_reference(unchanged, background.to(device), torch.zeros_like(valid).to(device), 0.9)
    assert torch.equal(unchanged.cpu(), start)
    both = torch.stack((start, start), 1).to(device)
    update_reference(both[:, 0], background.to(device), valid.to(device), 0.9)
    assert torch.equal(both[:, 0], updated) and torch.equal(both[:, 1], unchanged)
    half = start.to(device).bfloat16()
    update_reference(half, background.to(device), valid.to(device), 0.9)
    torch.testing.assert_close(half.double(), updated, rtol=2e-2, atol=2e-2)


def test_autograd_sees_that_the_reference_changed(device):
    reference, weight = uniform(3).to(device), torch.ones(3, dtype=torch.float64, device=device, requires_grad=True)
    product = (weight * reference).sum()
    update_reference(reference, uniform(2, 3).to(device), torch.ones(2, dtype=torch.bool, device=device), 0.9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_recordings_count_by_their_lengths(device):
    pooled, labels, _ = (x.to(device) for x in batch(5, 4))
    lengths = torch.tensor([3, 0, 7, -1, 1], device=device)
    for found, expected in (
        (video_factors(pooled, labels, lengths), video_factors(pooled, labels, lengths > 0)),
        (total_loss(pooled[:, 0], lengths), total_loss(pooled[:, 0], lengths > 0)),
    ):
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(device, dtype):
    pooled, labels, counted = (x.to(device) for x in batch(4, 3, dtype))
    p, y = video_factors(pooled, labels, counted)
    assert p.dtype == y.dtype == torch.float32
    torch.testing.assert_close((p, y), video_factors(pooled.float(), labels.float(), counted), rtol=0, atol=0)


def test_terms_of_several_types(device):
    dis, snippet, video = (uniform(n, seed=n).to(device) for n in (6, 6, 1))
    counted = torch.ones(6, dtype=torch.bool, device=device)
    weights = {"alpha_snippet": 0.2, "alpha_video": 0.3, "weight": 0.4}
    whole = total_loss(dis, counted, snippet, counted, video[0], video[0], **weights)
    mixed = total_loss(dis.float(), counted, snippet, counted, video[0], video[0].bfloat16(), **weights)
    half = total_loss(dis.half(), counted, snippet, counted, video[0], video[0], **weights)
    for found, tolerance in ((mixed, 1e-2), (half, 1e-2)):
        assert found.total.dtype == torch.float32
        torch.testing.assert_close(found.total.double(), whole.total, rtol=tolerance, atol=tolerance)


def test_opcheck_and_double_backward():
    pooled, labels, counted = batch(4, 3)
    pooled.requires_grad_()
    op = torch.ops.d2net
    for share in (-1.0, 0.2):
        torch.library.opcheck(op.video_factors, (pooled, labels, counted, 1e-6, share, False))
    dis, snippet = (uniform(4, seed=s).requires_grad_() for s in (1, 2))
    torch.library.opcheck(op.total_loss, (dis, counted, snippet, counted, dis.detach()[0].clone(), None, 0.1, 0.2, 0.3))
    torch.library.opcheck(op.total_loss, (dis, counted, None, None, None, None, 0.1, 0.2, 0.3))
    torch.library.opcheck(op.update_reference, (uniform(5), uniform(4, 5), counted, 0.9))
    for value, leaf in ((total_loss(dis, counted).total, dis), (video_factors(pooled, labels, counted)[0], pooled)):
        (gradient,) = torch.autograd.grad(value.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            gradient.sum().backward()
