"""A step of Adam that writes the copies of the weights in bfloat16 that the network computes with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops import _native
from d2net.ops.temporal_conv import reversed_taps

MOST_WEIGHTS = 12  # kMostWeights of csrc/adam.h


class WeightCopies(NamedTuple):
    """Copies of one parameter, in bfloat16.

    Attributes:
        plain: Of a weight (D, width, k): (D, k, width), or as many numbers; None: no copy.
        turned: Of a weight: (k D, width), :func:`d2net.ops.temporal_conv.reversed_taps`; None: no copy.
    """

    plain: Tensor | None = None
    turned: Tensor | None = None

    def write(self, weight: Tensor) -> None:
        """Copy ``weight``."""
        if self.plain is not None:
            self.plain.copy_(_flat(weight).view(self.plain.shape))
        if self.turned is not None:
            self.turned.copy_(reversed_taps(_flat(weight)))


def adam_step(
    rates: tuple[float, float, float, float, float],
    step: Tensor,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    *,
    copies: Sequence[WeightCopies],
) -> None:
    """One step in place, as ``torch._fused_adam_`` takes it; never waits for the device.

    Args:
        rates: Learning rate, beta_1, beta_2, epsilon, weight decay.
        step: Scalar float32: steps taken, this one included.
        weights: Float32, on a GPU, at most 12; those (D, width, k) lie in memory as (D, k, width).
        gradients: Of each.
        averages: Running mean of each gradient, which lies in memory as the weight does.
        squares: That of its square.
        copies: Of each weight; they are written.

    Raises:
        InputError: more weights than it takes, others than float32, fewer gradients or moments than weights, or one
            that does not lie in memory as said.
    """
    count = len(weights)
    if count > MOST_WEIGHTS or any(w.dtype is not torch.float32 for w in weights):
        raise InputError(f"adam_step: takes up to {MOST_WEIGHTS} weights of float32, found {count}")
    if {len(x) for x in (gradients, averages, squares, copies)} != {count}:
        raise InputError(f"adam_step: there are {count} weights, but {len(gradients)} gradients: each needs one")
    for x in (*weights, *averages, *squares):  # what is copied first would be changed in vain
        if not (x.mT if x.ndim == 3 else x).is_contiguous():
            raise InputError(f"adam_step: a tensor {tuple(x.shape)} does not lie in memory as (D, k, width)")
    none = (None,) * (MOST_WEIGHTS - count)
    zeros = (0,) * (MOST_WEIGHTS - count)
    members = (
        *(*(w.numel() for w in weights), *zeros),
        *(*(w.shape[2] if w.ndim == 3 else 1 for w in weights), *zeros),
        *(*(w.shape[1] if w.ndim == 3 else 1 for w in weights), *zeros),
    )
    tensors = (weights, gradients, averages, squares)
    columns = [[*(_flat(x.detach()) for x in column), *none] for column in tensors]
    columns += [[*(of.plain for of in copies), *none], [*(of.turned for of in copies), *none]]
    arrays = [x for column in columns for x in column]
    _native.cuda("adam_step", torch.float32, step.device, (*rates, count, step, *members, *arrays))
    for x in (*weights, *averages, *squares):
        torch.autograd.graph.increment_version(x)  # as PyTorch's own operators that work in place


def _flat(x: Tensor) -> Tensor:
    """Contiguous, of a weight (D, width, k) as (D, k, width)."""
    return x.mT.contiguous() if x.ndim == 3 else x.contiguous()
