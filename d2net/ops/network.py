"""The streams of the network (Fig. 2) on packed rows: products of matrices, and one pass of memory before and after."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops import _library, _native
from d2net.ops._native import Native
from d2net.ops.checks import can_look_at, check_floating, check_like, check_shape
from d2net.ops.network_ref import SLOPE, NetworkInputs, NetworkSettings, StreamWeights, network_ref
from d2net.ops.temporal_conv import convolution, gradient_of_rows, gradient_of_weight, products

BITS = 8  # elements of a row that one byte of signs tells of: kBitsOf of csrc/network.h
BLOCK_ROWS = 16  # rows of one partial sum of a bias' gradient: kBlockRows there
OUTPUTS = 4
INPUTS = 16  # tensors: mask, two of features, seed, twelve of weights
Weights = Sequence[Tensor | None]  # six of each stream: StreamWeights


def network(
    inputs: NetworkInputs, weights: Weights, settings: NetworkSettings
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The streams on packed rows.

    Computed in the type of the features; biases, sums and class activations in float32 at least. Differentiable once
    with respect to features and weights.

    Args:
        inputs: The rows.
        weights: :class:`StreamWeights` of one or two streams, of any floating type.
        settings: Of the recipe.

    Returns:
        logits_a and logits_b (N, C), the latter None with one stream; the TCAM (N, C), the mean of the streams'
        sigmoids; embeddings (N, D), the mean of the streams' second layers. All are 0 where the mask is False.

    Raises:
        InputError: shapes, types or devices that do not fit.
    """
    mask, x_a, x_b, seed = inputs
    of_all = (*weights, *(None,) * (12 - len(weights)))
    # Kernels of the CPU compute in float32 and float64. PyTorch has faster products of bfloat16 than they could use.
    half_on_cpu = x_a.is_cpu and x_a.dtype.itemsize == 2
    if half_on_cpu or not _library.has_kernel("network", x_a):
        _check(mask, x_a, x_b, seed, *of_all, *settings)
        return network_ref(inputs, of_all, settings)
    logits_a, logits_b, tcam, embeddings, *_ = _network(mask, x_a, x_b, seed, *of_all, *settings)
    return logits_a, None if x_b is None else logits_b, tcam, embeddings


def reach_of(kernel_sizes: Sequence[int], dilation: int) -> int:
    """Rows on either side that a row of a result is computed from: the width that gaps between recordings need."""
    return max(k // 2 for k in kernel_sizes) * dilation


def _check(mask: Tensor, x_a: Tensor, x_b: Tensor | None, seed: Tensor | None, *rest: Any) -> None:
    where, weights, dilation = "network", rest[:12], rest[12]
    check_shape(where, "x_a", x_a, "N, width")
    check_floating(where, "x_a", x_a)
    n, device = len(x_a), x_a.device
    check_like(where, "mask", mask, (n,), torch.bool, device)
    if x_b is not None:
        check_like(where, "x_b", x_b, (n, *x_b.shape[1:2]), x_a.dtype, device)
    if seed is not None:
        check_like(where, "seed", seed, (1,), torch.int64, device)
    if not 0 <= rest[14] < 1:
        raise InputError(f"{where}: dropout is {rest[14]}, expected 0 to below 1")
    for s, x in enumerate((x_a, x_b)):
        if x is None:
            continue
        of = StreamWeights(*weights[6 * s : 6 * s + 6])
        width = x.shape[1]
        for name in ("first", "second", "classifier"):
            weight, bias = getattr(of, name), getattr(of, f"{name}_bias")
            if weight is None or bias is None:
                raise InputError(f"{where}: {name} of stream {s + 1} is missing")
            check_floating(where, name, weight)
            if weight.ndim != 3 or weight.shape[1] != width or weight.shape[2] % 2 == 0 or weight.device != device:
                raise InputError(
                    f"{where}: {name} is {tuple(weight.shape)} on {weight.device}, expected (width out, {width}, an "
                    f"odd number of taps) on {device}"
                )
            check_like(where, f"{name}_bias", bias, weight.shape[:1], weight.dtype, device)
            width = width if name == "classifier" else len(weight)
    sizes = [len(w) for w in weights if w is not None and w.ndim == 3]
    if x_b is not None and sizes[:3] != sizes[3:]:
        raise InputError(f"{where}: the layers of the streams are {sizes[:3]} and {sizes[3:]} wide; they must match")
    widths = [x.shape[1] for x in (x_a, x_b) if x is not None]
    if rest[13] and any(width != size for width in widths for size in sizes[:2]):
        raise InputError(f"{where}: residual layers need features as wide as the layers, found {x_a.shape[1]}")
    reach = reach_of([w.shape[2] for w in weights if w is not None and w.ndim == 3], dilation)
    if reach and can_look_at(mask) and (mask[:reach].any() or mask[-reach:].any()):
        raise InputError(f"{where}: the first and the last {reach} rows must be gaps, mask False")


class _Streams:
    """Sizes of a call, and its weights as the products read them."""

    def __init__(self, x_a: Tensor, x_b: Tensor | None, weights: Weights) -> None:
        self.x = [x for x in (x_a, x_b) if x is not None]
        self.of = [StreamWeights(*weights[6 * s : 6 * s + 6]) for s in range(len(self.x))]  # type: ignore[arg-type]
        self.n, self.dtype, self.sums = len(x_a), x_a.dtype, _native.accumulator(x_a.dtype)
        self.d, self.c = len(self.of[0].second), len(self.of[0].classifier)
        self.taps = self.of[0].classifier.shape[2]
        self.bytes = (self.d + BITS - 1) // BITS

    def weight(self, weight: Tensor) -> Tensor:
        """(width out, k, width in) of the features' type; a view where the weight lies so in memory."""
        return weight.permute(0, 2, 1).to(self.dtype).contiguous()

    def classifier(self) -> Tensor:
        """(streams, C k, D): of all streams, for one batch of products."""
        result = self.x[0].new_empty(len(self.x), self.c * self.taps, self.d)
        for to, of in zip(result, self.of, strict=True):
            to.copy_(of.classifier.permute(0, 2, 1).reshape(-1, self.d))
        return result

    def blank(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.x[0].new_empty(size, dtype=dtype)

    def head(self, settings: NetworkSettings, mask: Tensor, of_taps: Tensor | None) -> tuple[Any, ...]:
        """The first members of csrc/network.h's ClassHead."""
        bias = torch.stack([of.classifier_bias for of in self.of]).to(self.sums)
        return self.n, self.c, self.taps, settings.dilation, len(self.x), mask, of_taps, bias

    def layer(self, settings: NetworkSettings, stream: int, drops: bool, mask: Tensor, share: float) -> tuple[Any, ...]:
        """The first members of csrc/network.h's StreamLayer."""
        numbers = SLOPE, settings.dropout, share
        return *numbers, self.n, self.d, stream, drops and settings.dropout_embeddings, mask


def _results(streams: _Streams, drops: bool, dropout_embeddings: bool) -> list[Tensor]:
    """Uninitialised: logits of both streams, TCAM, embeddings, then what the backward reads.

    That is: x of the first layer (streams, N, D), what the classifier reads (streams, N, D) unless that is the
    embeddings, the signs of both layers (2, streams, N, bytes), and what the dropout kept (streams, N, bytes).
    """
    s, n, d, c, new = len(streams.x), streams.n, streams.d, streams.c, streams.blank
    alone = s == 1 and (dropout_embeddings or not drops)
    return [
        *(new(n if i < s else 0, c, dtype=streams.sums) for i in range(2)),
        new(n, c, dtype=streams.sums),
        new(n, d),
        new(s, n, d),
        new(0 if alone else s, n, d),
        new(2, s, n, streams.bytes, dtype=torch.uint8),
        new(s if drops else 0, n, streams.bytes, dtype=torch.uint8),
    ]


def _fake(mask: Tensor, x_a: Tensor, x_b: Tensor | None, seed: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    settings = NetworkSettings(*rest[12:])
    drops = seed is not None and settings.dropout > 0
    return tuple(_results(_Streams(x_a, x_b, rest[:12]), drops, settings.dropout_embeddings))


def _forward(
    native: Native, mask: Tensor, x_a: Tensor, x_b: Tensor | None, seed: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    mask, x_a, x_b, seed = _native.contiguous(mask, x_a, x_b, seed)
    if native is _native.on_cpu and x_a.dtype.itemsize == 2:
        raise InputError(f"network: x_a has dtype {x_a.dtype}, expected float32 or float64 on a CPU: convert it")
    streams, settings = _Streams(x_a, x_b, rest[:12]), NetworkSettings(*rest[12:])
    drops = seed is not None and settings.dropout > 0
    results = _results(streams, drops, settings.dropout_embeddings)
    logits_a, logits_b, tcam, embeddings, hidden, last, signs, kept = results
    two, none = len(streams.x) == 2, (None,) * 5
    last = last if len(last) else embeddings[None]
    previous: Tensor | None = None  # the first stream's part of the embeddings
    for s, (x, of) in enumerate(zip(streams.x, streams.of, strict=True)):
        shape = streams.layer(settings, s, drops, mask, 1 / len(streams.x))
        y = convolution(x, streams.weight(of.first), settings.dilation)
        residual = x if settings.residual else None
        of_first = of.first_bias.to(streams.sums), y, residual, None, hidden[s], None, None, None, signs[0, s], None
        native("stream_layer", x, (*shape, *of_first, *none))

        y = convolution(hidden[s], streams.weight(of.second), settings.dilation)
        residual = hidden[s] if settings.residual else None
        activated, dropped = last[s], None
        if drops:
            activated, dropped = y if two or settings.dropout_embeddings else embeddings, last[s]
        mean = embeddings if previous is not None else None
        bits = signs[1, s], kept[s] if drops else None
        of_second = of.second_bias.to(streams.sums), y, residual, seed if drops else None, activated, dropped, previous
        native("stream_layer", x, (*shape, *of_second, mean, *bits, *none))
        previous = dropped if dropped is not None and settings.dropout_embeddings else activated

    of_taps = streams.blank(len(streams.x), streams.n, streams.c * streams.taps)
    products(last, streams.classifier().mT, of_taps)
    native("class_head", x_a, (*streams.head(settings, mask, of_taps), logits_a, logits_b, tcam, *none[:4]))
    return tuple(results)


def _setup_context(ctx, inputs, output) -> None:
    ctx.settings = inputs[INPUTS:]
    ctx.mark_non_differentiable(*output[OUTPUTS:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:INPUTS], *output)


def _backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    needed, none = ctx.needs_input_grad, (None,) * len(ctx.settings)
    grads = grads[:OUTPUTS]
    if all(grad is None for grad in grads):
        return *(None,) * INPUTS, *none
    inputs, results = [*ctx.saved_tensors[:INPUTS]], [*ctx.saved_tensors[INPUTS:]]
    found = _network_backward([*grads], inputs, results, *ctx.settings, needed[1], needed[2])
    leaves = [x for x in (*inputs[1:3], *inputs[4:], *grads) if x is not None]
    wanted = [i for i in (1, 2, *range(4, INPUTS)) if inputs[i] is not None]
    gradients: list[Tensor | None] = [None] * INPUTS
    for i, gradient in zip((1, 2, *range(4, INPUTS)), found, strict=True):
        if i in wanted and needed[i]:
            # Of weights they come in the order of the parameter's memory.
            gradient = gradient.permute(0, 2, 1) if gradient.ndim == 3 else gradient
            gradients[i] = _library.differentiable_once(gradient, *leaves)
    return *gradients, *none


Tensors = Sequence[Any]  # Tensor?[] of a schema


def _check_backward(grads: Tensors, inputs: Tensors, results: Tensors, *rest: Any) -> None:
    where, names = "network_backward", ("logits_a", "logits_b", "TCAM", "embeddings", "hidden", "last", "signs", "kept")
    if (len(grads), len(inputs), len(results)) != (OUTPUTS, INPUTS, len(names)) or inputs[1] is None:
        raise InputError(f"{where}: expected {OUTPUTS} gradients, {INPUTS} inputs and {len(names)} results")
    _check(*inputs, *rest[:4])
    expected = _fake(*inputs, *rest[:4])
    for name, x, like in zip(names, results, expected, strict=True):
        check_like(where, name, x, like.shape, like.dtype, like.device)
    for name, grad, like in zip(names, grads, expected, strict=False):
        if grad is not None:
            check_like(where, f"the gradient of {name}", grad, like.shape, like.dtype, like.device)


def _gradients(streams: _Streams, weights: Weights, need: Sequence[bool]) -> list[Tensor]:
    """Uninitialised: of the features of both streams, empty where not needed, and of the twelve weights."""
    inputs = [streams.blank(*(x.shape if wanted else (0,))) for x, wanted in zip(streams.x, need, strict=False)]
    inputs += [streams.blank(0)] * (2 - len(inputs))
    empty = streams.blank(0)
    return [
        *inputs,
        *(
            empty if w is None else w.new_empty([w.shape[i] for i in ((0, 2, 1) if w.ndim == 3 else (0,))])
            for w in weights
        ),
    ]


def _gradient_fake(grads: Tensors, inputs: Tensors, results: Tensors, *rest: Any) -> tuple[Tensor, ...]:
    found = _gradients(_Streams(inputs[1], inputs[2], inputs[4:]), inputs[4:], rest[4:])
    return tuple(x.new_empty(x.shape) for x in found)  # none is another's memory


def _gradient(native: Native, grads: Tensors, inputs: Tensors, results: Tensors, *rest: Any) -> tuple[Tensor, ...]:
    settings, need = NetworkSettings(*rest[:4]), rest[4:]
    # torch resolves lazy negation (the neg bit) of tensor arguments, but not of tensors in lists.
    plain: list[list[Any]] = [[None if x is None else x.resolve_neg() for x in y] for y in (grads, inputs[:4], results)]
    grad_a, grad_b, grad_tcam, grad_embeddings = _native.contiguous(*plain[0])
    mask, x_a, x_b, _ = _native.contiguous(*plain[1])
    logits_a, logits_b, _, embeddings, hidden, last, signs, kept = _native.contiguous(*plain[2])
    streams, drops = _Streams(x_a, x_b, inputs[4:]), len(kept) > 0
    last = last if len(last) else embeddings[None]
    n, d, k, dilation = streams.n, streams.d, streams.of[0].first.shape[2], settings.dilation
    numbers = len(streams.x), n, streams.c * streams.taps

    of_taps = streams.blank(*numbers)
    head = *streams.head(settings, mask, None), logits_a, logits_b, None, grad_tcam, grad_a, grad_b, of_taps
    native("class_head_backward", x_a, head)
    of_last = torch.empty_like(last)
    products(of_taps, streams.classifier(), of_last)
    of_classifier = streams.blank(len(streams.x), streams.c * streams.taps, d, dtype=streams.of[0].classifier.dtype)
    products(of_taps.mT, last, of_classifier)
    middle = of_taps.view(len(streams.x), n, streams.c, -1)[..., streams.taps // 2]
    of_bias = middle.sum(1, dtype=streams.sums)

    # One sum over blocks for the biases of all layers.
    sums = streams.blank(len(streams.x), 2, (n + BLOCK_ROWS - 1) // BLOCK_ROWS, d, dtype=streams.sums)
    of_x: list[Tensor] = []
    of_weights: list[tuple[Tensor, Tensor]] = []
    forward_only = (None,) * 8
    for s, (x, of) in enumerate(zip(streams.x, streams.of, strict=True)):
        of_residual = torch.empty_like(of_last[s]) if settings.residual else None
        first = *streams.layer(settings, s, drops, mask, 1 / len(streams.x)), *forward_only
        bits = signs[1, s], kept[s] if drops else None
        native(
            "stream_layer_backward",
            x,
            (*first, *bits, of_last[s], grad_embeddings, of_last[s], of_residual, sums[s, 1]),
        )
        second = gradient_of_weight(of_last[s], hidden[s], k, dilation, of.second.dtype)
        of_hidden = gradient_of_rows(of_last[s], hidden[s], streams.weight(of.second), dilation)

        of_input = torch.empty_like(of_hidden) if settings.residual and need[s] else None
        first = *streams.layer(settings, s, False, mask, 1.0), *forward_only
        bits = signs[0, s], None
        native("stream_layer_backward", x, (*first, *bits, of_hidden, of_residual, of_hidden, of_input, sums[s, 0]))
        of_weights.append((gradient_of_weight(of_hidden, x, k, dilation, of.first.dtype), second))
        if need[s]:
            grad_x = gradient_of_rows(of_hidden, x, streams.weight(of.first), dilation)
            of_x.append(torch.where(mask[:, None], grad_x if of_input is None else grad_x + of_input, 0))
        else:
            of_x.append(streams.blank(0))
    of_biases = sums.sum(2)
    found = of_x
    if len(streams.x) == 1:
        found.append(streams.blank(0))
    for s, (of, (first_weight, second)) in enumerate(zip(streams.of, of_weights, strict=True)):
        biases = *of_biases[s].unbind(), of_bias[s]
        classifier = of_classifier[s].view(streams.c, streams.taps, d)
        for weight, bias in zip((first_weight, second, classifier), biases, strict=True):
            found += [weight, bias.to(of.first_bias.dtype)]
    return (*found, *(streams.blank(0) for _ in range(14 - len(found))))


_SETTINGS = "int dilation, bool residual, float dropout, bool dropout_embeddings"
_WEIGHTS = ", ".join(f"Tensor{'?' * s} {name}_{'ab'[s]}" for s in range(2) for name in StreamWeights._fields)
_network = _library.register(
    f"network(Tensor mask, Tensor x_a, Tensor? x_b, Tensor? seed, {_WEIGHTS}, {_SETTINGS}) -> (Tensor logits_a,"
    " Tensor logits_b, Tensor tcam, Tensor embeddings, Tensor hidden, Tensor last, Tensor signs, Tensor kept)",
    check=_check,
    cpu=partial(_forward, _native.on_cpu),
    cuda=partial(_forward, _native.on_cuda),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_network_backward = _library.register(
    f"network_backward(Tensor?[] grads, Tensor?[] inputs, Tensor?[] results, {_SETTINGS}, bool need_a, bool need_b) -> "
    f"({', '.join(['Tensor'] * 14)})",
    check=_check_backward,
    cpu=partial(_gradient, _native.on_cpu),
    cuda=partial(_gradient, _native.on_cuda),
    fake=_gradient_fake,
    backward=_library.refuse_double_backward,
)
