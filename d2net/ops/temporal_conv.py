"""Temporal convolutions of packed rows and their gradients, as products of matrices wherever that is faster.

Rows x (N, width) are 0 in gaps, and their first and last rows are gaps as wide as half a kernel. Then the k rows that
row r of the result is computed from are one stretch of memory, k * width numbers from row r - k // 2 on. Of every k-th
row these stretches do not overlap: they are the rows of a matrix, and the convolution is k products of such matrices,
in one batch, with nothing copied and each sum of k * width products in one accumulator.

Weights are (width out, k, width in) here; ``D2Net.order_weights()`` lets them lie so in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def reach_of(kernel_sizes: Sequence[int], dilation: int) -> int:
    """Rows on either side that a row of a result is computed from: the width that gaps between recordings need."""
    return max(k // 2 for k in kernel_sizes) * dilation


def convolution(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """(N, width) -> (N, width out), without bias. Within half a kernel of both ends nothing need be written."""
    k = weight.shape[1]
    if _by_windows(x, k, dilation):
        return _windows_times(x, weight.flatten(1).T, k)
    y = torch.ops.aten.convolution(*_as_images(x, weight), None, *_geometry(k, dilation), False, [0, 0], 1)
    return y[0, :, 0].T.contiguous()


def reversed_taps(weight: Tensor) -> Tensor:
    """(k * width out, width): the weights that a gradient of rows is convolved with."""
    return torch.cat([weight[:, j] for j in reversed(range(weight.shape[1]))])


def gradient_of_rows(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: int, reverse: Callable[[], Tensor] | None = None
) -> Tensor:
    """(N, width out), 0 in gaps -> (N, width) as ``x``. Rows at both ends may stay unwritten.

    Args:
        grad: Of the rows of the result.
        x: What was convolved.
        weight: (width out, k, width).
        dilation: As it was.
        reverse: Gives :func:`reversed_taps` where they are needed; None: computed.
    """
    k = weight.shape[1]
    if _by_windows(grad, k, dilation):
        return _windows_times(grad, reversed_taps(weight) if reverse is None else reverse(), k)
    images = _rows_as_image(grad), *_as_images(x, weight)
    wanted = [True, False, False]
    grad_x, _, _ = torch.ops.aten.convolution_backward(*images, None, *_geometry(k, dilation), False, [0, 0], 1, wanted)
    return grad_x[0, :, 0].T.contiguous()


def gradient_of_weight(grad: Tensor, x: Tensor, k: int, dilation: int, dtype: torch.dtype) -> Tensor:
    """(width out, k, width) of ``dtype``."""
    reach, n, width = k // 2 * dilation, len(x), x.shape[1]
    inside = grad[reach : n - reach]
    if not x.is_cuda and _by_windows(x, k, dilation):
        rows, windows = _every_kth(grad, k, k // 2, 1), _every_kth(x, k, 0, k)
        total = rows[0].T @ windows[0]
        for j in range(1, k):
            total.addmm_(rows[j].T, windows[j])
        return total.view(-1, k, width).to(dtype)
    # One product for each tap, with the rows that it saw.
    seen = x.as_strided((k, len(inside), width), (dilation * width, width, 1), x.storage_offset())
    total = x.new_empty(grad.shape[1], k, width, dtype=dtype)
    products(inside.T.expand(k, -1, -1), seen, total.transpose(0, 1))
    return total


def products(a: Tensor, b: Tensor, out: Tensor) -> None:
    """A batch of products. On a GPU sums of half precision are not rounded to it where ``out`` is float32."""
    with _tf32_as_in_convolutions(a):
        if out.dtype is a.dtype:
            torch.bmm(a, b, out=out)
        elif a.is_cuda and out.dtype is torch.float32 and _HAS_OUT_DTYPE:
            torch.bmm(a, b, out_dtype=torch.float32, out=out)
        else:
            out.copy_(torch.bmm(a, b))


_HAS_OUT_DTYPE = "dtype_out" in torch.ops.aten.bmm.overloads()  # since torch 2.8


def _by_windows(x: Tensor, k: int, dilation: int) -> bool:
    # In TF32 cuDNN's convolution is twice as fast as the batch of products; in half precision and float32 it is slower.
    in_tf32 = x.is_cuda and x.dtype is torch.float32 and _convolutions_in_tf32()
    if len(x) == 0:  # which PyTorch's convolutions refuse
        return True
    return (dilation == 1 or k == 1) and (len(x) + 1) % k == 0 and not in_tf32


def _windows_times(x: Tensor, matrix: Tensor, k: int) -> Tensor:
    y = x.new_empty(len(x), matrix.shape[1])
    products(_every_kth(x, k, 0, k), matrix.expand(k, -1, -1), _every_kth(y, k, k // 2, 1))
    return y


def _every_kth(x: Tensor, k: int, first: int, rows: int) -> Tensor:
    """(k, n / k, rows * width): matrix j has the stretches of rows that begin at row first + j, first + j + k, ..."""
    width = x.shape[1]
    size = (k, (len(x) + 1) // k - 1, rows * width)
    return x.as_strided(size, (width, k * width, 1), x.storage_offset() + first * width)


def _rows_as_image(x: Tensor) -> Tensor:
    """Rows as an image of height 1 in the layout "channels last", which cuDNN's fast kernels use."""
    return x[None].transpose(1, 2).unsqueeze(2)


def _as_images(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return _rows_as_image(x), weight.permute(0, 2, 1).unsqueeze(2)


def _geometry(k: int, dilation: int) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation."""
    return [1, 1], [0, k // 2 * dilation], [1, dilation]


def _convolutions_in_tf32() -> bool:
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # PyTorch's newer settings are in use, and it refuses to answer by the older ones
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


@contextmanager
def _tf32_as_in_convolutions(x: Tensor) -> Iterator[None]:
    """PyTorch has two settings, for products and for convolutions; what is a convolution here follows the latter."""
    if not x.is_cuda or x.dtype is not torch.float32:
        yield
        return
    matmul, wanted = torch.backends.cuda.matmul, _convolutions_in_tf32()
    try:
        before = matmul.allow_tf32
    except RuntimeError:  # as above; products follow their own setting then
        before = wanted
    if before == wanted:
        yield
        return
    matmul.allow_tf32 = wanted
    try:
        yield
    finally:
        matmul.allow_tf32 = before
