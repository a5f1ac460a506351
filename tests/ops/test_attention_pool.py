"""attention_pool on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2net.errors import InputError
from d2net.ops import attention_pool
from d2net.ops.attention_pool import attention_pool_ref

NAN = float("nan")


def made(b=3, t=12, d=4, seed=0, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    x, attention = torch.randn(b, t, d, generator=g, dtype=dtype), torch.rand(b, t, generator=g, dtype=dtype)
    return x.to(device), attention.to(device)


def naive(x, attention, lengths, threshold, background_threshold, reduction):
    """Eq. 2 in float64, for each recording and for foreground and background alone; reads selected snippets only."""
    sides = []
    for lam, above in ((attention.double(), threshold), (1 - attention.double(), background_threshold)):
        vectors = []
        for i, length in enumerate(lengths.tolist()):
            total, vector = 0.0, torch.zeros(x.shape[2], dtype=torch.float64)
            for s in range(min(max(length, 0), x.shape[1])):
                if lam[i, s] > above:
                    total += lam[i, s].item()
                    vector += lam[i, s].cpu() * x[i, s].double().cpu()
            vectors.append((vector / total if reduction == "mean" and total > 0 else vector, total > 0))
        sides.append(vectors)
    return sides


@given(
    b=st.integers(0, 4),
    t=st.integers(0, 140),
    d=st.integers(0, 20),
    thresholds=st.sampled_from([(0.5, 0.5), (0.3, 0.3), (0.5, 0.8), (0.0, 1.0), (-1.0, 2.0)]),
    reduction=st.sampled_from(["sum", "mean"]),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_its_definition(device, b, t, d, thresholds, reduction, seed):
    x, attention = made(b, t, d, seed, torch.float64)
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(-2, t + 3, (b,), generator=g)  # clamped
    attention = torch.where(torch.rand(b, t, generator=g) < 0.2, attention.round(), attention)
    past = torch.arange(t) >= lengths[:, None]
    x, attention = x.masked_fill(past[:, :, None], NAN), attention.masked_fill(past, NAN)
    out = attention_pool(
        x.to(device),
        attention.to(device),
        lengths.to(device),
        threshold=thresholds[0],
        background_threshold=thresholds[1],
        reduction=reduction,
    )
    expected = naive(x, attention, lengths, *thresholds, reduction)
    for vectors, valid, side in ((out.x_fg, out.valid_fg, expected[0]), (out.x_bg, out.valid_bg, expected[1])):
        assert vectors.shape == (b, d) and valid.shape == (b,) and valid.dtype == torch.bool
        for i, (vector, is_valid) in enumerate(side):
            torch.testing.assert_close(vectors[i].cpu(), vector)
            assert bool(valid[i]) == is_valid


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("thresholds", [(0.5, 0.5), (0.3, 0.4), (0.6, 0.7), (-1.0, 0.5)], ids=str)
def test_gradient(device, reduction, thresholds):
    x, attention = made(t=70, d=2, dtype=torch.float64, device=device)  # more than a block
    attention = 0.05 + 0.1 * (attention * 10).floor()  # no difference quotient crosses a threshold
    attention[0, 0] = 0  # with the negative threshold it is selected: its weight is 0, but its gradient is not
    attention[2, :5] = 0.95
    lengths = torch.tensor([70, 33, 5], device=device)  # the last has no background

    def run(x, attention):
        threshold, background_threshold = thresholds
        options = {"threshold": threshold, "background_threshold": background_threshold, "reduction": reduction}
        return attention_pool(x, attention, lengths, **options)[:2]

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), attention.requires_grad_()))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("needed", ["x", "attention"])
def test_only_the_gradient_that_is_needed(device, needed, reduction):
    x, attention = made(device=device)
    both = [v.clone().requires_grad_() for v in (x, attention)]
    sum(v.sum() for v in attention_pool(*both, reduction=reduction)[:2]).backward()
    one = [x.clone().requires_grad_(needed == "x"), attention.clone().requires_grad_(needed == "attention")]
    sum(v.sum() for v in attention_pool(*one, reduction=reduction)[:2]).backward()
    for got, expected, name in zip(one, both, ("x", "attention"), strict=True):
        if name == needed:
            torch.testing.assert_close(got.grad, expected.grad)
        else:
            assert got.grad is None


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_one_side_of_the_result_may_go_unused_or_get_nan(device, reduction):
    x, attention = made(device=device)
    x, attention = x.requires_grad_(), attention.requires_grad_()
    out = attention_pool(x, attention, reduction=reduction)
    for grads in ([out.x_fg.sum()], [out.x_fg.sum(), NAN * out.x_bg.sum()]):
        grad_x, grad_attention = torch.autograd.grad(sum(grads), [x, attention], retain_graph=True)
        foreground = attention > 0.5
        assert grad_x[foreground].isfinite().all() and grad_attention[foreground].isfinite().all()
        assert (grad_x[foreground] != 0).all()
    assert out.x_fg.isfinite().all()


def test_the_gradient_is_not_differentiable():
    x, attention = made()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(attention_pool(x, attention).x_fg.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("junk", [NAN, float("inf"), 1e30])
def test_padding_does_not_matter(device, junk, reduction):
    x, attention = made(t=80, device=device)
    lengths = torch.tensor([80, 64, 0], device=device)
    past = torch.arange(80, device=device) >= lengths[:, None]

    def run(x, attention):
        x, attention = x.clone().requires_grad_(), attention.clone().requires_grad_()
        out = attention_pool(x, attention, lengths, reduction=reduction)
        return *out, *torch.autograd.grad(out.x_fg.sum() + 2 * out.x_bg.sum(), [x, attention])

    expected = run(x, attention)
    got = run(x.masked_fill(past[:, :, None], junk), attention.masked_fill(past, junk))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not got[4][past].any() and not got[5][past].any()
    assert not got[0][2].any() and not got[2][2] and not got[3][2]
    longer = run(torch.cat([x, x], 1)[:, :100], torch.cat([attention, attention], 1)[:, :100])
    for a, b in zip(longer[:4], expected[:4], strict=True):
        torch.testing.assert_close(a, b)


def test_nan_reaches_only_what_it_is_selected_for(device):
    x, attention = made(1, 4, 2, device=device)
    attention[0] = torch.tensor([0.9, 0.5, 0.1, NAN])
    x[0, 1], x[0, 3] = NAN, NAN  # selected nowhere
    clean = attention_pool(x, attention)
    assert clean.x_fg.isfinite().all() and clean.x_bg.isfinite().all()
    x[0, 0] = NAN
    out = attention_pool(x, attention)
    assert out.x_fg.isnan().all() and torch.equal(out.x_bg, clean.x_bg)
    x.requires_grad_()
    attention.requires_grad_()
    out = attention_pool(x, attention)
    grad_x, grad_attention = torch.autograd.grad(out.x_bg.sum() + out.x_fg.sum(), [x, attention])
    assert grad_x.isfinite().all() and grad_attention[0, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32_and_stays_there(device, dtype):
    x, attention = made(t=500, dtype=torch.float32, device=device)
    x = (1000 + 1000 * x).to(dtype)  # sums beyond the largest float16
    for lam in (attention, attention.to(dtype)):
        half, full = x.clone().requires_grad_(), x.float().requires_grad_()
        out, expected = attention_pool(half, lam), attention_pool(full, lam.float())
        assert all(torch.equal(found, wanted) for found, wanted in zip(out, expected, strict=True))
        assert out.x_fg.max() > 1e5
        (grad,) = torch.autograd.grad(out.x_fg.sum(), half)
        (expected_grad,) = torch.autograd.grad(expected.x_fg.sum(), full)
        torch.testing.assert_close(grad, expected_grad.to(dtype))


def at_odd_address(x):
    """A contiguous copy whose address is not a multiple of 16."""
    copy = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    return copy.copy_(x)


@pytest.mark.parametrize(
    ("t", "d", "place"),
    [(31, 1032, torch.clone), (17, 1032, at_odd_address), (33, 1031, torch.clone), (50, 520, torch.clone)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_blocks_of_snippets_and_columns(device, dtype, t, d, place):
    x, attention = made(2, t, d, dtype=torch.float64)
    x, attention, mean = x.to(dtype), attention.to(torch.promote_types(dtype, torch.float32)), t % 2 == 0
    lengths = torch.tensor([t, t - 3])
    grads = made(2, 2, d, seed=1)[0].unbind(1)

    def run(function, dtype, move):
        wide = torch.promote_types(dtype, torch.float32)
        leaves = [move(x.to(dtype)).requires_grad_(), move(attention.to(wide)).requires_grad_()]
        out = function(*leaves, lengths.to(leaves[0].device))
        return *out[:2], *torch.autograd.grad(out[:2], leaves, [move(v.to(wide)) for v in grads])

    reduction = "mean" if mean else "sum"
    got = run(lambda *inputs: attention_pool(*inputs, reduction=reduction), dtype, lambda v: place(v.to(device)))
    expected = run(lambda *inputs: attention_pool_ref(*inputs, 0.5, 0.5, mean), torch.float64, torch.clone)
    eps = torch.finfo(dtype).eps
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=2 * eps, atol=max(1e-4, eps))


def test_long_recordings_keep_their_precision(device):
    x, attention = made(1, 100_000, 3, device=device)
    x += 1  # sums far larger than their terms
    out = attention_pool(x, attention)
    fg = torch.where(attention > 0.5, attention, 0).double()
    bg = torch.where(1 - attention > 0.5, 1 - attention, 0).double()
    torch.testing.assert_close(out.x_fg.double(), (fg[..., None] * x.double()).sum(1), rtol=5e-6, atol=0)
    torch.testing.assert_close(out.x_bg.double(), (bg[..., None] * x.double()).sum(1), rtol=5e-6, atol=0)


def test_views_are_read_by_their_strides(device):
    wide = torch.randn(4, 7, 20, 2, generator=torch.Generator().manual_seed(0)).to(device)
    x, attention = wide[:, ::2, :, 0].transpose(1, 2), wide[:, 1, :, 1].sigmoid().T[::2].T
    x = x[:, ::2]
    x, attention = x.requires_grad_(), attention.requires_grad_()
    packed = [v.detach().clone().contiguous().requires_grad_() for v in (x, attention)]
    lengths = torch.tensor([10, 0, 3, 0, 7, 0, 9], device=device)[::2]
    expected = attention_pool(*packed, lengths.contiguous())
    out = attention_pool(x, attention, lengths)
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b)
    weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).to(device).T  # not contiguous
    for a, b in zip(
        torch.autograd.grad((out.x_fg * weights).sum(), [x, attention]),
        torch.autograd.grad((expected.x_fg * weights).sum(), packed),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_recordings_do_not_mix(device):
    x, attention = made(5, 100, 3, device=device)
    lengths = torch.tensor([100, 1, 0, 64, 65], device=device)
    order = torch.tensor([3, 1, 4, 0, 2], device=device)
    shuffled = attention_pool(x[order], attention[order], lengths[order])
    for a, b in zip(shuffled, attention_pool(x, attention, lengths), strict=True):
        assert torch.equal(a, b[order])


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0)], ids=str)
def test_nothing(device, shape):
    x = torch.zeros(shape, device=device, requires_grad=True)
    attention = torch.zeros(shape[:2], device=device, requires_grad=True)
    out = attention_pool(x, attention, reduction="mean")
    assert out.x_fg.shape == (shape[0], shape[2]) and not out.valid_fg.any()
    grads = torch.autograd.grad(out.x_fg.sum() + out.x_bg.sum(), [x, attention])
    assert [g.shape for g in grads] == [x.shape, attention.shape]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("b", [1, 3])
def test_the_number_of_threads_does_not_matter(b, reduction):
    x, attention = made(b, 999, 130)
    lengths = torch.tensor([999, 500, 64])[:b]

    def run():
        leaves = [x.clone().requires_grad_(), attention.clone().requires_grad_()]
        out = attention_pool(*leaves, lengths, reduction=reduction)
        return *out, *torch.autograd.grad((out.x_fg * x[:, 0] + out.x_bg).sum(), leaves)

    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7, 2):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("lengths", [None, torch.tensor([12, 5, 0])], ids=["all", "lengths"])
def test_registration(mean, lengths):
    x, attention = made()
    wanted = x.clone().requires_grad_(), attention.clone().requires_grad_()
    torch.library.opcheck(torch.ops.d2net.attention_pool.default, (*wanted, lengths, 0.5, 0.6, mean, None, 0))
    pooled = [x[:, 0].clone(), x[:, 1].clone()] if mean else [None, None]
    arguments = (x, attention, lengths, *pooled, x[:, 2].clone(), x[:, 3].clone(), 0.5, 0.6, mean)
    for need in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.d2net.attention_pool_backward.default, (*arguments, *need, None, 0))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_compiles_to_one_graph(reduction):
    def loss(x, attention, lengths):
        out = attention_pool(x, attention, lengths, reduction=reduction)
        return (out.x_fg * out.valid_bg[:, None] + out.x_bg).square().sum()

    x, attention = made()
    lengths = torch.tensor([12, 5, 0])
    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_(), attention.clone().requires_grad_()]
        value = run(*leaves, lengths)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected)


def test_clear_errors():
    x, attention = made()
    for call, message in [
        (lambda: attention_pool(x[0], attention), "x has shape"),
        (lambda: attention_pool(x, x), "attention has shape"),
        (lambda: attention_pool(x, attention[:, 1:]), "must match"),
        (lambda: attention_pool(x.long(), attention), "x has dtype"),
        (lambda: attention_pool(x, attention > 0.5), "attention has dtype"),
        (lambda: attention_pool(x, attention, torch.tensor([1.0, 2.0, 3.0])), "lengths has shape"),
        (lambda: attention_pool(x, attention, torch.tensor([1, 2])), "lengths has shape"),
        (lambda: attention_pool(x, attention.to("meta")), "meta"),
        (lambda: attention_pool(x, attention, reduction="max"), "reduction is 'max'"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
