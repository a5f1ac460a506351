"""How long the paper's training takes: 20,000 iterations with 10 recordings of up to 750 snippets, two streams of 1024
features and 20 classes, by d2net.training.Trainer as `d2net train` runs it, features resident on the device.

The time is extrapolated from two short runs (their difference is the time of an iteration, the rest that of loading,
warm-up, capture and one checkpoint), unless --full runs all of it. Each row says which. The features are random.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_training_step import QUICK, Sizes, finish, heading, precisions
from harness import arguments, attempt, environment, machine_rates, save, synchronize

from d2net.data.dataset import Dataset
from d2net.training import Trainer

ITERATIONS = 20_000
SHORT = 20  # iterations of the shorter run: beyond the warm-up and the capture


def seconds(
    sizes: Sizes, dataset: Dataset, device: torch.device, precision: str, graph: bool, iterations: int
) -> float:
    """Wall time of a whole run, from the host's features to the checkpoint."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stderr(io.StringIO()):
        begin = time.perf_counter()
        Trainer(
            dataset,
            sizes.recipe(iterations),
            out=Path(out),
            device=device,
            precision=precision,
            resident=True,
            graph=graph,
            save_every=0,
            tensorboard=False,
        ).run()
        synchronize(device)
        return time.perf_counter() - begin


def measure(
    sizes: Sizes, dataset: Dataset, device: torch.device, precision: str, graph: bool, iterations: int, full: bool
) -> dict[str, Any]:
    if full:
        total = seconds(sizes, dataset, device, precision, graph, ITERATIONS)
        return {"seconds": total, "ms_per_iteration": 1e3 * total / ITERATIONS, "how": "measured"}
    seconds(sizes, dataset, device, precision, graph, SHORT)  # libraries load, memory is taken
    short = seconds(sizes, dataset, device, precision, graph, SHORT)
    long = seconds(sizes, dataset, device, precision, graph, SHORT + iterations)
    each = max(long - short, 0) / iterations
    return {
        "seconds": short + each * (ITERATIONS - SHORT),
        "ms_per_iteration": 1e3 * each,
        "how": f"extrapolated from {iterations} iterations",
    }


def markdown(result: dict[str, Any]) -> str:
    lines = heading(result) + [
        "| network | execution | 20,000 iterations | an iteration | how |",
        "|---|---|---:|---:|---|",
    ]
    for row in result["rows"]:
        time_columns = (
            f"- | - | {row['failed'].replace('|', '/')}"
            if "failed" in row
            else f"{row['seconds']:.1f} s | {row['ms_per_iteration']:.3f} ms | {row['how']}"
        )
        lines.append(f"| {row['precision']} | {row['execution']} | {time_columns} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--iterations", type=int, default=200, help="to extrapolate from; default 200")
    parser.add_argument("--full", action="store_true", help="run all 20,000 iterations of every row")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    device = torch.device(options.device)
    sizes = QUICK if options.quick else Sizes()
    iterations = 20 if options.quick else options.iterations
    dataset = sizes.dataset()
    rows: list[dict[str, Any]] = []
    result = {
        "title": "paper schedule",
        "sizes": str(sizes),
        "environment": environment(device),
        "rates": machine_rates(device),
        "rows": rows,
    }
    for precision in precisions(device):
        for graph in [True, False] if device.type == "cuda" else [False]:
            numbers, failed = attempt(
                deadline, measure, sizes, dataset, device, precision, graph, iterations, options.full
            )
            row = {"precision": precision, "execution": "graph" if graph else "eager"}
            rows.append(row | (numbers or {"failed": failed}))
            save(result, markdown(result), options.out)
    finish(result, markdown(result), options.out)


if __name__ == "__main__":
    main()
