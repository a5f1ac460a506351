"""I3D, the Inflated 3D ConvNet (Carreira and Zisserman, CVPR 2017): windows of frames to features of 1024 numbers.

For inference: every batch normalisation is folded into the convolution before it when weights are read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from d2net.errors import InputError

FEATURES = 1024  # channels of Mixed_5c
SIZE = 224  # pixels, of the square that it looks at
SHORTEST = 10  # frames that leave Mixed_5c the two steps in time that the classifier averages over

# Channels of an Inception module: 1x1; 1x1 and 3x3; 1x1 and 3x3; 1x1 after the pool.
_MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
_POOLED_BEFORE = {"Mixed_4b": (3, 2), "Mixed_5b": (2, 2)}  # width and stride of the max pool before these


class Scores(NamedTuple):
    """What I3D says of windows.

    Attributes:
        features: (N, 1024), the mean of Mixed_5c over time and space.
        logits: (N, classes) of the classifier; None where the weights have none.
    """

    features: Tensor
    logits: Tensor | None


class I3D(nn.Module):
    """The network, in evaluation mode.

    Args:
        channels: Of a frame: 3 for RGB, 2 for optical flow.
        classes: Of the classifier; 0 for none.
    """

    def __init__(self, channels: int = 3, classes: int = 400) -> None:
        super().__init__()
        self.channels, self.classes = channels, classes
        self.Conv3d_1a_7x7 = _Unit(channels, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = _Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3)
        width = 192
        for name, sizes in _MIXED.items():
            self.add_module(name, _Mixed(width, sizes))
            width = sizes[0] + sizes[2] + sizes[4] + sizes[5]
        self.logits = nn.Linear(width, classes) if classes else None
        self.eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)

    def in_bfloat16(self) -> I3D:
        """The same with convolutions in bfloat16; means and classifier stay in float32."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                module.bfloat16()
        return self

    def forward(self, frames: Tensor) -> Scores:
        """Features of windows.

        Args:
            frames: (N, channels, T, 224, 224) in [-1, 1], T at least 10.

        Raises:
            InputError: another shape.
        """
        if frames.ndim != 5 or frames.shape[1] != self.channels or frames.shape[2] < SHORTEST:
            raise InputError(
                f"I3D: frames have shape {tuple(frames.shape)}, expected (N, {self.channels}, {SHORTEST} or more, "
                f"{SIZE}, {SIZE})"
            )
        if frames.shape[3:] != (SIZE, SIZE):
            size = f"{frames.shape[4]} x {frames.shape[3]}"
            raise InputError(f"I3D: frames are {size}, expected {SIZE} x {SIZE}: crop them")
        # By default cuDNN computes float32 in TF32, which has the digits of float16.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = self._mixed_5c(frames.to(self.Conv3d_1a_7x7.conv.weight.dtype, memory_format=torch.channels_last_3d))
        x = x.mean((3, 4), dtype=torch.float32)  # (N, 1024, steps in time)
        if self.logits is None:
            return Scores(x.mean(2), None)
        # The published network classifies the mean of every two neighbours in time, then averages. Its classifier is
        # linear: the average can come first.
        pairs = (x[:, :, 1:] + x[:, :, :-1]) / 2
        return Scores(x.mean(2), self.logits(pairs.mean(2)))

    def _mixed_5c(self, x: Tensor) -> Tensor:
        x = self.Conv3d_1a_7x7(x)
        x = _max_pool(x, (1, 3, 3), (1, 2, 2))
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        x = _max_pool(x, (1, 3, 3), (1, 2, 2))
        for name in _MIXED:
            if name in _POOLED_BEFORE:
                width, stride = _POOLED_BEFORE[name]
                x = _max_pool(x, (width,) * 3, (stride,) * 3)
            x = self.get_submodule(name)(x)
        return x


class _Unit(nn.Module):
    """Convolution, with its batch normalisation folded in, and ReLU; padded like TensorFlow's SAME."""

    def __init__(self, inputs: int, outputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.width, self.stride = width, stride
        self.conv = nn.Conv3d(inputs, outputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        same = _same_padding(x, (self.width,) * 3, (self.stride,) * 3)
        if same[::2] == same[1::2]:
            padding = same[::-2]
            return functional.conv3d(x, self.conv.weight, self.conv.bias, self.stride, padding).relu_()
        return self.conv(functional.pad(x, same)).relu_()


class _Mixed(nn.Module):
    """An Inception module."""

    def __init__(self, inputs: int, sizes: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        self.b0 = _Unit(inputs, sizes[0], 1)
        self.b1a, self.b1b = _Unit(inputs, sizes[1], 1), _Unit(sizes[1], sizes[2], 3)
        self.b2a, self.b2b = _Unit(inputs, sizes[3], 1), _Unit(sizes[3], sizes[4], 3)
        self.b3b = _Unit(inputs, sizes[5], 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = _max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat((self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)), 1)


def _same_padding(x: Tensor, width: tuple[int, int, int], stride: tuple[int, int, int]) -> list[int]:
    """For `functional.pad`, the last dimension first: as much as makes the output ceil(input / stride) long, where the
    odd one out stands after."""
    padding = []
    for size, w, s in zip(x.shape[:1:-1], width[::-1], stride[::-1], strict=True):
        needed = max((-(-size // s) - 1) * s + w - size, 0)
        padding += [needed // 2, needed - needed // 2]
    return padding


def _max_pool(x: Tensor, width: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    # What is padded never wins, and where it stands after alone, as an odd one does, a last window may be cut off.
    before = _same_padding(x, width, stride)[-2::-2]
    return functional.max_pool3d(x, width, stride, before, ceil_mode=True)
