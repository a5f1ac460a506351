"""extract_proposals on every backend, against loops that follow Sec. 3.3."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2net.errors import InputError
from d2net.ops.proposals import Proposals, extract_proposals, extract_proposals_ref

PAPER = [0.025 * i for i in range(1, 21)]


def rows(proposals: Proposals) -> list[tuple]:
    return list(zip(*(x.tolist() for x in proposals), strict=True))


def scan(
    sequence: torch.Tensor,
    thresholds,
    min_length=1,
    inflation=0.25,
    outer="pooled",
    min_contrast=-math.inf,
    nms_iou=0.5,
) -> list[tuple]:
    """Proposals (start, end, score) of one sequence, by loops."""
    x = sequence.tolist()
    found = set()
    for threshold in thresholds:
        start = None
        for t, value in enumerate([*x, -math.inf]):
            if value > threshold and start is None:
                start = t
            elif value <= threshold and start is not None:
                if t - start >= min_length:
                    found.add((start, t))
                start = None
    scored = []
    for start, end in found:
        reach = max(1, int(inflation * (end - start)))
        sides = [x[max(0, start - reach) : start], x[end : end + reach]]
        if outer == "pooled":
            sides = [sides[0] + sides[1]]
        means = [sum(side) / len(side) for side in sides if side]
        background = sum(means) / len(means) if means else 0.0
        score = sum(x[start:end]) / (end - start) - background
        score = torch.tensor(score, dtype=sequence.dtype).item()
        if score >= min_contrast:
            scored.append((start, end, score))
    kept: list[tuple] = []
    for start, end, score in sorted(scored, key=lambda s: (-s[2], s[0], s[1])):
        overlaps = [max(0, min(end, b) - max(start, a)) / (max(end, b) - min(start, a)) for a, b, _ in kept]
        if all(iou < nms_iou for iou in overlaps):
            kept.append((start, end, score))
    return kept


@st.composite
def batches(draw):
    """Multiples of 1/16, or of the smallest positive number: every sum is exact, and ties are common."""
    b, t, c = draw(st.integers(0, 3)), draw(st.integers(0, 24)), draw(st.integers(0, 3))
    values = draw(st.lists(st.integers(-2, 16), min_size=b * t * c, max_size=b * t * c))
    dtype, step = draw(st.sampled_from([(torch.float32, 2**-4), (torch.float64, 2**-4), (torch.float32, 2**-149)]))
    activations = (torch.tensor(values, dtype=torch.float64).reshape(b, t, c) * step).to(dtype)
    kept = draw(st.lists(st.booleans(), min_size=b * c, max_size=b * c))
    lengths = draw(st.none() | st.lists(st.integers(0, t), min_size=b, max_size=b))
    levels = st.sampled_from([-1, 0, 2, 5, 8, 14])
    options = {
        "thresholds": [step * level for level in draw(st.lists(levels, min_size=1))],
        "min_length": draw(st.integers(1, 4)),
        "inflation": draw(st.sampled_from([0.0, 0.25, 0.5, 2.0, 1e300])),
        "outer": draw(st.sampled_from(["pooled", "mean_of_sides"])),
        "min_contrast": draw(st.sampled_from([-math.inf, 0.0, 0.25])),
        "nms_iou": draw(st.sampled_from([0.25, 0.5, 0.75, 1.0])),
    }
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int64)
    return activations, torch.tensor(kept, dtype=torch.bool).reshape(b, c), lengths, options


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=batches())
def test_equals_a_plain_scan(device, batch):
    activations, classes, lengths, options = batch
    expected = []
    for b, c in classes.nonzero().tolist():
        end = activations.shape[1] if lengths is None else int(lengths[b])
        expected += [(b, c, *p) for p in scan(activations[b, :end, c], **options)]
    lengths = None if lengths is None else lengths.to(device)
    assert rows(extract_proposals(activations.to(device), classes.to(device), lengths, **options)) == expected


def wander(*shape: int, seed: int = 0) -> torch.Tensor:
    """Smooth random sequences in [0, 1] over dimension 1."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.avg_pool1d(noise.mT, 5, 1, 2).mT.sigmoid()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", [16, 4096], ids=["many ties", "few ties"])
def test_long_sequences_equal_a_plain_scan(device, dtype, grid):
    x = ((wander(1, 1500, 1) * 1.2 - 0.4) * grid).round().div(grid).to(dtype)
    found = extract_proposals(x.to(device), torch.ones(1, 1, dtype=torch.bool, device=device), thresholds=PAPER)
    expected = scan(x.flatten(), torch.tensor(PAPER, dtype=dtype).tolist())
    assert len(expected) > 100
    assert [r[2:] for r in rows(found)] == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equals_the_reference_bit_for_bit(device, dtype):
    x = (wander(4, 700, 11) * 3 - 1.5).to(device, dtype)
    classes = (torch.rand(4, 11, generator=torch.Generator().manual_seed(0)) > 0.2).to(device)
    lengths = torch.tensor([700, 0, 1, 333], device=device)
    for options in ({}, {"outer": "mean_of_sides", "min_length": 2, "nms_iou": 0.3, "min_contrast": -0.1}):
        found = extract_proposals(x, classes, lengths, thresholds=PAPER, **options)
        # On the CPU, where torch.cumsum adds in the order of time; on a GPU it does not.
        inputs = x.cpu(), classes.cpu(), lengths.cpu()
        expected = extract_proposals_ref(*inputs, thresholds=PAPER, **options)
        assert len(found.score) > 100
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0)


def test_every_length_around_a_warp_and_a_block(device):
    lengths = [
        0,
        1,
        2,
        3,
        31,
        32,
        33,
        63,
        64,
        65,
        127,
        128,
        129,
        223,
        224,
        225,
        255,
        256,
        257,
        511,
        512,
        513,
        1023,
        1024,
    ]
    x = ((wander(len(lengths), 1024, 1, seed=1) * 1.2 - 0.4) * 64).round().div(64).float()
    classes = torch.ones(len(lengths), 1, dtype=torch.bool, device=device)
    found = rows(extract_proposals(x.to(device), classes, torch.tensor(lengths, device=device), thresholds=PAPER))
    for b, length in enumerate(lengths):
        expected = scan(x[b, :length, 0], torch.tensor(PAPER).tolist())
        assert [r[2:] for r in found if r[0] == b] == expected


@pytest.mark.parametrize("nms_iou", [0.1, 0.5, 0.9, 0.99])
def test_deeply_nested_proposals(device, nms_iou):
    # Long chains of overlapping proposals: whether one is suppressed depends on the one before it, and so on.
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(1, 200, (3, 400), generator=generator)
    rising, falling = levels[0].sort().values, levels[1].sort(descending=True).values
    mountain = torch.cat((rising[::2], falling[::2]))
    both = torch.cat((mountain, levels[2], mountain.flip(0))).double() / 256
    thresholds = [(i + 0.5) / 256 for i in range(200)]
    for outer in ("pooled", "mean_of_sides"):
        found = one(device, both.tolist(), torch.float64, thresholds=thresholds, nms_iou=nms_iou, outer=outer)
        assert found == scan(both, thresholds, nms_iou=nms_iou, outer=outer)


def random_batch(device: torch.device, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randint(0, 65, (5, 60, 4), generator=generator) / 64
    classes = torch.rand(5, 4, generator=generator) > 0.4
    return activations.to(device), classes.to(device), torch.tensor([60, 1, 0, 37, 22], device=device)


def test_what_lies_past_a_length_never_matters(device):
    activations, classes, lengths = random_batch(device)
    expected = rows(extract_proposals(activations, classes, lengths, thresholds=PAPER))
    assert len(expected) > 50
    longer = torch.cat((activations, activations.new_zeros(5, 9, 4)), dim=1)
    for junk in (float("nan"), float("inf"), 0.7):
        for b, length in enumerate(lengths.tolist()):
            longer[b, length:] = junk
        assert rows(extract_proposals(longer, classes, lengths, thresholds=PAPER)) == expected


def test_recordings_are_independent(device):
    activations, classes, lengths = random_batch(device, 1)
    order = torch.tensor([3, 0, 4, 2, 1], device=device)
    together = rows(extract_proposals(activations, classes, lengths, thresholds=PAPER))
    permuted = rows(extract_proposals(activations[order], classes[order], lengths[order], thresholds=PAPER))
    assert sorted((int(order[r[0]]), *r[1:]) for r in permuted) == sorted(together)
    alone = [
        (b, *r[1:])
        for b in range(5)
        for r in rows(
            extract_proposals(activations[b : b + 1], classes[b : b + 1], lengths[b : b + 1], thresholds=PAPER)
        )
    ]
    assert alone == together


def test_activations_of_other_classes_are_never_read(device):
    activations, classes, _ = random_batch(device, 2)
    expected = rows(extract_proposals(activations, classes, thresholds=PAPER))
    activations.masked_fill_(~classes[:, None], float("nan"))
    assert rows(extract_proposals(activations, classes, thresholds=PAPER)) == expected


def one(device: torch.device, sequence: list[float], dtype: torch.dtype = torch.float32, **options) -> list[tuple]:
    """Proposals (start, end, score) of one recording with one class."""
    x = torch.tensor(sequence, dtype=dtype, device=device).reshape(1, -1, 1)
    found = extract_proposals(x, torch.ones(1, 1, dtype=torch.bool, device=device), **options)
    return [r[2:] for r in rows(found)]


def test_score_by_hand(device):
    sequence = [0.5, 0.25, *[1.0] * 8, 0.0, 0.0, 0.5]  # two snippets on either side
    assert one(device, sequence, thresholds=[0.6]) == [(2, 10, 1 - 0.75 / 4)]
    sequence = [0.5, *[1.0] * 8, 0.0, 0.0, 0.5]  # only one snippet before
    assert one(device, sequence, thresholds=[0.6]) == [(1, 9, pytest.approx(1 - 0.5 / 3))]
    assert one(device, sequence, thresholds=[0.6], outer="mean_of_sides") == [(1, 9, 1 - 0.25)]


@pytest.mark.parametrize("outer", ["pooled", "mean_of_sides"])
@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        ([], []),
        ([0.75], [(0, 1, 0.75)]),
        ([0.5], []),  # strictly above
        ([0.25] * 5, []),
        ([0.75] * 5, [(0, 5, 0.75)]),  # fills the recording: no background
        ([0.75, 0.0, 0.75], [(0, 1, 0.75), (2, 3, 0.75)]),  # equal scores: the earlier first
    ],
    ids=["T=0", "T=1", "at the threshold", "nothing above", "everything above", "tie"],
)
def test_edges(device, sequence, expected, outer):
    assert one(device, sequence, thresholds=[0.5], outer=outer) == expected


def test_a_segment_found_twice_is_one_proposal(device):
    found = one(device, [0.0, 0.9, 0.9, 0.0], thresholds=[0.5, 0.1, 0.3, 0.5], nms_iou=1.0)
    assert found == [(1, 3, pytest.approx(0.9))]


def test_a_staircase_is_one_proposal_a_step(device):
    n = 300  # every snippet starts a proposal: the largest possible number
    sequence = [i / n for i in range(1, n + 1)]
    thresholds = [(i - 0.5) / n for i in range(1, n + 1)]
    found = one(device, sequence, torch.float64, thresholds=thresholds, nms_iou=1.0)
    assert sorted(p[:2] for p in found) == [(start, n) for start in range(n)]
    found = one(device, sequence[::-1], torch.float64, thresholds=thresholds, nms_iou=1.0)
    assert sorted(p[:2] for p in found) == [(0, end) for end in range(1, n + 1)]


def test_nms_is_by_class(device):
    x = torch.tensor([0.0, 0.9, 0.9, 0.0], device=device).reshape(1, 4, 1).expand(1, 4, 2)
    found = extract_proposals(x, torch.ones(1, 2, dtype=torch.bool, device=device), thresholds=[0.5])
    assert found.label.tolist() == [0, 1]


def test_nms_removes_at_the_threshold_itself(device):
    sequence = [0.0, 0.375, 0.375, 1.0, 1.0, 0.0]  # (3, 5) lies in (1, 5): IoU 0.5
    assert [p[:2] for p in one(device, sequence, thresholds=[0.25, 0.75], nms_iou=0.5)] == [(3, 5)]
    assert [p[:2] for p in one(device, sequence, thresholds=[0.25, 0.75], nms_iou=0.51)] == [(3, 5), (1, 5)]


def test_a_score_of_minus_zero_ties_with_zero(device):
    d = 2.0**-149  # the first of the long ones scores -d / 4, which rounds to -0; the second 0
    sequence = [2 * d, 0.0, *[d] * 8, 0.0, 3 * d, 0.0, 0.0, 2 * d, 0.0, *[d] * 8, 0.0, 2 * d]
    found = one(device, sequence, thresholds=[0.0], min_length=2)
    assert found == [(2, 10, 0.0), (16, 24, 0.0)]
    assert [math.copysign(1, p[2]) for p in found] == [-1, 1]


def test_a_low_contrast_goes(device):
    # (1, 5) scores 0.6875; (3, 5) in it scores 0.8125 and suppresses it; (7, 8) scores 0.375.
    sequence = [0.0, 0.375, 0.375, 1.0, 1.0, 0.0, 0.0, 0.375, 0.0]
    options = {"thresholds": [0.25, 0.75], "nms_iou": 0.5}
    assert one(device, sequence, **options) == [(3, 5, 0.8125), (7, 8, 0.375)]
    assert one(device, sequence, min_contrast=0.375, **options) == [(3, 5, 0.8125), (7, 8, 0.375)]
    assert one(device, sequence, min_contrast=0.376, **options) == [(3, 5, 0.8125)]
    assert one(device, sequence, min_contrast=math.inf, **options) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types(device, dtype):
    x = torch.rand(2, 30, 3, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    classes = torch.ones(2, 3, dtype=torch.bool, device=device)
    found = extract_proposals(x, classes, thresholds=PAPER)
    assert [f.dtype for f in found[:4]] == [torch.int64] * 4
    assert found.score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    upcast = extract_proposals(x.double(), classes, thresholds=PAPER)
    torch.testing.assert_close(found.score.double(), upcast.score, rtol=0, atol=1e-6)


def test_a_value_written_as_the_threshold_is_not_above_it(device):
    assert one(device, [0.1], thresholds=[0.1]) == []  # float32(0.1) > 0.1 in float64


@pytest.mark.parametrize("thresholds", [(0.5, 0.25), torch.tensor([0.5, 0.25]), torch.tensor([0.5, 0.25]).numpy()])
def test_any_sequence_of_thresholds(device, thresholds):
    assert [p[:2] for p in one(device, [0.3, 0.0, 0.6], thresholds=thresholds)] == [(2, 3), (0, 1)]


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0)])
def test_empty_batches(device, shape):
    b, _, c = shape
    classes = torch.ones(b, c, dtype=torch.bool, device=device)
    found = extract_proposals(torch.zeros(shape, device=device), classes, thresholds=[0.5])
    assert [len(f) for f in found] == [0] * 5


def test_views_are_read_by_their_strides(device):
    activations, classes, lengths = random_batch(device, 4)
    expected = rows(extract_proposals(activations, classes, lengths, thresholds=PAPER))
    by_class_first = activations.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    every_second = torch.stack((activations, activations.new_full(activations.shape, math.nan)), dim=2).flatten(1, 2)
    for view in (by_class_first, activations.mT.contiguous().mT, every_second[:, ::2]):
        assert not view.is_contiguous()
        assert rows(extract_proposals(view, classes.T.contiguous().T, lengths, thresholds=PAPER)) == expected
    twice = activations[:1].expand(2, -1, -1)
    found = extract_proposals(twice, classes[:1].expand(2, -1), thresholds=PAPER)
    assert [r[1:] for r in rows(found) if r[0] == 0] == [r[1:] for r in rows(found) if r[0] == 1] != []


def test_other_integer_types_of_lengths(device):
    activations, classes, lengths = random_batch(device)
    expected = rows(extract_proposals(activations, classes, lengths, thresholds=PAPER))
    assert rows(extract_proposals(activations, classes, lengths.int(), thresholds=PAPER)) == expected


def test_the_largest_numbers(device):
    top = torch.finfo(torch.float32).max
    scores = {p[:2]: p[2] for p in one(device, [-top, top, top, -top, 1.0], thresholds=[-1.0, 1e300], nms_iou=1.0)}
    assert scores == {(1, 3): math.inf, (4, 5): top}
    top = torch.finfo(torch.float64).max
    with pytest.raises(InputError, match="overflows"):
        one(device, [top, top], torch.float64, thresholds=[0.5])
    with pytest.raises(InputError, match="overflows"):
        one(device, [-top, top, 0.0, -top, top], torch.float64, thresholds=[0.5])


def test_the_first_number_that_is_not_finite_is_named(device):
    activations, classes, lengths = random_batch(device)
    classes[3, 1:3] = True
    activations[3, 5, 2] = math.nan
    activations[3, 30, 1] = -math.inf
    with pytest.raises(InputError, match="recording 3, snippet 30, class 1"):
        extract_proposals(activations, classes, lengths, thresholds=PAPER)


def test_a_bad_length_is_refused_before_anything_else(device):
    activations, classes, lengths = random_batch(device)
    lengths[2] = 61
    for x, kept in (
        (activations, classes & False),
        (activations[:, :, :0], classes[:, :0]),
        (activations * math.nan, classes),
    ):
        with pytest.raises(InputError, match="0 to T = 60"):
            extract_proposals(x, kept, lengths, thresholds=PAPER)


def test_no_gradient(device):
    activations, classes, lengths = random_batch(device)
    found = extract_proposals(activations.requires_grad_(), classes, lengths, thresholds=PAPER)
    assert not found.score.requires_grad


def test_every_run_and_any_number_of_threads_give_the_same(device):
    x, classes = wander(12, 300, 9).to(device), torch.ones(12, 9, dtype=torch.bool, device=device)
    lengths = torch.randint(301, (12,), generator=torch.Generator().manual_seed(0)).to(device)
    expected, before = extract_proposals(x, classes, lengths, thresholds=PAPER), torch.get_num_threads()
    try:
        for threads in (1, 2, 7, before):
            torch.set_num_threads(threads)
            for found, e in zip(extract_proposals(x, classes, lengths, thresholds=PAPER), expected, strict=True):
                assert torch.equal(found, e)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("limit", [64 * 1024, 8 * 1024], ids=["a smaller chip", "nothing fits"])
def test_sequences_beyond_shared_memory(simt_module, simt_kernels, limit):
    x, classes = wander(5, 2100, 6), torch.ones(5, 6, dtype=torch.bool)
    classes[1:3, 1:] = False
    lengths = torch.tensor([2100, 2000, 0, 1025, 2100])
    simt_module.set_shared_memory_limit(limit)
    try:
        for n in (2100, 300):
            part, within = x[:, :n], lengths.clamp(max=n)
            found = extract_proposals(part, classes, within, thresholds=PAPER)
            expected = extract_proposals_ref(part, classes, within, thresholds=PAPER)
            assert rows(found) == rows(expected) != []
    finally:
        simt_module.set_shared_memory_limit(227 * 1024)


def test_too_long_for_cuda(simt_kernels):
    with pytest.raises(InputError, match="too long for CUDA"):
        classes = torch.ones(1, 1, dtype=torch.bool)
        extract_proposals(torch.zeros(1).expand(1, 2**29, 1), classes, thresholds=[0.5])


@pytest.mark.gpu
def test_one_synchronisation():
    arguments = random_batch(torch.device("cuda"))
    extract_proposals(*arguments, thresholds=PAPER)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            extract_proposals(*arguments, thresholds=PAPER)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "called a synchronizing CUDA operation" in str(w.message)]) == 1


def test_registration():
    activations, classes, lengths = random_batch(torch.device("cpu"))
    for x, n in (
        (activations, lengths),
        (activations.half().mT.contiguous().mT, None),
        (activations.double()[:0], None),
    ):
        kept = classes[: len(x)]
        arguments = (x, kept, n, PAPER, 1, 0.25, False, -math.inf, 0.5)
        torch.library.opcheck(torch.ops.d2net.extract_proposals.default, arguments)


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiles_to_one_graph():
    activations, classes, lengths = random_batch(torch.device("cpu"))

    def scores(x: torch.Tensor) -> torch.Tensor:
        return extract_proposals(x, classes, lengths, thresholds=PAPER).score * 2

    compiled = torch.compile(scores, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(activations), scores(activations), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activations": torch.zeros(2, 5)}, "activations are"),
        ({"activations": torch.zeros(2, 5, 3, dtype=torch.int64)}, "activations are"),
        ({"activations": torch.full((2, 5, 3), float("nan"))}, "recording 0, snippet 0, class 0"),
        ({"classes": torch.ones(2, 3)}, "classes are"),
        ({"classes": torch.ones(3, 2, dtype=torch.bool)}, "classes are"),
        ({"lengths": torch.tensor([5])}, "lengths has"),
        ({"lengths": torch.tensor([5.0, 5.0])}, "lengths has"),
        ({"lengths": torch.tensor([5, 6])}, "0 to T = 5"),
        ({"lengths": torch.tensor([-1, 5])}, "0 to T = 5"),
        ({"thresholds": []}, "thresholds"),
        ({"thresholds": [float("nan")]}, "thresholds"),
        ({"min_length": 0}, "min_length"),
        ({"inflation": -0.1}, "inflation"),
        ({"inflation": float("nan")}, "inflation"),
        ({"outer": "median"}, "outer"),
        ({"min_contrast": float("nan")}, "min_contrast"),
        ({"nms_iou": 0.0}, "nms_iou"),
        ({"nms_iou": 1.5}, "nms_iou"),
    ],
)
def test_wrong_input_is_refused_in_one_line(device, change, message):
    good = {"activations": torch.zeros(2, 5, 3), "classes": torch.ones(2, 3, dtype=torch.bool), "thresholds": [0.5]}
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in {**good, **change}.items()}
    with pytest.raises(InputError, match=message) as error:
        extract_proposals(**arguments)
    assert "\n" not in str(error.value)


def test_too_long_for_any_device(device):
    x = torch.zeros(1, device=device).expand(2, 2**31, 3)  # on the device: moving it would copy 51 GB
    with pytest.raises(InputError, match="too long"):
        extract_proposals(x, torch.ones(2, 3, dtype=torch.bool, device=device), thresholds=[0.5])
