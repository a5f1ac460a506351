"""A temporal convolution of packed rows, forward and both gradients: as the network computes it, and as PyTorch does.

The network's sizes, 1024 channels and a kernel of 3; 7,679 rows are ten recordings of 750 snippets with their gaps,
2,879 about what ten of THUMOS14's have. On a GPU in bfloat16, TF32 and float32. PyTorch's convolutions get the rows in
the layout that they like best, and so do the weights; a network that keeps (B, T, D) would copy them first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from harness import OURS, Case, main
from torch import Tensor

from d2net.ops.temporal_conv import convolution, gradient_of_rows, gradient_of_weight

K = 3


def in_precision(precision: str, run: Callable[[], None]) -> Callable[[], None]:
    def with_settings() -> None:
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        run()

    return with_settings


def ours(x: Tensor, weight: Tensor, grad: Tensor) -> Callable[[], None]:
    def run() -> None:
        convolution(x, weight, 1)
        gradient_of_rows(grad, x, weight, 1)
        gradient_of_weight(grad, x, K, 1, torch.float32)

    return run


def of_pytorch(x: Tensor, weight: Tensor, grad: Tensor, channels_last: bool) -> Callable[[], None]:
    """conv1d of (1, D, N), or a 2-D convolution of height 1 in the layout "channels last"."""
    if channels_last:
        x, grad = (y[None].transpose(1, 2).unsqueeze(2) for y in (x, grad))
        weight, shape = weight.permute(0, 2, 1).unsqueeze(2), ([1, 1], [0, K // 2], [1, 1])
    else:
        x, grad = (y.T[None].contiguous() for y in (x, grad))
        weight, shape = weight.permute(0, 2, 1).contiguous(), ([1], [K // 2], [1])
    rest = False, [0] * len(shape[0]), 1

    def run() -> None:
        torch.ops.aten.convolution(x, weight, None, *shape, *rest)
        torch.ops.aten.convolution_backward(grad, x, weight, None, *shape, *rest, [True, True, False])

    return run


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    width = 16 if quick else 1024
    for n in (41,) if quick else (7_679, 2_879):
        torch.manual_seed(0)
        for precision in ("bf16", "tf32", "fp32") if device.type == "cuda" else ("fp32",):
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            x, grad = (torch.randn(n, width, device=device, dtype=dtype) for _ in range(2))
            for rows in (x, grad):
                rows[0] = rows[-1] = 0
            weight = torch.randn(width, K, width, device=device, dtype=dtype)
            runs = {
                OURS: ours(x, weight, grad),
                "conv1d": of_pytorch(x, weight, grad, channels_last=False),
                "conv2d, channels last": of_pytorch(x, weight, grad, channels_last=True),
            }
            # Three products of (N, 3 width) and (3 width, width); the floor is in float32 arithmetic.
            work = 3 * 2 * n * K * width * width if precision == "fp32" else 0
            contenders = {name: in_precision(precision, run) for name, run in runs.items()}
            moved = dtype.itemsize * (5 * n * width + 3 * K * width * width)
            yield Case(f"N={n} D={width} {precision}", contenders, bytes=moved, operations=work)


if __name__ == "__main__":
    main("temporal conv", cases, __doc__)
