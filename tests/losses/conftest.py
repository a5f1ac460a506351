"""Batches for the tests of the losses."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor


class Batch(NamedTuple):
    tcam: Tensor
    embeddings: Tensor
    lengths: Tensor | None
    labels: Tensor


def _random(b=6, t=40, c=5, d=8, seed=0, dtype=torch.float64, power=4) -> Batch:
    """Powers of uniform numbers as activations: some snippets with, some without a foreground."""
    g = torch.Generator().manual_seed(seed)
    tcam = torch.rand(b, t, c, generator=g, dtype=dtype) ** power
    embeddings = torch.randn(b, t, d, generator=g, dtype=dtype)
    lengths = torch.randint(5, t + 1, (b,), generator=g)
    labels = torch.zeros(b, c, dtype=dtype)
    labels[torch.arange(b), torch.randint(c, (b,), generator=g)] = 1
    return Batch(tcam, embeddings, lengths, labels)


@pytest.fixture(scope="session")
def make_batch():
    return _random


def _degenerate() -> list:
    g = torch.Generator().manual_seed(0)
    z, o = torch.zeros, torch.ones

    def rand(*shape):
        return torch.rand(*shape, generator=g)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    lengths = torch.tensor([10, 7, 3, 1])
    one = torch.eye(4)[:, :3]
    cases = {
        "no foreground": (z(4, 10, 3), randn(4, 10, 6), lengths, one),
        "no background": (o(4, 10, 3), randn(4, 10, 6), lengths, one),
        "at the threshold": (o(4, 10, 3) / 2, randn(4, 10, 6), lengths, one),
        "zero embeddings": (rand(4, 10, 3), z(4, 10, 6), lengths, one),
        "one zero embedding": (
            rand(4, 10, 3),
            randn(4, 10, 6) * torch.tensor([0.0, 1, 1, 1])[:, None, None],
            None,
            one,
        ),
        "one recording": (rand(1, 10, 3), randn(1, 10, 6), lengths[:1], one[:1]),
        "no recording": (rand(0, 10, 3), randn(0, 10, 6), lengths[:0], one[:0]),
        "no snippet": (rand(4, 10, 3), randn(4, 10, 6), z(4, dtype=torch.int64), one),
        "no time": (rand(4, 0, 3), randn(4, 0, 6), None, one),
        "some empty": (rand(4, 10, 3), randn(4, 10, 6), torch.tensor([0, 7, 0, 3]), one),
        "all short": (rand(4, 10, 3), randn(4, 10, 6), torch.tensor([4, 3, 2, 1]), one),
        "no label": (rand(4, 10, 3), randn(4, 10, 6), lengths, z(4, 3)),
        "same label": (rand(4, 10, 3), randn(4, 10, 6), lengths, o(4, 3)),
        "same recording": (rand(1, 10, 3).repeat(4, 1, 1), randn(1, 10, 6).repeat(4, 1, 1), None, one),
        "everything equal": (torch.full((4, 10, 3), 0.7), o(4, 10, 6), lengths, one),
        "huge embeddings": (rand(4, 10, 3), 1e10 * randn(4, 10, 6), lengths, one),
        "one class": (rand(4, 10, 1), randn(4, 10, 6), lengths, one[:, :1]),
    }
    return [pytest.param(Batch(*batch), id=name) for name, batch in cases.items()]


DEGENERATE = _degenerate()


def pytest_generate_tests(metafunc):
    if "degenerate" in metafunc.fixturenames:
        metafunc.parametrize("degenerate", DEGENERATE)
