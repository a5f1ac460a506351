"""What the loss operator takes and returns: checks of its arguments, and the shapes of its results."""

from __future__ import annotations

import functools
import math

import torch

from d2net.errors import InputError
from d2net.ops import _native
from d2net.ops.checks import (
    check_computed,
    check_floating,
    check_lengths,
    check_like,
    check_numbers,
    check_probability_floor,
    check_same,
)
from d2net.ops.condition_number import MAX_SIZE, check_rank_tol
from d2net.ops.loss_ref import LossInputs, LossSettings
from d2net.ops.packed import check_rows, padded_shape


@functools.lru_cache(maxsize=64)
def checked_settings(operator: str, values: tuple[float, ...]) -> LossSettings:
    if len(values) != len(LossSettings._fields):
        raise InputError(f"{operator}: there are {len(values)} settings, expected {len(LossSettings._fields)}")
    settings = LossSettings(*values)
    if not all(x == x for x in settings):
        check_numbers(operator, **settings._asdict())
    if not 1 <= settings.topk_divisor < 2**62:
        raise InputError(f"{operator}: topk_divisor is {settings.topk_divisor}, expected at least 1")
    check_probability_floor(operator, settings.probability_floor)
    check_rank_tol(operator, settings.rank_tol)
    for part, needed in (("separate", "embed"), ("separate", "classify"), ("update", "embed"), ("snippet", "score")):
        if getattr(settings, part) and not getattr(settings, needed):
            raise InputError(f"{operator}: {part} is on without {needed}")
    return settings


def sizes_of(x: LossInputs, t: int) -> tuple[int, int, int, int]:
    """B, T, C, D."""
    b, t, c = padded_shape(x.tcam, x.offsets, t)
    return b, t, c, 0 if x.embeddings is None else x.embeddings.shape[-1]


def check_inputs(operator: str, x: LossInputs, settings: LossSettings, t: int) -> None:
    check_rows(operator, "tcam", x.tcam, "B, T, C", x.offsets, t)
    check_computed(operator, "tcam", x.tcam)
    dtype, device = x.tcam.dtype, x.tcam.device
    if x.embeddings is not None:
        check_rows(operator, "embeddings", x.embeddings, "B, T, D", x.offsets, t)
        check_floating(operator, "embeddings", x.embeddings)
        check_same(operator, "tcam", x.tcam, "embeddings", x.embeddings, x.tcam.ndim - 1)
        if _native.accumulator(x.embeddings.dtype) is not dtype:
            raise InputError(f"{operator}: tcam has dtype {dtype}, which does not go with {x.embeddings.dtype}")
    elif settings.embed or settings.score:
        raise InputError(f"{operator}: embeddings are missing")
    b, _, c, d = sizes_of(x, t)
    check_lengths(operator, x.lengths, x.tcam, offsets=x.offsets)
    check_like(operator, "labels", x.labels, (b, c), dtype, device)
    if x.x_ref is not None or settings.update or settings.score:
        check_like(operator, "x_ref", x.x_ref, (d,), dtype, device)
    if x.keys is not None:
        check_like(operator, "keys", x.keys, (3, b), torch.float32, device)
    if x.partner is not None or (settings.separate and x.keys is None):
        check_like(operator, "partner", x.partner, (3, b), torch.int64, device)
    if x.source is not None:
        check_like(operator, "source", x.source, (b,), torch.int64, device)
    if settings.video and min(b, c) > MAX_SIZE:
        raise InputError(f"{operator}: video takes up to {MAX_SIZE} recordings or classes, not {b} and {c}")


Shape = tuple[int, ...]


def result_shapes(x: LossInputs, settings: LossSettings, t: int) -> list[tuple[Shape, torch.dtype]]:
    """Shape and dtype of every result."""
    (b, _, c, d), rows, dtype = sizes_of(x, t), x.tcam.shape[:-1], x.tcam.dtype
    a, n = dtype.itemsize, math.prod(rows)
    # Bytes; at least as many as LossWorkspace of csrc/loss.h needs, which checks that.
    of_row = a + 8 if settings.own_classes else 4
    workspace = n * of_row + b * ((4 + 2 * a) * c + 14 * a + 41) + 2 * a * c + 64 * 15
    return [
        *[((), dtype)] * 4,
        (rows, dtype),
        ((b, c), dtype),
        ((2, b, d) if settings.embed else (0,), dtype),
        ((b,), torch.int64),
        (rows if settings.score else (0,), dtype),
        ((2, b) if settings.embed else (0,), torch.bool),
        ((d if settings.update else 0,), dtype),
        ((workspace,), torch.uint8),
    ]
