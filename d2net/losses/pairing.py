"""Which recordings of a batch are compared with each other (Eq. 3), drawn without waiting for the device."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops.checks import INTEGERS, as_tensor, as_whole, can_look_at, within
from d2net.ops.tcam_pool import class_max
from d2net.words import quoted

Pairing = Literal["different", "permutation"]


class Pairs(NamedTuple):
    """The fields of :class:`~d2net.ops.loss_ref.LossInputs` that say which recordings are paired."""

    keys: Tensor | None = None
    partner: Tensor | None = None
    source: Tensor | None = None


def draw_permutations(counts: Tensor, size: int, generator: torch.Generator | None = None) -> Tensor:
    """Random permutations: row i begins with one of 0 ... counts[i] - 1; the larger numbers up to size - 1 follow.

    Args:
        counts: (N,) int64, at most ``size``.
        size: length of a row.
        generator: on any device; None: PyTorch's default generator of the device of ``counts``.

    Returns:
        (N, size) int64.

    Raises:
        InputError: counts or a size of a wrong shape, type or range (the range of counts is checked on a CPU only).
    """
    counts, size = as_tensor("draw_permutations", "counts", counts), as_whole("draw_permutations", "size", size)
    if counts.ndim != 1 or counts.dtype not in INTEGERS or not 0 <= size < 2**31:
        raise InputError(
            f"draw_permutations: counts has shape {tuple(counts.shape)} and dtype {counts.dtype} and size is {size}, "
            "expected integers (N,) and 0 to 2^31 - 1"
        )
    if can_look_at(counts) and counts.numel() and not (counts.min() >= 0 and counts.max() <= size):
        raise InputError(f"draw_permutations: counts are {counts.min()} to {counts.max()}, expected 0 to {size}")
    return _permutations(uniform((len(counts), size), counts.device, generator), counts)


def _permutations(keys: Tensor, counts: Tensor) -> Tensor:
    """:func:`draw_permutations` from random numbers (N, size)."""
    return (keys + (torch.arange(keys.shape[1], device=counts.device) >= counts[:, None])).argsort(1)


def pair_different(b: int, device: torch.device, partners: Tensor | None, generator: torch.Generator | None) -> Pairs:
    """The paper's pairs: every weight of Eq. 3 comes from two different recordings."""
    if partners is None:
        return Pairs(keys=uniform((3, b), device, generator))
    partners = as_tensor("DiscriminativeLoss", "partners", partners).to(device)
    if partners.shape not in ((b,), (3, b)) or partners.dtype not in INTEGERS:
        raise InputError(
            f"partners has shape {tuple(partners.shape)} and dtype {partners.dtype}, expected integers ({b},), (3, {b})"
        )
    return Pairs(partner=partners.to(torch.int64).expand(3, b))


def pair_by_permutation(valid: Tensor, counted: Tensor, partners: Tensor | None, keys: Tensor | None) -> Pairs:
    """The released code's pairs: see ``partners`` of :class:`~d2net.losses.DiscriminativeLoss`.

    In the released code w_fb of pair j is computed from the foreground embedding number perm2[j] and the background
    embedding number perm3[j], counted among the recordings that have one. But it is assigned to recording number
    perm2[j] of all recordings that count. These differ where some recordings have no foreground embedding.

    Args:
        valid: (2, B) bool, whether a recording has a foreground and a background embedding.
        counted: (B,), above 0 where a recording counts.
        partners: (4, B), or None.
        keys: (4, B) random numbers, where there are no partners.
    """
    valid = torch.stack((*valid, counted > 0))
    number = (valid.cumsum(1) - 1).clamp(min=0)  # the number of each recording among the valid ones
    recording = (~valid[:2]).byte().argsort(dim=1, stable=True)  # the inverse: the recording of each number
    counts = valid[:2].sum(1)
    if partners is None:
        assert keys is not None
        partners = _permutations(keys, counts.repeat(2))
    else:
        partners = _given_permutations(partners, counts.repeat(2), counted)
    own = recording.gather(1, partners[:2].gather(1, number[:2]))
    row = number[2]
    pair = partners[2].argsort()[row]  # the j with perm2[j] = row
    mixed = recording[1][partners[3][pair]]
    usable = valid[2] & (row < counts[0]) & (pair < counts.amin())
    partner = torch.where(torch.cat((usable[None], valid[:2])), torch.cat((mixed[None], own)), -1)
    return Pairs(partner=partner, source=recording[0][row])


def have_embeddings(tcam: Tensor, counted: Tensor, threshold: float, background_threshold: float) -> Tensor:
    """(2, B) bool: which recordings have a foreground and a background embedding (Eq. 2).

    Args:
        tcam: (B, T, C).
        counted: (B,), lengths of the recordings that count.
        threshold: on the foreground attention.
        background_threshold: on the background attention.
    """
    with torch.no_grad():
        inside = within(tcam, counted)
        attention = class_max(tcam.detach()).masked_fill(~inside, 0)
        has = [
            torch.where(inside & (weight > over), weight, 0).sum(1) > 0
            for weight, over in ((attention, threshold), (1 - attention, background_threshold))
        ]
        return torch.stack(has)


def _given_permutations(partners: Tensor, counts: Tensor, like: Tensor) -> Tensor:
    """``partners`` (4, B) as int64; row i must be a permutation of 0 ... B - 1 that begins with 0 ... counts[i] - 1."""
    partners, b = as_tensor("DiscriminativeLoss", "partners", partners, like), like.shape[0]
    if partners.shape != (4, b) or partners.dtype not in INTEGERS:
        raise InputError(
            f"partners has shape {tuple(partners.shape)} and dtype {partners.dtype}, expected permutations (4, {b})"
        )
    partners = partners.to(torch.int64)
    if not (can_look_at(partners) and can_look_at(counts)):
        return partners.clamp(0, b - 1)  # an index out of range would end the process on a GPU
    place, first = torch.arange(b), counts[:, None]
    wrong = ((partners.sort(1).values != place) | ((place < first) & (partners >= first))).any(1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise InputError(
            f"DiscriminativeLoss: row {row} of partners is {quoted(partners[row].tolist())}, expected a permutation of "
            f"the {b} numbers from 0 on whose first {int(counts[row])} (the recordings that have a "
            f"{'background' if row % 2 else 'foreground'} embedding) are the least"
        )
    return partners


def uniform(shape: tuple[int, int], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Random numbers in [0, 1), float32; None: of PyTorch's default generator."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"generator is {quoted(generator)}, expected a torch.Generator or None")
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, dtype=torch.float32, device=source).to(device)
