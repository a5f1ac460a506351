"""snippet_pdmi against Eq. 9 written out, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from d2net.errors import InputError
from d2net.ops import snippet_pdmi

NORMALIZATIONS = pytest.mark.parametrize("normalization", ["joint", "per_class"])


def definition(attention, scores, length, fg_threshold, bg_threshold, normalization) -> tuple[float, bool]:
    """The loss of one recording, snippet by snippet in Python floats."""
    chosen = [(a, s) for a, s in zip(attention.tolist()[:length], scores.tolist()[:length], strict=True)]
    fg = [a for a, s in chosen if s > fg_threshold]
    bg = [a for a, s in chosen if s < bg_threshold]
    if not fg or not bg:
        return 0.0, False
    n_f, n_b = (len(fg), len(bg)) if normalization == "per_class" else [len(fg) + len(bg)] * 2
    u = [[sum(fg) / n_f, sum(bg) / n_b], [sum(1 - a for a in fg) / n_f, sum(1 - a for a in bg) / n_b]]
    sigma = [s for s in torch.linalg.svdvals(torch.tensor(u, dtype=torch.float64)).tolist() if s > 1e-5]
    return (math.log(sigma[0] / sigma[-1]) if len(sigma) == 2 else 0.0), True


def batch(b: int, t: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(b, t, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def gradient_of(attention: Tensor, *args, **options) -> Tensor:
    leaf = attention.detach().clone().requires_grad_()
    snippet_pdmi(leaf, *args, **options).loss.sum().backward()
    return leaf.grad


@NORMALIZATIONS
def test_equals_equation_9(device, normalization):
    attention = torch.tensor([[0.9, 0.8, 0.2, 0.4, 0.5]], dtype=torch.float64, device=device)
    scores = torch.tensor([[0.7, 0.6, 0.1, 0.2, 0.5]], dtype=torch.float64, device=device)  # the last: neither
    u = torch.tensor([[0.9 + 0.8, 0.2 + 0.4], [0.1 + 0.2, 0.8 + 0.6]], dtype=torch.float64)
    u = u / 4 if normalization == "joint" else u / 2
    sigma = torch.linalg.svdvals(u)
    loss, valid = snippet_pdmi(attention, scores, normalization=normalization)
    assert valid.all()
    assert loss.item() == pytest.approx(math.log(sigma[0] / sigma[1]))
    attention.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: snippet_pdmi(a, scores, normalization=normalization).loss, attention)


@NORMALIZATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t", [1, 2, 17, 750, 5000])
def test_equals_its_definition(device, normalization, dtype, t):
    attention, scores = batch(5, t, dtype)
    lengths = torch.tensor([t, t // 2, 0, 1, t + 9])
    thresholds = {"fg_threshold": 0.625, "bg_threshold": 0.375}
    loss, valid = snippet_pdmi(
        attention.to(device), scores.to(device), lengths.to(device), **thresholds, normalization=normalization
    )
    rows = zip(attention, scores, lengths.tolist(), strict=True)
    expected = [definition(a, s, min(length, t), 0.625, 0.375, normalization) for a, s, length in rows]
    assert valid.tolist() == [v for _, v in expected]
    tolerance = 2e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(
        loss.double().cpu(), torch.tensor([e for e, _ in expected], dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


@NORMALIZATIONS
def test_gradient_with_lengths_and_overlapping_thresholds(device, normalization):
    attention, scores = (x.to(device) for x in batch(4, 9))
    lengths = torch.tensor([9, 5, 0, 2], device=device)
    options = {"fg_threshold": 0.3, "bg_threshold": 0.7, "normalization": normalization}  # many snippets are both
    assert torch.autograd.gradcheck(
        lambda a: snippet_pdmi(a, scores, lengths, **options).loss, attention.requires_grad_()
    )


def test_without_a_side_it_is_not_valid(device):
    attention = torch.rand(3, 6, device=device, requires_grad=True)
    scores = torch.tensor([[0.9] * 6, [0.1] * 6, [0.5] * 6], device=device)
    loss, valid = snippet_pdmi(attention, scores, torch.tensor([6, 0, 3], device=device))
    loss.sum().backward()
    assert loss.tolist() == [0, 0, 0] and not valid.any() and (attention.grad == 0).all()


def test_equal_attention_everywhere_has_rank_one(device):
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.2]] * 3, device=device)
    attention = torch.tensor([[0.25] * 4, [0.0] * 4, [1.0] * 4], device=device)
    loss, valid = snippet_pdmi(attention, scores)
    assert valid.all() and loss.tolist() == [0, 0, 0]
    assert (gradient_of(attention, scores) == 0).all()


def test_perfect_attention_is_the_minimum(device):
    scores = torch.tensor([[0.9, 0.1]], device=device)
    loss, valid = snippet_pdmi(torch.tensor([[1.0, 0.0]], device=device), scores)
    assert valid.all() and loss.abs().item() < 1e-6
    assert gradient_of(torch.tensor([[1.0, 0.0]], device=device), scores).isfinite().all()


@NORMALIZATIONS
def test_entries_below_the_floor_are_raised_without_gradient(device, normalization):
    attention = torch.tensor([[0.999, 0.001, 0.5, 0.02]], dtype=torch.float64, device=device)
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.2]], dtype=torch.float64, device=device)
    n = 2 if normalization == "per_class" else 4
    u = torch.tensor([[1.499, 0.021], [0.501, 1.979]], dtype=torch.float64) / n
    sigma = torch.linalg.svdvals(u.clamp(min=0.02))  # raises the upper right one only
    options = {"normalization": normalization, "entry_floor": 0.02}
    loss = snippet_pdmi(attention, scores, **options).loss
    assert loss.item() == pytest.approx(math.log(sigma[0] / sigma[1]))
    assert torch.autograd.gradcheck(lambda a: snippet_pdmi(a, scores, **options).loss, attention.requires_grad_())


def test_singular_values_up_to_the_tolerance_are_zero(device):
    attention = torch.tensor([[0.6, 0.4]], dtype=torch.float64, device=device)
    scores = torch.tensor([[0.9, 0.1]], dtype=torch.float64, device=device)  # U_1 = [.3 .2; .2 .3]: 0.5 and 0.1
    assert snippet_pdmi(attention, scores, rank_tol=0.09).loss.item() == pytest.approx(math.log(5))
    assert snippet_pdmi(attention, scores, rank_tol=0.11).loss.item() == 0


@pytest.mark.parametrize("filler", [math.nan, math.inf, 1e30, 0.0])
def test_padding_does_not_matter(device, filler):
    attention, scores = (x.to(device) for x in batch(3, 12, torch.float32))
    lengths = torch.tensor([12, 7, 3], device=device)
    expected, expected_gradient = snippet_pdmi(attention, scores, lengths), gradient_of(attention, scores, lengths)
    past = torch.arange(12, device=device) >= lengths[:, None]
    padded = attention.masked_fill(past, filler)
    for s in (scores.masked_fill(past, filler), scores.masked_fill(past, 0.9)):
        result = snippet_pdmi(padded, s, lengths)
        assert torch.equal(result.loss, expected.loss) and torch.equal(result.valid, expected.valid)
        gradient = gradient_of(padded, s, lengths)
        assert torch.equal(gradient, expected_gradient) and (gradient[past] == 0).all()


def test_nan_propagates_from_chosen_snippets_only(device):
    attention, scores = (x.to(device) for x in batch(3, 8, torch.float32))
    scores[:, :3] = torch.tensor([0.9, 0.1, 0.5])
    attention[0, 2] = math.nan  # of a snippet that is neither
    attention[1, 0] = math.nan
    scores[2, 4] = math.nan
    loss, valid = snippet_pdmi(attention, scores)
    assert valid.all() and loss.isnan().tolist() == [False, True, False]
    gradient = gradient_of(attention, scores)
    assert gradient[[0, 2]].isfinite().all() and gradient[1, 0].isnan() and gradient[2, 4] == 0


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.tuples(*[st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 1.0])] * 2), min_size=1, max_size=12),
    length=st.integers(-2, 14),
    normalization=st.sampled_from(["joint", "per_class"]),
)
def test_any_recording(device, values, length, normalization):
    attention, scores = torch.tensor(values, dtype=torch.float64).T[:, None]
    expected, valid = definition(attention[0], scores[0], max(0, length), 0.5, 0.5, normalization)
    result = snippet_pdmi(
        attention.to(device), scores.to(device), torch.tensor([length], device=device), normalization=normalization
    )
    assert result.valid.item() is valid and result.loss.item() == pytest.approx(expected, abs=1e-7)
    turned = snippet_pdmi(
        attention[:, : max(0, length)].flip(1).to(device),
        scores[:, : max(0, length)].flip(1).to(device),
        normalization=normalization,
    )
    torch.testing.assert_close(turned.loss, result.loss, rtol=0, atol=1e-7)


def test_recordings_do_not_influence_each_other_and_views_are_read_by_their_strides(device):
    attention, scores = (x.to(device) for x in batch(6, 40, torch.float32))
    lengths = torch.tensor([40, 31, 8, 20, 40, 3], device=device)
    order = torch.tensor([3, 1, 5, 0, 2, 4], device=device)
    expected = snippet_pdmi(attention, scores, lengths)
    assert torch.equal(expected.loss[order], snippet_pdmi(attention[order], scores[order], lengths[order]).loss)
    strided = snippet_pdmi(attention.T.contiguous().T, scores.T.contiguous().T, lengths.to(torch.int32))
    torch.testing.assert_close(strided, expected)
    view, view_scores = attention[::2, 1::3], scores[::2, 1::3]
    torch.testing.assert_close(gradient_of(view, view_scores), gradient_of(view.contiguous(), view_scores.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t", [3, 1023, 1024, 1026, 2049])
def test_the_address_of_a_row_does_not_matter(device, t, dtype):
    attention, scores = batch(3, t + 1, dtype)
    lengths = torch.tensor([t, t - 1, t // 2], device=device)
    unaligned = attention.to(device).flatten()[1 : 1 + 3 * t].view(3, t)
    unaligned_scores = scores.to(device).flatten()[2 : 2 + 3 * t].view(3, t)
    aligned, aligned_scores = unaligned.clone(), unaligned_scores.clone()
    loss, expected = (
        snippet_pdmi(unaligned, unaligned_scores, lengths).loss,
        snippet_pdmi(aligned, aligned_scores, lengths),
    )
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=0)
    gradient, grad_aligned = (
        gradient_of(a, s, lengths) for a, s in ((unaligned, unaligned_scores), (aligned, aligned_scores))
    )
    assert torch.equal(gradient, grad_aligned) and (gradient[1, t - 1 :] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(device, dtype):
    attention, scores = (x.to(device) for x in batch(3, 30, dtype))
    loss, _ = snippet_pdmi(attention, scores)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, snippet_pdmi(attention.float(), scores.float()).loss)
    gradient = gradient_of(attention, scores)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, gradient_of(attention.float(), scores.float()).to(dtype))


def test_under_autocast_it_is_computed_in_float32(device):
    attention, scores = (x.to(device) for x in batch(3, 30, torch.float32))
    expected = snippet_pdmi(attention, scores)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        torch.testing.assert_close(snippet_pdmi(attention, scores), expected)
        assert snippet_pdmi(attention.bfloat16(), scores.bfloat16()).loss.dtype == torch.float32


def test_scores_of_another_type_and_with_a_gradient(device):
    attention, scores = (x.to(device) for x in batch(3, 30, torch.float32))
    scores = scores.bfloat16().requires_grad_()
    loss, _ = snippet_pdmi(attention.requires_grad_(), scores)
    torch.testing.assert_close(loss, snippet_pdmi(attention, scores.detach().float()).loss)
    loss.sum().backward()
    assert scores.grad is None and attention.grad.abs().sum() > 0


def test_empty(device):
    for shape in ((0, 5), (3, 0)):
        attention = torch.zeros(shape, device=device, requires_grad=True)
        loss, valid = snippet_pdmi(attention, torch.zeros(shape, device=device))
        loss.sum().backward()
        assert loss.tolist() == [0] * shape[0] and valid.tolist() == [False] * shape[0]
        assert attention.grad.shape == shape


def test_a_second_derivative_is_refused(device):
    attention, scores = (x.to(device) for x in batch(2, 10))
    loss = snippet_pdmi(attention.requires_grad_(), scores).loss
    (gradient,) = torch.autograd.grad(loss.square().sum(), attention, create_graph=True)
    with pytest.raises(RuntimeError, match="once|twice"):
        gradient.sum().backward()


def test_registration():
    attention, scores = batch(3, 9, torch.float32)
    for lengths in (None, torch.tensor([9, 4, 0])):
        args = (attention.clone().requires_grad_(), scores, lengths, 0.5, 0.5, False, 0.0, 1e-5, None, 0)
        torch.library.opcheck(torch.ops.d2net.snippet_pdmi.default, args)
    args = (torch.rand(3), torch.rand(3, 2), scores, lengths, 0.5, 0.5, None, 0)
    torch.library.opcheck(torch.ops.d2net.snippet_pdmi_backward.default, args)


def test_compiles_to_one_graph():
    attention, scores = batch(3, 9, torch.float32)
    attention.requires_grad_()
    compiled = torch.compile(snippet_pdmi, fullgraph=True, backend="aot_eager")
    ours, expected = compiled(attention, scores), snippet_pdmi(attention, scores)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours.loss.sum(), attention), torch.autograd.grad(expected.loss.sum(), attention)
    )


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_number_of_threads_does_not_matter(threads):
    attention, scores = batch(9, 30000, torch.float32)
    expected, gradient, before = (
        snippet_pdmi(attention, scores),
        gradient_of(attention, scores),
        torch.get_num_threads(),
    )
    torch.set_num_threads(threads)
    try:
        for _ in range(2):
            assert torch.equal(snippet_pdmi(attention, scores).loss, expected.loss)
            assert torch.equal(gradient_of(attention, scores), gradient)
    finally:
        torch.set_num_threads(before)


def test_wrong_inputs_are_refused():
    x = torch.rand(2, 3)
    with pytest.raises(InputError, match="normalization"):
        snippet_pdmi(x, x, normalization="rows")
    with pytest.raises(InputError, match="rank_tol"):
        snippet_pdmi(x, x, rank_tol=-1.0)
    with pytest.raises(InputError, match="attention has shape"):
        snippet_pdmi(x[0], x[0])
    with pytest.raises(InputError, match="they must match"):
        snippet_pdmi(x, x[:, :2])
    with pytest.raises(InputError, match="dtype"):
        snippet_pdmi(x.long(), x)
    for lengths in (torch.tensor([3]), torch.tensor([3.0, 3.0])):
        with pytest.raises(InputError, match="lengths has shape"):
            snippet_pdmi(x, x, lengths)
