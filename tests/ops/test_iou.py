"""iou_1d."""

from __future__ import annotations

import pytest
import torch

from d2net.errors import InputError
from d2net.ops.iou import iou_1d


def test_hand_computed_cases():
    a = torch.tensor([[0.0, 10.0], [5.0, 15.0]])
    b = torch.tensor([[0.0, 10.0], [5.0, 10.0], [10.0, 20.0], [2.0, 2.0]])
    expected = torch.tensor([[1.0, 0.5, 0.0, 0.0], [1 / 3, 0.5, 1 / 3, 0.0]])
    torch.testing.assert_close(iou_1d(a, b), expected)


@pytest.mark.parametrize("segment", [[3.0, 3.0], [4.0, 1.0]], ids=["empty", "reversed"])
def test_an_empty_union_gives_zero_and_a_finite_gradient(segment):
    a = torch.tensor([segment], requires_grad=True)
    iou = iou_1d(a, a.detach())
    assert iou.item() == 0
    (gradient,) = torch.autograd.grad(iou.sum(), a)
    assert gradient.isfinite().all()


def test_a_reversed_segment_is_empty_and_nan_propagates():
    b = torch.tensor([[0.0, 4.0]])
    assert iou_1d(torch.tensor([[3.0, 1.0]]), b).item() == 0
    assert iou_1d(torch.tensor([[float("nan"), 1.0]]), b).isnan().all()


def test_symmetry_bounds_and_shift_invariance():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 50, (n, 2), generator=generator).sort(dim=1).values for n in (17, 23))
    iou = iou_1d(a, b)
    assert iou.shape == (17, 23) and iou.dtype == torch.float64
    assert ((iou >= 0) & (iou <= 1)).all()
    assert torch.equal(iou, iou_1d(b, a).T)
    assert torch.equal(iou, iou_1d(a + 1000, b + 1000))


def test_half_precision_is_computed_in_float32():
    a = torch.tensor([[0.0, 3.0]], dtype=torch.float16)
    assert iou_1d(a, torch.tensor([[0, 1]])).dtype == torch.float32


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
def test_no_segments(n, m):
    assert iou_1d(torch.zeros(n, 2), torch.zeros(m, 2)).shape == (n, m)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (1, 4, 2)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(InputError, match="a has shape"):
        iou_1d(torch.zeros(shape), torch.zeros(1, 2))
    with pytest.raises(InputError, match="b has shape"):
        iou_1d(torch.zeros(1, 2), torch.zeros(shape))
