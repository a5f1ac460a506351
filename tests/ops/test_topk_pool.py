"""topk_pool on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2net.errors import InputError
from d2net.ops import topk_pool

NAN, INF = float("nan"), float("inf")


def by_sorting(x: torch.Tensor, lengths: list[int], divisor: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled scores and their gradient, column by column, with Python's sort."""
    b, t, c = x.shape
    pooled, gradient = torch.zeros(b, c, dtype=torch.float64), torch.zeros(b, t, c, dtype=torch.float64)
    for i, length in enumerate(lengths):
        k = max(1, math.ceil(length / divisor))
        for j in range(c):
            column = x[i, :length, j].tolist()
            nans = [s for s in range(length) if math.isnan(column[s])]
            numbers = sorted((s for s in range(length) if not math.isnan(column[s])), key=lambda s: (-column[s], s))
            order = (nans + numbers)[:k]
            pooled[i, j] = sum(column[s] for s in order) / k
            gradient[i, order, j] = 1 / k
    return pooled, gradient


def check(x: torch.Tensor, lengths: list[int] | None, divisor: int = 8) -> None:
    """Values and gradient of ``topk_pool`` against :func:`by_sorting`."""
    b, t, _ = x.shape
    expected, gradient = by_sorting(x.cpu(), [t] * b if lengths is None else lengths, divisor)
    leaf = x.detach().clone().requires_grad_()
    given = None if lengths is None else torch.tensor(lengths, dtype=torch.int64, device=x.device)
    pooled = topk_pool(leaf, given, divisor=divisor)
    torch.testing.assert_close(pooled.cpu(), expected.to(x.dtype), equal_nan=True)
    (got,) = torch.autograd.grad(pooled.sum(), leaf)
    torch.testing.assert_close(got.cpu(), gradient.to(x.dtype))


@given(
    b=st.integers(0, 4),
    t=st.integers(0, 40),
    c=st.integers(1, 20),
    divisor=st.integers(1, 9),
    kinds=st.sampled_from([1, 3, 6, 1000]),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_a_sort_of_every_column(device, b, t, c, divisor, kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, kinds, (b, t, c), generator=generator).double()  # many ties
    lengths = torch.randint(0, t + 1, (b,), generator=generator)
    x[torch.arange(t) >= lengths[:, None]] = NAN  # padding
    check(x.to(device), lengths.tolist(), divisor)


@given(
    t=st.integers(1, 30),
    c=st.integers(1, 17),
    divisor=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_special_values(device, t, c, divisor, dtype, data):
    # Sums of thirty of the largest numbers fit into float32, in which the reference sums.
    special = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 1e-40, -1e-40, 1e37]
    values = data.draw(st.lists(st.sampled_from(special), min_size=t * c, max_size=t * c))
    check(torch.tensor(values, dtype=dtype, device=device).view(1, t, c), None, divisor)


@pytest.mark.parametrize("c", [1, 3, 16, 20])
@pytest.mark.parametrize("kind", ["normal", "sigmoid", "sorted", "constant", "two values", "periodic"])
def test_long_recordings(device, c, kind):
    """So many snippets that the search starts from a sample."""
    t = 9000
    x = torch.randn(1, t, c, generator=torch.Generator().manual_seed(0)).to(device)
    if kind == "sigmoid":
        x = (8 * x - 12).sigmoid()
    elif kind == "sorted":
        x = x.sort(1).values
    elif kind == "constant":
        x = torch.ones_like(x)
    elif kind == "two values":
        x = (x > 0.9).float()
    elif kind == "periodic":
        x[:, ::16] += 100
    top, index = x.double().sort(dim=1, descending=True, stable=True)
    k = math.ceil(t / 8)
    leaf = x.requires_grad_()
    pooled = topk_pool(leaf)
    torch.testing.assert_close(pooled, top[:, :k].mean(1).float(), rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(pooled.sum(), leaf)
    torch.testing.assert_close(gradient, torch.zeros_like(x).scatter(1, index[:, :k], 1 / k))


def test_more_classes_than_a_tile_and_every_length(device):
    x = torch.randn(40, 39, 101, generator=torch.Generator().manual_seed(0)).to(device)
    check(x, list(range(40)), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("b", "t", "c"),
    [
        (3, 40, 20),  # three tiles of classes, the last not full
        (2, 1000, 1),
        (4, 257, 8),  # a second batch of keys
        (1, 1500, 9),  # two warps for a column, float64 four
        (1, 2100, 33),  # four and eight
        (1, 5000, 3),  # eight and sixteen
        (1, 16500, 2),  # more than registers hold
    ],
)
def test_cuda_kernels_equal_the_cpu(simt_module, request, b, t, c, dtype):
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(b, t, c, generator=generator).to(dtype)
    x[:, :, c // 2] = x[:, :, c // 2].round()  # ties
    x[0, 1::7, 0] = torch.tensor([NAN, INF, -INF, -0.0, 0.0]).repeat(t)[: len(x[0, 1::7, 0])]
    lengths = torch.tensor([t, t - 13, 1, 0])[:b]
    grad = torch.randn(b, c, generator=generator).to(dtype)

    def results() -> list[torch.Tensor]:
        pooled, kth, last = torch.ops.d2net.topk_pool(x, lengths, 7, None, 0)
        return [pooled, kth, last, torch.ops.d2net.topk_pool_backward(grad, x, lengths, kth, last, 7, None, 0)]

    expected = results()
    request.getfixturevalue("simt_kernels")
    pooled, *got = results()
    # The order of the sums differs. They are in float64, so the difference is hardly ever visible in a narrower dtype.
    torch.testing.assert_close(pooled, expected[0], rtol=1e-14 if dtype == torch.float64 else 0, atol=0, equal_nan=True)
    for have, want in zip(got, expected[1:], strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0, equal_nan=True)


def test_unaligned_memory(device):
    values = torch.randn(1 + 2 * 30 * 8, generator=torch.Generator().manual_seed(0)).to(device)
    check(values[1:].view(2, 30, 8), None)


def test_gradient_goes_to_the_earlier_of_equals(device):
    x = torch.ones(1, 16, 1, requires_grad=True, device=device)
    topk_pool(x).sum().backward()
    assert x.grad[0, :, 0].tolist() == [0.5, 0.5] + [0.0] * 14


def test_gradient(device):
    x = torch.randperm(2 * 20 * 3, generator=torch.Generator().manual_seed(0)).view(2, 20, 3).double().to(device)
    lengths = torch.tensor([20, 9], device=device)
    assert torch.autograd.gradcheck(lambda v: topk_pool(v, lengths), x.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(device, dtype):
    x = torch.full((1, 8 * 4096, 1), 0.1, device=device).to(dtype)
    assert topk_pool(x).item() == x[0, 0, 0].item()
    y = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    check(y, [30, 11])


def test_float16_range(device):
    x = torch.full((1, 24, 2), 6e4, dtype=torch.float16, device=device)
    assert torch.equal(topk_pool(x), x[:, 0])


def test_padding_does_not_matter(device):
    generator = torch.Generator().manual_seed(0)
    x, lengths = torch.randn(3, 25, 6, generator=generator).to(device), torch.tensor([25, 7, 0], device=device)
    expected = topk_pool(x, lengths)
    assert expected[2].eq(0).all()
    torch.testing.assert_close(topk_pool(x[:2, :7], lengths[1].expand(2))[1], expected[1])
    for padding in (NAN, INF, -INF, 1e30):
        past = (torch.arange(25, device=device) >= lengths[:, None])[:, :, None]
        leaf = x.masked_fill(past, padding).requires_grad_()
        pooled = topk_pool(leaf, lengths)
        assert torch.equal(pooled, expected)
        (gradient,) = torch.autograd.grad(pooled.square().sum(), leaf)
        assert gradient.masked_select(past).eq(0).all() and gradient.isfinite().all()


def test_lengths_are_clamped(device):
    x = torch.randn(3, 10, 2, generator=torch.Generator().manual_seed(0)).to(device)
    beyond = topk_pool(x, torch.tensor([-3, 11, 2**40], device=device))
    torch.testing.assert_close(beyond, topk_pool(x, torch.tensor([0, 10, 10], device=device)))


def test_order_of_recordings_does_not_matter(device):
    generator = torch.Generator().manual_seed(0)
    x, lengths = torch.randn(6, 50, 9, generator=generator).to(device), torch.tensor([50, 3, 0, 20, 49, 1]).to(device)
    order = torch.tensor([3, 1, 5, 0, 4, 2], device=device)
    assert torch.equal(topk_pool(x[order], lengths[order]), topk_pool(x, lengths)[order])


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty_inputs(device, shape):
    x = torch.zeros(shape, device=device, requires_grad=True)
    pooled = topk_pool(x)
    assert pooled.shape == (shape[0], shape[2]) and pooled.eq(0).all()
    (gradient,) = torch.autograd.grad(pooled.sum(), x)
    assert gradient.shape == shape


def test_views_are_read_by_their_strides(device):
    wide = torch.randn(4, 12, 30, generator=torch.Generator().manual_seed(0)).to(device)
    for view in (wide[:, :, 1::3], wide.transpose(1, 2), wide[::2, 3:], wide[:1].expand(3, 12, 30)):
        check(view, None)
    x = wide.transpose(0, 2).requires_grad_()
    pooled = topk_pool(x)
    (gradient,) = torch.autograd.grad(pooled, x, torch.ones((), device=device).expand_as(pooled))
    torch.testing.assert_close(gradient.sum(1), torch.ones_like(pooled))


@pytest.mark.parametrize("c", [1, 16, 40])
def test_threads_and_runs_do_not_matter(c):
    x = torch.randn(3, 2000, c, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(3, c, generator=torch.Generator().manual_seed(1))

    def results() -> list[torch.Tensor]:
        pooled = topk_pool(x)
        return [pooled, *torch.autograd.grad(pooled, x, weight)]

    expected, before = results(), torch.get_num_threads()
    try:
        for threads in (1, 2, 7, 7):
            torch.set_num_threads(threads)
            assert all(torch.equal(got, want) for got, want in zip(results(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("lengths", [None, torch.tensor([12, 5])])
def test_registration(dtype, lengths):
    x = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.library.opcheck(torch.ops.d2net.topk_pool.default, (x.clone().requires_grad_(), lengths, 8, None, 0))
    _, kth, last = torch.ops.d2net.topk_pool(x, lengths, 8, None, 0)
    arguments = (torch.ones(2, 5, dtype=dtype), x, lengths, kth, last, 8, None, 0)
    torch.library.opcheck(torch.ops.d2net.topk_pool_backward.default, arguments)


def test_compiles_to_one_graph():
    x, lengths = torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([40, 17])
    results = []
    for function in (topk_pool, torch.compile(topk_pool, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        pooled = function(leaf, lengths)
        results.append((pooled, *torch.autograd.grad(pooled.square().sum(), leaf)))
    torch.testing.assert_close(*results)


def test_a_second_derivative_is_refused():
    x = torch.randn(1, 9, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(topk_pool(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_clear_errors(device):
    x = torch.rand(2, 5, 3, device=device)
    for call, message in [
        (lambda: topk_pool(x[0]), "x has shape"),
        (lambda: topk_pool(x.long()), "x has dtype"),
        (lambda: topk_pool(x, divisor=0), "divisor is 0"),
        (lambda: topk_pool(x, torch.tensor([1.0, 2.0], device=device)), "lengths has shape"),
        (lambda: topk_pool(x, torch.tensor([1, 2, 3], device=device)), "lengths has shape"),
        (lambda: topk_pool(x, torch.tensor([1, 2], device="meta")), "lengths is on meta"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
