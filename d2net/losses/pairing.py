"""Which recordings of a batch are compared with each other (Eq. 3), drawn without waiting for the device."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops._checks import as_tensor
from d2net.ops.discriminative import Pairs, different_partners

Pairing = Literal["different", "permutation"]


def draw_permutations(counts: Tensor, size: int, generator: torch.Generator | None = None) -> Tensor:
    """(N, size) int64: row i begins with a random permutation of 0 ... counts[i] - 1; the larger numbers follow.

    Args:
        counts: (N,) int64, at most ``size``.
        generator: on any device; None: PyTorch's own of ``counts``'s device.
    """
    counts = as_tensor("draw_permutations", "counts", counts)
    keys = _uniform((len(counts), size), counts.device, generator)
    return (keys + (torch.arange(size, device=counts.device) >= counts[:, None])).argsort(1)


def pair_different(
    valid_fg: Tensor, valid_bg: Tensor, partners: Tensor | None, generator: torch.Generator | None
) -> Pairs:
    """The paper's pairs: every weight from two different recordings."""
    b = len(valid_fg)
    if partners is None:
        return Pairs(different_partners(_uniform((3, b), valid_fg.device, generator), valid_fg, valid_bg))
    partners = as_tensor("DiscriminativeLoss", "partners", partners, valid_fg)
    if partners.shape not in ((b,), (3, b)) or partners.is_floating_point():
        raise InputError(
            f"partners has shape {tuple(partners.shape)} and dtype {partners.dtype}, expected integers ({b},), (3, {b})"
        )
    partner = partners.to(torch.int64).expand(3, b)
    usable = (partner >= 0) & (partner < b) & (partner != torch.arange(b, device=partner.device))
    has_x, has_other = torch.stack((valid_fg, valid_fg, valid_bg)), torch.stack((valid_bg, valid_fg, valid_bg))
    usable = usable & has_x & has_other.gather(1, torch.where(usable, partner, 0))
    return Pairs(torch.where(usable, partner, -1))


def pair_by_permutation(
    counted: Tensor,
    valid_fg: Tensor,
    valid_bg: Tensor,
    partners: Tensor | None,
    generator: torch.Generator | None,
) -> Pairs:
    """The released code's pairs: see ``partners`` of :class:`~d2net.losses.DiscriminativeLoss`.

    Its w_fb of the j-th pair belongs to the embeddings with the numbers perm2[j] and perm3[j] among those there are,
    but is stored at number perm2[j] of all counted recordings: another recording, where some have no foreground.
    """
    b, counted = len(counted), counted > 0
    valid = torch.stack((valid_fg, valid_bg, counted))
    number = (valid.cumsum(1) - 1).clamp(min=0)  # of a recording among the valid ones
    recording = (~valid[:2]).byte().argsort(dim=1, stable=True)  # that has a number
    counts = valid[:2].sum(1)
    if partners is None:
        partners = draw_permutations(counts.repeat(2), b, generator)
    partners = as_tensor("DiscriminativeLoss", "partners", partners, counted)
    if partners.shape != (4, b) or partners.is_floating_point():
        raise InputError(
            f"partners has shape {tuple(partners.shape)} and dtype {partners.dtype}, expected permutations (4, {b})"
        )
    own = recording.gather(1, partners[:2].gather(1, number[:2]))
    row = number[2]
    pair = partners[2].argsort()[row]  # the j with perm2[j] = row
    mixed = recording[1][partners[3][pair]]
    usable = counted & (row < counts[0]) & (pair < counts.amin())
    partner = torch.where(torch.cat((usable[None], valid[:2])), torch.cat((mixed[None], own)), -1)
    return Pairs(partner, source=recording[0][row])


def _uniform(shape: tuple[int, int], device: torch.device, generator: torch.Generator | None) -> Tensor:
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, dtype=torch.float32, device=source).to(device)
