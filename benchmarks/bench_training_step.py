"""A training step of D2-Net: its time, the loss's share of it, launches, bytes moved, peak memory.

The paper's sizes: 10 recordings of up to 750 snippets, two streams of 1024 features, 20 classes. A step is
gathering the batch, network, loss, backward pass and Adam, as d2net.training.Trainer does it; the loss is measured
alone, forward and backward, on the step's own activations. On a GPU both also as replayed CUDA graphs. The features are
random numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import clock, environment, machine_rates, peak_memory, synchronize
from torch import Tensor

from d2net.data.dataset import Dataset, Recording
from d2net.errors import D2NetError
from d2net.recipes import Recipe, load_recipe
from d2net.step_graph import WARM_UP, StepGraph
from d2net.training import Trainer

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
    return ("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32",)


def measure(
    sizes: Sizes, dataset: Dataset, device: torch.device, precision: str, rounds: int, bandwidth: float
) -> list[dict[str, Any]]:
    """A row eagerly and, on a GPU, one as CUDA graphs."""
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
        result = trainer.loss(*leaves, batch.lengths, batch.labels, generator=trainer.pairing)
        torch.autograd.grad(result.total, leaves)
        return result.total.detach()

    runs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "eager": (partial(step, rows, True), partial(loss, rows, True))
    }
    if device.type == "cuda":
        graphs = [StepGraph(work, rows, [trainer.pairing], required=True) for work in (step, loss)]
        runs["graph"] = (partial(graphs[0], rows, True), partial(graphs[1], rows, True))
    # The embeddings are read twice forward and once backward, and their gradient is written.
    moved = 4 * leaves[1].nbytes + 3 * leaves[0].nbytes
    found = []
    for execution, (whole, part) in runs.items():
        row: dict[str, Any] = {"precision": precision, "execution": execution}
        found.append(row)
        try:
            for _ in range(WARM_UP + 1):
                whole()
                part()
        except D2NetError as error:
            row["failed"] = str(error)
            continue
        times: dict[str, list[float]] = {"step": [], "loss": []}
        for _ in range(rounds):  # interleaved: machines are noisy
            times["step"].append(clock(whole, 1 if rounds < 10 else 5, device))
            times["loss"].append(clock(part, 1 if rounds < 10 else 5, device))
        seconds = {name: statistics.median(t) for name, t in times.items()}
        row |= {
            "step_ms": 1e3 * seconds["step"],
            "loss_ms": 1e3 * seconds["loss"],
            "loss_share": seconds["loss"] / seconds["step"],
            "step_launches": launches(whole, device),
            "loss_launches": launches(part, device),
            "loss_bytes": moved,
            "loss_bandwidth_share": moved / seconds["loss"] / bandwidth,
            "step_peak_mib": peak_memory(whole, device) / 2**20,
        }
    return found


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


def write(result: dict[str, Any], table: str, out: Path | None) -> None:
    """Print the table; with a folder, write NAME.json and NAME.md there."""
    print(table)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        name = result["title"].replace(" ", "_")
        (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / f"{name}.md").write_text(table)


def markdown(result: dict[str, Any]) -> str:
    lines = heading(result) + [
        "| network | execution | step ms | loss ms | loss / step | launches: step | loss | loss GB/s/copy | peak MiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        if "failed" in row:
            lines.append(f"| {row['precision']} | {row['execution']} | {row['failed']} |||||||")
            continue
        counts = ["-" if row[k] is None else str(row[k]) for k in ("step_launches", "loss_launches")]
        lines.append(
            f"| {row['precision']} | {row['execution']} | {row['step_ms']:.3f} | {row['loss_ms']:.3f} | "
            f"{100 * row['loss_share']:.1f} % | {counts[0]} | {counts[1]} | "
            f"{100 * row['loss_bandwidth_share']:.0f} % | {row['step_peak_mib']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def arguments(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder for the results; default: only print")
    return parser


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="default 15")
    options = parser.parse_args()
    device = torch.device(options.device)
    sizes = QUICK if options.quick else Sizes()
    dataset, rates = sizes.dataset(), machine_rates(device)
    rounds = 3 if options.quick else options.rounds
    rows = [
        row
        for precision in precisions(device)
        for row in measure(sizes, dataset, device, precision, rounds, rates["bytes_per_s"])
    ]
    result = {
        "title": "training step",
        "sizes": str(sizes),
        "environment": environment(device),
        "rates": rates,
        "rows": rows,
    }
    write(result, markdown(result), options.out)


if __name__ == "__main__":
    main()
