"""iou_1d on every backend."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch

from d2net.errors import InputError
from d2net.ops import iou_1d
from d2net.ops.iou import iou_1d_ref


def test_hand_computed_cases(device):
    a = torch.tensor([[0.0, 10.0], [5.0, 15.0]], device=device)
    b = torch.tensor([[0.0, 10.0], [5.0, 10.0], [10.0, 20.0], [2.0, 2.0]], device=device)
    expected = torch.tensor([[1.0, 0.5, 0.0, 0.0], [1 / 3, 0.5, 1 / 3, 0.0]], device=device)
    torch.testing.assert_close(iou_1d(a, b), expected)


@pytest.mark.parametrize("segment", [[3.0, 3.0], [4.0, 1.0]], ids=["empty", "reversed"])
def test_an_empty_union_gives_zero_and_a_finite_gradient(device, segment):
    a = torch.tensor([segment], requires_grad=True, device=device)
    iou = iou_1d(a, a.detach())
    assert iou.item() == 0
    (gradient,) = torch.autograd.grad(iou.sum(), a)
    assert gradient.isfinite().all()


def test_a_reversed_segment_is_empty_and_nan_propagates(device):
    b = torch.tensor([[0.0, 4.0]], device=device)
    assert iou_1d(torch.tensor([[3.0, 1.0]], device=device), b).item() == 0
    for broken in ([float("nan"), 1.0], [0.0, float("nan")]):
        x = torch.tensor([broken], device=device)
        assert iou_1d(x, b).isnan().all() and iou_1d(b, x).isnan().all()


# Products of these under- and overflow, and so do some of their differences.
EXTREME = {
    torch.float32: [0.0, 1e-45, 3e-45, 1e-40, 5e-39, 1e-30, 1e-23, 2e-23, 3e-23, 1.0, 3.0, 1e19, 1e30, 1.6e38, 3e38],
    torch.float64: [
        0.0,
        5e-324,
        2e-323,
        1e-310,
        3e-308,
        1e-200,
        1e-160,
        2e-160,
        1.0,
        3.0,
        1e154,
        1e300,
        8e307,
        1.6e308,
    ],
}


def extreme_segments(dtype):
    numbers = EXTREME[dtype]
    return torch.tensor([*itertools.product([-numbers[-1], -numbers[-6], *numbers], numbers)], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_and_the_largest_segments(device, dtype):
    x = extreme_segments(dtype)
    iou = iou_1d(x.to(device), x.to(device)).cpu()
    assert ((iou >= 0) & (iou <= 1)).all() and torch.equal(iou, iou.T)
    exact = [(Fraction(s), Fraction(e)) for s, e in x.tolist()]
    largest, eps = Fraction(torch.finfo(dtype).max), torch.finfo(dtype).eps
    some = range(0, len(x), 5)
    for i, j in itertools.product(some, some):
        (a, b), (c, d) = exact[i], exact[j]
        lengths = max(b - a, 0) + max(d - c, 0)
        overlap = max(min(b, d) - max(a, c), 0) if lengths <= largest else 0
        expected = float(overlap / (lengths - overlap)) if overlap else 0.0
        assert iou[i, j].item() == pytest.approx(expected, rel=4 * eps, abs=torch.finfo(dtype).tiny)


def test_endless_segments_overlap_nothing_and_only_nan_gives_nan(device):
    ends = [-math.inf, -1.0, 0.0, 2.0, math.inf, math.nan]
    x = torch.tensor([*itertools.product(ends, ends)], device=device)
    iou, broken = iou_1d(x, x), x.isnan().any(1)
    assert torch.equal(iou.isnan(), broken[:, None] | broken)
    endless = x.isinf().any(1) & ~broken
    assert not iou[endless][:, ~broken].any() and not iou[:, endless][~broken].any()
    finite = x[~broken & ~endless].requires_grad_()
    (gradient,) = torch.autograd.grad(iou_1d(finite, x[endless]).sum(), finite)
    assert not gradient.any()


@pytest.mark.parametrize("exponent", [-148, -128, -120, -76, -40, 60, 120])
def test_the_gradient_of_the_smallest_and_the_largest_segments(device, exponent):
    """The gradient is that at ordinary lengths, divided by the scale, and 0 where 1 / union overflows."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 9, (n, 2), generator=generator).sort(1).values for n in (9, 7))
    a, b = a[a[:, 0] < a[:, 1]], b[b[:, 0] < b[:, 1]]
    wide = [x.double().to(device).requires_grad_() for x in (a, b)]
    expected = torch.autograd.grad(iou_1d(*wide).sum(), wide)
    narrow = [torch.ldexp(x.float(), torch.tensor(exponent)).to(device).requires_grad_() for x in (a, b)]
    iou = iou_1d(*narrow)
    torch.testing.assert_close(iou.double(), iou_1d(*wide), rtol=1e-6, atol=0)
    for found, wanted in zip(torch.autograd.grad(iou.sum(), narrow), expected, strict=True):
        if exponent < -126 - 4:
            assert not found.any()
        elif exponent >= -120:
            torch.testing.assert_close(
                torch.ldexp(found.double(), torch.tensor(exponent, device=device)), wanted, rtol=1e-5, atol=1e-6
            )
        assert not found.isnan().any()  # Inf where the sum overflows


def test_symmetry_bounds_and_shift_invariance(device):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 50, (n, 2), generator=generator).sort(dim=1).values.to(device) for n in (17, 23))
    iou = iou_1d(a, b)
    assert iou.shape == (17, 23) and iou.dtype == torch.float64
    assert ((iou >= 0) & (iou <= 1)).all()
    assert torch.equal(iou, iou_1d(b, a).T)
    assert torch.equal(iou, iou_1d(a + 1000, b + 1000))


def test_half_precision_is_computed_in_float32(device):
    a = torch.tensor([[0.0, 3.0]], dtype=torch.float16, device=device)
    assert iou_1d(a, torch.tensor([[0, 1]], device=device)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(9, 300), (70, 1), (65, 32), (17, 33), (1, 256), (3, 257)])
def test_equals_the_reference_for_any_numbers_of_segments(device, n, m, dtype):
    generator = torch.Generator().manual_seed(n)
    a, b = (10 * torch.rand(size, 2, generator=generator, dtype=dtype) for size in (n, m))  # half of them reversed
    a[-1, 0] = float("nan")
    expected = iou_1d_ref(a, b)
    assert torch.equal(iou_1d(a.to(device), b.to(device)).cpu().nan_to_num(-1), expected.nan_to_num(-1))


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
def test_no_segments(device, n, m):
    assert iou_1d(torch.zeros(n, 2, device=device), torch.zeros(m, 2, device=device)).shape == (n, m)


def test_views_are_read_by_their_strides(device):
    wide = torch.rand(9, 4, generator=torch.Generator().manual_seed(0)).to(device)
    a, b = wide[:, 1:3], wide[::2, ::3]
    torch.testing.assert_close(iou_1d(a, b), iou_1d(a.contiguous(), b.contiguous()))


def test_gradient(device):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(n, 2, generator=generator, dtype=torch.float64).sort(1).values.to(device) for n in (4, 3))
    assert torch.autograd.gradcheck(iou_1d, (a.requires_grad_(), b.requires_grad_()))


def test_gradient_equals_that_of_the_reference(device):
    generator = torch.Generator().manual_seed(0)
    # Whole numbers: many equal ends, empty and reversed segments.
    a, b = (torch.randint(0, 5, (n, 2), generator=generator).double().to(device).requires_grad_() for n in (30, 20))
    grad = torch.rand(30, 20, generator=generator, dtype=torch.float64).to(device)
    expected = torch.autograd.grad(iou_1d_ref(a, b), (a, b), grad)
    torch.testing.assert_close(torch.autograd.grad(iou_1d(a, b), (a, b), grad), expected)


def test_a_second_derivative_is_refused():
    a = torch.tensor([[0.0, 2.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(iou_1d(a, torch.tensor([[1.0, 3.0]])).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(gradient.sum(), a)


def test_registration():
    a, b = torch.rand(4, 2, requires_grad=True), torch.rand(3, 2)
    torch.library.opcheck(torch.ops.d2net.iou_1d.default, (a, b))


def test_compiles_to_one_graph():
    a, b = torch.rand(4, 2), torch.rand(3, 2)
    torch.testing.assert_close(torch.compile(iou_1d, fullgraph=True, backend="aot_eager")(a, b), iou_1d(a, b))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_number_of_threads_does_not_matter(threads):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(999, 2, generator=generator), torch.rand(501, 2, generator=generator)
    expected, before = iou_1d(a, b), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(iou_1d(a, b), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (1, 4, 2)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(InputError, match="a has shape"):
        iou_1d(torch.zeros(shape), torch.zeros(1, 2))
    with pytest.raises(InputError, match="b has shape"):
        iou_1d(torch.zeros(1, 2), torch.zeros(shape))


def test_gradients_lie_as_the_fake_kernel_says():
    s = torch.rand(7)
    a, b = torch.stack((s, s + 1)).T, torch.rand(3, 2).sort(1).values
    for found in torch.ops.d2net.iou_1d_backward(torch.rand(7, 3), a, b):
        assert found.is_contiguous()
