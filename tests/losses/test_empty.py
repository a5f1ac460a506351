"""Losses of batches without recordings, snippets, classes or columns: 0 or finite, with finite gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from d2net import losses


def snippet(term):
    return lambda t, e, n, y: term(t, e, n, torch.ones(e.shape[2], dtype=e.dtype), y)


LOSSES = {
    "cross entropy": lambda t, e, n, y: losses.CrossEntropyLoss()(t, n, y),
    "focal": lambda t, e, n, y: losses.FocalLoss()(t, n, y),
    "discriminative": lambda t, e, n, y: losses.DiscriminativeLoss()(t, e, n, y).loss,
    "permutation": lambda t, e, n, y: losses.DiscriminativeLoss(pairing="permutation")(t, e, n, y).loss,
    "snippet": snippet(losses.SnippetDenoising()),
    "own classes": snippet(losses.SnippetDenoising(own_classes=True)),
    "snippet l1": snippet(losses.SnippetL1()),
    "snippet bce": snippet(losses.SnippetBCE()),
    "snippet dmi": snippet(losses.SnippetDMI()),
    "video": lambda t, e, n, y: losses.VideoDenoising()(t, n, y),
    "video peaks": lambda t, e, n, y: losses.VideoDenoising(peak_share=0.5, normalization="per_class")(t, n, y),
    "video l1": lambda t, e, n, y: losses.VideoL1()(t, n, y),
    "video bce": lambda t, e, n, y: losses.VideoBCE()(t, n, y),
    "video dmi": lambda t, e, n, y: losses.VideoDMI()(t, n, y),
    "uncertainty": lambda t, e, n, y: losses.UncertaintyModeling()(e, t, n).total,
    "co-activity": lambda t, e, n, y: losses.CoActivitySimilarity()(e, t, n, y),
    "snippet contrast": lambda t, e, n, y: losses.SnippetContrast()(e, t.sum(2), n),
    "all": lambda t, e, n, y: losses.D2NetLoss(t.shape[2], e.shape[2]).to(e)(t, e, n, y).total,
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_nothing_is_finite(name):
    generator = torch.Generator().manual_seed(0)
    for b, t, c, d in itertools.product((0, 2), (0, 3), (0, 1, 4), (0, 5)):
        tcam, embeddings = (
            torch.rand(b, t, width, generator=generator, dtype=torch.float64).requires_grad_() for width in (c, d)
        )
        labels = torch.rand(b, c, generator=generator) > 0.5
        for lengths in (None, torch.full((b,), t)):
            loss: Tensor = LOSSES[name](tcam, embeddings, lengths, labels)
            assert loss.shape == () and loss.isfinite(), (b, t, c, d)
            if loss.requires_grad:
                grads = torch.autograd.grad(loss, (tcam, embeddings), allow_unused=True)
                assert all(x is None or x.isfinite().all() for x in grads), (b, t, c, d)
            if 0 in (b, t):
                assert loss == 0
