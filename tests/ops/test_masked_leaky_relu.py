"""masked_leaky_relu on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from d2net.errors import InputError
from d2net.ops import masked_leaky_relu

NAN, INF = float("nan"), float("inf")
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(x: Tensor, lengths: Tensor, slope: float) -> Tensor:
    """x is (B, T, D)."""
    past = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return F.leaky_relu(x, slope).masked_fill(past[:, :, None], 0)


@pytest.mark.parametrize("slope", [0.2, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("time_dim", [1, 2])
@pytest.mark.parametrize("shape", [(3, 40, 16), (3, 41, 7), (3, 1, 1), (3, 300, 64)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_same_bits_as_pytorch_both_ways(device, shape, time_dim, slope, dtype):
    x = drawn(*shape).to(dtype)
    x[0, 0, 0], x[1, 0, 0] = -0.0, 1e-7
    lengths = torch.tensor([shape[1], shape[1] // 3, 0])
    weights = drawn(*shape, seed=1).to(dtype)
    leaf = x.clone().requires_grad_()
    wanted = expected(leaf, lengths, slope)
    (gradient,) = torch.autograd.grad(wanted, leaf, weights)

    def place(y: Tensor) -> Tensor:
        return y.transpose(1, time_dim).contiguous().to(device)

    past = (torch.arange(shape[1]) >= lengths[:, None])[:, :, None]
    leaf = place(x.masked_fill(past, NAN)).requires_grad_()
    found = masked_leaky_relu(leaf, lengths.to(device), slope=slope, time_dim=time_dim)
    assert torch.equal(found.cpu().transpose(1, time_dim), wanted)
    (found,) = torch.autograd.grad(found, leaf, place(weights))
    assert torch.equal(found.cpu().transpose(1, time_dim), gradient)


def test_nan_and_infinity(device):
    x = torch.tensor([[[NAN, INF, -INF]]], device=device, requires_grad=True)
    y = masked_leaky_relu(x)
    assert y[0, 0, 0].isnan() and y[0, 0, 1:].tolist() == [INF, -INF]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient[0, 0].cpu(), torch.tensor([0.2, 1.0, 0.2]), rtol=0, atol=0)  # as PyTorch's


@pytest.mark.parametrize("time_dim", [1, 2])
def test_both_derivatives(device, time_dim):
    x = drawn(2, 5, 4).double().to(device).requires_grad_()
    lengths = torch.tensor([4, 2], device=device)

    def function(y: Tensor) -> Tensor:
        return masked_leaky_relu(y, lengths, slope=0.3, time_dim=time_dim)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_views_are_read_by_their_strides(device):
    x = drawn(3, 12, 30).to(device)
    lengths = torch.tensor([12, 3, 0], device=device)
    found = masked_leaky_relu(x.transpose(1, 2), lengths, time_dim=2)
    assert torch.equal(found.transpose(1, 2), masked_leaky_relu(x, lengths))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
@pytest.mark.parametrize("time_dim", [1, 2])
def test_empty_inputs(device, shape, time_dim):
    x = torch.zeros(shape, device=device, requires_grad=True)
    y = masked_leaky_relu(x, time_dim=time_dim)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == gradient.shape == shape


@pytest.mark.parametrize("dtype", FLOATS)
def test_unaligned_memory(device, dtype):
    x = drawn(2 * 30 * 8 + 1).to(device, dtype)[1:].view(2, 30, 8)
    assert torch.equal(masked_leaky_relu(x), masked_leaky_relu(x.clone()))


def test_any_number_of_threads():
    x, lengths = drawn(3, 3000, 40).requires_grad_(), torch.tensor([3000, 17, 0])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            y = masked_leaky_relu(x, lengths)
            results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [None, torch.tensor([12, 5])])
def test_registration(dtype, lengths):
    x, ops = drawn(2, 12, 5).to(dtype), torch.ops.d2net
    torch.library.opcheck(ops.masked_leaky_relu.default, (x.clone().requires_grad_(), lengths, 0.2, 1))
    arguments = (drawn(2, 12, 5, seed=1).to(dtype).requires_grad_(), x, lengths, 0.2, 1)
    torch.library.opcheck(ops.masked_leaky_relu_backward.default, arguments)


def test_compiles_to_one_graph():
    lengths, results = torch.tensor([40, 17]), []
    for function in (masked_leaky_relu, torch.compile(masked_leaky_relu, fullgraph=True, backend="aot_eager")):
        leaf = drawn(2, 40, 5).requires_grad_()
        y = function(leaf, lengths)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
    torch.testing.assert_close(*results)


def test_clear_errors(device):
    x = torch.rand(2, 5, 3, device=device)
    for call, message in [
        (lambda: masked_leaky_relu(x[0]), r"x has shape \(5, 3\), expected \(B, T, D\)"),
        (lambda: masked_leaky_relu(x[0], time_dim=2), r"expected \(B, D, T\)"),
        (lambda: masked_leaky_relu(x.long()), "x has dtype"),
        (lambda: masked_leaky_relu(x, torch.tensor([1], device=device)), "lengths has shape"),
        (lambda: masked_leaky_relu(x, slope=-0.1), "slope is -0.1"),
        (lambda: masked_leaky_relu(x, slope=NAN), "slope is nan"),
        (lambda: masked_leaky_relu(x, slope=INF), "slope is inf"),
        (lambda: masked_leaky_relu(x, time_dim=0), "time_dim is 0"),
        (lambda: masked_leaky_relu(x, time_dim=1.5), "time_dim is 1.5, expected a whole number"),
    ]:
        with pytest.raises(InputError, match=f"masked_leaky_relu: .*{message}"):
            call()
