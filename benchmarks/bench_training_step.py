"""A training step of D2-Net: its time, the loss's share of it, launches, bytes moved, peak memory.

The paper's sizes: 10 recordings of up to 750 snippets, two streams of 1024 features, 20 classes. A step is
gathering the batch, network, loss, backward pass and Adam, as d2net.training.Trainer does it; the loss is measured
alone, forward and backward, on the step's own activations. On a GPU both also as replayed CUDA graphs. The features are
random numbers.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from harness import OUT_OF_TIME, arguments, attempt, clock, environment, machine_rates, peak_memory, save, synchronize
from torch import Tensor

from d2net.data.dataset import Dataset, Recording
from d2net.recipes import Recipe, load_recipe
from d2net.training import Trainer
from d2net.training.step_graph import WARM_UP, StepGraph

LAUNCH_CALLS = ("cudaLaunch", "cuLaunch", "cudaMemcpy", "cudaMemset")  # what the profiler calls them, graphs included


class Sizes(NamedTuple):
    batch: int = 10
    snippets: int = 750
    width: int = 1024
    classes: int = 20
    recordings: int = 200

    def dataset(self) -> Dataset:
        """Recordings of random features, from a quarter to one and a half times the longest batch."""
        generator = np.random.default_rng(0)
        names = tuple(f"class {c}" for c in range(self.classes))
        recordings = []
        for i in range(self.recordings):
            length = int(generator.integers(self.snippets // 4, 3 * self.snippets // 2))
            x = generator.random((length, 2 * self.width), dtype=np.float32)
            labels = (names[i % self.classes],)
            recordings.append(Recording(f"recording {i}", "train", labels, (), 0.64, "random", partial(np.asarray, x)))
        return Dataset("random", names, (self.width, self.width), tuple(recordings))

    def recipe(self, iterations: int) -> Recipe:
        return load_recipe("thumos14-paper").override(
            [
                f"training.iterations={iterations}",
                f"training.batch_size={self.batch}",
                f"training.max_snippets={self.snippets}",
            ]
        )

    def __str__(self) -> str:
        return f"B={self.batch} T={self.snippets} D=2x{self.width} C={self.classes}"


QUICK = Sizes(batch=2, snippets=40, width=16, classes=3, recordings=6)


def precisions(device: torch.device) -> tuple[str, ...]:
    """The default first."""
    return ("tf32", "fp32", "bf16") if device.type == "cuda" else ("fp32",)


class Runs(NamedTuple):
    """What to call for a step and for its loss alone, by how they are executed; the bytes that the loss must move."""

    executions: dict[str, tuple[Callable[[], Any], Callable[[], Any]]]
    moved: int


def prepare(sizes: Sizes, dataset: Dataset, device: torch.device, precision: str) -> Runs:
    """A step eagerly and, on a GPU, as a CUDA graph."""
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            dataset,
            sizes.recipe(1),
            out=Path(out),
            device=device,
            precision=precision,
            resident=True,
            tensorboard=False,
        )
    # Trainer.run sets this for a whole run.
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    assert trainer.resident is not None
    rows = trainer.resident.rows(trainer.sampler.windows(trainer.resident.lengths)).to(device)

    def step(rows: Tensor, _: bool) -> Tensor:
        return trainer.update(trainer.resident.gather(rows), True)

    batch = trainer.resident.gather(rows)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        output = trainer.model(batch.features, batch.lengths)
    leaves = [x.detach().requires_grad_() for x in (output.tcam, output.embeddings)]

    def loss(*_: Any) -> Tensor:
        result = trainer.loss(*leaves, batch.lengths, batch.labels, generator=trainer.state.pairing)
        torch.autograd.grad(result.total, leaves)
        return result.total.detach()

    executions: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "eager": (partial(step, rows, True), partial(loss, rows, True))
    }
    if device.type == "cuda":
        graphs = [StepGraph(work, rows, [trainer.state.pairing], required=True) for work in (step, loss)]
        executions["graph"] = (partial(graphs[0], rows, True), partial(graphs[1], rows, True))
    # The embeddings are read twice forward and once backward, and their gradient is written.
    return Runs(executions, 4 * leaves[1].nbytes + 3 * leaves[0].nbytes)


def measure(
    whole: Callable[[], Any], part: Callable[[], Any], moved: int, device: torch.device, rounds: int, bandwidth: float
) -> dict[str, Any]:
    for _ in range(WARM_UP + 1):
        whole()
        part()
    times: dict[str, list[float]] = {"step": [], "loss": []}
    for _ in range(rounds):  # interleaved: machines are noisy
        times["step"].append(clock(whole, 1 if rounds < 10 else 5, device))
        times["loss"].append(clock(part, 1 if rounds < 10 else 5, device))
    seconds = {name: statistics.median(t) for name, t in times.items()}
    return {
        "step_ms": 1e3 * seconds["step"],
        "loss_ms": 1e3 * seconds["loss"],
        "loss_share": seconds["loss"] / seconds["step"],
        "loss_bytes": moved,
        "loss_bandwidth_share": moved / seconds["loss"] / bandwidth,
        "step_peak_mib": peak_memory(whole, device) / 2**20,
    }


def launches(run: Callable[[], Any], device: torch.device) -> int | None:
    """Kernels, copies, fills and graphs that the host launches in one call; None on a CPU."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        run()
        synchronize(device)
    return sum(event.name.startswith((*LAUNCH_CALLS, "cudaGraphLaunch")) for event in profile.events())


def heading(result: dict[str, Any]) -> list[str]:
    where = result["environment"]
    name = where["device"] if where["device"] != "cpu" else f"{where['processor']}, {where['threads']} threads"
    driver = f", driver {where['driver']}" if "driver" in where else ""
    return [
        f"### {result['title']}",
        "",
        f"{name}{driver}, torch {where['torch']}, commit {where['commit']}, {where['date'][:10]}; {result['sizes']}; "
        f"copy bandwidth {result['rates']['bytes_per_s'] / 1e9:.1f} GB/s",
        "",
    ]


def markdown(result: dict[str, Any]) -> str:
    lines = heading(result) + [
        "| network | execution | step ms | loss ms | loss / step | launches: step | loss | loss GB/s/copy | peak MiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        if "failed" in row:
            lines.append(f"| {row['precision']} | {row['execution']} | {row['failed'].replace('|', '/')} |||||||")
            continue
        counts = [row.get(key) or "-" for key in ("step_launches", "loss_launches")]
        lines.append(
            f"| {row['precision']} | {row['execution']} | {row['step_ms']:.3f} | {row['loss_ms']:.3f} | "
            f"{100 * row['loss_share']:.1f} % | {counts[0]} | {counts[1]} | "
            f"{100 * row['loss_bandwidth_share']:.0f} % | {row['step_peak_mib']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="default 15")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    device = torch.device(options.device)
    sizes = QUICK if options.quick else Sizes()
    rounds = 3 if options.quick else options.rounds
    dataset, rates = sizes.dataset(), machine_rates(device)
    rows: list[dict[str, Any]] = []
    result = {
        "title": "training step",
        "sizes": str(sizes),
        "environment": environment(device),
        "rates": rates,
        "rows": rows,
    }
    for precision in precisions(device):
        runs, failed = attempt(deadline, prepare, sizes, dataset, device, precision)
        if failed:
            rows.append({"precision": precision, "execution": "-", "failed": failed})
            continue
        for execution, (whole, part) in runs.executions.items():
            row = {"precision": precision, "execution": execution}
            rows.append(row)
            numbers, failed = attempt(deadline, measure, whole, part, runs.moved, device, rounds, rates["bytes_per_s"])
            if failed:
                row["failed"] = failed
                continue
            row |= numbers
            for key, run in (("step_launches", whole), ("loss_launches", part)):
                row[key], _ = attempt(deadline, launches, run, device)
            save(result, markdown(result), options.out)
    finish(result, markdown(result), options.out)


def finish(result: dict[str, Any], table: str, out: Path | None) -> NoReturn:
    """Print and write the results; the exit status is 1 where a row failed, or there was no time for any."""
    print(table)
    save(result, table, out)
    failed = {row.get("failed", "") for row in result["rows"]}
    sys.exit("" not in failed or not failed <= {"", OUT_OF_TIME})


if __name__ == "__main__":
    main()
