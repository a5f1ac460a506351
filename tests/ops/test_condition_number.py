"""log_condition_number, joint_log_condition_number and snippet_pdmi against singular values."""

from __future__ import annotations

import math

import pytest
import torch

from d2net.errors import InputError
from d2net.ops import joint_log_condition_number, log_condition_number, snippet_pdmi


@pytest.mark.parametrize("shape", [(5, 2, 2), (3, 20, 20), (4, 3, 7), (4, 7, 3), (2, 1, 6)])
def test_equals_svdvals(shape):
    u = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sigma = torch.linalg.svdvals(u)
    torch.testing.assert_close(log_condition_number(u), (sigma[:, 0] / sigma[:, -1]).log())
    assert torch.autograd.gradcheck(log_condition_number, u.requires_grad_())


def test_rank_deficient_matrices_use_the_smallest_nonzero_value():
    u = torch.diag_embed(torch.tensor([[4.0, 2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [8.0, 1.0, 9e-6]]))
    expected = torch.tensor([math.log(2), 0.0, 0.0, math.log(8)])
    torch.testing.assert_close(log_condition_number(u), expected)


def test_repeated_singular_values_have_a_finite_gradient():
    u = torch.eye(4).repeat(2, 1, 1).requires_grad_()
    log_condition_number(u).sum().backward()
    assert torch.isfinite(u.grad).all()


def test_scale_does_not_change_the_value():
    u = torch.rand(4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(log_condition_number(u), log_condition_number(3 * u))


def test_joint_is_the_product():
    g = torch.Generator().manual_seed(0)
    p = torch.rand(3, 30, 5, generator=g, dtype=torch.float64).requires_grad_()
    y = torch.rand(3, 5, 30, generator=g, dtype=torch.float64)
    torch.testing.assert_close(joint_log_condition_number(p, y), log_condition_number(p @ y))
    assert torch.autograd.gradcheck(lambda v: joint_log_condition_number(v, y), p)


@pytest.mark.parametrize("normalization", ["joint", "per_class"])
def test_snippet_pdmi_equals_equation_9(normalization):
    attention = torch.tensor([[0.9, 0.8, 0.2, 0.4, 0.5]], dtype=torch.float64)
    scores = torch.tensor([[0.7, 0.6, 0.1, 0.2, 0.5]], dtype=torch.float64)  # the last is neither
    u = torch.tensor([[0.9 + 0.8, 0.2 + 0.4], [0.1 + 0.2, 0.8 + 0.6]], dtype=torch.float64)
    u = u / 4 if normalization == "joint" else u / 2
    sigma = torch.linalg.svdvals(u)
    loss, valid = snippet_pdmi(attention, scores, normalization=normalization)
    assert valid.all()
    assert loss.item() == pytest.approx(math.log(sigma[0] / sigma[1]))
    attention.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: snippet_pdmi(a, scores, normalization=normalization).loss, attention)


def test_snippet_pdmi_without_a_side_is_not_valid():
    attention = torch.rand(3, 6, requires_grad=True)
    scores = torch.tensor([[0.9] * 6, [0.1] * 6, [0.5] * 6])
    loss, valid = snippet_pdmi(attention, scores, torch.tensor([6, 0, 3]))
    loss.sum().backward()
    assert loss.tolist() == [0, 0, 0] and not valid.any() and (attention.grad == 0).all()


def test_empty_and_wrong_inputs():
    assert log_condition_number(torch.zeros(0, 2, 2)).shape == (0,)
    assert log_condition_number(torch.zeros(3, 0, 2)).tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="shape"):
        log_condition_number(torch.eye(2))
    u = torch.rand(3, 3, 3)
    u[1, 0, 2] = float("nan")
    assert torch.isnan(log_condition_number(u)).tolist() == [False, True, False]
    with pytest.raises(InputError, match="multiplied"):
        joint_log_condition_number(torch.rand(1, 3, 2), torch.rand(1, 3, 3))
    with pytest.raises(InputError, match="normalization"):
        snippet_pdmi(torch.rand(1, 3), torch.rand(1, 3), normalization="rows")
