"""The D2-Net network (Fig. 2): two parallel streams of three temporal convolutions, or one of them alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from d2net.errors import InputError
from d2net.ops.adam import WeightCopies
from d2net.ops.checks import as_tensor, check_floating, check_shape
from d2net.ops.gaps import Packed, Padded
from d2net.ops.network import network
from d2net.ops.network_call import NetworkCopies
from d2net.ops.network_ref import NetworkInputs, NetworkSettings, StreamWeights
from d2net.ops.precision import at_least_float32, autocasts, kept_in_float32, without_autocast
from d2net.ops.temporal_conv import reach_of
from d2net.recipes import ModelRecipe, Recipe

__all__ = ["D2Net", "D2NetOutput"]


class D2NetOutput(NamedTuple):
    """The outputs of the network for a batch, (N, ...) of packed recordings; all are 0 past a recording's length.

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


class Stream(nn.Module):
    """Weights of three temporal convolutions (Fig. 2), which :mod:`d2net.ops.network` computes.

    The layers are never called themselves: hooks on them, or others in their place, have no effect.
    """

    def __init__(self, width: int, embedding_dim: int, num_classes: int, recipe: ModelRecipe) -> None:
        super().__init__()
        k = recipe.kernel_size
        self.first = nn.Conv1d(width, embedding_dim, k)
        self.second = nn.Conv1d(embedding_dim, embedding_dim, k)
        self.classifier = nn.Conv1d(embedding_dim, num_classes, recipe.classifier_kernel_size or k)
        if recipe.weight_std is not None:
            for layer in (self.first, self.second, self.classifier):
                nn.init.normal_(layer.weight, std=recipe.weight_std)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def weights(self) -> StreamWeights:
        layers = (self.first, self.second, self.classifier)
        return StreamWeights(*(x for layer in layers for x in (layer.weight, layer.bias)))  # type: ignore[arg-type]


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
        self.settings = NetworkSettings(recipe.dilation, recipe.residual, recipe.dropout, recipe.dropout_embeddings)
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

    def forward(self, features: Tensor, lengths: Tensor | None = None, offsets: Tensor | None = None) -> D2NetOutput:
        """Run the streams.

        Args:
            features: (B, T, sum of stream widths), of the network's type and device; arrays and lists are converted.
                What lies past a length never matters. B and T may be 0, and so are the results' then.
            lengths: (B,) int64 snippets of each recording, or None (all T; with offsets: up to the next recording).
            offsets: (B+1,) int64, for recordings one after another: features are (N, width), recording b begins at row
                offsets[b], and the results are (N, ...) too, 0 in rows of no recording. None: as above.

        Raises:
            InputError: wrong shape, type or device.
        """
        weight = self.stream_a.first.weight
        if not isinstance(features, Tensor):
            features = as_tensor("D2Net", "features", features, weight).to(weight.dtype)
        check_shape("D2Net", "features", features, "B, T, width" if offsets is None else "N, width")
        check_floating("D2Net", "features", features)
        if features.shape[-1] != sum(self.stream_widths):
            of = " and ".join(map(str, self.stream_widths))
            raise InputError(
                f"D2Net: features are {features.shape[-1]} wide, the network expects {sum(self.stream_widths)} "
                f"({'streams' if self.stream_b is not None else 'one stream'} of {of})"
            )
        if features.device != weight.device:
            raise InputError(f"D2Net: features are on {features.device} but the network on {weight.device}; move one")
        if features.dtype != weight.dtype and not torch.is_autocast_enabled(features.device.type):
            raise InputError(f"D2Net: features are {features.dtype} but the network {weight.dtype}; convert one")
        gaps = Padded(features, lengths, self) if offsets is None else Packed(features, lengths, offsets, self)
        output = self.streams([gaps.insert(x) for x in features.split(self.stream_widths, -1)], gaps.mask)
        return D2NetOutput(*(None if x is None else gaps.remove(x) for x in output))  # type: ignore[arg-type]

    @property
    def reach(self) -> int:
        """Rows on either side that a layer computes a row from: as many gap rows keep recordings apart."""
        layers = (self.stream_a.first, self.stream_a.classifier)
        return reach_of([layer.kernel_size[0] for layer in layers], self.settings.dilation)

    def rows(self, least: int) -> int:
        """The next number of packed rows, from ``least`` on, of which the convolutions are products of matrices."""
        k = self.stream_a.first.kernel_size[0]
        return least + -(least + 1) % k

    def order_weights(self) -> D2Net:
        """Let the weights lie in memory as products of matrices read them, (width out, k, width in).

        Else every call copies them so. What needs contiguous parameters (LBFGS, ``safetensors.torch.save_file``) raises
        then, and state of ``torch.optim.Adam(fused=True)`` that was saved before does not fit without an error.
        """
        for p in self.parameters():
            if p.ndim == 3:
                p.data = p.data.mT.contiguous().mT
        return self

    def copies(self, dtype: torch.dtype) -> tuple[NetworkCopies, list[WeightCopies]]:
        """Memory for copies of weights that :meth:`order_weights` ordered: for :meth:`streams`, and by parameter."""
        of = [stream.weights() for stream in (self.stream_a, self.stream_b) if stream is not None]
        copies = NetworkCopies.blank(of, dtype)
        of_parameters = []
        for s, weights in enumerate(of):
            used = copies.classifier[s, : weights.classifier[:, 0].numel()]
            pairs = ((copies.first[s],), (copies.second[s], copies.reversed_second[s]), (used,))
            of_parameters += [x for pair in pairs for x in (WeightCopies(*pair), WeightCopies())]
        return copies, of_parameters

    def streams(
        self,
        parts: Sequence[Tensor],
        mask: Tensor,
        copies: NetworkCopies | None = None,
        numbers: Tensor | None = None,
        apart: bool = False,
    ) -> D2NetOutput:
        """Run the streams on packed rows, with gaps between the recordings that the caller has put there.

        Args:
            parts: (N, width) features of each stream, in the type to compute in, 0 in gaps. The first :attr:`reach`
                rows are a gap, as many follow every recording, and N is one of :meth:`rows`.
            mask: (N,) bool, False in gaps.
            copies: Of the weights as they are now, in the type to compute in, on a GPU; None: they are made.
            numbers: (N,) int64, of the rows in the whole batch, where these are some of its recordings: with the same
                seed of PyTorch the dropout is that of the whole batch. None: 0 to N - 1.
            apart: Whether the backward computes the gradients of the first layers' weights apart, behind all others, so
                that these can be on their way to other processes meanwhile.

        Returns:
            (N, ...), 0 in gaps. The embeddings have the type of ``parts``.

        Raises:
            InputError: wrong shape, type or device.
        """
        device = mask.device.type
        dtype = parts[0].dtype
        if autocasts(device) and dtype is not torch.float64:  # which autocast leaves alone
            dtype = torch.get_autocast_dtype(device)
        if self.feature_mean is not None and self.feature_scale is not None:
            scales = zip(
                parts, *(x.split(self.stream_widths) for x in (self.feature_mean, self.feature_scale)), strict=True
            )
            parts = [torch.where(mask[:, None], (x - mean) * scale, 0) for x, mean, scale in scales]
        x_a, x_b = parts[0].to(dtype), parts[1].to(dtype) if len(parts) == 2 else None
        seed = None
        if self.training and self.settings.dropout > 0:
            seed = torch.randint(2**62, (1,), device=mask.device)  # on the device: a CUDA graph draws anew
        weights = [x for stream in (self.stream_a, self.stream_b) if stream is not None for x in stream.weights()]
        with without_autocast(device):
            rows = NetworkInputs(mask, x_a, x_b, seed, numbers)
            return D2NetOutput(*network(rows, weights, self.settings, copies, apart))


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
