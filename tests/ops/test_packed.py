"""Packed batches: rows of recordings one after another, and what every operator makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from d2net import ops
from d2net.errors import InputError
from d2net.ops.loss import d2net_loss
from d2net.ops.loss_ref import LossInputs, LossResult, LossSettings
from d2net.ops.packed import as_offsets, packed, padded

NAN = float("nan")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


LENGTHS_AND_GAPS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 4)), max_size=5)


def offsets_of(lengths_and_gaps: list[tuple[int, int]], first: int = 0) -> torch.Tensor:
    ends = [first]
    for length, gap in lengths_and_gaps:
        ends.append(ends[-1] + length + gap)
    return torch.tensor(ends)


@given(LENGTHS_AND_GAPS, st.integers(0, 3), st.integers(0, 3), st.integers(0, 9), st.sampled_from([(), (2,), (3, 2)]))
@settings(max_examples=60, deadline=None)
def test_padded_and_packed_are_inverse(lengths_and_gaps, first, rest, max_length, shape):
    """By the definition, row by row, gradients too; gap rows hold NaN and so do their gradients."""
    offsets, lengths = (
        offsets_of(lengths_and_gaps, first),
        torch.tensor([n for n, _ in lengths_and_gaps], dtype=torch.int64),
    )
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
        ([-1, 4], None, r"here: offsets\[0\] is -1, expected 0 or more"),
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
    for offsets in ([0, 4], [2, 4], torch.tensor([0, 4, 4, 6], dtype=torch.int32), [0]):
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


# Operators on packed batches and the same on padded ones.

PAPER = LossSettings(
    classify=True, separate=True, embed=True, update=True, score=True, snippet=True, alpha_snippet=0.2, video=True,
    alpha_video=0.3, gamma=0.3,
)  # fmt: skip
RELEASE = PAPER._replace(
    topk_divisor=4, min_snippets=3, skip_unlabelled=True, mean_over_classes=True, balanced=True, threshold=0.3,
    background_threshold=0.6, mean_embeddings=True, lowest_attention=True, fg_threshold=0.6, bg_threshold=0.4,
    own_classes=True, snippet_per_class=True, entry_floor=0.01, peak_share=0.3, video_per_class=True,
)  # fmt: skip
C, D = 5, 36


def loss_of(settings: LossSettings) -> Callable[..., list[Tensor]]:
    def function(tcam, embeddings, lengths, offsets=None, max_length=None):
        b = len(offsets) - 1 if lengths is None else len(lengths)
        labels = (random(b, C, seed=1) > 0).to(tcam)
        labels[: b // 4] = 0
        partner = torch.randint(-1, b + 1, (3, b), generator=torch.Generator().manual_seed(b)).to(tcam.device)
        pairs = {"x_ref": random(D, seed=2).to(tcam), "partner": partner, "offsets": offsets}
        batch = LossInputs(tcam, embeddings, lengths, labels, **pairs)
        return list(d2net_loss(batch, settings, max_length)[:-1])

    return function


class Operator(NamedTuple):
    """``function(*rows, lengths, **packing)``; rows have these widths, the last ``embeddings`` of them may be of half
    precision. of_row: the results that have a row for each snippet."""

    function: Callable[..., list[Tensor]]
    widths: list[tuple[int, ...]]
    embeddings: int = 0
    of_row: tuple[int, ...] = ()


LOSS_ROWS = tuple(LossResult._fields.index(name) for name in ("attention", "scores"))
OPERATORS = {
    "topk_pool": Operator(lambda x, n, **at: [ops.topk_pool(x, n, divisor=3, **at)], [(C,)]),
    "tcam_pool": Operator(lambda x, n, **at: list(ops.tcam_pool(x, n, **at)), [(C,)], of_row=(0,)),
    "tcam_pool of one class": Operator(lambda x, n, **at: list(ops.tcam_pool(x, n, **at)), [(1,)], of_row=(0,)),
    "attention_pool": Operator(lambda a, x, n, **at: list(ops.attention_pool(x, a, n, **at)), [(), (D,)], embeddings=1),
    "attention_pool by mean": Operator(
        lambda a, x, n, **at: list(ops.attention_pool(x, a, n, threshold=0.3, reduction="mean", **at)),
        [(), (33,)],
        embeddings=1,
    ),
    "bottom_up_attention": Operator(
        lambda x, n, **at: [ops.bottom_up_attention(x, random(D, seed=2).to(x.device), n, **at)],
        [(D,)],
        embeddings=1,
        of_row=(0,),
    ),
    "snippet_pdmi": Operator(lambda a, s, n, **at: list(ops.snippet_pdmi(a, s, n, **at)), [(), ()]),
    "d2net_loss": Operator(loss_of(PAPER), [(C,), (D,)], embeddings=1, of_row=LOSS_ROWS),
    "d2net_loss of the release": Operator(loss_of(RELEASE), [(C,), (D,)], embeddings=1, of_row=LOSS_ROWS),
}


def evaluated(operator: Operator, rows: list[Tensor], weigh: Callable[[int, Tensor], Tensor], *lengths, **packing):
    """Results, then gradients of their weighted sum with respect to the rows."""
    leaves = [x.clone().requires_grad_() for x in rows]
    results = operator.function(*leaves, *lengths, **packing)
    smooth = [i for i, x in enumerate(results) if x.requires_grad]
    weights = [weigh(i, results[i]) for i in smooth]
    gradients = torch.autograd.grad([results[i] for i in smooth], leaves, weights, materialize_grads=True)
    return [x.detach().cpu() for x in (*results, *gradients)]


TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 1e-2, "atol": 1e-4},
    torch.bfloat16: {"rtol": 3e-2, "atol": 1e-3},
}


@given(
    lengths_and_gaps=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 5)), max_size=5),
    first=st.integers(0, 5),
    rest=st.integers(0, 40),
    slack=st.none() | st.integers(0, 40),
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
    index=st.sampled_from([torch.int64, torch.int32]),
    seed=st.integers(0, 99),
)
@example([(70, 2), (0, 0), (1, 3), (33, 0)], 3, 7, 0, torch.float64, torch.int64, 0)
@example([(0, 0), (0, 4)], 0, 0, None, torch.float32, torch.int64, 0)
@example([(3, 0)], 0, 0, None, torch.bfloat16, torch.int32, 0)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("name", OPERATORS)
def test_packed_results_equal_padded_ones(device, name, lengths_and_gaps, first, rest, slack, dtype, index, seed):
    """Gradients too, whatever gap rows and their gradients hold; in them results and gradients are 0."""
    operator, offsets = OPERATORS[name], offsets_of(lengths_and_gaps, first)
    lengths = torch.tensor([n for n, _ in lengths_and_gaps], dtype=torch.int64)
    n, longest = int(offsets[-1]) + rest, max(lengths.tolist(), default=0)
    t = n if slack is None else min(longest + slack, n)
    inside = packed(torch.ones(len(lengths), t, dtype=torch.bool), offsets, lengths, n)
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    rows = []
    for i, width in enumerate(operator.widths):
        x = random(n, *width, seed=seed + i)
        x = x if i >= len(operator.widths) - operator.embeddings else x.sigmoid() ** 2
        x[~inside] = NAN
        rows.append(x.to(dtype if i >= len(operator.widths) - operator.embeddings else wide))

    def weigh(i: int, x: Tensor) -> Tensor:
        if i not in operator.of_row:
            return 1 + random(*x.shape, seed=i).to(x)
        weights = random(n, seed=i)
        weights[~inside] = NAN
        return (weights if x.ndim == 1 else padded(weights, offsets, lengths, t)).to(x)

    moved = [x.to(device) for x in rows]
    where = {"offsets": offsets.to(device, index), "max_length": None if slack is None else longest + slack}
    found = evaluated(operator, moved, weigh, lengths.to(device, index), **where)
    expected = evaluated(operator, [padded(x, offsets, lengths, t).to(device) for x in rows], weigh, lengths.to(device))
    of_row = [*operator.of_row, *range(len(found) - len(rows), len(found))]
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        if i in of_row:
            assert not x[~inside].any()
            y = packed(y, offsets, lengths, n)
        limit = TOLERANCE[x.dtype if x.dtype in TOLERANCE else torch.float64]
        torch.testing.assert_close(x, y, **limit, msg=lambda text, i=i: f"result {i}: {text}")


@pytest.mark.parametrize("name", OPERATORS)
def test_without_lengths_recordings_touch(device, name):
    operator, offsets = OPERATORS[name], torch.tensor([0, 40, 40, 75, 80])
    rows = [random(80, *width, seed=i).sigmoid() ** 2 for i, width in enumerate(operator.widths)]
    results = []
    for lengths in (None, offsets.diff(), torch.full((4,), 2**40)):  # the last are clamped
        moved, n = [x.to(device) for x in rows], None if lengths is None else lengths.to(device)
        results.append(evaluated(operator, moved, lambda i, x: 1 + x.detach().cos(), n, offsets=offsets.to(device)))
    for x, *others in zip(*results, strict=True):
        assert all(torch.equal(x, y) for y in others)


def loss_arguments(seed: int, device: str = "cpu") -> list[Tensor]:
    """TCAM (200, C), embeddings, lengths and offsets of recordings of any lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 45, (4,), generator=generator)
    offsets = torch.nn.functional.pad((lengths + 5).cumsum(0), (1, 0))
    tcam, embeddings = random(200, C, seed=seed).sigmoid().float(), random(200, D, seed=seed + 1).float()
    return [*(x.to(device).requires_grad_() for x in (tcam, embeddings)), *(x.to(device) for x in (lengths, offsets))]


def total_loss(x: list[Tensor], max_length: int | None) -> Tensor:
    tcam, embeddings, lengths, offsets = x
    labels, keys = torch.eye(4, C, device=tcam.device), torch.linspace(0, 1, 12, device=tcam.device).view(3, 4)
    x_ref = torch.ones(D, device=tcam.device)
    return d2net_loss(
        LossInputs(tcam, embeddings, lengths, labels, x_ref, keys, None, None, offsets), RELEASE, max_length
    ).total


def loss_and_gradients(x: list[Tensor]) -> list[Tensor]:
    total = total_loss(x, 45)
    return [total, *torch.autograd.grad(total, x[:2])]


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_loss_compiles_to_one_graph(dynamic):
    """For all offsets and, with dynamic sizes, for all N."""
    torch._dynamo.reset()
    compiled = torch.compile(total_loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seed in range(2):
        x = loss_arguments(seed)
        if dynamic:
            x[:2] = [y[: 197 + seed].detach().requires_grad_() for y in x[:2]]
        found, expected = (f(x, 45 if dynamic else None) for f in (compiled, total_loss))
        assert torch.equal(found, expected)
        gradients = [torch.autograd.grad(y, x[:2]) for y in (found, expected)]
        assert all(torch.equal(y, z) for y, z in zip(*gradients, strict=True))


@pytest.mark.gpu
def test_the_loss_is_one_graph_for_all_offsets():
    """Captured once, without a wait; replayed with other offsets and lengths it gives what an eager call gives."""
    static = loss_arguments(0, "cuda")
    loss_and_gradients(static)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss_and_gradients(static)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            results = loss_and_gradients(static)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for seed in range(1, 5):
        inputs = loss_arguments(seed, "cuda")
        with torch.no_grad():
            for to, value in zip(static, inputs, strict=True):
                to.copy_(value)
        graph.replay()
        torch.testing.assert_close(results, loss_and_gradients(inputs), rtol=1e-5, atol=1e-7)


def test_packing_takes_no_launch_more(simt_kernels):
    counts = []
    for offsets in (None, torch.tensor([0, 50, 101, 160])):
        shape = (3, 50) if offsets is None else (160,)
        leaves = [torch.rand(*shape, n).requires_grad_() for n in (C, D)]
        batch = LossInputs(*leaves, torch.tensor([50, 30, 0]), torch.eye(3, C), torch.ones(D), offsets=offsets)
        batch = batch._replace(partner=torch.tensor([[1, 2, 0]] * 3))
        before = simt_kernels.enqueued()
        total = d2net_loss(batch, RELEASE, None if offsets is None else 50).total
        between = simt_kernels.enqueued()
        torch.autograd.grad(total, leaves)
        counts.append((between - before, simt_kernels.enqueued() - between))
    assert counts == [(5, 2), (5, 2)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.topk_pool(x, offsets=[0, 9]), r"topk_pool: offsets\[1\] is 9, past the 8 rows"),
        (lambda x: ops.topk_pool(x[None], offsets=[0, 1]), r"topk_pool: x has shape \(1, 8, 3\), expected \(N, C\)"),
        (lambda x: ops.tcam_pool(x[None], max_length=4), "tcam_pool: max_length is given without offsets"),
        (lambda x: ops.topk_pool(x, [1, 2], offsets=[0, 4]), r"topk_pool: lengths has shape \(2,\).*expected \(1,\)"),
        (lambda x: ops.attention_pool(x, x[:, 0], offsets=[0, 4, 2]), r"attention_pool: offsets\[2\] is 2, below"),
        (lambda x: ops.attention_pool(x, x, offsets=[0, 4]), r"attention_pool: attention has .* expected \(N\)"),
        (lambda x: ops.bottom_up_attention(x, x[0], offsets=[-3, 4]), r"bottom_up_attention: offsets\[0\] is -3"),
        (lambda x: ops.snippet_pdmi(x[:, 0], x[:, 1], offsets=[0.5]), "snippet_pdmi: offsets has shape"),
        (lambda x: d2net_loss(LossInputs(x, None, None, x, offsets=[0, 9]), LossSettings()), "d2net_loss: offsets"),
        (
            lambda x: d2net_loss(LossInputs(x, None, None, x, offsets=[0, 8]), LossSettings()),
            r"d2net_loss: labels is \(8, 3\)",
        ),
    ],
)
def test_what_does_not_fit_a_packed_batch_is_refused(device, call, message):
    with pytest.raises(InputError, match=message):
        call(torch.rand(8, 3, device=device) if device.type == "cpu" else torch.rand(8, 3))
