"""tcam_pool on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2net.errors import InputError
from d2net.ops import tcam_pool, topk_pool

NAN, INF = float("nan"), float("inf")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_definition(tcam: torch.Tensor, lengths: list[int], divisor: int) -> list[torch.Tensor]:
    """attention and pooled, recording by recording; differentiable."""
    attentions, pooleds = [], []
    for row, length in zip(tcam, lengths, strict=True):
        inside = row[:length]
        k = max(1, -(-length // divisor))
        pooleds.append(inside.sort(dim=0, descending=True, stable=True).values[:k].mean(0) if length else inside.sum(0))
        attentions.append(torch.nn.functional.pad(inside.max(1).values, (0, len(row) - length)))
    return [torch.stack(attentions), torch.stack(pooleds)]


@given(
    b=st.integers(1, 3),
    t=st.integers(1, 40),
    c=st.integers(1, 20),
    divisor=st.integers(1, 9),
    which=st.lists(st.booleans(), min_size=2, max_size=2).filter(any),
    seed=st.integers(0, 999),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_its_definition_with_any_of_its_gradients(device, b, t, c, divisor, which, seed):
    x = random(b, t, c, seed=seed, dtype=torch.float64)
    lengths = torch.randint(0, t + 1, (b,), generator=torch.Generator().manual_seed(seed))
    past = (torch.arange(t) >= lengths[:, None])[:, :, None]
    leaf = x.clone().requires_grad_()
    expected = by_definition(leaf, lengths.tolist(), divisor)
    weights = [random(*e.shape, seed=seed + 7, dtype=torch.float64) for e in expected]
    loss = sum((e * w).sum() for e, w, use in zip(expected, weights, which, strict=True) if use)
    (gradient,) = torch.autograd.grad(loss, leaf)

    leaf = x.masked_fill(past, NAN).to(device).requires_grad_()
    got = tcam_pool(leaf, lengths.to(device), divisor=divisor)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.cpu(), e)
    loss = sum((g * w.to(device)).sum() for g, w, use in zip(got, weights, which, strict=True) if use)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0].cpu(), gradient)


def test_nan_propagates(device):
    x = torch.zeros(1, 8, 3, device=device)
    x[0, 5, 1] = NAN
    pooled = tcam_pool(x)
    assert pooled.attention[0].isnan().tolist() == [t == 5 for t in range(8)]
    assert pooled.pooled[0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("c", [1, 2, 16, 20, 300])
def test_tcam_pool_equals_its_parts(device, c):
    tcam, lengths = random(3, 37, c).to(device), torch.tensor([37, 5, 0], device=device)
    weight_a, weight_p = random(3, 37, seed=1).to(device), random(3, c, seed=2).to(device)
    results = []
    for fused in (True, False):
        leaf = tcam.clone().requires_grad_()
        if fused:
            attention, pooled = tcam_pool(leaf, lengths, divisor=3)
        else:
            past = (torch.arange(37, device=device) >= lengths[:, None])[:, :, None]
            attention, pooled = leaf.masked_fill(past, 0).amax(2), topk_pool(leaf, lengths, divisor=3)
        loss = (attention * weight_a).sum() + (pooled * weight_p).sum()
        results.append((attention, pooled, *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("b", "t", "c"),
    [
        (3, 40, 20),
        (2, 70, 1),
        (1, 30, 130),  # more classes than a warp takes at once: 32 packs of 4, ...
        (1, 30, 35),  # ... or 32 single ones
        (2, 600, 6),
        (1, 16500, 3),  # more than registers hold
    ],
)
def test_cuda_kernels_equal_the_cpu(simt_module, request, b, t, c, dtype):
    x = random(b, t, c).to(dtype)
    x[:, 1::3, c // 2] = 0.5  # ties
    x[0, 2, 0], x[0, 3, c - 1], x[0, 4, c // 2] = NAN, INF, -INF
    lengths = torch.tensor([t, t - 13, 0])[:b]
    weights = [random(*shape, seed=2).to(dtype) for shape in ((b, t), (b, c))]

    def results() -> list[torch.Tensor]:
        ops = torch.ops.d2net
        pool = ops.tcam_pool(x, lengths, 7, None, 0)
        return [*pool, ops.tcam_pool_backward(*weights, x, lengths, *pool[2:], 7, None, 0)]

    expected = results()
    request.getfixturevalue("simt_kernels")
    for got, want in zip(results(), expected, strict=True):
        close = want.dtype == torch.float64  # sums come in another order
        torch.testing.assert_close(got, want, rtol=1e-13 if close else 0, atol=0, equal_nan=True)


def test_unaligned_memory(device):
    x = random(2 * 30 * 8 + 1).to(device)[1:].view(2, 30, 8)
    results = []
    for y in (x, x.clone()):
        leaf = y.detach().requires_grad_()
        out = tcam_pool(leaf)
        results.append((*out, *torch.autograd.grad(sum(z.square().sum() for z in out), leaf)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_lower_of_equal_classes_gets_the_gradient(device):
    tcam = torch.zeros(1, 20, 5, device=device)
    tcam[0, 1, 2:] = 1.0
    tcam[0, 2, [1, 4]] = NAN
    tcam[0, 3, 0] = -0.0
    tcam.requires_grad_()
    (gradient,) = torch.autograd.grad(tcam_pool(tcam).attention.sum(), tcam)
    assert gradient[0].argmax(1).tolist() == [0, 2, 1] + [0] * 17
    assert gradient.sum() == 20


def test_gradient(device):
    x = random(2, 20, 3, dtype=torch.float64).to(device).requires_grad_()
    lengths = torch.tensor([20, 9], device=device)
    assert torch.autograd.gradcheck(lambda x: tuple(tcam_pool(x, lengths)), (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(device, dtype):
    x, lengths = random(2, 30, 5).to(device, dtype).requires_grad_(), torch.tensor([30, 11], device=device)
    out = tcam_pool(x, lengths)
    wide = tcam_pool(x.detach().float(), lengths)
    for got, want in zip(out, wide, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, want.to(dtype), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(out.attention.sum() + out.pooled.sum(), x)
    assert gradient.dtype == dtype and gradient.isfinite().all()


def test_padding_does_not_matter(device):
    x, lengths = random(3, 25, 6).to(device), torch.tensor([25, 7, 0], device=device)
    past = torch.arange(25, device=device) >= lengths[:, None]
    expected = tcam_pool(x, lengths)
    assert (expected.attention[past] == 0).all() and (expected.pooled[2] == 0).all()
    for padding in (NAN, INF, -1e30):
        leaf = x.masked_fill(past[:, :, None], padding).requires_grad_()
        out = tcam_pool(leaf, lengths)
        assert all(torch.equal(got, want) for got, want in zip(out, expected, strict=True))
        (gradient,) = torch.autograd.grad(sum(x.square().sum() for x in out), leaf)
        assert (gradient[past] == 0).all() and gradient.isfinite().all()


def test_order_of_recordings_does_not_matter(device):
    x = random(4, 50, 9).to(device)
    lengths, order = torch.tensor([50, 3, 0, 20], device=device), torch.tensor([3, 1, 0, 2], device=device)
    out, turned = tcam_pool(x, lengths), tcam_pool(x[order], lengths[order])
    assert all(torch.equal(x[order], y) for x, y in zip(out, turned, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty_inputs(device, shape):
    x = torch.zeros(shape, device=device, requires_grad=True)
    attention, pooled = tcam_pool(x)
    assert attention.shape == shape[:2] and pooled.shape == (shape[0], shape[2])
    assert (attention == 0).all() and (shape[1] > 0 or (pooled == 0).all())
    (gradient,) = torch.autograd.grad(attention.sum() + pooled.sum(), x)
    assert gradient.shape == shape


def test_views_are_read_by_their_strides(device):
    x = random(3, 12, 30).to(device).transpose(1, 2).requires_grad_()
    out = tcam_pool(x)
    grads = [torch.ones((), device=device).expand_as(y) for y in out]
    (gradient,) = torch.autograd.grad(out, x, grads)
    leaf = x.detach().contiguous().requires_grad_()
    (expected,) = torch.autograd.grad(sum(y.sum() for y in tcam_pool(leaf)), leaf)
    torch.testing.assert_close(gradient, expected)


def test_threads_and_runs_do_not_matter():
    leaf = random(3, 2000, 20).requires_grad_()

    def results() -> list[torch.Tensor]:
        out = tcam_pool(leaf)
        return [*out, *torch.autograd.grad(sum((x * x.detach()).sum() for x in out), leaf)]

    expected, before = results(), torch.get_num_threads()
    try:
        for threads in (1, 2, 7, 7):
            torch.set_num_threads(threads)
            assert all(torch.equal(got, want) for got, want in zip(results(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [None, torch.tensor([12, 5])])
def test_registration(dtype, lengths):
    x, ops = random(2, 12, 5).to(dtype), torch.ops.d2net
    torch.library.opcheck(ops.tcam_pool.default, (x.clone().requires_grad_(), lengths, 8, None, 0))
    attention, pooled, *chosen = ops.tcam_pool(x, lengths, 8, None, 0)
    for grad_attention in (attention, None):
        arguments = (grad_attention, pooled, x, lengths, *chosen, 8, None, 0)
        torch.library.opcheck(ops.tcam_pool_backward.default, arguments)


def test_compiles_to_one_graph():
    x, lengths = random(2, 40, 5), torch.tensor([40, 17])
    results = []
    for function in (tcam_pool, torch.compile(tcam_pool, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        out = function(leaf, lengths)
        results.append((*out, *torch.autograd.grad(sum(x.square().sum() for x in out), leaf)))
    torch.testing.assert_close(*results)


def test_a_second_derivative_is_refused():
    x = random(1, 9, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(tcam_pool(x).pooled.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_clear_errors(device):
    x = torch.rand(2, 5, 3, device=device)
    for call, message in [
        (lambda: tcam_pool(x, torch.tensor([1], device=device)), "lengths has shape"),
        (lambda: tcam_pool(x[0]), "tcam has shape"),
        (lambda: tcam_pool(x.long()), "tcam has dtype"),
        (lambda: tcam_pool(x, divisor=-1), "divisor is -1"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
