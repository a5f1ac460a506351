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
from d2net.ops.checks import check_like
from d2net.ops.first_layer import first_layer
from d2net.ops.network_call import (
    AT_COPIES,
    AT_PRODUCTS,
    AT_WEIGHTS,
    BLOCK_ROWS,
    Arguments,
    Call,
    NetworkCopies,
    Weights,
)
from d2net.ops.network_checks import check_network
from d2net.ops.network_ref import NetworkInputs, NetworkSettings, StreamWeights, network_ref
from d2net.ops.precision import without_autocast
from d2net.ops.temporal_conv import convolution, gradient_of_rows, gradient_of_weight, products

OUTPUTS = 4


def network(
    inputs: NetworkInputs,
    weights: Weights,
    settings: NetworkSettings,
    copies: NetworkCopies | None = None,
    apart: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The streams on packed rows.

    Computed in the type of the features; biases, sums and class activations in float32 at least. Differentiable once
    with respect to features and weights.

    Args:
        inputs: The rows.
        weights: :class:`StreamWeights` of one or two streams, of any floating type.
        settings: Of the recipe.
        copies: Of these very weights in the type of the features, for kernels of a GPU; None: they are made.
        apart: Whether the products of the first layers are nodes of autograd of their own, so that the backward has the
            gradients of all else before it computes those of their weights. Where no kernel runs it changes nothing.

    Returns:
        logits_a and logits_b (N, C), the latter None with one stream; the TCAM (N, C), the mean of the streams'
        sigmoids; embeddings (N, D), the mean of the streams' second layers. All are 0 where the mask is False.

    Raises:
        InputError: shapes, types or devices that do not fit.
    """
    mask, x_a, x_b, *_ = inputs
    of_all = (*weights, *(None,) * (12 - len(weights)))
    # Kernels of the CPU compute in float32 and float64. PyTorch has faster products of bfloat16 than they could use.
    half_on_cpu = x_a.is_cpu and x_a.dtype.itemsize == 2
    if half_on_cpu or not _library.has_kernel("network", x_a):
        check_network(*inputs, None, None, *of_all, [], *settings)
        return network_ref(inputs, of_all, settings)
    of_copies = [] if copies is None else copies.flat()
    first_products: list[Tensor | None] = [None, None]
    for s, x in enumerate((x_a, x_b) if apart else ()):
        if x is not None:
            copy = of_copies[s] if of_copies else None
            first_products[s] = first_layer(mask, x, of_all[6 * s], copy, settings.dilation)
    logits_a, logits_b, tcam, embeddings, *_ = _network(*inputs, *first_products, *of_all, of_copies, *settings)
    return logits_a, None if x_b is None else logits_b, tcam, embeddings


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    rows, _, weights, _, settings = Arguments.of(*arguments)
    drops = rows.seed is not None and settings.dropout > 0
    return tuple(Call(rows.x_a, rows.x_b, weights).results(drops, settings.dropout_embeddings))


def _forward(native: Native, *arguments: Any) -> tuple[Tensor, ...]:
    rows, first_products, weights, copies, settings = Arguments.of(*arguments)
    mask, x_a, x_b, seed, numbers = _native.contiguous(*rows)
    if native is _native.on_cpu and x_a.dtype.itemsize == 2:
        raise InputError(f"network: x_a has dtype {x_a.dtype}, expected float32 or float64 on a CPU: convert it")
    call = Call(x_a, x_b, weights, copies)
    drops = seed is not None and settings.dropout > 0
    results = call.results(drops, settings.dropout_embeddings)
    logits_a, logits_b, tcam, embeddings, hidden, last, signs, kept = results
    n, two, backward = call.n, len(call.x) == 2, (None, None, None, None, None, 0)
    last = last if len(last) else embeddings[None]
    previous: Tensor | None = None  # the first stream's part of the embeddings
    for s, x in enumerate(call.x):
        shape = call.layer(settings, s, drops, mask, 1 / len(call.x))
        y = first_products[s]
        y = convolution(x, call.first(s), settings.dilation) if y is None else y.contiguous()
        residual = x if settings.residual else None
        of_first = call.bias(s, "first_bias"), y, residual, None, None, hidden[s], None, None, None, signs[0, s], None
        native("stream_layer", x, (*shape, *of_first, *backward))

        y = convolution(hidden[s], call.second(s), settings.dilation)
        residual = hidden[s] if settings.residual else None
        activated, dropped = last[s], None
        if drops:
            activated, dropped = y if two or settings.dropout_embeddings else embeddings, last[s]
        mean = embeddings if previous is not None else None
        bits = signs[1, s], kept[s] if drops else None
        of_dropout = (seed, numbers) if drops else (None, None)
        of_second = call.bias(s, "second_bias"), y, residual, *of_dropout, activated, dropped, previous
        native("stream_layer", x, (*shape, *of_second, mean, *bits, *backward))
        previous = dropped if dropped is not None and settings.dropout_embeddings else activated

    of_taps = call.blank(len(call.x), n, call.row)
    products(last, call.classifier().mT, of_taps)
    head = *call.head(settings, mask, of_taps), logits_a, logits_b, tcam
    native("class_head", x_a, (*head, None, None, None, None, None, 0, 0))
    return tuple(results)


def _setup_context(ctx, inputs, output) -> None:
    ctx.copies, ctx.settings, ctx.apart = inputs[AT_COPIES], inputs[AT_COPIES + 1 :], inputs[AT_PRODUCTS] is not None
    ctx.mark_non_differentiable(*output[OUTPUTS:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:AT_PRODUCTS], None, None, *inputs[AT_WEIGHTS:AT_COPIES], *output)


def _backward(ctx, *grads: Tensor | None) -> tuple[Any, ...]:
    needed, none = [*ctx.needs_input_grad], ([None] * len(ctx.copies), *(None,) * len(ctx.settings))
    grads = grads[:OUTPUTS]
    if all(grad is None for grad in grads):
        return *(None,) * AT_COPIES, *none
    saved = [*ctx.saved_tensors]  # read once, for torch.utils.checkpoint
    inputs, results = saved[:AT_COPIES], saved[AT_COPIES:]
    places = [1, 2, *range(AT_WEIGHTS, AT_COPIES)]  # of what the gradients are
    if ctx.apart:
        places[2], places[8] = AT_PRODUCTS, AT_PRODUCTS + 1
        if not NetworkSettings(*ctx.settings).residual:  # nothing else reads the features
            needed[1] = needed[2] = False
    with without_autocast(inputs[1].device.type):
        asked = *needed[1:3], ctx.apart
        found = _network_backward([*grads], inputs, results, ctx.copies, *ctx.settings, *asked)
    leaves = [x for x in (*inputs[1:3], *inputs[AT_WEIGHTS:], *grads) if x is not None]
    gradients: list[Tensor | None] = [None] * AT_COPIES
    for i, gradient in zip(places, found, strict=True):
        if needed[i]:
            # Of weights they come in the order of the parameter's memory.
            gradient = gradient.permute(0, 2, 1) if gradient.ndim == 3 else gradient
            gradients[i] = _library.differentiable_once(gradient, *leaves)
    return *gradients, *none


Tensors = Sequence[Any]  # Tensor?[] of a schema


def _check_backward(grads: Tensors, inputs: Tensors, results: Tensors, copies: Tensors, *rest: Any) -> None:
    where, names = "network_backward", ("logits_a", "logits_b", "TCAM", "embeddings", "hidden", "last", "signs", "kept")
    if (len(grads), len(inputs), len(results)) != (OUTPUTS, AT_COPIES, len(names)) or inputs[1] is None:
        raise InputError(f"{where}: expected {OUTPUTS} gradients, {AT_COPIES} inputs and {len(names)} results")
    check_network(*inputs, copies, *rest[:4])
    # On the meta device the expected results take no memory.
    meta: list[Any] = [None if x is None else torch.empty_like(x, device="meta") for x in inputs[1:3]]
    expected, device = _fake(inputs[0], *meta, *inputs[3:], copies, *rest[:4]), inputs[1].device
    for name, x, like in zip(names, results, expected, strict=True):
        check_like(where, name, x, like.shape, like.dtype, device)
    for name, grad, like in zip(names, grads, expected, strict=False):
        if grad is not None:
            check_like(where, f"the gradient of {name}", grad, like.shape, like.dtype, device)


def _gradient_fake(
    grads: Tensors, inputs: Tensors, results: Tensors, copies: Tensors, *rest: Any
) -> tuple[Tensor, ...]:
    *need, apart = rest[4:]
    found = Call(inputs[1], inputs[2], inputs[AT_WEIGHTS:]).gradients(inputs[AT_WEIGHTS:], need, apart)
    return tuple(x.new_empty(x.shape) for x in found)  # none is another's memory


def _gradient(
    native: Native, grads: Tensors, inputs: Tensors, results: Tensors, copies: Tensors, *rest: Any
) -> tuple[Tensor, ...]:
    settings, (*need, apart) = NetworkSettings(*rest[:4]), rest[4:]
    # torch resolves lazy negation (the neg bit) of tensor arguments, but not of tensors in lists.
    plain: list[list[Any]] = [[None if x is None else x.resolve_neg() for x in y] for y in (grads, inputs[:3], results)]
    grad_a, grad_b, grad_tcam, grad_embeddings = _native.contiguous(*plain[0])
    mask, x_a, x_b = _native.contiguous(*plain[1])
    logits_a, logits_b, _, embeddings, hidden, last, signs, kept = _native.contiguous(*plain[2])
    call, drops = Call(x_a, x_b, inputs[AT_WEIGHTS:], copies), len(kept) > 0
    last = last if len(last) else embeddings[None]
    n, d, k, dilation, dtype = call.n, call.d, call.k, settings.dilation, call.of[0].first.dtype

    # Sums over blocks of rows for the biases of all layers: first, second, classifier.
    width, blocks = max(d, call.c), (n + BLOCK_ROWS - 1) // BLOCK_ROWS
    partial_sums = call.blank(len(call.x), 3, blocks, width, dtype=call.sums)

    of_taps = call.blank(len(call.x), n, call.row)
    head = *call.head(settings, mask, None), logits_a, logits_b, None, grad_tcam, grad_a, grad_b, of_taps
    native("class_head_backward", x_a, (*head, partial_sums[0, 2], partial_sums.stride(0), width))
    of_last = torch.empty_like(last)
    products(of_taps, call.classifier(), of_last)
    of_classifier = call.blank(len(call.x), call.row, d, dtype=dtype)
    products(of_taps.mT, last, of_classifier)

    of_x: list[Tensor] = []
    of_weights: list[tuple[Tensor, Tensor]] = []
    forward_only = (None,) * 9
    for s, x in enumerate(call.x):
        grad, of_residual = of_last[s], torch.empty_like(of_last[s]) if settings.residual else None
        members = *call.layer(settings, s, drops, mask, 1 / len(call.x)), *forward_only
        bits = signs[1, s], kept[s] if drops else None
        sums = partial_sums[s, 1], width
        native("stream_layer_backward", x, (*members, *bits, grad, grad_embeddings, grad, of_residual, *sums))
        second = gradient_of_weight(grad, hidden[s], k, dilation, dtype)
        grad = gradient_of_rows(grad, hidden[s], call.second(s), dilation, partial(call.reversed_second, s))

        of_input = torch.empty_like(x) if settings.residual and need[s] else None
        members = *call.layer(settings, s, False, mask, 1.0), *forward_only
        sums = partial_sums[s, 0], width
        native("stream_layer_backward", x, (*members, signs[0, s], None, grad, of_residual, grad, of_input, *sums))
        # Apart, it is that of the products: grad itself.
        of_weights.append((grad if apart else gradient_of_weight(grad, x, k, dilation, dtype), second))
        if need[s] and apart:
            of_x.append(torch.zeros_like(x) if of_input is None else of_input)
        elif need[s]:
            grad_x = gradient_of_rows(grad, x, call.first(s), dilation)
            of_x.append(torch.where(mask[:, None], grad_x if of_input is None else grad_x + of_input, 0))
        else:
            of_x.append(call.blank(0))

    of_biases = call.blank(len(call.x), 3, width, dtype=call.sums)
    native("bias_sums", of_biases, (len(call.x), blocks, width, d, call.c, partial_sums, of_biases))
    found = [*of_x, *(call.blank(0) for _ in range(2 - len(of_x)))]
    for s, (first, second) in enumerate(of_weights):
        of_bias = of_biases[s].to(dtype)
        classifier = of_classifier[s, : call.c * call.taps].view(call.c, call.taps, d)
        found += [first, of_bias[0, :d], second, of_bias[1, :d], classifier, of_bias[2, : call.c]]
    return (*found, *(call.blank(0, dtype=dtype) for _ in range(14 - len(found))))


_SETTINGS = "int dilation, bool residual, float dropout, bool dropout_embeddings"
_WEIGHTS = ", ".join(f"Tensor{'?' * s} {name}_{'ab'[s]}" for s in range(2) for name in StreamWeights._fields)
_network = _library.register(
    "network(Tensor mask, Tensor x_a, Tensor? x_b, Tensor? seed, Tensor? numbers, Tensor? y_a, Tensor? y_b, "
    f"{_WEIGHTS}, Tensor[] copies, {_SETTINGS}) -> (Tensor logits_a, Tensor logits_b, Tensor tcam, Tensor embeddings, "
    "Tensor hidden, Tensor last, Tensor signs, Tensor kept)",
    check=check_network,
    cpu=partial(_forward, _native.on_cpu),
    cuda=partial(_forward, _native.on_cuda),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_network_backward = _library.register(
    f"network_backward(Tensor?[] grads, Tensor?[] inputs, Tensor?[] results, Tensor[] copies, {_SETTINGS}, bool "
    f"need_a, bool need_b, bool apart) -> ({', '.join(['Tensor'] * 14)})",
    check=_check_backward,
    cpu=partial(_gradient, _native.on_cpu),
    cuda=partial(_gradient, _native.on_cuda),
    fake=_gradient_fake,
    backward=_library.refuse_double_backward,
)
