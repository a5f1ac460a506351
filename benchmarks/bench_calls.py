"""What a call costs that has next to nothing to compute: topk_pool and the whole loss, and what no call can go below.

Forward and backward each. *an empty autograd node*: an autograd.Function that only allocates its results, as many as
topk_pool does, and remembers what its backward needs; *x * 2*: what PyTorch's own node, in C++, takes. On a GPU also
with the backward in the calling thread, where autograd else hands it to a thread of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_loss import batch, in_one_thread
from harness import OURS, Case, forward_backward, main
from torch import Tensor

from d2net.losses import D2NetLoss
from d2net.ops import topk_pool


class Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        pooled, kth, last = (x.new_empty(x.shape[0], x.shape[2]) for _ in range(3))
        ctx.save_for_backward(x, kth, last)
        return pooled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, _, _ = ctx.saved_tensors
        return torch.empty_like(x)


def also_in_one_thread(contenders: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, Callable[[], Any]]:
    if device.type == "cpu":
        return contenders
    return contenders | {f"{name}, one thread": in_one_thread(run) for name, run in contenders.items()}


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    x = torch.rand(2, 10, 3, generator=torch.Generator().manual_seed(0)).to(device)
    contenders = {
        OURS: forward_backward(topk_pool, x),
        "PyTorch": forward_backward(lambda x: x.topk(2, 1)[0].mean(1), x),
        "an empty autograd node": forward_backward(Empty.apply, x),
        "x * 2": forward_backward(lambda x: x * 2, x),
    }
    yield Case("topk_pool B=2 T=10 C=3", also_in_one_thread(contenders, device))
    tcam, embeddings, lengths, labels = batch(2, 10, 3, 8, device)
    module = D2NetLoss.from_recipe("thumos14-paper", num_classes=3, embedding_dim=8).to(device)
    leaves = [y.requires_grad_() for y in (tcam, embeddings)]

    def loss() -> Tensor:
        total = module(*leaves, lengths, labels).total
        torch.autograd.grad(total, leaves)
        return total.detach()

    yield Case("D2NetLoss B=2 T=10 C=3 D=8", also_in_one_thread({OURS: loss}, device))


if __name__ == "__main__":
    main("calls", cases, __doc__)
