"""What the benchmarks of training train on, and one training of it ready to be timed.

The paper's sizes: batches of 10 recordings of up to 750 snippets, two streams of 1024 features, 20 classes. Two sets of
lengths: "full", where every recording fills its 750 snippets, and "THUMOS14", those of its 200 training videos. The
features are random numbers.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import captured
from thumos14_lengths import thumos14_lengths
from torch import Tensor

from d2net.data.batches import Batch
from d2net.data.dataset import Dataset, Recording
from d2net.data.resident import ResidentFeatures
from d2net.recipes import Recipe, load_recipe
from d2net.training import Trainer

LENGTHS = ("THUMOS14", "full")
EXECUTIONS = ("graph", "eager")
PRECISIONS = ("tf32", "bf16", "fp32")
THUMOS14_SNIPPETS = 750  # T of the paper, to which THUMOS14's lengths are cut


class Sizes(NamedTuple):
    batch: int = 10
    snippets: int = 750
    width: int = 1024
    classes: int = 20
    recordings: int = 200

    def lengths(self, which: str) -> list[int]:
        """Snippets of every recording; THUMOS14's are scaled with ``snippets``, so that the share of padding stays."""
        if which == "full":
            return [self.snippets] * self.recordings
        known = thumos14_lengths()
        if self.recordings > len(known):
            raise ValueError(f"THUMOS14 has {len(known)} training videos, not {self.recordings}")
        chosen = [known[i * len(known) // self.recordings] for i in range(self.recordings)]
        return [max(1, n * self.snippets // THUMOS14_SNIPPETS) for n in chosen]

    def dataset(self, which: str = "full") -> Dataset:
        """Recordings of random features, of one class each."""
        generator = np.random.default_rng(0)
        names = tuple(f"class {c}" for c in range(self.classes))
        recordings = []
        for i, length in enumerate(self.lengths(which)):
            x = generator.random((length, 2 * self.width), dtype=np.float32)
            labels = (names[i % self.classes],)
            recordings.append(Recording(f"recording {i}", "train", labels, (), 0.64, "random", partial(np.asarray, x)))
        return Dataset(f"random, {which}", names, (self.width, self.width), tuple(recordings))

    def recipe(self, iterations: int) -> Recipe:
        return load_recipe("thumos14-paper").override(
            [
                f"training.iterations={iterations}",
                f"training.batch_size={self.batch}",
                f"training.max_snippets={self.snippets}",
            ]
        )

    def __str__(self) -> str:
        return f"B={self.batch} T<={self.snippets} D=2x{self.width} C={self.classes}, {self.recordings} recordings"


ON_CPU = Sizes(width=128, recordings=50)
QUICK = Sizes(batch=2, snippets=40, width=16, classes=3, recordings=6)


def add_options(parser: argparse.ArgumentParser, executions: Sequence[str]) -> None:
    """Options that choose rows, and the width."""
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=LENGTHS, help="default: both")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, help="default: all on a GPU, fp32 on a CPU")
    parser.add_argument("--execution", nargs="+", choices=executions, default=executions, help="default: all")
    parser.add_argument("--width", type=int, help=f"of a stream; default 1024, on a CPU {ON_CPU.width}")


def chosen(options: argparse.Namespace, device: torch.device) -> tuple[Sizes, list[str], list[str], list[str]]:
    """Sizes, lengths, precisions and executions: those asked for that the device has. A CPU replays no graphs."""
    on_gpu = device.type == "cuda"
    sizes = QUICK if options.quick else Sizes() if on_gpu else ON_CPU
    if options.width:
        sizes = sizes._replace(width=options.width)
    precisions = options.precision or (PRECISIONS if on_gpu else ("fp32",))
    executions = [e for e in options.execution if e != "graph" or on_gpu]
    if not executions:
        raise SystemExit("--execution graph needs --device cuda: a CPU replays no graphs")
    return sizes, list(options.lengths), list(precisions), executions


class Drawn(NamedTuple):
    """A batch that was trained on.

    Attributes:
        snippets: In its recordings, after cutting.
        rows: That the network computes: snippets, and what fills up to its shape (padding, gaps, rounding).
    """

    snippets: int
    rows: int


class Prepared(NamedTuple):
    """A training, ready to be timed.

    Attributes:
        step: One step with the next batch, as `d2net train` does it.
        loss: The loss alone of one batch after the other of an epoch, forward and backward, on activations that were
            computed before. Made by calling it, as it holds memory.
        drawn: The batches of :attr:`step` so far.
        epoch: Batches of an epoch.
    """

    step: Callable[[], Any]
    loss: Callable[[], Callable[[], Any]]
    drawn: list[Drawn]
    epoch: int


def prepare(sizes: Sizes, dataset: Dataset, device: torch.device, precision: str, graph: bool) -> Prepared:
    """A training with resident features: all that these benchmarks know of how d2net trains."""
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            dataset,
            sizes.recipe(1),
            out=Path(out),
            device=device,
            precision=precision,
            resident=True,
            graph=graph,
            tensorboard=False,
        )
    # Trainer.run sets this for a whole run.
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    assert isinstance(trainer.resident, ResidentFeatures)
    resident, update = trainer.resident, trainer.step_graph() or trainer.update_resident
    drawn: list[Drawn] = []

    def step() -> None:
        windows = trainer.sampler.windows(resident.lengths)
        rows = resident.rows(windows)
        drawn.append(Drawn(sum(w.length for w in windows), len(rows) - 3 * len(windows) - 1))
        update(rows, True)

    epoch = len(dataset) // trainer.sampler.batch_size

    def loss() -> Callable[[], Any]:
        runs = []
        for _ in range(epoch):
            rows = resident.rows(trainer.sampler.windows(resident.lengths)).to(device)
            batch = resident.gather(rows)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                output = trainer.model.streams(batch.parts, batch.mask)
            leaves = [x.detach().requires_grad_() for x in (output.tcam, output.embeddings)]

            def run(leaves: list[Tensor] = leaves, batch: Batch = batch) -> None:
                where: dict[str, Any] = {"offsets": batch.offsets, "max_length": batch.max_length}
                result = trainer.loss(*leaves, batch.lengths, batch.labels, generator=trainer.state.pairing, **where)
                torch.autograd.grad(result.total, leaves)

            runs.append(captured(run, [trainer.state.pairing]) if graph else run)
        turn = cycle(runs)
        return lambda: next(turn)()

    return Prepared(step, loss, drawn, epoch)
