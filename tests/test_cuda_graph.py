"""On a GPU: the loss and a whole training step wait for nothing, are CUDA graphs, and take few launches."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from d2net.checkpoint import load_checkpoint
from d2net.data import batches
from d2net.data.dataset import Dataset, Recording
from d2net.losses import D2NetLoss
from d2net.recipes import load_recipe
from d2net.training import Trainer, trainer
from d2net.training.step_graph import StepGraph

pytestmark = pytest.mark.gpu

B, T, C, D = 10, 750, 20, 1024
LAUNCHES = 8, 4  # forward, backward; seven are ours, and torch draws, copies x_ref and fills
LAUNCH_CALLS = ("cudaLaunch", "cuLaunch", "cudaMemcpy", "cudaMemset")  # what the profiler calls them


def loss_inputs(seed: int) -> list[Tensor]:
    """TCAM, embeddings, lengths and labels of a batch."""
    generator = torch.Generator("cuda").manual_seed(seed)
    tcam = torch.rand(B, T, C, generator=generator, device="cuda")
    embeddings = torch.randn(B, T, D, generator=generator, device="cuda")
    lengths = torch.randint(1, T + 1, (B,), generator=generator, device="cuda")
    labels = (torch.rand(B, C, generator=generator, device="cuda") < 0.15).float()
    return [tcam.requires_grad_(), embeddings.requires_grad_(), lengths, labels]


def forward_backward(loss: D2NetLoss, inputs: list[Tensor]) -> list[Tensor]:
    """The terms, x_ref and the gradients."""
    result = loss(*inputs)
    gradients = torch.autograd.grad(result.total, inputs[:2])
    return [*(term.detach() for term in result), loss.reference, *gradients]


@contextmanager
def no_wait() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# What is computed beside the one native call of the loss.
VARIANTS = [
    "loss.snippet_oriented=true",
    "loss.video_queue=40",
    "loss.um_weight=0.1",
    "loss.um_margin=2",
    "loss.um_margin_unit=embedding",
    "training.denoising_agreement=0.6",
]


def make_trainer(out: Path, iterations: int, settings: Sequence[str] = (), **options: object) -> Trainer:
    generator = np.random.default_rng(0)
    recordings = []
    for i in range(9):
        x = generator.normal(size=(int(generator.integers(20, 70)), 64)).astype(np.float32)
        labels = (("jump", "throw", "run")[i % 3],)
        recordings.append(Recording(f"r{i}", "train", labels, (), 1.0, "memory", lambda x=x: x))
    dataset = Dataset("tiny", ("jump", "throw", "run"), (32, 32), tuple(recordings))
    recipe = load_recipe("thumos14-paper").override(
        [
            "model.dropout=0.3",
            "training.batch_size=4",
            "training.max_snippets=50",
            "training.denoising_every=2",
            "training.ema_decay=0.9",
            f"training.iterations={iterations}",
            *settings,
        ]
    )
    return Trainer(dataset, recipe, out=out, device="cuda", tensorboard=False, **options)


@pytest.mark.parametrize("recipe", ["thumos14-paper", "thumos14-release", "activitynet12-paper"])
def test_the_loss_waits_for_nothing(recipe):
    loss = D2NetLoss.from_recipe(recipe, num_classes=C, embedding_dim=D).cuda()
    forward_backward(loss, loss_inputs(0))
    inputs = loss_inputs(1)
    with no_wait():
        forward_backward(loss, inputs)


@pytest.mark.parametrize("settings", [[], VARIANTS], ids=["paper", "variants"])
def test_a_training_step_waits_for_nothing(tmp_path, settings):
    trainer = make_trainer(tmp_path, 10, settings)
    resident = trainer.resident
    for step in range(3):
        rows = resident.rows(trainer.sampler.windows(resident.lengths))
        with no_wait() if step == 2 else nullcontext():
            trainer.update_resident(rows, True)


def test_a_batch_comes_by_one_copy_and_without_waiting(tmp_path):
    trainer = make_trainer(tmp_path, 10, precision="bf16")
    resident = trainer.resident
    windows = trainer.sampler.windows(resident.lengths)
    rows = resident.rows(windows)
    assert rows.is_pinned() and rows.dtype == torch.int64
    with no_wait():
        batch = resident.gather(rows.to("cuda", non_blocking=True))
    assert {part.dtype for part in batch.parts} == {torch.bfloat16} and batch.features.shape == (len(batch.mask), 64)
    expected = torch.zeros(len(batch.mask), 64)
    for window, first in zip(windows, batch.offsets.tolist(), strict=False):
        x = torch.from_numpy(trainer.dataset.features(window.recording))
        expected[first : first + window.length] = x[window.start : window.start + window.length]
    assert torch.equal(batch.features.cpu(), expected.bfloat16())


def test_the_loss_as_a_graph_gives_what_it_gives_eagerly():
    graphed = D2NetLoss.from_recipe("thumos14-paper", num_classes=C, embedding_dim=D).cuda()
    eager = copy.deepcopy(graphed)
    static = loss_inputs(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward_backward(graphed, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = forward_backward(graphed, static)
    graphed.reference.zero_()
    for seed in range(1, 6):
        inputs = loss_inputs(seed)
        with torch.no_grad():
            for to, value in zip(static, inputs, strict=True):
                to.copy_(value)
        torch.cuda.manual_seed(seed)  # the pairs are drawn in the graph
        graph.replay()
        torch.cuda.manual_seed(seed)
        expected = forward_backward(eager, inputs)
        torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_training_run_of_graphs_is_like_an_eager_one(tmp_path, monkeypatch, precision):
    # Of a weight's gradient cuDNN may else sum in any order, which Adam makes steps of where it is nearly zero.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    made = []

    class Recorded(StepGraph):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(trainer, "StepGraph", Recorded)
    monkeypatch.setattr(batches, "ROWS", 32)  # more sizes
    eager = load_checkpoint(make_trainer(tmp_path / "eager", 25, precision=precision, graph=False).run()).tensors
    assert not made
    graphed = load_checkpoint(make_trainer(tmp_path / "graph", 25, precision=precision, graph=True).run()).tensors
    captured = made[0].captured
    assert {flag for _, flag in captured} == {True, False}  # with the denoising terms and without
    assert len({size for size, _ in captured}) > 1
    make_trainer(tmp_path / "parts", 13, precision=precision, graph=True).run()
    path = make_trainer(tmp_path / "parts", 25, precision=precision, graph=True).run(resume=True)
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if precision == "bf16" else {"rtol": 1e-3, "atol": 1e-5}
    for other in (graphed, load_checkpoint(path).tensors):
        for key, tensor in eager.items():
            if key.startswith("model."):
                torch.testing.assert_close(other[key], tensor, **tolerance)
        assert torch.equal(other["rng.pairing_cuda"], eager["rng.pairing_cuda"])
        assert torch.equal(other["rng.cuda"], eager["rng.cuda"])


def test_a_step_that_waits_is_found_out_and_goes_on():
    weight = torch.zeros(3, device="cuda")

    def step(rows: Tensor, flag: bool) -> Tensor:
        if rows.sum().item() > 0:  # waits
            weight.add_(1)
        return weight.clone()

    rows = torch.ones(3, dtype=torch.int64)
    graph = StepGraph(step, rows.cuda().device, [])
    with pytest.warns(UserWarning, match="waits for the device"):
        for _ in range(6):
            result = graph(rows.pin_memory(), True)
    assert result.tolist() == [6, 6, 6] and not graph.captured


def test_the_loss_takes_few_launches():
    loss = D2NetLoss.from_recipe("thumos14-paper", num_classes=C, embedding_dim=D).cuda()
    inputs = loss_inputs(0)
    for _ in range(2):
        forward_backward(loss, inputs)
    torch.cuda.synchronize()
    totals: list[Tensor] = []
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    counts = []
    for run in (lambda: totals.append(loss(*inputs).total), lambda: torch.autograd.grad(totals[0], inputs[:2])):
        with torch.profiler.profile(activities=activities) as profile:
            run()
            torch.cuda.synchronize()
        counts.append(sum(event.name.startswith(LAUNCH_CALLS) for event in profile.events()))
    assert all(0 < n <= most for n, most in zip(counts, LAUNCHES, strict=True)), f"{counts} launches"
