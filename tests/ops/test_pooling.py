"""attention_pool against a loop over recordings."""

from __future__ import annotations

import pytest
import torch

from d2net.errors import InputError
from d2net.ops import attention_pool


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_attention_pool_equals_a_loop(reduction):
    g = torch.Generator().manual_seed(3)
    x, attention = torch.randn(3, 12, 4, generator=g), torch.rand(3, 12, generator=g)
    attention[2] = 0.9  # a recording without background
    lengths = torch.tensor([12, 5, 7])
    out = attention_pool(x, attention, lengths, threshold=0.4, background_threshold=0.7, reduction=reduction)
    for i, s in enumerate(lengths.tolist()):
        lam = attention[i, :s]
        for got, valid, weight in (
            (out.x_fg[i], out.valid_fg[i], torch.where(lam > 0.4, lam, 0)),
            (out.x_bg[i], out.valid_bg[i], torch.where(1 - lam > 0.7, 1 - lam, 0)),
        ):
            expected = (weight[:, None] * x[i, :s]).sum(0)
            if reduction == "mean" and weight.sum() > 0:
                expected = expected / weight.sum()
            torch.testing.assert_close(got, expected)
            assert bool(valid) == bool(weight.sum() > 0)


def test_clear_errors():
    x = torch.rand(2, 5, 3)
    for call, message in [
        (lambda: attention_pool(x, x), "attention"),
        (lambda: attention_pool(x, x[..., 0], reduction="max"), "reduction"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
