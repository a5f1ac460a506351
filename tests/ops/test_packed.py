"""Packed batches: rows of recordings one after another, and what every operator makes of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from d2net.errors import InputError
from d2net.ops.packed import as_offsets, packed, padded

NAN = float("nan")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


LENGTHS_AND_GAPS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 4)), max_size=5)


def offsets_of(lengths_and_gaps: list[tuple[int, int]]) -> torch.Tensor:
    ends = [0]
    for length, gap in lengths_and_gaps:
        ends.append(ends[-1] + length + gap)
    return torch.tensor(ends)


@given(LENGTHS_AND_GAPS, st.integers(0, 3), st.integers(0, 9), st.sampled_from([(), (2,), (3, 2)]))
@settings(max_examples=60, deadline=None)
def test_padded_and_packed_are_inverse(lengths_and_gaps, rest, max_length, shape):
    """By the definition, row by row, gradients too; gap rows hold NaN and so do their gradients."""
    offsets, lengths = offsets_of(lengths_and_gaps), torch.tensor([n for n, _ in lengths_and_gaps], dtype=torch.int64)
    n, b = int(offsets[-1]) + rest, len(lengths)
    inside = torch.zeros(n, dtype=torch.bool)
    wanted = torch.zeros(b, max_length, *shape, dtype=torch.float64)
    x = random(n, *shape)
    for i, length in enumerate(lengths.clamp(max=max_length).tolist()):
        inside[offsets[i] : offsets[i] + length] = True
        wanted[i, :length] = x[offsets[i] : offsets[i] + length]
    x[~inside] = NAN
    x.requires_grad_()
    y = padded(x, offsets, lengths, max_length)
    assert torch.equal(y, wanted)
    back = packed(y, offsets, lengths, n)
    assert torch.equal(back, torch.where(inside.view(-1, *[1] * len(shape)), x, 0).nan_to_num(0))
    weights = random(n, *shape, seed=1)
    weights[~inside] = NAN
    (gradient,) = torch.autograd.grad(back, x, weights)
    assert torch.equal(gradient, weights.nan_to_num(0))


@given(st.lists(st.integers(-5, 12), min_size=1, max_size=5), st.integers(0, 8), st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_any_values_of_offsets_stay_within_the_rows(values, n, max_length):
    offsets, lengths = torch.tensor(values, dtype=torch.int32), torch.tensor(values[1:], dtype=torch.int64)
    y = padded(torch.ones(n, 2), offsets, lengths, max_length)
    assert y.shape == (len(values) - 1, max_length, 2) and set(y.unique().tolist()) <= {0.0, 1.0}
    assert packed(y, offsets, lengths, n).shape == (n, 2)


def test_without_lengths_a_recording_ends_where_the_next_begins():
    x = torch.arange(1.0, 7.0)
    y = padded(x, torch.tensor([0, 2, 2, 5]), None, 3)
    assert y.tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]]
    assert packed(y, torch.tensor([0, 2, 2, 5]), None, 6).tolist() == [1, 2, 3, 4, 5, 0]


@pytest.mark.parametrize(
    ("offsets", "max_length", "message"),
    [
        ([1, 4], None, r"here: offsets\[0\] is 1, expected 0"),
        ([0, 4, 3], None, r"here: offsets\[2\] is 3, below offsets\[1\], 4"),
        ([0, 4, 7], None, r"here: offsets\[2\] is 7, past the 6 rows"),
        ([0.0, 4.0], None, "here: offsets has shape .2,. and dtype torch.float32, expected .B.1,. int64"),
        ([[0, 4]], None, "here: offsets has shape .1, 2."),
        (torch.empty(0, dtype=torch.int64), None, "here: offsets has shape .0,."),
        ("ab", None, "here: offsets is a str"),
        ([0, 4], -1, "here: max_length is -1, expected 0 or more"),
        ([0, 4], 2.5, "here: max_length is 2.5, expected a whole number"),
        (None, 4, "here: max_length is given without offsets"),
    ],
)
def test_offsets_that_do_not_fit(offsets, max_length, message):
    with pytest.raises(InputError, match=message):
        as_offsets("here", offsets, max_length, torch.zeros(6, 2))


def test_offsets_that_fit():
    x = torch.zeros(6, 2)
    assert as_offsets("here", None, None, x[None]) == (None, 0)
    for offsets in ([0, 4], torch.tensor([0, 4, 4, 6], dtype=torch.int32), [0]):
        found, t = as_offsets("here", offsets, None, x)
        assert t == 6 and found.tolist() == list(offsets)
    assert as_offsets("here", [0, 4], 3, x)[1] == 3 and as_offsets("here", [0, 4], 9, x)[1] == 6
    assert as_offsets("here", torch.empty(3, dtype=torch.int64, device="meta"), None, x.to("meta"))[1] == 6


def test_nothing_is_read_while_a_function_is_traced():
    """Shapes follow from sizes alone, so that one graph serves all offsets."""

    def both(x, offsets, lengths):
        return packed(padded(x, offsets, lengths, 5), offsets, lengths, 8)

    graph = make_fx(both, tracing_mode="fake")(torch.zeros(8, 2), torch.tensor([0, 3, 7]), torch.tensor([2, 4]))
    x, offsets, lengths = random(8, 2), torch.tensor([0, 1, 6]), torch.tensor([1, 5])
    assert torch.equal(graph(x, offsets, lengths), both(x, offsets, lengths))
    assert both(x.to("meta"), offsets.to("meta"), lengths.to("meta")).shape == (8, 2)
