"""Every kind of derivative that PyTorch has, of every operator: right, or an error, but never a silent 0."""

from __future__ import annotations

import importlib.util
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, func
from torch.autograd import forward_ad

from d2net import ops
from d2net.losses import D2NetLoss
from d2net.ops import log_condition_number, soft_nms_1d, topk_pool, use_backend

# Not importable by name under --import-mode=importlib.
_spec = importlib.util.spec_from_file_location("every", Path(__file__).parents[1] / "test_every_operator.py")
every = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(every)

DIFFERENTIABLE = [name for name, case in every.CASES.items() if case[1]]


def scalar(name: str):
    """A smooth function of the first argument of a case, in float64, and that argument."""
    function, (x, *others), rest = every.CASES[name]
    others = [y.double() for y in others]

    def of(x: Tensor) -> Tensor:
        out = function(x, *others, *rest)
        out = [out] if isinstance(out, Tensor) else out
        return sum((1 + i) * y.square().sum() for i, y in enumerate(y for y in out if y.is_floating_point()))

    return of, x.double()


def gradient(of, x: Tensor) -> Tensor:
    """By the kernels' own backward."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(of(x), x)[0]


def direction(x: Tensor) -> Tensor:
    """0 where x is, as the network's features in gaps must stay."""
    return torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(7)).masked_fill(x == 0, 0)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode(name):
    of, x = scalar(name)
    t = direction(x)
    expected = (gradient(of, x) * t).sum()
    assert expected != 0
    value, tangent = func.jvp(of, (x,), (t,))
    close(value, of(x))
    close(tangent, expected)
    with forward_ad.dual_level():
        close(forward_ad.unpack_dual(of(forward_ad.make_dual(x, t))).tangent, expected)
    close(func.jacfwd(lambda by: of(x + by * t))(torch.zeros((), dtype=x.dtype)), expected)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_reverse_mode(name):
    of, x = scalar(name)
    expected = gradient(of, x)
    close(func.grad(of)(x), expected)
    value, pull = func.vjp(of, x)
    close(pull(torch.ones_like(value))[0], expected)
    close(func.jacrev(lambda x: of(x)[None])(x)[0], expected)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_vmap(name):
    of, x = scalar(name)
    both = torch.stack((x, direction(x)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # for warnings about slow fallbacks
        close(func.vmap(of)(both), torch.stack([of(x) for x in both]))
    gradients = torch.stack([gradient(of, x) for x in both])
    close(func.vmap(func.grad(of))(both), gradients)
    close(func.grad(lambda both: func.vmap(of)(both).sum())(both), gradients)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_right_or_refused(name):
    """Second derivatives by torch.func, which exist where PyTorch can differentiate the reference twice."""
    of, x = scalar(name)
    t, step = direction(x), 1e-5
    expected = (gradient(of, x + step * t) - gradient(of, x - step * t)) / (2 * step)
    try:
        found = func.grad(lambda x: (func.grad(of)(x) * t).sum())(x)
    except RuntimeError as error:
        assert "differentiable once" in str(error)
        assert "condition" in name or name.split()[0] in ("snippet_pdmi", "d2net_loss")
        with pytest.raises(RuntimeError, match="differentiable once"):
            func.jvp(func.grad(of), (x,), (t,))
    else:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(func.jvp(func.grad(of), (x,), (t,))[1], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["kernel", "reference"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_second_backward_is_refused(name, kind):
    """Also for a linear function of the results, whose incoming gradient is constant, as one term of a sum."""
    function, differentiable, others = every.CASES[name]
    if kind == "reference":
        if "condition" not in name:
            pytest.skip("plain PyTorch can be differentiated again")
    for at in range(len(differentiable)):
        leaves = [x.detach().clone() for x in differentiable]
        x = leaves[at].requires_grad_()
        with use_backend("reference") if kind == "reference" else nullcontext():
            out = function(*leaves, *others)
        out = [out] if isinstance(out, Tensor) else out
        (first,) = torch.autograd.grad(sum(y.sum() for y in out if y.requires_grad), x, create_graph=True)
        penalty = first.sum() + x.sum()
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(penalty, x)
        weight = torch.ones((), requires_grad=True)  # weight of the results, as for learned weights of terms
        with use_backend("reference") if kind == "reference" else nullcontext():
            out = function(*leaves, *others)
        out = [out] if isinstance(out, Tensor) else out
        (first,) = torch.autograd.grad(weight * sum(y.sum() for y in out if y.requires_grad), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(first.sum() + weight, weight)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_two_backwards_of_one_graph(name):
    of, x = scalar(name)
    x.requires_grad_()
    loss = of(x)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_an_input_that_was_changed_in_place_is_found(name):
    function, differentiable, others = every.CASES[name]
    for at in range(len(differentiable)):
        leaves = [x.detach().clone().requires_grad_() for x in differentiable]
        inputs = [x.clone() for x in leaves]
        out = function(*inputs, *others)
        out = [out] if isinstance(out, Tensor) else out
        inputs[at].detach().mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(sum(y.sum() for y in out if y.requires_grad), leaves)


def test_operators_themselves_have_no_forward_mode():
    """torch.ops.d2net has no forward-mode derivative and must raise: the dispatcher would drop the tangents."""
    x = direction(torch.ones(2, 3, 4))
    for function in (lambda x: torch.ops.d2net.topk_pool(x, None, 8, None, 0)[0], torch.ops.d2net.iou_1d.default):
        args = (x,) if function is not torch.ops.d2net.iou_1d.default else (x[0, :, :2], x[1, :, :2])
        with pytest.raises(RuntimeError, match="no forward-mode derivative; the functions of d2net.ops"):
            func.jvp(function, args, args)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
            function(*(forward_ad.make_dual(y, y) for y in args))
        with pytest.raises(RuntimeError, match="functorch transforms"):
            func.grad(lambda y, function=function, args=args: function(y, *args[1:]).sum())(args[0])


def test_what_is_not_differentiable_says_so():
    segments, scores = every.segments()
    segments.requires_grad_(), scores.requires_grad_()
    for out in (
        soft_nms_1d(segments, scores, iou_threshold=0.3, sigma=0.5, min_score=0.05),
        torch.ops.d2net.soft_nms_1d(segments, scores, 0.3, 0.5, 0.05, True),
    ):
        assert not out[0].requires_grad and not out[1].requires_grad


def test_transforms_within_a_compiled_function():
    x = direction(torch.ones(4, 3, 3, dtype=torch.float64))

    def compiled(function):
        return torch.compile(function, fullgraph=True, backend="aot_eager")(x)

    for of in (lambda x: topk_pool(x).square().sum(), lambda x: log_condition_number(x).sum()):

        def batch(x, of=of):
            return func.vmap(of)(torch.stack((x, 2 * x)))

        def tangent(x, of=of):
            return func.jvp(of, (x,), (x,))[1]

        def gradient(x, of=of):
            return func.grad(of)(x)

        torch.testing.assert_close(compiled(batch), batch(x))
        try:
            torch.testing.assert_close(compiled(tangent), tangent(x))
        except Exception as error:  # torch._dynamo's own classes
            assert "call jvp eagerly" in str(error)  # noqa: PT017
        with pytest.raises(Exception, match="functorch transforms"):
            compiled(gradient)


def _dual_backward(of, x, t):
    with torch.autograd.forward_ad.dual_level():
        leaf = x.clone().requires_grad_()
        dual = torch.autograd.forward_ad.make_dual(leaf, t)
        (gradient,) = torch.autograd.grad(of(dual), leaf)
        return torch.autograd.forward_ad.unpack_dual(gradient).tangent


@pytest.mark.parametrize(
    "second",
    [
        lambda of, x, t: func.grad(lambda y: func.jvp(of, (y,), (t,))[1])(x),
        lambda of, x, t: func.jvp(lambda y: func.jvp(of, (y,), (t,))[1], (x,), (t,)),
        lambda of, x, t: func.jacrev(func.jacfwd(of))(x),
        lambda of, x, t: func.jacfwd(func.jacfwd(of))(x),
        _dual_backward,
    ],
    ids=["grad of jvp", "jvp of jvp", "jacrev of jacfwd", "jacfwd of jacfwd", "backward of dual numbers"],
)
@pytest.mark.parametrize("name", ["log_condition_number", "joint_log_condition_number", "snippet_pdmi"])
def test_condition_numbers_have_no_second_derivative_through_forward_mode(name, second):
    draw = torch.Generator().manual_seed(0)
    rest = torch.rand(1, 4, 3, generator=draw, dtype=torch.float64)
    of, shape = {
        "log_condition_number": (lambda x: ops.log_condition_number(x).sum(), (1, 3, 3)),
        "joint_log_condition_number": (lambda x: ops.joint_log_condition_number(x, rest).sum(), (1, 3, 4)),
        "snippet_pdmi": (lambda x: ops.snippet_pdmi(x, rest.flatten()[None]).loss.sum(), (1, 12)),
    }[name]
    x, t = (torch.rand(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    with pytest.raises(RuntimeError, match="differentiable once"):
        second(of, x, t)


def test_a_compiled_function_has_our_operator_alone():
    """The graph contains the operator, and nothing of the checks around it."""
    graphs = []

    def backend(graph, _):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    torch.compile(lambda x: topk_pool(x), fullgraph=True, backend=backend)(torch.rand(2, 5, 3))
    assert len(graphs[0]) == 2 and torch.ops.d2net.topk_pool.default in graphs[0]  # and getitem for one of its results


class TestLoss:
    """D2NetLoss in evaluation mode; in training mode it updates x_ref in place, which transforms refuse."""

    def of(self, training: bool = False):
        generator = torch.Generator().manual_seed(0)
        loss = D2NetLoss(every.C, every.D).double().train(training)
        loss.reference.copy_(torch.randn(every.D, generator=generator))
        tcam = torch.rand(every.B, every.T, every.C, generator=generator, dtype=torch.float64)
        embeddings = torch.randn(every.B, every.T, every.D, generator=generator, dtype=torch.float64)
        labels, partners = torch.eye(every.C)[: every.B], torch.tensor([1, 2, 0])
        lengths = torch.tensor([every.T, 40, 37])
        return lambda t, e: loss(t, e, lengths, labels, partners).total, (tcam, embeddings)

    def test_forward_and_reverse_mode(self):
        of, inputs = self.of()
        leaves = [x.clone().requires_grad_() for x in inputs]
        expected = torch.autograd.grad(of(*leaves), leaves)
        for found, grad in zip(func.grad(of, argnums=(0, 1))(*inputs), expected, strict=True):
            close(found, grad)
        tangents = tuple(direction(x) for x in inputs)
        close(
            func.jvp(of, inputs, tangents)[1],
            sum((x * t).sum() for x, t in zip(expected, tangents, strict=True)),
        )

    def test_vmap(self):
        of, (t, e) = self.of()
        found = func.vmap(of)(torch.stack((t, 0.9 * t)), torch.stack((e, 0.5 * e)))
        close(found, torch.stack((of(t, e), of(0.9 * t, 0.5 * e))))

    def test_in_training_and_twice_it_is_refused(self):
        of, (t, e) = self.of(training=True)
        for transform in (func.grad(of), lambda *x: func.jvp(of, x, x)):
            with pytest.raises(RuntimeError, match="in-place"):
                transform(t, e)
        t.requires_grad_()
        (first,) = torch.autograd.grad(of(t, e), t, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(first.sum() + t.sum(), t)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_backward_does_not_mind_forward_mode_elsewhere(name):
    """A backward within a ``dual_level``, without tangents or with tangents of unrelated tensors."""
    of, x = scalar(name)
    expected, t = gradient(of, x), direction(x)
    x.requires_grad_()
    loss = of(x)
    with forward_ad.dual_level():
        other = forward_ad.make_dual(direction(x), t)
        assert torch.equal(torch.autograd.grad(loss, x, retain_graph=True)[0], expected)
        close(forward_ad.unpack_dual(of(other)).tangent, (gradient(of, direction(x)) * t).sum())
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


def test_a_gradient_that_comes_in_with_a_tangent_is_refused():
    """An incoming gradient with a tangent raises: the tangent would be lost."""
    x = direction(torch.ones(2, 3, 4)).requires_grad_()
    y = topk_pool(x)
    with forward_ad.dual_level():
        incoming = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.autograd.grad(y, x, incoming)
