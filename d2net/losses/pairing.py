"""Which recordings of a batch are compared with each other (Eq. 3), drawn without waiting for the device."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from d2net.errors import InputError

Pairing = Literal["different", "permutation"]


class Pairs(NamedTuple):
    """For each recording, whose embeddings give its weights w_fb, w_fg, w_bg (the rows).

    Attributes:
        partner: (3, B) int64, the recording of x~.
        usable: (3, B) bool; the weight is 0 where not.
        source: (B,) int64, the recording of x in w_fb; None: the recording itself.
    """

    partner: Tensor
    usable: Tensor
    source: Tensor | None


def draw_partners(valid: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pair every valid recording with a different one: a random cycle through them.

    Args:
        valid: (..., B) bool; each row is drawn on its own.
        generator: on any device; None: PyTorch's own of ``valid``'s device.

    Returns:
        (..., B) int64 partners; the recording itself where it is invalid or the only valid one.
    """
    b = valid.shape[-1]
    order = (_uniform(valid.shape, valid.device, generator) + (~valid)).argsort(-1)  # keys are below 1
    place = torch.arange(b, device=valid.device)
    count = valid.sum(-1, keepdim=True)
    following = torch.where(place < count, (place + 1) % count.clamp(min=1), place)
    return torch.empty_like(order).scatter_(-1, order, order.gather(-1, following))


def draw_permutations(counts: Tensor, size: int, generator: torch.Generator | None = None) -> Tensor:
    """(N, size) int64: row i begins with a random permutation of 0 ... counts[i] - 1; the larger numbers follow.

    Args:
        counts: (N,) int64, at most ``size``.
        generator: on any device; None: PyTorch's own of ``counts``'s device.
    """
    keys = _uniform(torch.Size((len(counts), size)), counts.device, generator)
    return (keys + (torch.arange(size, device=counts.device) >= counts[:, None])).argsort(1)


def pair_different(
    valid_fg: Tensor, valid_bg: Tensor, partners: Tensor | None, generator: torch.Generator | None
) -> Pairs:
    """The paper's pairs: every weight from two different recordings."""
    b = len(valid_fg)
    if partners is None:
        partners = draw_partners(torch.stack((torch.ones_like(valid_fg), valid_fg, valid_bg)), generator)
    elif partners.shape not in ((b,), (3, b)):
        raise InputError(f"partners has shape {tuple(partners.shape)}, expected ({b},) or (3, {b})")
    partner = partners.expand(3, b)
    usable = torch.stack((valid_bg, valid_fg, valid_bg)).gather(1, partner)
    usable &= torch.stack((valid_fg, valid_fg, valid_bg)) & (partner != torch.arange(b, device=partner.device))
    return Pairs(partner, usable, None)


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
    b = len(counted)
    valid = torch.stack((valid_fg, valid_bg, counted))
    number = (valid.cumsum(1) - 1).clamp(min=0)  # of a recording among the valid ones
    recording = (~valid[:2]).byte().argsort(dim=1, stable=True)  # that has a number
    counts = valid[:2].sum(1)
    if partners is None:
        partners = draw_permutations(counts.repeat(2), b, generator)
    elif partners.shape != (4, b):
        raise InputError(f"partners has shape {tuple(partners.shape)}, expected the four permutations (4, {b})")
    own = recording.gather(1, partners[:2].gather(1, number[:2]))
    row = number[2]
    pair = partners[2].argsort()[row]  # the j with perm2[j] = row
    mixed = recording[1][partners[3][pair]]
    usable = counted & (row < counts[0]) & (pair < counts.amin())
    return Pairs(torch.cat((mixed[None], own)), torch.cat((usable[None], valid[:2])), source=recording[0][row])


def _uniform(shape: torch.Size, device: torch.device, generator: torch.Generator | None) -> Tensor:
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source).to(device)
