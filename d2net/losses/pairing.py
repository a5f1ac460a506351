"""Which recordings of a batch are compared with each other (Eq. 3), drawn without waiting for the device."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops.checks import INTEGERS, as_tensor, as_whole, can_look_at, within
from d2net.ops.two_stream_tcam import class_max
from d2net.words import quoted

Pairing = Literal["different", "permutation"]


class Pairs(NamedTuple):
    """What :class:`~d2net.ops.loss_ref.LossInputs` says of pairs."""

    keys: Tensor | None = None
    partner: Tensor | None = None
    source: Tensor | None = None


def draw_permutations(counts: Tensor, size: int, generator: torch.Generator | None = None) -> Tensor:
    """(N, size) int64: row i begins with a random permutation of 0 ... counts[i] - 1; the larger numbers follow.

    Args:
        counts: (N,) int64, at most ``size``.
        generator: on any device; None: PyTorch's own of ``counts``'s device.
    """
    counts, size = as_tensor("draw_permutations", "counts", counts), as_whole("draw_permutations", "size", size)
    if counts.ndim != 1 or counts.dtype not in INTEGERS or not 0 <= size < 2**31:
        raise InputError(
            f"draw_permutations: counts has shape {tuple(counts.shape)} and dtype {counts.dtype} and size is {size}, "
            "expected integers (N,) and 0 to 2^31 - 1"
        )
    if can_look_at(counts) and counts.numel() and not (counts.min() >= 0 and counts.max() <= size):
        raise InputError(f"draw_permutations: counts are {counts.min()} to {counts.max()}, expected 0 to {size}")
    keys = _uniform((len(counts), size), counts.device, generator)
    return (keys + (torch.arange(size, device=counts.device) >= counts[:, None])).argsort(1)


def pair_different(b: int, device: torch.device, partners: Tensor | None, generator: torch.Generator | None) -> Pairs:
    """The paper's pairs: every weight from two different recordings."""
    if partners is None:
        return Pairs(keys=_uniform((3, b), device, generator))
    partners = as_tensor("DiscriminativeLoss", "partners", partners).to(device)
    if partners.shape not in ((b,), (3, b)) or partners.dtype not in INTEGERS:
        raise InputError(
            f"partners has shape {tuple(partners.shape)} and dtype {partners.dtype}, expected integers ({b},), (3, {b})"
        )
    return Pairs(partner=partners.to(torch.int64).expand(3, b))


def pair_by_permutation(
    tcam: Tensor,
    counted: Tensor,
    threshold: float,
    background_threshold: float,
    partners: Tensor | None,
    generator: torch.Generator | None,
) -> Pairs:
    """The released code's pairs: see ``partners`` of :class:`~d2net.losses.DiscriminativeLoss`.

    Its w_fb of the j-th pair belongs to the embeddings with the numbers perm2[j] and perm3[j] among those there are,
    but is stored at number perm2[j] of all counted recordings: another recording, where some have no foreground.

    Args:
        tcam: (B, T, C). counted: (B,), lengths of the recordings that count.
        threshold, background_threshold: of Eq. 2: they say which recordings have an embedding.
    """
    with torch.no_grad():
        b, inside = len(counted), within(tcam, counted)
        attention = class_max(tcam.detach()).masked_fill(~inside, 0)
        has = [
            torch.where(inside & (weight > over), weight, 0).sum(1) > 0
            for weight, over in ((attention, threshold), (1 - attention, background_threshold))
        ]
        valid = torch.stack((*has, counted > 0))
        number = (valid.cumsum(1) - 1).clamp(min=0)  # of a recording among the valid ones
        recording = (~valid[:2]).byte().argsort(dim=1, stable=True)  # that has a number
        counts = valid[:2].sum(1)
        if partners is None:
            partners = draw_permutations(counts.repeat(2), b, generator)
        else:
            partners = _given_permutations(partners, counts.repeat(2), tcam)
        own = recording.gather(1, partners[:2].gather(1, number[:2]))
        row = number[2]
        pair = partners[2].argsort()[row]  # the j with perm2[j] = row
        mixed = recording[1][partners[3][pair]]
        usable = valid[2] & (row < counts[0]) & (pair < counts.amin())
        partner = torch.where(torch.cat((usable[None], valid[:2])), torch.cat((mixed[None], own)), -1)
        return Pairs(partner=partner, source=recording[0][row])


def _given_permutations(partners: Tensor, counts: Tensor, like: Tensor) -> Tensor:
    """``partners`` (4, B) as int64; row i must hold 0 ... B - 1, and 0 ... counts[i] - 1 first."""
    partners, b = as_tensor("DiscriminativeLoss", "partners", partners, like), like.shape[0]
    if partners.shape != (4, b) or partners.dtype not in INTEGERS:
        raise InputError(
            f"partners has shape {tuple(partners.shape)} and dtype {partners.dtype}, expected permutations (4, {b})"
        )
    partners = partners.to(torch.int64)
    if not (can_look_at(partners) and can_look_at(counts)):
        return partners.clamp(0, b - 1)  # an index that leads outside would end the process on a GPU
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


def _uniform(shape: tuple[int, int], device: torch.device, generator: torch.Generator | None) -> Tensor:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"generator is {quoted(generator)}, expected a torch.Generator or None")
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, dtype=torch.float32, device=source).to(device)
