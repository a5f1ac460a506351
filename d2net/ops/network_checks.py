"""What the network's operator takes: checks of its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops.checks import can_look_at, check_floating, check_like, check_shape
from d2net.ops.network_call import Arguments, Call, sizes_of_copies
from d2net.ops.network_ref import StreamWeights
from d2net.ops.temporal_conv import reach_of


def check_weight(where: str, name: str, weight: Tensor, width: int, device: torch.device) -> None:
    """Require a weight of a convolution of (N, ``width``)."""
    check_floating(where, name, weight)
    if weight.ndim != 3 or weight.shape[1] != width or weight.shape[2] % 2 == 0 or weight.device != device:
        raise InputError(
            f"{where}: {name} is {tuple(weight.shape)} on {weight.device}, expected (width out, {width}, an odd number "
            f"of taps) on {device}"
        )


def check_network(*arguments: Any) -> None:
    """Raises InputError for arguments of the operator that do not fit."""
    where, (rows, products, weights, copies, settings) = "network", Arguments.of(*arguments)
    mask, x_a, x_b, seed, numbers = rows
    check_shape(where, "x_a", x_a, "N, width")
    check_floating(where, "x_a", x_a)
    n, device = x_a.shape[0], x_a.device
    check_like(where, "mask", mask, (n,), torch.bool, device)
    if x_b is not None:
        check_like(where, "x_b", x_b, (n, *x_b.shape[1:2]), x_a.dtype, device)
    if seed is not None:
        check_like(where, "seed", seed, (1,), torch.int64, device)
    if numbers is not None:
        check_like(where, "numbers", numbers, (n,), torch.int64, device)
    if not 0 <= settings.dropout < 1:
        raise InputError(f"{where}: dropout is {settings.dropout}, expected 0 to below 1")
    for s, x in enumerate((x_a, x_b)):
        if x is None:
            continue
        of = StreamWeights(*weights[6 * s : 6 * s + 6])
        width = x.shape[1]
        for name in ("first", "second", "classifier"):
            weight, bias = getattr(of, name), getattr(of, f"{name}_bias")
            if weight is None or bias is None:
                raise InputError(f"{where}: {name} of stream {s + 1} is missing")
            check_weight(where, name, weight, width, device)
            check_like(where, f"{name}_bias", bias, weight.shape[:1], weight.dtype, device)
            width = width if name == "classifier" else len(weight)
    layers = [len(w) for w in weights if w is not None and w.ndim == 3]
    if x_b is not None and layers[:3] != layers[3:]:
        raise InputError(f"{where}: the layers of the streams are {layers[:3]} and {layers[3:]} wide; they must match")
    widths = [x.shape[1] for x in (x_a, x_b) if x is not None]
    if settings.residual and any(width != size for width in widths for size in layers[:2]):
        raise InputError(f"{where}: residual layers need features as wide as the layers, found {x_a.shape[1]}")
    if any(size == 0 for size in (*widths, *layers)):
        raise InputError(f"{where}: features are {widths} and the layers {layers} wide, expected at least 1")
    if settings.dilation < 1:
        raise InputError(f"{where}: dilation is {settings.dilation}, expected at least 1")
    taps = [w.shape[2] for w in weights if w is not None and w.ndim == 3]
    if any(k != taps[0] for k in (*taps[::3], *taps[1::3])) or any(k != taps[2] for k in taps[2::3]):
        raise InputError(
            f"{where}: the kernels have {taps} taps; those of the first two layers must be alike, in both streams, and "
            "so must those of the classifiers"
        )
    reach = reach_of(taps, settings.dilation)
    if n < reach:
        raise InputError(f"{where}: there are {n} rows, expected gaps of {reach} at both ends")
    if reach and can_look_at(mask) and (mask[:reach].any() or mask[-reach:].any()):
        raise InputError(f"{where}: the first and the last {reach} rows must be gaps, mask False")
    for s, (x, y) in enumerate(zip((x_a, x_b), products, strict=True)):
        if (y is None) != (x is None or products[0] is None):
            raise InputError(f"{where}: y_a and y_b are the products of every stream's first layer, or none is given")
        if y is not None:
            check_like(where, f"y_{'ab'[s]}", y, (n, layers[0]), x_a.dtype, device)
    if copies:
        sizes = sizes_of_copies(Call(x_a, x_b, weights).of)
        if len(copies) != len(sizes):
            raise InputError(f"{where}: there are {len(copies)} copies of weights, expected {len(sizes)}")
        for i, (copy, size) in enumerate(zip(copies, sizes, strict=True)):
            check_like(where, f"copy {i}", copy, size, x_a.dtype, device)
