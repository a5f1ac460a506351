"""two_stream_tcam and tcam_pool on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2net.errors import InputError
from d2net.ops import tcam_pool, topk_pool, two_stream_tcam

NAN, INF = float("nan"), float("inf")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_definition(a: torch.Tensor, b: torch.Tensor, lengths: list[int], divisor: int = 8) -> list[torch.Tensor]:
    """tcam, attention and pooled in float64, recording by recording; differentiable."""
    tcams, attentions, pooleds = [], [], []
    t = a.shape[1]
    for i, length in enumerate(lengths):
        s = 0.5 * (1 / (1 + (-a[i, :length].double()).exp()) + 1 / (1 + (-b[i, :length].double()).exp()))
        k = max(1, -(-length // divisor))
        top = s.sort(dim=0, descending=True, stable=True).values[:k]
        pooleds.append(top.mean(0) if length else s.sum(0))
        attentions.append(torch.nn.functional.pad(s.max(1).values, (0, t - length)))
        tcams.append(torch.nn.functional.pad(s, (0, 0, 0, t - length)))
    return [torch.stack(x) for x in (tcams, attentions, pooleds)]


@given(
    b=st.integers(1, 3),
    t=st.integers(1, 40),
    c=st.integers(1, 20),
    divisor=st.integers(1, 9),
    which=st.lists(st.booleans(), min_size=3, max_size=3).filter(any),
    seed=st.integers(0, 999),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_its_definition_with_any_of_its_gradients(device, b, t, c, divisor, which, seed):
    x, y = (4 * random(b, t, c, seed=seed + s, dtype=torch.float64) for s in (0, 1000))
    lengths = torch.randint(0, t + 1, (b,), generator=torch.Generator().manual_seed(seed))
    past = (torch.arange(t) >= lengths[:, None])[:, :, None]
    leaves = [v.clone().requires_grad_() for v in (x, y)]
    expected = by_definition(*leaves, lengths.tolist(), divisor)
    weights = [random(*e.shape, seed=seed + 7, dtype=torch.float64) for e in expected]
    loss = sum((e * w).sum() for e, w, use in zip(expected, weights, which, strict=True) if use)
    gradients = torch.autograd.grad(loss, leaves)

    leaves = [v.masked_fill(past, NAN).to(device).requires_grad_() for v in (x, y)]
    got = two_stream_tcam(*leaves, lengths.to(device), divisor=divisor)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.cpu(), e)
    loss = sum((g * w.to(device)).sum() for g, w, use in zip(got, weights, which, strict=True) if use)
    for g, e in zip(torch.autograd.grad(loss, leaves), gradients, strict=True):
        torch.testing.assert_close(g.cpu(), e)


def test_sigmoid_over_the_whole_range(device):
    x = torch.cat([torch.linspace(-110, 110, 20001), torch.tensor([INF, -INF, 3e38, -3e38, 1e-40, 0.0, -0.0])])
    x = x.to(device).view(1, -1, 1).requires_grad_()
    tcam = two_stream_tcam(x, x).tcam
    wide = x.detach().double()
    # 16 units of the last place, and the smallest normal number (below it PyTorch's own sigmoid gives 0).
    torch.testing.assert_close(tcam.double(), wide.sigmoid(), rtol=2e-6, atol=1.2e-38)
    assert tcam[0, 20001] == 1 and tcam[0, 20002] == 0
    (gradient,) = torch.autograd.grad(tcam.sum(), x)
    torch.testing.assert_close(gradient.double(), wide.sigmoid() * (-wide).sigmoid(), rtol=1e-5, atol=1e-7)


def test_nan_propagates(device):
    x = torch.zeros(1, 8, 3, device=device)
    x[0, 5, 1] = NAN
    for out in (two_stream_tcam(x, torch.zeros_like(x)), two_stream_tcam(torch.zeros_like(x), x)):
        assert torch.equal(out.tcam.isnan(), x.isnan())
        assert out.attention[0].isnan().tolist() == [t == 5 for t in range(8)]
        assert out.pooled[0].isnan().tolist() == [False, True, False]
    pooled = tcam_pool(x)
    assert pooled.attention[0, 5].isnan() and pooled.pooled[0, 1].isnan() and pooled.pooled[0, 0] == 0


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
    x, y = (6 * random(b, t, c, seed=s).to(dtype) for s in (0, 1))
    x[:, 1::3, c // 2] = 0.0
    y[:, 1::3, c // 2] = 0.0  # ties
    x[0, 2, 0], x[0, 3, c - 1], y[0, 4, c // 2], y[0, 5, 0] = NAN, INF, -INF, NAN
    lengths = torch.tensor([t, t - 13, 0])[:b]
    weights = [random(*shape, seed=2).to(dtype) for shape in ((b, t, c), (b, t), (b, c))]

    def results() -> list[torch.Tensor]:
        ops = torch.ops.d2net
        tcam, *pool = ops.two_stream_tcam(x, y, lengths, 7)
        saved = (tcam, lengths, *pool[2:], 7)
        gradients = ops.two_stream_tcam_backward(*weights, x, y, *saved)
        again = ops.tcam_pool(tcam, lengths, 7)
        return [tcam, *pool, *gradients, *again, ops.tcam_pool_backward(*weights[1:], *saved)]

    expected = results()
    request.getfixturevalue("simt_kernels")
    for got, want in zip(results(), expected, strict=True):
        close = want.dtype == torch.float64  # exp may differ in its last place, and sums come in another order
        torch.testing.assert_close(got, want, rtol=1e-13 if close else 0, atol=0, equal_nan=True)


def test_unaligned_memory(device):
    a, b = (random(2 * 30 * 8 + s, seed=s).to(device)[s:].view(2, 30, 8) for s in (0, 1))
    results = []
    for y in (b, b.clone()):
        leaves = [x.detach().requires_grad_() for x in (a, y)]
        out = two_stream_tcam(*leaves)
        results.append((*out, *torch.autograd.grad(sum(x.square().sum() for x in out), leaves)))
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
    logits = torch.zeros(1, 20, 5, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(two_stream_tcam(logits, logits.detach()).attention.sum(), logits)
    assert (gradient[0, :, 0] == 0.125).all() and (gradient[0, :, 1:] == 0).all()


def test_gradient(device):
    a, b = (random(2, 20, 3, seed=s, dtype=torch.float64).to(device).requires_grad_() for s in (0, 1))
    lengths = torch.tensor([20, 9], device=device)
    assert torch.autograd.gradcheck(lambda x, y: tuple(two_stream_tcam(x, y, lengths)), (a, b))
    assert torch.autograd.gradcheck(lambda x: tuple(tcam_pool(x, lengths)), (a,))


def test_one_stream_may_need_no_gradient(device):
    a, b = random(2, 9, 3).to(device).requires_grad_(), random(2, 9, 3, seed=1).to(device)
    two_stream_tcam(a, b).pooled.sum().backward()
    assert a.grad is not None and b.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(device, dtype):
    a, b = (random(2, 30, 5, seed=s).to(device, dtype).requires_grad_() for s in (0, 1))
    lengths = torch.tensor([30, 11], device=device)
    out = two_stream_tcam(a, b, lengths)
    wide = two_stream_tcam(a.detach().float(), b.detach().float(), lengths)
    for got, want in zip(out, wide, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-3)
    # What is derived from the TCAM is derived from the one returned.
    derived = tcam_pool(out.tcam.detach(), lengths)
    assert torch.equal(out.attention, derived.attention) and torch.equal(out.pooled, derived.pooled)
    gradients = torch.autograd.grad(out.attention.sum() + out.pooled.sum(), (a, b))
    assert all(g.dtype == dtype and g.isfinite().all() for g in gradients)


def test_different_dtypes_are_promoted(device):
    a = random(1, 5, 2).to(device)
    assert two_stream_tcam(a.half(), a).tcam.dtype == torch.float32
    assert two_stream_tcam(a, a.double()).tcam.dtype == torch.float64


def test_padding_does_not_matter(device):
    a, b = (random(3, 25, 6, seed=s).to(device) for s in (0, 1))
    lengths = torch.tensor([25, 7, 0], device=device)
    past = torch.arange(25, device=device) >= lengths[:, None]
    expected = two_stream_tcam(a, b, lengths)
    assert (
        (expected.tcam[past] == 0).all() and (expected.attention[past] == 0).all() and (expected.pooled[2] == 0).all()
    )
    for padding in (NAN, INF, -1e30):
        leaves = [x.masked_fill(past[:, :, None], padding).requires_grad_() for x in (a, b)]
        out = two_stream_tcam(*leaves, lengths)
        assert all(torch.equal(got, want) for got, want in zip(out, expected, strict=True))
        for gradient in torch.autograd.grad(sum(x.square().sum() for x in out), leaves):
            assert (gradient[past] == 0).all() and gradient.isfinite().all()
        leaf = leaves[0].detach().requires_grad_()
        pooled = tcam_pool(leaf, lengths)
        assert (pooled.attention[past] == 0).all() and pooled.pooled.isfinite().all()
        (gradient,) = torch.autograd.grad(sum(x.sum() for x in pooled), leaf)
        assert (gradient[past] == 0).all() and gradient.isfinite().all()


def test_order_of_recordings_does_not_matter(device):
    a, b = (random(4, 50, 9, seed=s).to(device) for s in (0, 1))
    lengths, order = torch.tensor([50, 3, 0, 20], device=device), torch.tensor([3, 1, 0, 2], device=device)
    out, turned = two_stream_tcam(a, b, lengths), two_stream_tcam(a[order], b[order], lengths[order])
    assert all(torch.equal(x[order], y) for x, y in zip(out, turned, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty_inputs(device, shape):
    x = torch.zeros(shape, device=device, requires_grad=True)
    tcam, attention, pooled = two_stream_tcam(x, x)
    assert tcam.shape == shape and attention.shape == shape[:2] and pooled.shape == (shape[0], shape[2])
    assert (attention == 0).all() and (shape[1] > 0 or (pooled == 0).all())
    (gradient,) = torch.autograd.grad(attention.sum() + pooled.sum(), x)
    assert gradient.shape == shape
    (gradient,) = torch.autograd.grad(sum(y.sum() for y in tcam_pool(x)), x)
    assert gradient.shape == shape


def test_views_are_read_by_their_strides(device):
    wide = random(6, 12, 30).to(device)
    a, b = wide[::2, :, 1::3], wide[1::2, :, ::3]
    for got, want in zip(two_stream_tcam(a, b), two_stream_tcam(a.contiguous(), b.contiguous()), strict=True):
        assert torch.equal(got, want)
    x = wide.transpose(1, 2).requires_grad_()
    out = tcam_pool(x)
    grads = [torch.ones((), device=device).expand_as(y) for y in out]
    (gradient,) = torch.autograd.grad(out, x, grads)
    leaf = x.detach().contiguous().requires_grad_()
    (expected,) = torch.autograd.grad(sum(y.sum() for y in tcam_pool(leaf)), leaf)
    torch.testing.assert_close(gradient, expected)


def test_threads_and_runs_do_not_matter():
    leaves = [random(3, 2000, 20, seed=s).requires_grad_() for s in (0, 1)]

    def results() -> list[torch.Tensor]:
        out = two_stream_tcam(*leaves)
        pool = tcam_pool(leaves[0])
        loss = sum((x * x.detach()).sum() for x in (*out, *pool))
        return [*out, *pool, *torch.autograd.grad(loss, leaves)]

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
    a, b = (random(2, 12, 5, seed=s).to(dtype) for s in (0, 1))
    ops = torch.ops.d2net
    torch.library.opcheck(
        ops.two_stream_tcam.default, (a.clone().requires_grad_(), b.clone().requires_grad_(), lengths, 8)
    )
    torch.library.opcheck(ops.tcam_pool.default, (a.clone().requires_grad_(), lengths, 8))
    tcam, attention, pooled, *chosen = ops.two_stream_tcam(a, b, lengths, 8)
    for of_tcam, of_attention in ((tcam, attention), (None, None)):
        saved = (tcam, lengths, *chosen, 8)
        torch.library.opcheck(ops.two_stream_tcam_backward.default, (of_tcam, of_attention, pooled, a, b, *saved))
        torch.library.opcheck(ops.tcam_pool_backward.default, (of_attention, pooled, *saved))


def test_compiles_to_one_graph():
    a, b, lengths = random(2, 40, 5), random(2, 40, 5, seed=1), torch.tensor([40, 17])

    def both(x, y):
        return *two_stream_tcam(x, y, lengths), *tcam_pool(x, lengths)

    results = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (a, b)]
        out = function(*leaves)
        results.append((*out, *torch.autograd.grad(sum(x.square().sum() for x in out), leaves)))
    torch.testing.assert_close(*results)


def test_a_second_derivative_is_refused():
    x = random(1, 9, 2).requires_grad_()
    for out in (two_stream_tcam(x, x).pooled, tcam_pool(x).pooled):
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            gradient.sum().backward()


def test_clear_errors(device):
    x = torch.rand(2, 5, 3, device=device)
    for call, message in [
        (lambda: two_stream_tcam(x[0], x[0]), "logits_a has shape"),
        (lambda: two_stream_tcam(x, x[:, :4]), "must match"),
        (lambda: two_stream_tcam(x, x.long()), "logits_b has dtype"),
        (lambda: two_stream_tcam(x, x.to("meta")), "move one of them"),
        (lambda: two_stream_tcam(x, x, torch.tensor([1], device=device)), "lengths has shape"),
        (lambda: two_stream_tcam(x, x, divisor=0), "divisor is 0"),
        (lambda: tcam_pool(x[0]), "tcam has shape"),
        (lambda: tcam_pool(x.long()), "tcam has dtype"),
        (lambda: tcam_pool(x, divisor=-1), "divisor is -1"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
