"""Drop-in losses: those of D2-Net (Eq. 1 to 11), those the paper compares with, and some of other methods.

They take plain tensors (activations, embeddings, lengths, labels) and return a scalar or a small named result. Nothing
here waits for the device, so a training step can be one CUDA graph. Every loss is finite for every batch of finite
inputs, within the limits of docs/numbers.md.

A batch is padded, (B, T, ...), or packed: with ``offsets`` the recordings lie one after another in (N, ...), recording
b from row ``offsets[b]`` on, as many rows as its length, and no further than ``offsets[b + 1]``. Other rows may hold
anything; their gradient is 0. ``max_length`` is an upper bound of the lengths, by which memory is reserved. On a CPU it
is found where it is not given; elsewhere that would wait for the device, and N is taken.
"""

from d2net.losses.comparison import (
    CrossEntropyLoss,
    FocalLoss,
    SnippetBCE,
    SnippetDMI,
    SnippetL1,
    VideoBCE,
    VideoDMI,
    VideoL1,
)
from d2net.losses.complementary import CoActivitySimilarity, SnippetContrast
from d2net.losses.denoising import Denoising, DenoisingLoss, SnippetDenoising
from d2net.losses.discriminative import Discriminative, DiscriminativeLoss
from d2net.losses.pairing import draw_permutations
from d2net.losses.total import D2NetLoss, D2NetLossResult
from d2net.losses.uncertainty import UncertaintyModeling, UncertaintyModelingResult
from d2net.losses.video_denoising import VideoDenoising
from d2net.losses.whole_batch import WholeBatch
from d2net.ops.bottom_up_attention import bottom_up_attention

__all__ = [
    "CoActivitySimilarity",
    "CrossEntropyLoss",
    "D2NetLoss",
    "D2NetLossResult",
    "Denoising",
    "DenoisingLoss",
    "Discriminative",
    "DiscriminativeLoss",
    "FocalLoss",
    "SnippetBCE",
    "SnippetContrast",
    "SnippetDMI",
    "SnippetDenoising",
    "SnippetL1",
    "UncertaintyModeling",
    "UncertaintyModelingResult",
    "VideoBCE",
    "VideoDMI",
    "VideoDenoising",
    "VideoL1",
    "WholeBatch",
    "bottom_up_attention",
    "draw_permutations",
]
