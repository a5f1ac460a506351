"""benchmarks/scale_model.py against what real processes send and compute, and benchmarks/bench_scale.py as a whole."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from d2net.data import Dataset, Recording
from d2net.data.batches import BatchSampler
from d2net.distributed import Ranks, of_group
from d2net.losses import D2NetLoss, WholeBatch, whole_batch
from d2net.model import D2Net
from d2net.recipes import load_recipe
from d2net.training.together import in_parallel

ROOT = Path(__file__).resolve().parents[1]
C = 3
SETTINGS = {
    "paper": (),
    "permutation, lowest": ("loss.pairing=permutation", "loss.reference_update=lowest_attention"),
    "UM": ("loss.um_weight=0.1",),
    "no L_D": ("loss.alpha_snippet=0", "loss.alpha_video=0"),
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _in_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def model():
    return importlib.import_module("scale_model")


def network_of(width: int, classes: int = C):
    from training_floor import Network

    return Network.of(width, classes, load_recipe("thumos14-paper").model)


# --- what is sent


def sent(settings: tuple[str, ...], width: int, recordings: int):
    """Bytes that this rank gives to each collective of a step, in order: gathers, then the buckets of gradients."""
    recipe = load_recipe("thumos14-paper").override(list(settings))
    rng, names = np.random.default_rng(0), [f"class {c}" for c in range(C)]
    features = [rng.normal(size=(9 + i, 2 * width)).astype(np.float32) for i in range(recordings)]
    made = [
        Recording(f"r{i}", "train", (names[i % C],), (), 1.0, "memory", lambda x=x: x, snippets=len(x))
        for i, x in enumerate(features)
    ]
    dataset, ranks = Dataset("tiny", tuple(names), (width, width), tuple(made)), of_group()
    network = D2Net.from_recipe(recipe.model, num_classes=C, stream_widths=(width, width)).order_weights()
    loss = D2NetLoss.from_recipe(recipe.loss, num_classes=C, embedding_dim=width)
    wrapped = in_parallel(network, torch.device("cpu"))
    batch = BatchSampler(dataset, batch_size=recordings, max_snippets=25, layout=network, ranks=ranks).next()
    gathers, buckets, gather = [], [], dist.all_gather

    def hook(_, bucket):
        held = sum(
            p is w for w in (network.stream_a.first.weight, network.stream_b.first.weight) for p in bucket.parameters()
        )
        buckets.append((bucket.buffer().nbytes, held == 0))
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def counted(found, mine, **options):
        gathers.append(mine.nbytes)
        gather(found, mine, **options)

    wrapped.register_comm_hook(None, hook)
    dist.all_gather = counted
    try:
        output = wrapped(batch.parts, batch.mask, None, batch.numbers)
        where = {"offsets": batch.offsets, "max_length": batch.max_length, "whole": batch.whole}
        loss(
            output.tcam, output.embeddings, batch.lengths, batch.labels, logits=output.logits, **where
        ).total.backward()
    finally:
        dist.all_gather = gather
    return gathers, buckets


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("which", SETTINGS)
def test_the_gathers(processes, model, which, size):
    loss = load_recipe("thumos14-paper").override(list(SETTINGS[which])).loss
    expected = model.payload(network_of(8), loss, 7, -(-7 // size))
    for gathers, _ in processes.run(size, sent, SETTINGS[which], 8, 7):
        assert gathers == [expected.loss, *([expected.snippet] if expected.snippet else [])]
    assert (which == "no L_D") == (expected.snippet == 0)


@pytest.mark.parametrize("width", [8, 512, 1024])
def test_the_buckets_of_gradients(processes, model, width):
    """At 8 features all gradients are one bucket, at 1024 each large layer is."""
    sizes, early = model.buckets_of(network_of(width))
    assert sum(sizes) == 4 * network_of(width).parameters
    for _, buckets in processes.run(2, sent, (), width, 4):
        assert [size for size, _ in buckets] == sizes
        assert [is_early for _, is_early in buckets] == [i < early for i in range(len(sizes))]


def controls():
    from d2net.training.together import Decisions

    given, reduce = [], dist.all_reduce

    def counted(numbers, *arguments, **options):
        given.append(numbers.nbytes)
        reduce(numbers, *arguments, **options)

    decisions = Decisions(of_group(), 0)
    dist.all_reduce = counted
    try:
        for iteration in range(1, 102):
            decisions.take(iteration, False, False, now=False)
    finally:
        dist.all_reduce = reduce
    return given


def test_the_control(processes, model):
    """Of fast steps every tenth."""
    for given in processes.run(2, controls):
        assert given == [model.CONTROL_BYTES] * 11


# --- what is computed and kept


class Count(TorchDispatchMode):
    """Counts operators that compute, and the bytes that they read and write."""

    VIEWS = (
        "view reshape split split_with_sizes select slice unbind expand t transpose permute unsqueeze squeeze detach "
        "alias _unsafe_view as_strided empty empty_like new_empty empty_strided _reshape_alias lift_fresh diagonal"
    ).split()

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (name := func.__name__.split(".")[0]) not in self.VIEWS:
            self.operators[name] += 1
            tensors = tree_flatten((args, kwargs or {}, result))[0]
            self.bytes += sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
        return result


def count(monkeypatch, ranks: int, width: int) -> Count:
    """The loss of a batch of 10 recordings on each of ``ranks``, on one of them."""

    class Gathered(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.expand(ranks, *x.shape).clone()

        @staticmethod
        def backward(ctx, grad):
            return grad[0]

    monkeypatch.setattr(whole_batch, "gathered", Gathered.apply)
    classes, snippets = 20, 12
    loss = D2NetLoss.from_recipe("thumos14-paper", num_classes=classes, embedding_dim=width)
    tcam, x = torch.rand(10 * snippets, classes).requires_grad_(), torch.randn(10 * snippets, width).requires_grad_()
    labels = torch.eye(classes)[torch.arange(10 * ranks) % classes]
    lengths, offsets = torch.full((10,), snippets), torch.arange(11) * snippets
    whole = WholeBatch(labels, torch.arange(10 * ranks), 10)
    with Count() as counted:
        result = loss(tcam, x, lengths, labels[:10], offsets=offsets, max_length=snippets, whole=whole)
        result.total.backward()
    return counted


def test_the_loss_of_a_whole_batch(monkeypatch, model):
    few, many, wide = (count(monkeypatch, *sizes) for sizes in ((8, 64), (16, 64), (16, 128)))
    few_wide = count(monkeypatch, 8, 128)
    assert few.operators.total() == many.operators.total() == pytest.approx(model.OPERATORS, rel=0.1)
    each, wider = (many.bytes - few.bytes) / 80 / 4, (wide.bytes - few_wide.bytes) / 80 / 4
    a_width = (wider - each) / 64
    assert a_width == pytest.approx(model.VALUES_A_WIDTH, rel=0.1)
    assert each - 64 * a_width == pytest.approx(model.VALUES_A_RECORDING, rel=0.1)


def test_what_is_kept_for_the_backward(model):
    recipe, width, n = load_recipe("thumos14-paper"), 16, 50
    network = D2Net.from_recipe(recipe.model, num_classes=C, stream_widths=(width, width)).order_weights()
    kept: dict[int, int] = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    parts, mask = [torch.rand(n, width) for _ in range(2)], (torch.arange(n) + 1) % n > 1
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = network.streams(parts, mask, apart=True)
    kept = {at: size for at, size in kept.items() if at not in {p.data_ptr() for p in network.parameters()}}
    expected = model.memory(network_of(width), recipe, "fp32", n, 0, 0)["kept for the backward"]
    assert output.tcam.requires_grad and sum(kept.values()) == expected + mask.nbytes
    copies, _ = network.copies(torch.bfloat16)
    expected = model.memory(network_of(width), recipe, "bf16", n, 0, 0)["copies of the weights in bfloat16"]
    assert sum(x.nbytes for x in copies.flat()) == expected


# --- seconds


def test_a_ring(model):
    link = model.Link(1e-3, 1e6)
    assert link.all_reduce(1000, 4) == pytest.approx(1e-3 + 1.5e-3)
    assert link.all_gather(1000, 4) == pytest.approx(1e-3 + 3e-3)
    assert model.link_of(8) == model.LINKS["within a machine"] != model.link_of(9)
    assert model.link_of(8, 2.0).latency == 2 * model.link_of(8).latency


def test_sharded_features(model):
    """Ten snippets of two streams of 8 in bfloat16 are 320 bytes, of which seven in eight come from others."""
    assert model.exchanged(network_of(8), 10, "bf16", 8) == 280
    assert model.all_to_all(370e9, 8) == pytest.approx(15e-6 + 1)
    assert model.all_to_all(63 * 47e9, 64) == pytest.approx(60e-6 + 56)  # 56 of the 63 others are elsewhere


@pytest.mark.parametrize(
    ("products", "expected"),
    [
        (0.0, 4.0),
        (2.0, 2.0),
        (3.0, 1.0),
        (10.0, 1.0),
    ],  # buckets of a second each; the last is always after the backward
)
def test_what_outlasts_the_backward(model, products, expected):
    sent = model.Payload(0, 0, [1, 1, 1, 1], 2)
    assert model.outlasting(sent, model.Link(0.5, 2.0), 2, products) == pytest.approx(expected)


def test_rows_are_dealt_as_in_a_training(model):
    full = model.dealt("full", 80, 8)
    assert full.most == full.mean == 7682  # as measured
    uneven = model.dealt("THUMOS14", 80, 8)
    assert uneven.most >= uneven.mean == pytest.approx(model.dealt("THUMOS14", 10, 1).mean, rel=0.02)


def test_one_gpu_is_the_measured_one(model):
    rows = json.loads(model.MEASURED.read_text())["rows"]
    for row in rows[:4]:
        assert (row["execution"], row["precision"]) in (("graph", "bf16"), ("graph", "tf32"))
        assert 1e3 * model.one_gpu(row["precision"]).step(row["rows"]) == pytest.approx(row["step_ms"])
    step = model.predicted(network_of(1024, 20), load_recipe("thumos14-paper"), "bf16", "THUMOS14", 10, 1)
    assert 1e3 * step.seconds == pytest.approx(0.657, rel=0.02) and step.seconds == step.computing


def test_the_tables_of_the_pages_are_of_today(model):
    page = model.PAGE.read_text(encoding="utf-8")
    assert "benchmarks/scale_model.py" in page
    assert model.filled(page, model.DEFAULT) == page, "run python benchmarks/scale_model.py --page"


def test_numbers_that_the_page_says(model):
    page = " ".join((ROOT / "docs" / "scale.md").read_text(encoding="utf-8").split())
    found = {(x["lengths"], x["precision"], x["recordings"], x["ranks"]): x for x in model.scaling(model.DEFAULT)}
    alone, divided = (found["THUMOS14", "bf16", 10, ranks] for ranks in (1, 8))
    large = [100 * found["full", precision, 640, 8]["efficiency"] for precision in ("bf16", "tf32")]
    small = 1e3 * model.OPERATORS * model.OPERATOR_SECONDS
    for words in (
        f"it is {model.OPERATORS} small operators of PyTorch",
        f"at an assumed {1e6 * model.OPERATOR_SECONDS:.1f} us each that is {small:.2f} ms",
        f"{1e3 * model.one_gpu('bf16').loss['THUMOS14']:.2f} ms on an H100",
        f"A step takes {alone['step_ms']:.2f} ms on one H100",
        f"would take {divided['step_ms'] / alone['step_ms']:.1f} times as long",
        f"{large[0]:.0f} % in bf16 and {large[1]:.0f} % in TF32",
        f"takes {1e6 * model.CONDITION_SECONDS:.0f} us for 10 recordings",
        f"{1e6 * model.QR_SECONDS_A_RECORDING:.1f} us more for each",
    ):
        assert words in page
    rows = model.curves()["rows"]
    assert max(row["efficiency"] for row in rows if row["ranks"] == 4) <= 0.55  # of at most 50 %, but for noise


def test_the_command(model, tmp_path, monkeypatch, capsys):
    arguments = ["scale_model.py", "--ranks", "1", "2", "--width", "64", "--json", str(tmp_path / "all.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    model.main()
    said, numbers = capsys.readouterr().out, json.loads((tmp_path / "all.json").read_text())
    assert "| a rank gives, gets, in | 2 GPUs |" in said and "No efficiency: the step was measured with" in said
    assert numbers["ranks"] == [1, 2] and "efficiency" not in numbers
    (first, *_) = numbers["collectives"]
    assert first["bytes"] == model.payload(network_of(64, 20), load_recipe("thumos14-paper").loss, 20, 10).loss


def test_measured_curves(tmp_path, monkeypatch, capsys):
    bench = importlib.import_module("bench_scale")
    arguments = ["bench_scale.py", "--quick", "--rounds", "1", "--ranks", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    bench.main()
    result, table = json.loads((tmp_path / "scale.json").read_text()), (tmp_path / "scale.md").read_text()
    named = [(row["kind"], row["ranks"], row["recordings"]) for row in result["rows"]]
    assert named == [("strong", 1, 2), ("strong", 2, 2), ("weak", 2, 4), ("plain", 2, 2)]
    alone, strong, weak, plain = result["rows"]
    assert strong["efficiency"] == pytest.approx(alone["step_ms"] / strong["step_ms"] / 2)
    assert weak["efficiency"] == pytest.approx(alone["step_ms"] / weak["step_ms"])
    for row in (strong, weak):
        assert all(share > 0 for share in row["shares"].values()) and sum(row["shares"].values()) < 1
    assert plain["shares"]["gather"] == 0 < plain["shares"]["all_reduce"]
    assert f"| {strong['step_ms']:.1f} |" in table and bench.in_words(result).startswith("efficiency of 2 processes")
    monkeypatch.setattr(sys, "argv", ["bench_scale.py", "--quick", "--ranks", "8"])
    with pytest.raises(SystemExit, match="8 recordings are less than a batch of 2 for each"):
        bench.main()


def test_dealing_is_timed(monkeypatch):
    bench = importlib.import_module("bench_scale")
    assert [(x["ranks"], x["recordings"]) for x in bench.dealing(1)] == [(8, 80), (64, 640)]
    assert bench.Ranks is Ranks
