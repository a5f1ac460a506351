"""Who is compared with whom, and Eq. 3 and 4 from pooled scores and embeddings, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from d2net.ops.discriminative import Pairs, different_partners, discriminative_terms

PATTERNS = [[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 1], [0, 0, 0, 1, 0], [0] * 5]


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("fg", PATTERNS)
@pytest.mark.parametrize("bg", PATTERNS)
def test_partners_form_a_cycle_through_those_that_have_the_embedding(device, fg, bg):
    valid_fg, valid_bg = torch.tensor(fg).bool(), torch.tensor(bg).bool()
    seen = set()
    for seed in range(8):
        keys = uniform(3, 5, seed=seed, dtype=torch.float32)
        partner = different_partners(keys.to(device), valid_fg.to(device), valid_bg.to(device)).cpu()
        assert partner.shape == (3, 5) and partner.dtype == torch.int64
        for row, takes_part in ((1, valid_fg), (2, valid_bg)):
            members = takes_part.nonzero()[:, 0].tolist()
            if len(members) < 2:
                assert (partner[row] == -1).all()
                continue
            assert (partner[row][~takes_part] == -1).all()
            visited, at = [], members[0]
            for _ in members:
                visited.append(at)
                at = partner[row][at].item()
            assert at == members[0] and sorted(visited) == members
        order = keys[0].argsort().tolist()
        for place, i in enumerate(order):
            other = order[(place + 1) % 5]
            assert partner[0][i] == (other if valid_fg[i] and valid_bg[other] else -1)
        seen.add(tuple(partner.flatten().tolist()))
    assert len(seen) > 1 or max(valid_fg.sum(), valid_bg.sum()) < 3


def test_partners_of_equal_keys_follow_the_number(device):
    ones = torch.ones(4, dtype=torch.bool, device=device)
    assert different_partners(torch.zeros(3, 4, device=device), ones, ones).tolist() == [[1, 2, 3, 0]] * 3


@pytest.mark.parametrize("b", [0, 1, 300])
def test_partners_of_any_number_of_recordings(device, b):
    keys, valid = uniform(3, b, dtype=torch.float32).to(device), (uniform(b) > 0.3).to(device)
    partner = different_partners(keys, valid, ~valid)
    assert partner.shape == (3, b)
    assert (partner >= 0).sum(1).tolist()[1:] == ([0, 0] if b < 2 else [int(valid.sum()), int((~valid).sum())])


def definition(pooled, labels, counted, fg, bg, partner, source, *, beta, gamma, floor, mean, balanced) -> list[float]:
    """Recording by recording and class by class in Python floats."""

    def cosine(u, v):
        return float(u @ v / math.sqrt((u @ u + 1e-12) * (v @ v + 1e-12)))

    b, c = pooled.shape
    terms = []
    for i in range(b):
        other = [int(partner[kind][i]) if partner is not None else -1 for kind in range(3)]
        x = i if source is None else int(source[i])
        w_fb = max(0.0, cosine(fg[x], bg[other[0]])) if 0 <= other[0] < b else 0.0
        w_fg = gamma * (1 - cosine(fg[i], fg[other[1]])) if 0 <= other[1] < b else 0.0
        w_bg = gamma * (1 - cosine(bg[i], bg[other[2]])) if 0 <= other[2] < b else 0.0
        term = 0.0
        for k in range(c):
            p = min(max(float(pooled[i, k]), floor), 1 - floor)
            if labels[i, k] > 0:
                term -= (c if balanced else 1) * (1 - p + w_fg + w_fb) ** beta * math.log(p)
            else:
                term -= (p + w_bg + w_fb) ** beta * math.log(1 - p)
        terms.append((term / (c if mean else 1)) if counted[i] else 0.0)
    return terms


def batch(b: int, c: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0):
    pooled, labels = uniform(b, c, seed=seed, dtype=dtype), (uniform(b, c, seed=seed + 1) > 0.6).to(dtype)
    x_fg, x_bg = (uniform(b, d, seed=seed + k, dtype=dtype) - 0.5 for k in (2, 3))
    partner = torch.randint(-1, b, (3, b), generator=torch.Generator().manual_seed(seed))
    return pooled, labels, uniform(b, seed=seed + 4) > 0.2, x_fg, x_bg, partner


OPTIONS = [
    {"beta": 2.0, "gamma": 0.01, "mean": False, "balanced": False},
    {"beta": 1.5, "gamma": 0.3, "mean": True, "balanced": True},
    {"beta": 0.0, "gamma": 0.3, "mean": False, "balanced": True},
    {"beta": 1.0, "gamma": 0.0, "mean": True, "balanced": False},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("b", "c", "d"), [(1, 1, 1), (2, 3, 7), (6, 20, 33), (5, 300, 8), (9, 4, 700)])
@pytest.mark.parametrize("with_source", [False, True])
def test_equals_its_definition(device, options, b, c, d, with_source):
    pooled, labels, counted, x_fg, x_bg, partner = batch(b, c, d)
    pooled[0, 0], pooled[-1, -1] = 0.0, 1.0  # are clamped
    source = torch.arange(b).flip(0) if with_source else None
    expected = definition(pooled, labels, counted, x_fg, x_bg, partner, source, floor=1e-3, **options)
    pairs = Pairs(partner.to(device), None if source is None else source.to(device))
    inputs = [x.to(device) for x in (pooled, labels, counted)]
    terms = discriminative_terms(*inputs, (x_fg.to(device), x_bg.to(device)), pairs, probability_floor=1e-3, **options)
    torch.testing.assert_close(terms.cpu(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    focal = discriminative_terms(*inputs, probability_floor=1e-3, **options)
    expected = definition(pooled, labels, counted, None, None, None, None, floor=1e-3, **options)
    torch.testing.assert_close(focal.cpu(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", OPTIONS[:2])
@pytest.mark.parametrize("with_source", [False, True])
def test_gradient(device, options, with_source):
    pooled, labels, counted, x_fg, x_bg, partner = (x.to(device) for x in batch(5, 4, 6, seed=3))
    partner[:, 0] = 2  # several have the same partner
    partner[1, 2] = 2  # and one itself
    pairs = Pairs(partner, torch.tensor([3, 3, 0, 1, 4], device=device) if with_source else None)
    pooled = 0.1 + 0.8 * pooled

    def function(*leaves):
        return discriminative_terms(leaves[0], labels, counted, leaves[1:], pairs, **options)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in (pooled, x_fg, x_bg)])
    assert torch.autograd.gradcheck(lambda p: discriminative_terms(p, labels, counted, **options), pooled)


def test_float32_follows_float64(device):
    inputs = [x.to(device) for x in batch(10, 20, 1024)]
    found = {}
    for dtype in (torch.float32, torch.float64):
        pooled, x_fg, x_bg = (inputs[k].to(dtype).detach().requires_grad_() for k in (0, 3, 4))
        terms = discriminative_terms(pooled, inputs[1].to(dtype), inputs[2], (x_fg, x_bg), Pairs(inputs[5]), gamma=0.1)
        terms.sum().backward()
        found[dtype] = [x.double() for x in (terms.detach(), pooled.grad, x_fg.grad, x_bg.grad)]
    torch.testing.assert_close(found[torch.float32], found[torch.float64], rtol=1e-4, atol=1e-6)


def test_clamped_scores_have_no_gradient(device):
    pooled = torch.tensor([[0.0, 1.0, 0.5, 1e-7]], device=device, requires_grad=True)
    labels = torch.tensor([[1.0, 0.0, 1.0, 0.0]], device=device)
    terms = discriminative_terms(pooled, labels, torch.ones(1, dtype=torch.bool, device=device))
    terms.sum().backward()
    assert terms.isfinite().all() and (pooled.grad[0, [0, 1, 3]] == 0).all() and pooled.grad[0, 2] != 0


def test_zero_embeddings_and_uncounted_recordings_are_finite(device):
    pooled, labels, counted, x_fg, x_bg, partner = (x.to(device) for x in batch(4, 3, 5, torch.float32))
    x_fg, x_bg = torch.zeros_like(x_fg).requires_grad_(), torch.zeros_like(x_bg).requires_grad_()
    counted[1] = False
    pooled[1] = math.nan
    leaf = pooled.clone().requires_grad_()
    terms = discriminative_terms(leaf, labels, counted, (x_fg, x_bg), Pairs(partner))
    terms.sum().backward()
    assert terms.isfinite().all() and terms[1] == 0 and (leaf.grad[1] == 0).all()
    assert leaf.grad.isfinite().all() and x_fg.grad.isfinite().all() and x_bg.grad.isfinite().all()


def test_nan_propagates(device):
    pooled, labels, _, x_fg, x_bg, _ = (x.to(device) for x in batch(4, 3, 5, torch.float32))
    counted = torch.ones(4, dtype=torch.bool, device=device)
    partner = torch.tensor([1, 2, 3, 0], device=device).expand(3, 4)
    pooled[0, 1] = math.nan
    assert discriminative_terms(pooled, labels, counted).isnan().tolist() == [True, False, False, False]
    x_bg[2, 3] = math.inf  # of recording 2 itself, and of 1, whose partner it is
    pooled[0, 1] = 0.5
    terms = discriminative_terms(pooled, labels, counted, (x_fg, x_bg), Pairs(partner))
    assert terms.isnan().tolist() == [False, True, True, False]


def test_pairs_that_do_not_count_are_not_looked_at(device):
    pooled, labels, _, x_fg, x_bg, _ = (x.to(device) for x in batch(4, 3, 5))
    counted = torch.ones(4, dtype=torch.bool, device=device)
    expected = discriminative_terms(pooled, labels, counted)
    x_fg[0] = math.nan
    none = torch.full((3, 4), -1, device=device)
    assert torch.equal(discriminative_terms(pooled, labels, counted, (x_fg, x_bg), Pairs(none)), expected)
    partner = torch.stack((torch.tensor([1, 2, 3, 0]), *[torch.full((4,), -1)] * 2)).to(device)
    source = torch.tensor([4, -1, 7, 9], device=device)
    assert torch.equal(discriminative_terms(pooled, labels, counted, (x_fg, x_bg), Pairs(partner, source)), expected)


def test_partners_of_another_integer_type(device):
    pooled, labels, counted, x_fg, x_bg, partner = (x.to(device) for x in batch(6, 3, 5))
    source = torch.arange(6, device=device).flip(0)
    expected = discriminative_terms(pooled, labels, counted, (x_fg, x_bg), Pairs(partner, source))
    other = Pairs(partner.int(), source.short())
    assert torch.equal(discriminative_terms(pooled, labels, counted, (x_fg, x_bg), other), expected)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_partners(device, data):
    b = data.draw(st.integers(1, 6))
    numbers = st.integers(-3, b + 3)  # none of 0 ... B - 1: weight 0
    partner = torch.tensor(data.draw(st.lists(st.lists(numbers, min_size=b, max_size=b), min_size=3, max_size=3)))
    pooled, labels, counted, x_fg, x_bg, _ = batch(b, 3, 4, seed=b)
    options = {"beta": 2.0, "gamma": 0.2, "mean": False, "balanced": False}
    expected = definition(pooled, labels, counted, x_fg, x_bg, partner, None, floor=1e-6, **options)
    inputs = [x.to(device) for x in (pooled, labels, counted)]
    terms = discriminative_terms(*inputs, (x_fg.to(device), x_bg.to(device)), Pairs(partner.to(device)), **options)
    torch.testing.assert_close(terms.cpu(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(device, dtype):
    pooled, labels, counted, x_fg, x_bg, partner = (x.to(device) for x in batch(4, 3, 5, dtype))
    terms = discriminative_terms(pooled, labels, counted, (x_fg, x_bg), Pairs(partner))
    wide = discriminative_terms(pooled.float(), labels, counted, (x_fg.float(), x_bg.float()), Pairs(partner))
    assert terms.dtype == torch.float32 and torch.equal(terms, wide)


def test_views_are_read_by_their_strides(device):
    pooled, labels, counted, x_fg, x_bg, partner = (x.to(device) for x in batch(8, 6, 10))
    strided = [x[::2, ::2] for x in (pooled, labels, x_fg, x_bg)]
    views = strided[0], strided[1], counted[::2], (strided[2], strided[3]), Pairs(partner.T[::2, :].T)
    dense = (
        views[0].contiguous(), views[1].contiguous(), views[2].contiguous(),
        tuple(x.contiguous() for x in views[3]), Pairs(views[4].partner.contiguous()),
    )  # fmt: skip
    assert torch.equal(discriminative_terms(*views), discriminative_terms(*dense))


def test_results_do_not_depend_on_the_number_of_threads():
    pooled, labels, counted, x_fg, x_bg, partner = batch(40, 50, 2000, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 13):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_() for x in (pooled, x_fg, x_bg)]
            terms = discriminative_terms(leaves[0], labels, counted, leaves[1:], Pairs(partner))
            terms.sum().backward()
            found.append([terms.detach(), *(x.grad for x in leaves)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_opcheck_and_double_backward():
    pooled, labels, counted, x_fg, x_bg, partner = batch(4, 3, 5)
    leaves = [x.requires_grad_() for x in (pooled, x_fg, x_bg)]
    options = (2.0, 0.01, 1e-6, False, False)
    op = torch.ops.d2net.discriminative_terms
    torch.library.opcheck(op, (leaves[0], labels, counted, leaves[1], leaves[2], partner, None, *options))
    torch.library.opcheck(op, (leaves[0], labels, counted, None, None, None, None, *options))
    torch.library.opcheck(torch.ops.d2net.different_partners, (uniform(3, 4).float(), counted, counted))
    terms = discriminative_terms(pooled, labels, counted, (x_fg, x_bg), Pairs(partner))
    (gradient,) = torch.autograd.grad(terms.sum(), pooled, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()
