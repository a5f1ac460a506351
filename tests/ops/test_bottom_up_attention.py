"""bottom_up_attention on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2net.errors import InputError
from d2net.ops import bottom_up_attention

NAN = float("nan")


def made(b=3, t=12, d=5, seed=0, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    x, x_ref = torch.randn(b, t, d, generator=g, dtype=dtype), torch.randn(d, generator=g, dtype=dtype)
    return x.to(device), x_ref.to(device)


def naive(x: list[float], x_ref: list[float]) -> float:
    """Eq. 8 in Python's floats, each vector scaled by its largest component."""
    unit = []
    for v in (x, x_ref):
        largest = max((abs(c) for c in v), default=0.0)
        if largest == 0:
            return 0.5
        v = [c / largest for c in v]
        norm = sum(c * c for c in v) ** 0.5
        unit.append([c / norm for c in v])
    return 0.5 * (1 - sum(a * b for a, b in zip(*unit, strict=True)))


@given(
    b=st.integers(0, 3),
    t=st.integers(0, 9),
    d=st.integers(0, 40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    magnitude=st.sampled_from([1.0, 1e-30, 1e-18, 1e18, 1e30]),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_its_definition_at_any_magnitude(device, b, t, d, dtype, magnitude, seed):
    x, x_ref = made(b, t, d, seed, dtype)
    g = torch.Generator().manual_seed(seed)
    x *= magnitude * (torch.rand(b, t, 1, generator=g) > 0.1)
    x_ref *= magnitude ** (2 * (seed % 2) - 1)
    lengths = torch.randint(-2, t + 3, (b,), generator=g)
    past = torch.arange(t) >= lengths[:, None]
    x[past] = NAN
    out = bottom_up_attention(x.to(device), x_ref.to(device), lengths.to(device)).cpu()
    assert out.shape == (b, t) and out.dtype == dtype and ((out >= 0) & (out <= 1)).all()
    expected = [[0.5 if past[i, s] else naive(x[i, s].tolist(), x_ref.tolist()) for s in range(t)] for i in range(b)]
    expected = torch.tensor(expected, dtype=dtype).view(b, t)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_float64_whose_squares_leave_its_range(device, scale):
    x, x_ref = made(dtype=torch.float64, device=device)
    expected = bottom_up_attention(x, x_ref)
    torch.testing.assert_close(bottom_up_attention(x * scale, x_ref), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(bottom_up_attention(x, x_ref * scale), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "odd address"])
@pytest.mark.parametrize(("t", "d"), [(37, 132), (33, 129), (5, 2050), (3, 4096)])
def test_every_snippet_has_its_own_magnitude(device, t, d, offset):
    x, x_ref = made(2, t, d)
    g = torch.Generator().manual_seed(1)
    x *= 10.0 ** torch.randint(-36, 36, (2, t, 1), generator=g)
    x[0, 2], x[1, 0] = 0, x_ref
    lengths = torch.tensor([t, t - 1])
    expected = torch.tensor([[naive(v.tolist(), x_ref.tolist()) for v in recording] for recording in x])
    expected[1, -1] = 0.5
    moved = x.new_empty(x.numel() + offset).to(device)[offset:].view(x.shape).copy_(x)
    out = bottom_up_attention(moved, x_ref.to(device), lengths.to(device))
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=1e-6)


def test_known_angles(device):
    x = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-5.0, 0.0], [0.0, 0.0], [1.0, 1.0]]], device=device)
    out = bottom_up_attention(x, torch.tensor([4.0, 0.0], device=device))
    torch.testing.assert_close(out.cpu(), torch.tensor([[0.0, 0.5, 1.0, 0.5, 0.5 - 0.5**1.5]]))
    assert (bottom_up_attention(x, torch.zeros(2, device=device)) == 0.5).all()


def test_parallel_vectors_stay_in_bounds(device):
    _, x_ref = made(d=1023, device=device)
    x = x_ref * torch.linspace(-3, 3, 400, device=device)[None, :, None]
    out = bottom_up_attention(x, x_ref)
    assert ((out >= 0) & (out <= 1)).all()
    torch.testing.assert_close(out[0, 200:], torch.zeros_like(out[0, 200:]), rtol=0, atol=1e-6)


def test_nan_and_infinity_stay_in_their_snippet(device):
    x, x_ref = made(device=device)
    expected = bottom_up_attention(x, x_ref)
    broken = x.clone()
    broken[0, 1, 0], broken[1, 2], broken[2, 3, 2] = NAN, NAN, float("inf")
    broken[2, 4], broken[2, 4, 0] = 0, NAN  # a vector of zeros and a NaN is not a zero vector
    out = bottom_up_attention(broken, x_ref)
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit[0, 1] = hit[1, 2] = hit[2, 3] = hit[2, 4] = True
    assert out[hit].isnan().all() and torch.equal(out[~hit], expected[~hit])
    x_ref[3] = NAN
    assert bottom_up_attention(x, x_ref).isnan().all()


def test_gradient(device):
    x, x_ref = made(2, 6, 4, dtype=torch.float64, device=device)
    lengths = torch.tensor([6, 4], device=device)
    assert torch.autograd.gradcheck(
        lambda x, r: bottom_up_attention(x, r, lengths), (x.requires_grad_(), x_ref.requires_grad_())
    )


@pytest.mark.parametrize("needed", ["embeddings", "x_ref"])
def test_only_the_gradient_that_is_needed(device, needed):
    x, x_ref = made(device=device)
    both = [v.clone().requires_grad_() for v in (x, x_ref)]
    bottom_up_attention(*both).square().sum().backward()
    one = [x.clone().requires_grad_(needed == "embeddings"), x_ref.clone().requires_grad_(needed == "x_ref")]
    bottom_up_attention(*one).square().sum().backward()
    for got, expected in zip(one, both, strict=True):
        assert got.grad is None or torch.equal(got.grad, expected.grad)
    assert (one[0].grad is None) != (one[1].grad is None)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_gradient_at_any_magnitude(device, scale):
    leaves = [v.requires_grad_() for v in made(device=device)]
    scaled = [(v.detach() * scale).requires_grad_() for v in leaves]
    expected = torch.autograd.grad(bottom_up_attention(*leaves).square().sum(), leaves)
    got = torch.autograd.grad(bottom_up_attention(*scaled).square().sum(), scaled)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double() * scale, b.double(), rtol=1e-4, atol=1e-5)


def test_zero_vectors_and_padding_have_gradient_zero(device):
    x, x_ref = made(2, 4, 3, device=device)
    x[0, 1] = 0
    x[1, 2:] = NAN
    x, x_ref = x.requires_grad_(), x_ref.requires_grad_()
    out = bottom_up_attention(x, x_ref, torch.tensor([4, 2], device=device))
    assert (out[1, 2:] == 0.5).all()
    grad_x, grad_x_ref = torch.autograd.grad(out.sum(), [x, x_ref])
    assert not grad_x[0, 1].any() and not grad_x[1, 2:].any() and grad_x[1, :2].any()
    assert grad_x_ref.isfinite().all() and grad_x_ref.any()
    zero = torch.zeros(3, device=device, requires_grad=True)
    x = x.detach().nan_to_num().requires_grad_()
    for grad in torch.autograd.grad(bottom_up_attention(x, zero).sum(), [x, zero]):
        assert not grad.any()


def test_the_gradient_is_not_differentiable():
    x, x_ref = made()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(bottom_up_attention(x, x_ref).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_stays_there(device, dtype):
    x, x_ref = made(d=600, device=device)
    half = (100 * x).to(dtype).requires_grad_()  # whose squares exceed the largest float16
    full = half.detach().float().requires_grad_()
    out, expected = bottom_up_attention(half, x_ref), bottom_up_attention(full, x_ref)
    assert torch.equal(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), half)
    (expected_grad,) = torch.autograd.grad(expected.sum(), full)
    torch.testing.assert_close(
        grad.float(), expected_grad, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6
    )  # one rounding


def test_views_are_read_by_their_strides(device):
    wide = torch.randn(4, 9, 20, generator=torch.Generator().manual_seed(0)).to(device)
    x, x_ref = wide.transpose(1, 2)[:, ::3, ::2], wide[0, 0, ::4]
    lengths = torch.tensor([7, 0, 3, 0, 5, 0, 9], device=device)[::2]
    expected = bottom_up_attention(x.contiguous(), x_ref.contiguous(), lengths.contiguous())
    torch.testing.assert_close(bottom_up_attention(x, x_ref, lengths), expected)


def test_recordings_do_not_mix(device):
    x, x_ref = made(5, 9, 3, device=device)
    lengths = torch.tensor([9, 1, 0, 4, 5], device=device)
    order = torch.tensor([3, 1, 4, 0, 2], device=device)
    expected = bottom_up_attention(x, x_ref, lengths)
    torch.testing.assert_close(bottom_up_attention(x[order], x_ref, lengths[order]), expected[order])


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)], ids=str)
def test_nothing(device, shape):
    x = torch.zeros(shape, device=device, requires_grad=True)
    x_ref = torch.zeros(shape[2], device=device, requires_grad=True)
    out = bottom_up_attention(x, x_ref)
    assert out.shape == shape[:2] and (out == 0.5).all()
    grads = torch.autograd.grad(out.sum(), [x, x_ref])
    assert [g.shape for g in grads] == [x.shape, x_ref.shape] and not any(g.any() for g in grads)


@pytest.mark.parametrize("b", [1, 3])
def test_the_number_of_threads_does_not_matter(b):
    x, x_ref = made(b, 999, 130)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7, 2):
            torch.set_num_threads(threads)
            results.append(bottom_up_attention(x, x_ref))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results[1:])


@pytest.mark.parametrize("lengths", [None, torch.tensor([12, 5, 0])], ids=["all", "lengths"])
def test_registration(lengths):
    x, x_ref = made()
    wanted = x.clone().requires_grad_(), x_ref.clone().requires_grad_()
    torch.library.opcheck(torch.ops.d2net.bottom_up_attention.default, (*wanted, lengths, None, 0))
    attention, norms = torch.ops.d2net.bottom_up_attention.default(x, x_ref, lengths, None, 0)
    for need in ((True, True), (True, False), (False, True)):
        arguments = (x, x_ref, attention, norms, torch.rand(3, 12), *need)
        torch.library.opcheck(torch.ops.d2net.bottom_up_attention_backward.default, arguments)


def test_compiles_to_one_graph():
    x, x_ref = made()
    lengths = torch.tensor([12, 5, 0])
    results = []
    for run in (bottom_up_attention, torch.compile(bottom_up_attention, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_(), x_ref.clone().requires_grad_()]
        out = run(*leaves, lengths)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected)


def test_clear_errors():
    x, x_ref = made()
    for call, message in [
        (lambda: bottom_up_attention(x[0], x_ref), "embeddings has shape"),
        (lambda: bottom_up_attention(x, x_ref[1:]), "x_ref has shape"),
        (lambda: bottom_up_attention(x, x[0]), "x_ref has shape"),
        (lambda: bottom_up_attention(x.long(), x_ref), "embeddings has dtype"),
        (lambda: bottom_up_attention(x, x_ref.long()), "x_ref has dtype"),
        (lambda: bottom_up_attention(x, x_ref.to("meta")), "meta"),
        (lambda: bottom_up_attention(x, x_ref, torch.tensor([1, 2])), "lengths has shape"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
