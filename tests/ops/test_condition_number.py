"""log_condition_number and joint_log_condition_number against float64 singular values, on every backend."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from d2net.errors import InputError
from d2net.ops import backend_of, condition_number, joint_log_condition_number, log_condition_number, use_backend

TOLERANCE = 1e-5


@pytest.fixture
def kind(request):
    with use_backend("reference") if request.param == "reference" else nullcontext():
        yield


def expected_value(u: Tensor, rank_tol: float = TOLERANCE) -> Tensor:
    """The values, from all singular values in float64, matrix by matrix."""
    values = []
    for matrix in u.detach().double().cpu():
        sigma = [s for s in torch.linalg.svdvals(matrix).tolist() if s > rank_tol]
        values.append(math.log(sigma[0] / sigma[-1]) if len(sigma) > 1 else 0.0)
    return torch.tensor(values, dtype=torch.float64)


def assert_value(u: Tensor, **options) -> None:
    close = {"rtol": 1e-5, "atol": 1e-5} if u.dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(log_condition_number(u).double().cpu(), expected_value(u), **(options or close))


def skip_reference(operator: str, device: torch.device) -> None:
    if backend_of(operator, device.type) == "reference":
        pytest.skip("the reference computes in float32, which has not the digits; kernels compute in float64")


def gradient_of(function, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves).sum(), leaves)


def assert_valid_gradient(u: Tensor, gradient: Tensor) -> None:
    """G = u1 v1^T / s1 - ur vr^T / sr gives G U^T = u1 u1^T - ur ur^T, whichever vectors are taken; where s1 = sr they
    may coincide, or be averaged."""
    for g, matrix in zip(gradient.double(), u.double(), strict=True):
        projections = g @ matrix.T
        assert projections.isfinite().all()
        torch.testing.assert_close(projections, projections.T, atol=1e-4, rtol=0)
        eigenvalues = torch.linalg.eigvalsh(projections)
        assert eigenvalues.sum().abs() < 1e-4 and eigenvalues.abs().max() < 1 + 1e-4
        sigma = torch.linalg.svdvals(matrix)
        if sigma[0] > sigma[-1] * 1.001:
            torch.testing.assert_close(eigenvalues[[0, -1]], eigenvalues.new_tensor([-1.0, 1.0]), atol=1e-4, rtol=0)
            assert len(sigma) < 3 or eigenvalues[1:-1].abs().max() < 1e-4


def rotations(n: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(count, n, n, generator=generator, dtype=torch.float64)).Q


def with_singular_values(sigma: list[float], count: int = 2) -> Tensor:
    n = len(sigma)
    return rotations(n, count, 1) @ torch.diag(torch.tensor(sigma, dtype=torch.float64)) @ rotations(n, count, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape",
    [(50, 2, 2), (5, 3, 3), (3, 20, 20), (2, 100, 100), (1, 128, 128), (1, 130, 129)]
    + [(4, 3, 7), (4, 7, 3), (2, 1, 6), (2, 6, 1), (2, 1, 1), (2, 128, 2), (2, 40, 41)],
)
def test_equals_svdvals(device, shape, dtype):
    u = torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=dtype).to(device)
    assert_value(u, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("shape", [(5, 2, 2), (2, 5, 5), (3, 4, 7), (3, 7, 4), (2, 1, 3), (1, 12, 12)])
def test_gradient(device, shape):
    u = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(device)
    assert torch.autograd.gradcheck(log_condition_number, u.requires_grad_())


@pytest.mark.parametrize("n", [20, 100])
def test_gradient_of_large_matrices(device, n):
    u = torch.rand(2, n, n, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    left, sigma, right = torch.linalg.svd(u)
    expected = (
        left[:, :, :1] @ right[:, :1] / sigma[:, :1, None] - left[:, :, -1:] @ right[:, -1:] / sigma[:, -1:, None]
    )
    (gradient,) = gradient_of(log_condition_number, u.to(device))
    torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item())
    (gradient,) = gradient_of(log_condition_number, u.float().to(device))
    torch.testing.assert_close(gradient.cpu().double(), expected, rtol=0, atol=1e-2 * expected.abs().max().item())


@pytest.mark.parametrize("shape", [(17, 17), (17, 128), (64, 64), (128, 100), (128, 128)])
def test_singular_values_spread_over_many_decades(device, shape):
    """Matrices that need many Jacobi rotations; from 17 columns on the CUDA kernel does a QR factorisation first."""
    rows, cols = shape
    rank = min(shape)
    sigma = torch.logspace(0, -12, rank, dtype=torch.float64)
    u = rotations(rows, 1, 1)[:, :, :rank] * sigma @ rotations(cols, 1, 2)[:, :rank]
    u = u.to(device)
    for tolerance in (2e-5, 2e-9):  # not close to a singular value
        found = log_condition_number(u, rank_tol=tolerance).cpu()
        torch.testing.assert_close(found, expected_value(u, tolerance), rtol=1e-7, atol=0)
    skip_reference("log_condition_number", device)
    assert_value(u.float(), rtol=1e-2, atol=0)  # rounding to float32 changes the smallest singular value
    if rows == cols:
        assert_valid_gradient(u, gradient_of(lambda x: log_condition_number(x, rank_tol=2e-5), u)[0])


def test_rank_deficient_matrices_use_the_smallest_nonzero_value(device):
    u = torch.diag_embed(torch.tensor([[4.0, 2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [8.0, 1.0, 9e-6]]))
    expected = torch.tensor([math.log(2), 0.0, 0.0, math.log(8)])
    torch.testing.assert_close(log_condition_number(u.to(device)).cpu(), expected)


@pytest.mark.parametrize("n", [2, 5, 32, 100])
def test_rank_one_and_zero_give_zero_and_no_gradient(device, n):
    x = torch.rand(3, n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = (x @ x.mT).to(device)
    u[2] = 0
    (gradient,) = gradient_of(log_condition_number, u)
    assert (log_condition_number(u) == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("n", [5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_structured_matrices(device, n, dtype):
    if dtype == torch.float32:
        skip_reference("log_condition_number", device)
    near = torch.ones(n, dtype=torch.float64) + 1e-12 * torch.rand(n, generator=torch.Generator().manual_seed(0))
    half, generator = n // 2, torch.Generator().manual_seed(5)
    cases = [
        with_singular_values(torch.logspace(0, -3, n).tolist()),
        with_singular_values([1.0] * half + [0.0] * (n - half)),
        with_singular_values([1.0] * half + [1e-2] * (n - half)),
        with_singular_values(near.tolist()),
        torch.diag(torch.logspace(3, -2, n, dtype=torch.float64))[None],
        torch.logspace(0, -2, n, dtype=torch.float64)[:, None] * torch.rand(1, n, n, generator=generator),
        (torch.eye(n) + torch.eye(n).roll(1, 0))[None].double().tril(),
        torch.block_diag(torch.ones(half, half), torch.ones(n - half, n - half))[None].double(),
        (torch.rand(2, n, n, generator=generator) > 0.7).double(),
    ]
    for u in cases:
        u = u.to(dtype)
        sigma = torch.linalg.svdvals(u.double())
        assert not ((sigma > 1e-7) & (sigma < 1e-4)).any()  # no singular value is close to the tolerance
        u = u.to(device)
        assert_value(u, rtol=1e-4, atol=1e-4)
        if dtype == torch.float64:
            (gradient,) = gradient_of(log_condition_number, u)
            if (sigma > TOLERANCE).all():
                assert_valid_gradient(u.cpu(), gradient.cpu())


@pytest.mark.parametrize("n", [2, 4, 7, 50])
def test_repeated_singular_values_have_a_finite_and_valid_gradient(device, n):
    flipped = torch.eye(n, dtype=torch.float64)
    flipped[0, 0] = -1
    turned = rotations(n, 1, 0)[0]
    u = torch.stack([torch.eye(n, dtype=torch.float64), flipped, flipped.flip(0), turned, 3 * turned.T])
    for dtype in (torch.float32, torch.float64):
        x = u.to(dtype).to(device)
        torch.testing.assert_close(log_condition_number(x).cpu(), torch.zeros(5, dtype=dtype), atol=1e-5, rtol=0)
        (gradient,) = gradient_of(log_condition_number, x)
        assert_valid_gradient(u, gradient.cpu())


def test_two_by_two_does_not_cancel(device):
    t = torch.tensor([0.1, 1.0, 2.0, 4.0], dtype=torch.float64)
    turn = torch.stack([t.cos(), -t.sin(), t.sin(), t.cos()], 1).reshape(4, 2, 2)
    for excess in (1e-3, 1e-7, 1e-10):  # nearly orthogonal: log(1 + excess)
        u = turn @ torch.diag(torch.tensor([1 + excess, 1.0], dtype=torch.float64)) @ turn.mT
        torch.testing.assert_close(
            log_condition_number(u.to(device)).cpu(),
            torch.full((4,), math.log1p(excess)).double(),
            rtol=1e-5,
            atol=1e-15,
        )
    # Nearly singular: singular values 2 and 1e-4. A determinant computed in float32 would have no correct digit.
    u = torch.tensor([[[1.0, 1.0], [1.0, 1.0002]], [[1.0, -1.0], [-1.0001, 1.0003]]])
    torch.testing.assert_close(log_condition_number(u.to(device)).double().cpu(), expected_value(u), rtol=2e-4, atol=0)


@pytest.mark.parametrize("n", [2, 6])
@pytest.mark.parametrize(("dtype", "scales"), [(torch.float32, (1e-30, 1e30)), (torch.float64, (1e-300, 1e300))])
def test_scale_does_not_change_the_value(device, n, dtype, scales):
    u = torch.rand(4, n, n, generator=torch.Generator().manual_seed(0), dtype=dtype).to(device)
    expected = log_condition_number(u, rank_tol=0.0)
    for scale in (3.0, *scales):
        value = log_condition_number(u * scale, rank_tol=0.0)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


ENTRIES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-2, 7.0, 1 / 3])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 6), cols=st.integers(1, 6), data=st.data())
def test_any_small_matrix(device, rows, cols, data):
    entries = data.draw(st.lists(ENTRIES, min_size=rows * cols, max_size=rows * cols))
    u = torch.tensor(entries, dtype=torch.float64).reshape(1, rows, cols)
    sigma = torch.linalg.svdvals(u)
    assume(not ((sigma > 1e-9) & (sigma < 1e-4)).any())
    u = u.to(device)
    assert_value(u)
    torch.testing.assert_close(log_condition_number(u.mT), log_condition_number(u))
    # Rounding to float32 changes every singular value by some 1e-7 of the largest. So zero ones must stay below the
    # tolerance, and the relative error of the smallest other one is larger than 1e-7.
    single = log_condition_number(u.flip(1).float(), rank_tol=5e-5).double()
    condition = log_condition_number(u).exp().item()
    torch.testing.assert_close(single, log_condition_number(u), rtol=0, atol=1e-6 * condition + 1e-6)
    (gradient,) = gradient_of(log_condition_number, u)
    assert gradient.isfinite().all()
    # Scaling U does not change the value.
    torch.testing.assert_close((gradient * u).sum(), u.new_zeros(()), atol=1e-8, rtol=0)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(3, 2, 2), (3, 3, 3), (3, 5, 2), (3, 1, 4)])
def test_nan_stays_in_its_matrix(device, broken, shape):
    u = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    u[1, 0, 1] = broken
    u = u.to(device)
    assert log_condition_number(u).isnan().tolist() == [False, True, False]
    (gradient,) = gradient_of(log_condition_number, u)
    assert gradient.isnan().all(2).all(1).tolist() == [False, True, False] and gradient[::2].isfinite().all()


def test_matrices_do_not_influence_each_other_and_views_are_read_by_their_strides(device):
    u = torch.rand(6, 9, 11, generator=torch.Generator().manual_seed(0)).to(device)
    order = torch.tensor([3, 1, 5, 0, 2, 4], device=device)
    torch.testing.assert_close(log_condition_number(u)[order], log_condition_number(u[order]))
    for view in (u[:, 1:6, ::2], u.mT, u[:1].expand(4, -1, -1), u.transpose(0, 1)):
        torch.testing.assert_close(log_condition_number(view), log_condition_number(view.contiguous()))
        (a,), (b,) = gradient_of(log_condition_number, view), gradient_of(log_condition_number, view.contiguous())
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("classes", "items"), [(30, 5), (100, 10), (20, 20), (5, 30), (2, 2), (6, 1), (1, 6), (1, 1), (140, 4), (4, 140)]
)
def test_joint_is_the_product(device, classes, items):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(3, classes, items, generator=generator, dtype=torch.float64)
    y = torch.rand(3, items, classes, generator=generator, dtype=torch.float64)
    if items > 1:
        y[1, 1] = y[1, 0]  # two recordings with equal labels
        y[2, items // 2] = 0
    p, y = 100 * p, y / 32
    product = p @ y
    (grad_product,) = gradient_of(condition_number.log_condition_number_ref, product)
    p, y = p.to(device), y.to(device)
    torch.testing.assert_close(joint_log_condition_number(p, y).cpu(), expected_value(product), rtol=1e-9, atol=1e-9)
    grad_p, grad_y = gradient_of(joint_log_condition_number, p, y)
    for ours, expected in ((grad_p, grad_product @ y.cpu().mT), (grad_y, p.cpu().mT @ grad_product)):
        torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=1e-9 * max(1, expected.abs().max().item()))


def test_joint_of_one_hot_labels_in_float32(device):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(4, 50, 10, generator=generator)
    y = torch.nn.functional.one_hot(torch.randint(0, 4, (4, 10), generator=generator), 50) / 10  # few classes: rank 4
    value = joint_log_condition_number(p.to(device), y.to(device)).double().cpu()
    torch.testing.assert_close(value, expected_value(p.double() @ y.double()), rtol=1e-4, atol=1e-4)


def test_joint_keeps_small_singular_values(device):
    """Small singular values: a Gram matrix in float32 would lose those below 3e-4 of the largest."""
    skip_reference("joint_log_condition_number", device)
    p = torch.zeros(1, 30, 4)
    p[0, :4] = torch.diag(torch.tensor([1.0, 0.3, 1e-3, 2e-5]))
    y = torch.eye(4, 30)[None]
    expected = torch.tensor([math.log(1 / 2e-5)])
    turned = (rotations(30, 1, 0) @ p.double()).float()
    torch.testing.assert_close(
        joint_log_condition_number(turned.to(device), y.to(device)).cpu(), expected, rtol=1e-3, atol=0
    )


def test_little_shared_memory_changes_no_result(simt_kernels):
    generator = torch.Generator().manual_seed(0)
    # More matrices than blocks that share the scratch memory (eight).
    u = torch.rand(11, 24, 23, generator=generator, dtype=torch.float64)
    p = torch.rand(9, 60, 20, generator=generator, dtype=torch.float64)
    y = torch.rand(9, 20, 60, generator=generator, dtype=torch.float64)
    u[3, 0, 0] = p[4, 0, 0] = math.nan
    u[5] = p[6] = 1

    def run() -> list[Tensor]:
        results = [log_condition_number(u), joint_log_condition_number(p, y)]
        return [*results, *gradient_of(log_condition_number, u), *gradient_of(joint_log_condition_number, p, y)]

    expected = run()
    simt_kernels.set_shared_memory_limit(4096)
    try:
        for ours, theirs in zip(run(), expected, strict=True):
            assert torch.equal(ours.nan_to_num(-1.0), theirs.nan_to_num(-1.0))
    finally:
        simt_kernels.set_shared_memory_limit(227 * 1024)


@pytest.mark.parametrize("n", [1, 256, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_by_two_at_any_address_and_in_any_number(device, n, dtype):
    numbers = torch.rand(4 * n + 1, generator=torch.Generator().manual_seed(0), dtype=dtype).to(device)
    unaligned = numbers[1:].view(n, 2, 2)
    aligned = unaligned.clone()
    assert torch.equal(log_condition_number(unaligned), log_condition_number(aligned))
    assert_value(aligned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("classes", "items"), [(6, 3), (3, 6), (4, 4), (5, 2)])
def test_joint_gradient(device, classes, items):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(2, classes, items, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    y = torch.rand(2, items, classes, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    assert torch.autograd.gradcheck(joint_log_condition_number, (p, y))
    assert torch.autograd.gradcheck(lambda v: joint_log_condition_number(v, y.detach()), p)
    assert torch.autograd.gradcheck(lambda v: joint_log_condition_number(p.detach(), v), y)


@pytest.mark.parametrize(("classes", "items"), [(6, 3), (3, 6)])
def test_joint_nan_and_rank_one(device, classes, items):
    p = torch.rand(4, classes, items, generator=torch.Generator().manual_seed(0))
    y = torch.rand(4, items, classes, generator=torch.Generator().manual_seed(1))
    p[0, 0, 0], y[1, 0, 0] = math.nan, math.inf
    y[2], p[3] = 1, 0
    p, y = p.to(device), y.to(device)
    value = joint_log_condition_number(p, y)
    assert value[:2].isnan().all() and value[2:].tolist() == [0, 0]
    grad_p, grad_y = gradient_of(joint_log_condition_number, p, y)
    assert grad_p[:2].isnan().all() and (grad_p[2:] == 0).all() and (grad_y[2:] == 0).all()


def test_joint_takes_labels_of_any_type_and_views(device):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(2, 4, 9, generator=generator).to(device).mT
    y = torch.randint(0, 2, (2, 9, 4), generator=generator).to(device).mT
    torch.testing.assert_close(joint_log_condition_number(p, y), joint_log_condition_number(p.contiguous(), y.float()))


def test_only_the_gradients_that_are_needed_are_computed(monkeypatch):
    calls, backward = [], condition_number._log_condition_number_backward
    monkeypatch.setattr(
        condition_number, "_log_condition_number_backward", lambda *x: calls.append(x[2].shape[2]) or backward(*x)
    )
    p, y = torch.rand(1, 5, 3, requires_grad=True), torch.rand(1, 3, 5)
    joint_log_condition_number(p, y).sum().backward()
    assert calls == [3]


def test_empty(device):
    assert log_condition_number(torch.zeros(0, 2, 2, device=device)).shape == (0,)
    assert log_condition_number(torch.zeros(3, 0, 2, device=device)).tolist() == [0, 0, 0]
    for n, classes, items in ((0, 3, 2), (2, 0, 3), (2, 3, 0)):
        p = torch.zeros(n, classes, items, device=device, requires_grad=True)
        value = joint_log_condition_number(p, torch.zeros(n, items, classes, device=device))
        value.sum().backward()
        assert value.tolist() == [0] * n and p.grad.shape == p.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 5])
def test_half_precision_is_computed_in_float32(device, dtype, n):
    generator = torch.Generator().manual_seed(0)
    u, y = (torch.rand(3, n, n, generator=generator).to(dtype).to(device) for _ in range(2))
    value = log_condition_number(u)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, log_condition_number(u.float()))
    (gradient,) = gradient_of(log_condition_number, u)
    assert gradient.dtype == dtype and gradient.isfinite().all()
    torch.testing.assert_close(joint_log_condition_number(u, y), joint_log_condition_number(u.float(), y.float()))


def test_under_autocast_it_is_computed_in_float32(device):
    generator = torch.Generator().manual_seed(0)
    p, y = torch.rand(3, 6, 4, generator=generator).to(device), torch.rand(3, 4, 6, generator=generator).to(device)
    expected = [log_condition_number(p), joint_log_condition_number(p, y), log_condition_number(p.bfloat16())]
    p.requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        values = [log_condition_number(p), joint_log_condition_number(p, y), log_condition_number(p.bfloat16())]
    for value, e in zip(values, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, e)
    sum(v.sum() for v in values).backward()
    assert p.grad.dtype == torch.float32 and p.grad.isfinite().all()


def test_the_operators_have_an_autocast_rule_of_their_own():
    u, y = torch.rand(2, 3, 4).bfloat16(), torch.rand(2, 4, 3).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.ops.d2net.log_condition_number(u, TOLERANCE)[0].dtype == torch.float32
        assert torch.ops.d2net.joint_log_condition_number(u, y, TOLERANCE)[0].dtype == torch.float32


def test_a_second_derivative_is_refused(device):
    for n in (2, 3):
        u = torch.rand(2, n, n, device=device, requires_grad=True)
        (gradient,) = torch.autograd.grad(log_condition_number(u).square().sum(), u, create_graph=True)
        with pytest.raises(RuntimeError, match="once|twice"):
            gradient.sum().backward()


def test_registration():
    op = torch.ops.d2net
    for shape in ((3, 2, 2), (2, 4, 3)):
        u = torch.rand(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
        torch.library.opcheck(op.log_condition_number.default, (u, TOLERANCE))
    p, y = torch.rand(2, 5, 3, requires_grad=True), torch.rand(2, 3, 5, requires_grad=True)
    torch.library.opcheck(op.joint_log_condition_number.default, (p, y, TOLERANCE))
    torch.library.opcheck(
        op.log_condition_number_backward.default, (torch.rand(2), torch.rand(2, 2, 5), torch.rand(2, 2, 3))
    )


def test_compiles_to_one_graph():
    p, y = torch.rand(2, 5, 3, requires_grad=True), torch.rand(2, 3, 5)

    def function(p, y):
        return log_condition_number(p) + joint_log_condition_number(p, y)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(p, y), function(p, y))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(p, y).sum(), p), torch.autograd.grad(function(p, y).sum(), p)
    )


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_number_of_threads_does_not_matter(threads):
    generator = torch.Generator().manual_seed(0)
    u2, u9 = torch.rand(9999, 2, 2, generator=generator), torch.rand(99, 9, 9, generator=generator)
    p, y = torch.rand(99, 30, 5, generator=generator), torch.rand(99, 5, 30, generator=generator)

    def run() -> list[Tensor]:
        results = []
        for function, inputs in (
            (log_condition_number, (u2,)),
            (log_condition_number, (u9,)),
            (joint_log_condition_number, (p, y)),
        ):
            results += [function(*inputs), *gradient_of(function, *inputs)]
        return results

    expected, before = run(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for a, b, c in zip(run(), run(), expected, strict=True):
            assert torch.equal(a, c) and torch.equal(b, c)
    finally:
        torch.set_num_threads(before)


def test_wrong_inputs_are_refused():
    with pytest.raises(InputError, match="shape"):
        log_condition_number(torch.eye(2))
    with pytest.raises(InputError, match="dtype"):
        log_condition_number(torch.ones(1, 2, 2, dtype=torch.int64))
    for tolerance in (-1.0, math.nan):
        with pytest.raises(InputError, match="rank_tol"):
            log_condition_number(torch.rand(1, 2, 2), rank_tol=tolerance)
        with pytest.raises(InputError, match="rank_tol"):
            joint_log_condition_number(torch.rand(1, 3, 2), torch.rand(1, 2, 3), rank_tol=tolerance)
    for y in (torch.rand(1, 3, 3), torch.rand(2, 2, 3), torch.rand(1, 2, 4)):
        with pytest.raises(InputError, match="multiplied"):
            joint_log_condition_number(torch.rand(1, 3, 2), y)
    with pytest.raises(InputError, match="y has shape"):
        joint_log_condition_number(torch.rand(1, 3, 2), torch.rand(2, 3))
    with pytest.raises(InputError, match="p has dtype"):
        joint_log_condition_number(torch.ones(1, 3, 2, dtype=torch.int64), torch.rand(1, 2, 3))


@pytest.mark.parametrize("kind", ["kernel", "reference"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 2, 2), (4, 3, 3), (2, 5, 4), (1, 3, 7), (1, 130, 130)])
def test_entries_near_the_largest_number(shape, dtype, kind):
    """sigma_1 exceeds the largest number of the dtype, but the ratio and the gradient do not."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(shape, generator=generator, dtype=dtype)
    scale = 2.0 ** math.floor(math.log2(torch.finfo(dtype).max / u.abs().max().item()))
    expected, (gradient,) = log_condition_number(u), gradient_of(log_condition_number, u)
    found, (grad_large,) = log_condition_number(u * scale), gradient_of(log_condition_number, u * scale)
    # Matrices of 130 rows go to LAPACK, which computes in float32 and scales them differently.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-4 if max(shape) > 128 else 1e-6)
    # Gradients of 1e-38 have few digits in float32.
    torch.testing.assert_close(grad_large * scale, gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["kernel", "reference"], indirect=True)
@pytest.mark.parametrize(("rank_tol", "least"), [(1e-5, 1.0), (1e-7, 1e-6)])
def test_rank_tol_counts_before_any_scaling(rank_tol, least, kind):
    """Also where the ratio sigma_1 / sigma_r exceeds the largest number."""
    u = torch.diag(torch.tensor([torch.finfo(torch.float32).max, 1.0, 1e-6]))[None]
    expected = math.log(torch.finfo(torch.float32).max) - math.log(least)
    assert log_condition_number(u, rank_tol=rank_tol).item() == pytest.approx(expected, rel=1e-6)
