"""use_backend: references run within it, and nowhere else."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from d2net.errors import InputError
from d2net.losses import D2NetLoss
from d2net.ops import backend_of, topk_pool, use_backend


def ran(x: Tensor) -> str:
    """Whether a kernel or the reference computed a result of topk_pool."""
    return "kernel" if "topk_pool" in x.grad_fn.name() else "reference"


def pooled() -> Tensor:
    return topk_pool(torch.rand(2, 9, 3, requires_grad=True))


def test_within_and_afterwards():
    assert (ran(pooled()), backend_of("topk_pool", "cpu")) == ("kernel", "cpu")
    with use_backend("reference"):
        assert (ran(pooled()), backend_of("topk_pool", "cpu")) == ("reference", "reference")
        with use_backend("reference"):
            assert ran(pooled()) == "reference"
        assert ran(pooled()) == "reference"
    assert (ran(pooled()), backend_of("topk_pool", "cpu")) == ("kernel", "cpu")
    assert ran(use_backend("reference")(pooled)()) == "reference"
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        _ = 1 / 0
    assert ran(pooled()) == "kernel"


def test_another_name():
    with pytest.raises(InputError, match="there is 'reference', not 'cuda'"), use_backend("cuda"):
        pass


def test_other_threads_go_on_with_the_kernels():
    found = []
    with use_backend("reference"):
        other = threading.Thread(target=lambda: found.append(ran(pooled())))
        other.start()
        other.join()
    inside, outside = threading.Event(), threading.Event()

    def stay_inside() -> None:
        with use_backend("reference"):
            inside.set()
            outside.wait(60)

    other = threading.Thread(target=stay_inside)
    other.start()
    inside.wait(60)
    found.append(ran(pooled()))
    outside.set()
    other.join()
    assert found == ["kernel", "kernel"]


@pytest.mark.parametrize("first", ["kernel", "reference"])
def test_a_gradient_belongs_to_its_result(first):
    x = torch.rand(2, 9, 3)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = torch.autograd.grad(topk_pool(a).sum(), a)[0]
    if first == "kernel":
        out = topk_pool(b)
        with use_backend("reference"):
            found = torch.autograd.grad(out.sum(), b)[0]
    else:
        with use_backend("reference"):
            out = topk_pool(b)
        found = torch.autograd.grad(out.sum(), b)[0]
    assert ran(out) == first
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_that_backward_computes_again(reentrant):
    seen = []

    def of(x: Tensor) -> Tensor:
        seen.append(backend_of("topk_pool", "cpu"))
        return topk_pool(x)

    x = torch.rand(2, 9, 3, requires_grad=True)
    with use_backend("reference"):
        checkpoint(of, x, use_reentrant=reentrant).sum().backward()
    assert seen == ["reference", "reference"]


class Deeper(torch.autograd.Function):
    """Its backward calls backward again; autograd moves deep recursion to another thread."""

    @staticmethod
    def forward(ctx, x, depth, seen):
        ctx.depth, ctx.seen = depth, seen
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append((threading.get_ident(), backend_of("topk_pool", "cpu")))
        if ctx.depth:
            with torch.enable_grad():
                x = torch.ones(1, requires_grad=True)
                Deeper.apply(x, ctx.depth - 1, ctx.seen).backward()
        return grad, None, None


def test_the_threads_of_autograd_take_it_over():
    seen: list[tuple[int, str]] = []
    with use_backend("reference"):
        Deeper.apply(torch.ones(1, requires_grad=True), 100, seen).backward()
    threads, backends = zip(*seen, strict=True)
    assert len(set(threads)) > 1 and set(backends) == {"reference"}


def test_a_compiled_function_is_compiled_again():
    graphs = []

    def look(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append("kernel" if "d2net" in graph.code else "reference")
        return graph

    compiled = torch.compile(lambda x: topk_pool(x), fullgraph=True, backend=look)
    x = torch.rand(2, 9, 3)
    expected = compiled(x)
    with use_backend("reference"):
        torch.testing.assert_close(compiled(x), expected)
    compiled(x)
    assert graphs == ["kernel", "reference"]


def test_the_whole_loss():
    # In float64: condition numbers make rounding visible in one of ten batches of float32.
    batch = torch.rand(3, 9, 4).double(), torch.randn(3, 9, 8).double(), None, torch.eye(4)[:3].double()
    loss = D2NetLoss.from_recipe("thumos14-paper", num_classes=4, embedding_dim=8).double()

    def total() -> tuple[Tensor, Tensor]:
        loss.reference.fill_(0.5)  # every call updates it
        tcam = batch[0].clone().requires_grad_()
        value = loss(tcam, *batch[1:], generator=torch.Generator().manual_seed(1)).total
        return value.detach(), torch.autograd.grad(value, tcam)[0]

    expected = total()
    with use_backend("reference"):
        torch.testing.assert_close(total(), expected)


def test_whoever_leaves_first_need_not_have_entered_last():
    first, second = use_backend("reference"), use_backend("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert backend_of("topk_pool", "cpu") == "reference"
    second.__exit__(None, None, None)
    assert backend_of("topk_pool", "cpu") == "cpu"
