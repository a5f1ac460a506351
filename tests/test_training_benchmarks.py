"""The benchmarks of training: THUMOS14's lengths, the floor, the peer, and what the tables say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from d2net.losses import D2NetLoss
from d2net.model import D2Net
from d2net.recipes import load_recipe

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RECIPE = load_recipe("thumos14-paper")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _in_benchmarks(monkeypatch, one_thread):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_lengths_of_thumos14():
    from thumos14_lengths import thumos14_lengths

    lengths = thumos14_lengths()
    cut = [min(length, 750) for length in lengths]
    assert len(lengths) == 200 and sum(cut) / 200 == 284.275
    assert round(100 * (1 - sum(cut) / (200 * 750)), 1) == 62.1  # percent of padding


def test_lengths_are_made_again(shared):
    from thumos14_lengths import FILE, from_annotations

    assert json.loads(FILE.read_text())["snippets"] == from_annotations(shared / "data" / "thumos14" / "wtalc")


@pytest.mark.parametrize(("which", "share"), [("THUMOS14", 0.379), ("full", 1.0)])
def test_recordings_of_any_size_keep_the_share_of_padding(which, share):
    from training_sizes import Sizes

    sizes = Sizes(snippets=75, width=2, recordings=200)
    lengths = sizes.lengths(which)
    assert sum(min(n, 75) for n in lengths) / (75 * 200) == pytest.approx(share, abs=0.01)
    dataset = sizes.dataset(which)
    assert [len(dataset.features(i)) for i in (0, 7, 199)] == [lengths[i] for i in (0, 7, 199)]


def network_of(width: int, classes: int):
    from training_floor import Network

    return Network.of(width, classes, RECIPE.model)


def test_floor_counts_the_products_that_pytorch_counts():
    from peers.plain_training import PlainNetwork
    from training_floor import products

    network = PlainNetwork(8, 3, RECIPE.model)
    with FlopCounterMode(display=False) as counter:
        tcam, embeddings = network(torch.rand(2, 10, 16))
        (tcam.sum() + embeddings.sum()).backward()
    assert products(network_of(8, 3), rows=20) == counter.get_total_flops()


def test_floor_has_the_parameters_of_the_network():
    model = D2Net(3, (8, 8), RECIPE.model)
    assert network_of(8, 3).parameters == sum(p.numel() for p in model.parameters())


def test_floor_in_bytes():
    """One row, 8 wide, 3 classes: 8 parameters a convolution's output, 3 taps, and a bias; counted by hand."""
    from training_floor import floor, moved

    parameters = 2 * (2 * (8 * 8 * 3 + 8) + 8 * 3 * 3 + 3)
    assert moved(network_of(8, 3), 1, "fp32") == {
        "gather": 4 * (16 + 16),
        "first layers, forward": 4 * 2 * (8 + 8),
        "second layers, forward": 4 * (2 * (8 + 8) + 8),
        "logits and TCAM, forward": 4 * (2 * 3 + 3),
        "logits and TCAM, backward": 4 * (2 * (3 + 3) + 3),
        "loss": 4 * (4 * 8 + 3 * 3),
        "second layers, backward": 4 * (2 * (8 + 8 + 8) + 8),
        "first layers, backward": 4 * 2 * (8 + 8 + 8),
        "Adam": 4 * 7 * parameters,
    }
    half = moved(network_of(8, 3), 1, "bf16")
    assert half["gather"] == 2 * (16 + 16)
    assert half["loss"] == 2 * 4 * 8 + 4 * 3 * 3  # the TCAM is float32
    assert half["Adam"] == (4 * 6 + 2 + 2) * parameters  # the gradient, and the copy of the weights
    assert moved(network_of(8, 3), 1, "tf32") == moved(network_of(8, 3), 1, "fp32")

    bound = floor(network_of(8, 3), 1, "bf16", flops=1e3, bytes_per_s=1e4)
    assert bound.seconds == bound.flop / 1e3 + sum(half.values()) / 1e4


@pytest.mark.parametrize("setting", ["model.residual=true", "model.dropout=0.7"])
def test_floor_refuses_what_it_does_not_count(setting):
    from training_floor import Network

    with pytest.raises(ValueError, match="residuals and dropout"):
        Network.of(8, 3, RECIPE.override([setting]).model)


@pytest.mark.parametrize("batched", [False, True])
def test_the_peer_computes_what_d2net_computes(batched):
    """Loss, x_ref and gradients of batches without padding, one after the other with the same weights."""
    from peers.plain_training import PlainTraining
    from training_sizes import QUICK

    torch.manual_seed(0)
    peer = PlainTraining(QUICK, QUICK.dataset(), CPU, "fp32", batched)
    with torch.no_grad():
        for name, parameter in peer.network.named_parameters():  # or activations are all about 0.5
            parameter *= 0 if "bias" in name else 2
    model = D2Net(QUICK.classes, (QUICK.width, QUICK.width), RECIPE.model)
    model.load_state_dict(peer.network.state_dict(), strict=False)
    loss = D2NetLoss.from_recipe(RECIPE.loss, num_classes=QUICK.classes, embedding_dim=QUICK.width)
    terms = []
    for batch in peer.batches:
        batch.features[:, 20:] *= -1  # two kinds of snippets
        batch.labels = torch.eye(QUICK.classes)[: len(batch.labels)]
        output = model(batch.features)
        partners = torch.tensor(batch.partners)
        ours = loss(output.tcam, output.embeddings, batch.lengths_on_device, batch.labels, partners)
        terms.append(torch.stack([ours.snippet, ours.video]))
        theirs = peer.criterion(*peer.forward(batch), batch)
        torch.testing.assert_close(theirs, ours.total, rtol=1e-5, atol=1e-6)
        grads = [torch.autograd.grad(x, list(n.parameters())) for x, n in ((ours.total, model), (theirs, peer.network))]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)
    assert torch.stack(terms).any(0).all()  # L_D had something to do
    torch.testing.assert_close(peer.module.reference if batched else peer.x_ref, loss.reference)


@pytest.mark.parametrize("batched", [None, False, True])
def test_an_epoch_draws_every_recording(batched):
    from peers.plain_training import PlainTraining
    from training_sizes import QUICK, prepare

    dataset = QUICK.dataset("THUMOS14")
    if batched is None:
        training = prepare(QUICK, dataset, CPU, "fp32", graph=False)
    else:
        training = PlainTraining(QUICK, dataset, CPU, "fp32", batched)
    assert training.epoch == 3
    for _ in range(training.epoch):
        training.step()
    assert sum(batch.snippets for batch in training.drawn) == sum(min(n, 40) for n in QUICK.lengths("THUMOS14"))
    assert all(batch.rows >= batch.snippets for batch in training.drawn)


def test_the_peer_trains():
    from peers.plain_training import PlainTraining
    from training_sizes import QUICK

    peer = PlainTraining(QUICK, QUICK.dataset(), CPU, "fp32", False)
    before = [p.clone() for p in peer.network.parameters()]
    peer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, peer.network.parameters(), strict=True))


def quick(monkeypatch, tmp_path: Path, name: str, *options: str) -> tuple[dict, str]:
    """What the benchmark writes, with small sizes and machine rates that are round numbers."""
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "machine_rates", lambda _: {"bytes_per_s": 1e9, "flops": 1e9})
    monkeypatch.setattr(module, "product_rate", lambda *_: lambda: 2e9, raising=False)
    monkeypatch.setattr(module, "copy_rate", lambda _: lambda: 1e9, raising=False)
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--out", str(tmp_path), *options])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert not stopped.value.code
    (result,) = tmp_path.glob("*.json")
    return json.loads(result.read_text()), result.with_suffix(".md").read_text()


def test_a_step_beside_its_floor(monkeypatch, tmp_path):
    from training_floor import moved, products
    from training_sizes import QUICK

    result, table = quick(monkeypatch, tmp_path, "bench_training_step")
    named = [(row["lengths"], row["precision"], row["execution"]) for row in result["rows"]]
    assert named == [(n, "fp32", e) for e in ("eager", "loops", "batched") for n in ("THUMOS14", "full")]
    network = network_of(QUICK.width, QUICK.classes)
    for row in result["rows"]:
        snippets = sum(min(n, QUICK.snippets) for n in QUICK.lengths(row["lengths"])) / 3  # batches an epoch
        assert row["snippets"] == pytest.approx(snippets) and row["filler_share"] == 1 - row["snippets"] / row["rows"]
        assert row["flop"] == pytest.approx(products(network, snippets))
        assert row["bytes"] == pytest.approx(moved(network, snippets, "fp32"))
        assert row["floor_ms"] == pytest.approx(1e3 * (row["flop"] / 2e9 + sum(row["bytes"].values()) / 1e9))
        assert row["times_floor"] == pytest.approx(row["step_ms"] / row["floor_ms"])
        assert row["loss_share"] == pytest.approx(row["loss_ms"] / row["step_ms"])
        assert f"| {row['step_ms']:.3f} | {row['floor_ms']:.3f} = " in table
    assert result["rows"][3]["filler_share"] == 0  # padded to 40, the length of all; ours has gaps and rounds up
    assert "PyTorch, loops over recordings" in table and "| Adam |" in table


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rates_are_measured_anew(precision):
    from harness import copy_rate, product_rate

    before = torch.backends.cuda.matmul.allow_tf32
    assert product_rate(CPU, precision)() > 0 and copy_rate(CPU)() > 0
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_rows_that_are_asked_for(monkeypatch, tmp_path):
    options = ["--lengths", "full", "--precision", "fp32", "--execution", "graph", "loops", "--width", "8"]
    result, table = quick(monkeypatch, tmp_path, "bench_training_step", *options)
    assert [(row["lengths"], row["execution"]) for row in result["rows"]] == [("full", "loops")]  # a CPU has no graphs
    assert "D=2x8" in table


def test_the_paper_schedule_beside_the_bare_step(monkeypatch, tmp_path):
    result, table = quick(monkeypatch, tmp_path, "paper_schedule")
    assert [row["lengths"] for row in result["rows"]] == ["THUMOS14", "full"] and result["first_start_seconds"] > 0
    for row in result["rows"]:
        assert row["how"] == "extrapolated from 40 iterations"
        assert row["seconds"] > 20_000 * 0.99 / row["iterations_per_s"] > row["start_seconds"] > 0
        assert row["bare_share"] == pytest.approx(row["iterations_per_s"] / row["bare_iterations_per_s"])
        assert f"| {row['seconds']:.1f} s | {row['start_seconds']:.2f} s |" in table


def test_rates_of_a_run(monkeypatch):
    from paper_schedule import Run

    run = Run(9.0, [(10, 3.0), (20, 5.0), (30, 6.0), (40, 7.0)])
    assert run.each(0) == 4 / 30 and run.each(20) == 0.1


def test_a_cpu_has_no_graphs(monkeypatch, capsys):
    import paper_schedule

    monkeypatch.setattr(sys, "argv", ["paper_schedule.py", "--quick", "--execution", "graph"])
    with pytest.raises(SystemExit, match="--execution graph needs --device cuda"):
        paper_schedule.main()
