"""What the ranks of a training do alike: the network's gradients are added up, and all stop and save together."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d2net.distributed import Ranks, lost_ranks
from d2net.model import D2Net, D2NetOutput
from d2net.ops.network_call import NetworkCopies
from d2net.training.terms import CHECK_EVERY

BUCKET_MB = 8  # gradients are sent in pieces of at least so much: of THUMOS14's network each large layer is one
LOOK_SECONDS = 0.25  # between two looks at whether a rank was asked to stop, at most, unless a step takes longer


# x_ref is the same on all ranks anyway. The option has another name since torch 2.13.
_OPTIONS = inspect.signature(DistributedDataParallel.__init__).parameters
_LEAVE_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers": False
}


class Streams(nn.Module):
    """``D2Net.streams`` as the forward of a module, which is what DistributedDataParallel wraps.

    Args:
        model: The network.
        apart: Whether the gradients of the first layers come after the others, which can be sent meanwhile.
    """

    def __init__(self, model: D2Net, *, apart: bool = False) -> None:
        super().__init__()
        self.model, self.apart = model, apart

    def forward(
        self, parts: Sequence[Tensor], mask: Tensor, copies: NetworkCopies | None, numbers: Tensor | None
    ) -> D2NetOutput:
        return self.model.streams(parts, mask, copies, numbers, apart=self.apart)


def in_parallel(model: D2Net, device: torch.device) -> nn.Module:
    """A module like :class:`Streams` whose backward gives every rank the mean of all ranks' gradients.

    DistributedDataParallel sends gradients while the backward computes others, in pieces whose order it settles in its
    first backward. That order decides the last bits of a sum over three ranks or more. So that a resumed training has
    those of one that was not interrupted, the first backward is of nothing, here.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    # On a stream of its own, or a CUDA graph could not hold its steps.
    with torch.cuda.stream(stream) if stream is not None else nullcontext(), lost_ranks():
        network = DistributedDataParallel(
            Streams(model, apart=True), bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=True, **_LEAVE_BUFFERS
        )
    rows = model.rows(2 * model.reach + 1)
    dtype = model.stream_a.first.weight.dtype
    training = model.training
    model.eval()  # without dropout, which would draw a seed
    for _ in range(2):
        parts = [torch.zeros(rows, width, dtype=dtype, device=device) for width in model.stream_widths]
        mask = torch.zeros(rows, dtype=torch.bool, device=device)
        with lost_ranks():
            output = network(parts, mask, None, None)
            sum(x.sum() for x in output if x is not None).backward()
    model.train(training)
    for p in model.parameters():
        p.grad = None
    return network


class Decisions:
    """When to stop and to save: a signal may reach one rank alone, and only rank 0 looks at the clock.

    The ranks ask each other in the same iterations: at least every tenth, and more often where steps are slow.

    Args:
        ranks: Of the training.
        iteration: Iterations done.
    """

    def __init__(self, ranks: Ranks, iteration: int) -> None:
        self._ranks = ranks
        self._last, self._next = iteration, iteration + 1
        self._at = time.monotonic()

    def take(self, iteration: int, stop: bool, save: bool, *, now: bool) -> tuple[bool, bool]:
        """Whether all stop, and whether they save.

        Args:
            iteration: Iterations done; the same on all ranks.
            stop: Whether this rank was asked to.
            save: Whether rank 0 finds that it is time.
            now: Whether to ask in this iteration in any case; the same on all ranks.
        """
        if self._ranks.size == 1:
            return stop, save
        if not now and iteration < self._next:
            return False, False
        seconds = (time.monotonic() - self._at) / max(iteration - self._last, 1)
        wish = max(1, min(CHECK_EVERY, int(LOOK_SECONDS / max(seconds, 1e-9))))
        leads = self._ranks.leads
        stops, saves, every = self._ranks.most(stop, save and leads, wish if leads else 0)
        self._last, self._next, self._at = iteration, iteration + every, time.monotonic()
        return bool(stops), bool(saves)


def same_weights(model: nn.Module, ranks: Ranks) -> bool:
    """Whether all ranks have the same weights, by a sum of their bits. Waits for the device."""
    bits: Any = [p.detach().view(torch.int32).sum() for p in model.parameters()]
    total = int(torch.stack(bits).sum())
    most, least = ranks.most(total, -total)
    return most == -least
