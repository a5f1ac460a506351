"""topk_pool and two_stream_tcam against loops over recordings."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2net.errors import InputError
from d2net.ops import topk_pool, two_stream_tcam


@given(
    b=st.integers(0, 4), t=st.integers(0, 30), c=st.integers(1, 5), divisor=st.integers(1, 9), seed=st.integers(0, 999)
)
@settings(max_examples=60, deadline=None)
def test_topk_pool_equals_topk_per_recording(b, t, c, divisor, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 6, (b, t, c), generator=g).double()  # many ties
    lengths = torch.randint(0, t + 1, (b,), generator=g)
    past = torch.arange(t) >= lengths[:, None]
    pooled = topk_pool(x.masked_fill(past[:, :, None], float("nan")), lengths, divisor=divisor)
    for i, s in enumerate(lengths.tolist()):
        k = max(1, math.ceil(s / divisor))
        expected = x[i, :s].topk(min(k, s), 0).values.mean(0) if s else torch.zeros(c).double()
        torch.testing.assert_close(pooled[i], expected)


def test_topk_pool_gradient_goes_to_the_earlier_of_equals():
    x = torch.ones(1, 16, 1, requires_grad=True)
    topk_pool(x).sum().backward()
    assert x.grad[0, :, 0].tolist() == [0.5, 0.5] + [0.0] * 14


def test_topk_pool_gradcheck():
    x = torch.randperm(2 * 20 * 3).view(2, 20, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: topk_pool(v, torch.tensor([20, 9])), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_topk_pool_accumulates_halves_in_float32(dtype):
    x = torch.full((1, 8 * 4096, 1), 0.1).to(dtype)
    assert topk_pool(x).item() == x[0, 0, 0].item()


def test_two_stream_tcam():
    a, b = torch.randn(2, 10, 3), torch.randn(2, 10, 3)
    lengths = torch.tensor([10, 4])
    out = two_stream_tcam(a, b, lengths)
    expected = (a.sigmoid() + b.sigmoid()) / 2
    expected[1, 4:] = 0
    torch.testing.assert_close(out.tcam, expected)
    torch.testing.assert_close(out.attention, expected.amax(2))
    torch.testing.assert_close(out.pooled, topk_pool(expected, lengths))


def test_clear_errors():
    x = torch.rand(2, 5, 3)
    for call, message in [
        (lambda: topk_pool(x[0]), "shape"),
        (lambda: topk_pool(x.long()), "dtype"),
        (lambda: topk_pool(x, divisor=0), "divisor"),
        (lambda: topk_pool(x, torch.tensor([1.0, 2.0])), "lengths"),
        (lambda: two_stream_tcam(x, x[:, :4]), "must match"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
