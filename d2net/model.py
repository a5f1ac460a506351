"""The D2-Net network (Fig. 2): two parallel streams of three temporal convolutions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2net.errors import InputError
from d2net.ops._checks import check_shape, valid_mask
from d2net.recipes import ModelRecipe


class D2NetOutput(NamedTuple):
    """What the network says of a batch; everything is 0 past a recording's length.

    Attributes:
        logits_a, logits_b: (B, T, C) class logits of the first (RGB) and second (flow) stream.
        tcam: (B, T, C) class activations T, the mean of the streams' sigmoids.
        embeddings: (B, T, D) latent embeddings x(t), the mean of the streams' second layers.
    """

    logits_a: Tensor
    logits_b: Tensor
    tcam: Tensor
    embeddings: Tensor


class TemporalConv(nn.Conv1d):
    """A convolution over time of (B, T, D) that sees zeros beyond every recording's length."""

    def __init__(self, width_in: int, width_out: int, kernel_size: int, dilation: int) -> None:
        super().__init__(width_in, width_out, kernel_size, padding=(kernel_size - 1) // 2 * dilation, dilation=dilation)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, T, width_in) -> (B, T, width_out); ``padding`` (B, T, 1) is True past a length."""
        y = self.channels_last(x) if x.is_cuda else super().forward(x.transpose(1, 2)).transpose(1, 2)
        return y.masked_fill(padding, 0)

    def channels_last(self, x: Tensor) -> Tensor:
        """The convolution as a two-dimensional one of height 1, for which (B, T, D) is the layout "channels last".

        It is that of cuDNN's kernels for tensor cores, and conv1d would copy x to (B, D, T) first. On a CPU conv1d
        is the faster one.
        """
        y = F.conv2d(
            x.transpose(1, 2).unsqueeze(2),
            self.weight.unsqueeze(2),
            self.bias,
            padding=(0, int(self.padding[0])),
            dilation=(1, self.dilation[0]),
        )
        return y.squeeze(2).transpose(1, 2)


class Stream(nn.Module):
    """Three temporal convolutions, leaky ReLU (slope 0.2) after the first two; variants as the recipe says."""

    def __init__(self, width: int, embedding_dim: int, num_classes: int, recipe: ModelRecipe) -> None:
        super().__init__()
        shape = (recipe.kernel_size, recipe.dilation)
        self.first = TemporalConv(width, embedding_dim, *shape)
        self.second = TemporalConv(embedding_dim, embedding_dim, *shape)
        self.classifier = TemporalConv(
            embedding_dim, num_classes, recipe.classifier_kernel_size or recipe.kernel_size, recipe.dilation
        )
        self.residual = recipe.residual
        self.dropout = recipe.dropout
        self.dropout_embeddings = recipe.dropout_embeddings
        if recipe.weight_std is not None:
            for layer in (self.first, self.second, self.classifier):
                nn.init.normal_(layer.weight, std=recipe.weight_std)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, width) -> embeddings (B, T, D) and logits (B, T, C)."""
        for layer in (self.first, self.second):
            y = F.leaky_relu(layer(x, padding), 0.2)
            x = x + y if self.residual else y
        dropped = F.dropout(x, self.dropout, self.training)
        return dropped if self.dropout_embeddings else x, self.classifier(dropped, padding)


class D2Net(nn.Module):
    """Features (B, T, width) -> TCAM and embeddings (Fig. 2).

    Args:
        num_classes: C.
        stream_widths: widths of the two streams; the features are their concatenation. I3D: (1024, 1024).
        recipe: kernel size, dilation, residuals, dropout, embedding width; default THUMOS14's.

    Raises:
        InputError: an even kernel size, or residuals with an embedding width other than the streams'.
    """

    def __init__(
        self, num_classes: int, stream_widths: tuple[int, int] = (1024, 1024), recipe: ModelRecipe | None = None
    ) -> None:
        super().__init__()
        recipe = recipe or ModelRecipe()
        self.stream_widths = tuple(stream_widths)
        self.num_classes = num_classes
        self.embedding_dim = recipe.embedding_dim or self.stream_widths[0]
        for kernel_size in (recipe.kernel_size, recipe.classifier_kernel_size or recipe.kernel_size):
            if kernel_size % 2 == 0 or kernel_size < 1 or recipe.dilation < 1:
                raise InputError(
                    f"model: kernel size {kernel_size} and dilation {recipe.dilation}; expected an odd kernel "
                    "size and a dilation of at least 1, so that time stays aligned"
                )
        if recipe.residual and {self.embedding_dim} != set(self.stream_widths):
            raise InputError(
                f"model: residual layers need streams as wide as the embedding ({self.embedding_dim}), "
                f"found {self.stream_widths}; set model.residual=false or model.embedding_dim"
            )
        self.stream_a = Stream(self.stream_widths[0], self.embedding_dim, num_classes, recipe)
        self.stream_b = Stream(self.stream_widths[1], self.embedding_dim, num_classes, recipe)

    @classmethod
    def from_recipe(
        cls, recipe: ModelRecipe, *, num_classes: int, stream_widths: tuple[int, int] = (1024, 1024)
    ) -> D2Net:
        """The network that a recipe describes."""
        return cls(num_classes, stream_widths, recipe)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> D2NetOutput:
        """Run both streams.

        Args:
            features: (B, T, sum of stream widths). What lies past a length never matters.
            lengths: (B,) int64 snippets of each recording, or None (all T).

        Raises:
            InputError: wrong shape or device.
        """
        check_shape("D2Net", "features", features, "B, T, width")
        if features.shape[2] != sum(self.stream_widths):
            raise InputError(
                f"D2Net: features are {features.shape[2]} wide, the network expects {sum(self.stream_widths)} "
                f"(streams of {self.stream_widths[0]} and {self.stream_widths[1]})"
            )
        padding = ~valid_mask("D2Net", features, lengths)[:, :, None]
        a, b = (x.masked_fill(padding, 0) for x in features.split(self.stream_widths, 2))  # each contiguous
        x_a, logits_a = self.stream_a(a, padding)
        x_b, logits_b = self.stream_b(b, padding)
        # Under autocast the layers give bfloat16, whose sigmoid is 1 from a logit of 6 on.
        logits_a, logits_b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logits_a, logits_b))
        tcam = (0.5 * (torch.sigmoid(logits_a) + torch.sigmoid(logits_b))).masked_fill(padding, 0)
        return D2NetOutput(logits_a, logits_b, tcam, 0.5 * (x_a + x_b))
