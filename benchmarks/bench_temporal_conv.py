"""A temporal convolution of the network, forward and backward: as the model runs it here, and in both layouts.

The network's sizes, 1024 channels and a kernel of 3. On a GPU in float32, TF32 and bfloat16 (autocast).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from harness import OURS, Case, main
from torch import Tensor, nn

from d2net.model import TemporalConv


def forward_backward(function: Callable[[Tensor], Tensor], layer: TemporalConv, x: Tensor, precision: str) -> Callable:
    leaves = [x.clone().requires_grad_(), *layer.parameters()]

    def run() -> None:
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
            out = function(leaves[0])
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    b, t, width = (2, 40, 16) if quick else (10, 750, 1024)
    torch.manual_seed(0)
    layer, x = TemporalConv(width, width, 3, 1).to(device), torch.randn(b, t, width, device=device)
    functions = {
        OURS: layer,
        "conv1d": lambda x: nn.Conv1d.forward(layer, x.transpose(1, 2)).transpose(1, 2),
        "channels last": layer.channels_last,
    }
    for precision in ("tf32", "bf16", "fp32") if device.type == "cuda" else ("fp32",):
        contenders = {name: forward_backward(function, layer, x, precision) for name, function in functions.items()}
        # Forward one product of (b t) x (3 width) and (3 width) x width, backward two; floor in float32 arithmetic.
        work = 3 * 2 * b * t * 3 * width * width if precision == "fp32" else 0
        yield Case(f"B={b} T={t} D={width} {precision}", contenders, bytes=4 * 4 * b * t * width, operations=work)


if __name__ == "__main__":
    main("temporal conv", cases, __doc__)
