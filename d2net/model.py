"""The D2-Net network (Fig. 2): two parallel streams of three temporal convolutions, or one of them alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2net.errors import InputError
from d2net.ops import masked_leaky_relu
from d2net.ops.checks import as_lengths, as_tensor, check_floating, check_shape, within
from d2net.ops.precision import at_least_float32, kept_in_float32
from d2net.recipes import ModelRecipe, Recipe


class D2NetOutput(NamedTuple):
    """The outputs of the network for a batch; all are 0 past a recording's length.

    Attributes:
        logits_a: (B, T, C) class logits of the first stream (RGB).
        logits_b: (B, T, C) class logits of the second stream (flow); None where the network has one stream.
        tcam: (B, T, C) class activations T, the mean of the streams' sigmoids.
        embeddings: (B, T, D) latent embeddings x(t), the mean of the streams' second layers.
    """

    logits_a: Tensor
    logits_b: Tensor | None
    tcam: Tensor
    embeddings: Tensor

    @property
    def logits(self) -> Tensor:
        """(B, T, C) class logits, the mean of the streams'."""
        return self.logits_a if self.logits_b is None else 0.5 * (self.logits_a + self.logits_b)


class TemporalConv(nn.Conv1d):
    """A convolution over time of (B, T, D)."""

    def __init__(self, width_in: int, width_out: int, kernel_size: int, dilation: int) -> None:
        super().__init__(width_in, width_out, kernel_size, padding=(kernel_size - 1) // 2 * dilation, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, width_in) -> (B, T, width_out); on a CPU the transpose of contiguous (B, width_out, T)."""
        if x.shape[1] == 0:  # PyTorch's convolutions refuse T = 0; this gives an empty output, and gradients of 0
            return F.linear(x, self.weight[:, :, 0], self.bias)
        return self.channels_last(x) if x.is_cuda else super().forward(x.transpose(1, 2)).transpose(1, 2)

    def activated(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Leaky ReLU (slope 0.2) of the convolution, 0 past every recording's length; memory as :meth:`forward`'s."""
        y = self(x)
        if x.is_cuda:
            return masked_leaky_relu(y, lengths, slope=0.2)
        return masked_leaky_relu(y.transpose(1, 2), lengths, slope=0.2, time_dim=2).transpose(1, 2)

    def channels_last(self, x: Tensor) -> Tensor:
        """The convolution as a 2-D one of height 1, for which (B, T, D) is PyTorch's "channels last" layout.

        cuDNN's kernels for tensor cores use this layout; conv1d would copy x to (B, D, T) first. On a CPU conv1d is
        faster.
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
    """Three temporal convolutions, with leaky ReLU (slope 0.2) after the first two; the recipe sets variants."""

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

    def forward(self, x: Tensor, lengths: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, width), 0 where ``padding`` (B, T, 1) -> embeddings (B, T, D) and logits (B, T, C), 0 there too."""
        for layer in (self.first, self.second):
            y = layer.activated(x, lengths)
            x = x + y if self.residual else y
        x = x.contiguous()  # as the loss reads it, and dropout draws in the order of memory
        dropped = F.dropout(x, self.dropout, self.training)
        return dropped if self.dropout_embeddings else x, self.classifier(dropped).masked_fill(padding, 0)


class D2Net(nn.Module):
    """Features (B, T, width) -> TCAM and embeddings (Fig. 2).

    Args:
        num_classes: C.
        stream_widths: widths of the streams, one or two; the features are their concatenation. I3D: (1024, 1024), RGB
            alone: (1024,).
        recipe: kernel size, dilation, residuals, dropout, embedding width; None: THUMOS14's.

    Attributes:
        x_ref: (D,) buffer, the running mean of background embeddings that Eq. 8 compares with: state of the network, as
            the statistics of a batch norm are. :class:`d2net.losses.D2NetLoss` updates it where its ``reference`` is
            this tensor; 0 before training, where lambda' is 0.5 everywhere. At least float32, as there.
        feature_mean: (width,) buffer, at least float32, or None: where the recipe says ``standardize``, the network
            computes with (features - feature_mean) * feature_scale. :class:`d2net.training.Trainer` sets it to the mean
            of its recordings; 0 before.
        feature_scale: The same of 1 / deviation; 1 before.
        classes: Names of the outputs; None where nobody said.
        recipe: All settings of the training, those of localization among them; None where there was none.
        trained_on: Name of that dataset, or None.
        extraction: How its features were made (:class:`d2net.data.dataset.Dataset`), or None. All four are set by
            :func:`d2net.checkpoint.load_model` and by :class:`d2net.training.Trainer`, and are no part of
            ``state_dict()``.

    Raises:
        InputError: a wrong number of classes or width, or residuals with an embedding width other than the streams'.
    """

    x_ref: Tensor
    feature_mean: Tensor | None
    feature_scale: Tensor | None
    classes: tuple[str, ...] | None = None
    recipe: Recipe | None = None
    trained_on: str | None = None
    extraction: Mapping[str, Any] | None = None

    def __init__(
        self, num_classes: int, stream_widths: Sequence[int] = (1024, 1024), recipe: ModelRecipe | None = None
    ) -> None:
        super().__init__()
        if recipe is not None and not isinstance(recipe, ModelRecipe):
            raise InputError(
                f"model: recipe is a {type(recipe).__name__}; expected a ModelRecipe, load_recipe(…).model"
            )
        recipe = recipe or ModelRecipe()
        self.stream_widths = check_stream_widths("model", stream_widths)
        if not isinstance(num_classes, (int, np.integer)) or num_classes < 1:
            raise InputError(f"model: num_classes is {num_classes!r}; expected a whole number of at least 1")
        self.num_classes = num_classes
        self.embedding_dim = recipe.embedding_dim or self.stream_widths[0]
        if recipe.residual and {self.embedding_dim} != set(self.stream_widths):
            raise InputError(
                f"model: residual layers need streams as wide as the embedding ({self.embedding_dim}), "
                f"found {self.stream_widths}; set model.residual=false or model.embedding_dim"
            )
        self.stream_a = Stream(self.stream_widths[0], self.embedding_dim, num_classes, recipe)
        self.stream_b: Stream | None = None
        if len(self.stream_widths) == 2:
            self.stream_b = Stream(self.stream_widths[1], self.embedding_dim, num_classes, recipe)
        self.register_buffer("x_ref", at_least_float32(torch.zeros(self.embedding_dim)))
        width = sum(self.stream_widths)
        self.register_buffer("feature_mean", at_least_float32(torch.zeros(width)) if recipe.standardize else None)
        self.register_buffer("feature_scale", at_least_float32(torch.ones(width)) if recipe.standardize else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> D2Net:
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            setattr(self, name, kept_in_float32(tensor, getattr(self, name)))
        return self

    @classmethod
    def from_recipe(
        cls, recipe: ModelRecipe, *, num_classes: int, stream_widths: Sequence[int] = (1024, 1024)
    ) -> D2Net:
        """The network that a recipe describes.

        Args:
            recipe: The settings of the network.
            num_classes: C.
            stream_widths: Widths of the streams, one or two.
        """
        return cls(num_classes, stream_widths, recipe)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> D2NetOutput:
        """Run the streams.

        Args:
            features: (B, T, sum of stream widths), of the network's type and device; arrays and lists are converted.
                What lies past a length never matters. B and T may be 0, and so are the results' then.
            lengths: (B,) int64 snippets of each recording, or None (all T).

        Raises:
            InputError: wrong shape, type or device.
        """
        weight = self.stream_a.first.weight
        if not isinstance(features, Tensor):
            features = as_tensor("D2Net", "features", features, weight).to(weight.dtype)
        check_shape("D2Net", "features", features, "B, T, width")
        check_floating("D2Net", "features", features)
        if features.shape[2] != sum(self.stream_widths):
            of = " and ".join(map(str, self.stream_widths))
            raise InputError(
                f"D2Net: features are {features.shape[2]} wide, the network expects {sum(self.stream_widths)} "
                f"({'streams' if self.stream_b is not None else 'one stream'} of {of})"
            )
        if features.device != weight.device:
            raise InputError(f"D2Net: features are on {features.device} but the network on {weight.device}; move one")
        if features.dtype != weight.dtype and not torch.is_autocast_enabled(features.device.type):
            raise InputError(f"D2Net: features are {features.dtype} but the network {weight.dtype}; convert one")
        lengths = as_lengths("D2Net", lengths, features)
        padding = ~within(features, lengths)[:, :, None]
        if self.feature_mean is not None and self.feature_scale is not None:
            features = ((features - self.feature_mean) * self.feature_scale).to(features.dtype)
        parts = [x.masked_fill(padding, 0) for x in features.split(self.stream_widths, 2)]  # each contiguous
        x_a, logits_a = self.stream_a(parts[0], lengths, padding)
        # Under autocast the layers give bfloat16, whose sigmoid is 1 from a logit of 6 on.
        logits_a = at_least_float32(logits_a)
        tcam = torch.sigmoid(logits_a)
        if self.stream_b is None:
            return D2NetOutput(logits_a, None, tcam.masked_fill(padding, 0), x_a)
        x_b, logits_b = self.stream_b(parts[1], lengths, padding)
        logits_b = at_least_float32(logits_b)
        tcam = (0.5 * (tcam + torch.sigmoid(logits_b))).masked_fill(padding, 0)
        return D2NetOutput(logits_a, logits_b, tcam, 0.5 * (x_a + x_b))


def check_stream_widths(where: str, widths: object) -> tuple[int, ...]:
    """The widths of one or two streams as whole numbers.

    Raises:
        InputError: anything else, naming ``where`` it is from.
    """
    try:
        checked = tuple(index(w) for w in widths)  # type: ignore[attr-defined]
    except TypeError:
        checked = ()
    if len(checked) not in (1, 2) or min(checked) < 1:
        raise InputError(
            f"{where}: stream_widths is {widths!r}; expected one or two widths of at least 1, such as (1024,) or "
            "(1024, 1024)"
        )
    return checked
