"""How long the paper's training takes: 20,000 iterations with 10 recordings of up to 750 snippets, two streams of 1024
features and 20 classes, by d2net.training.Trainer as `d2net train` runs it, features resident on the device.

Start is the time from the features in the host's memory until the first 10 iterations are done and checked: loading,
warm-up, the first graphs. The rate is that of the iterations after it. Beside it that of the bare step, measured in the
same run as bench_training_step.py does, without what a Trainer does around a step.

The time of 20,000 iterations is extrapolated from a few hundred, at the rate of their second half, unless --full runs
all of them. Each row says which. Lengths are THUMOS14's or all full. The features are random.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_training_step import WARM_UP_STEPS, failure, finish, heading, whole_epochs
from harness import arguments, attempt, clock, environment, machine_rates, save, synchronize
from training_sizes import EXECUTIONS, Sizes, add_options, chosen, prepare

from d2net.data.dataset import Dataset
from d2net.training import Trainer

ITERATIONS = 20_000
TOLD_EVERY = 10  # iterations between two reports of a Trainer


class Run(NamedTuple):
    """A whole run.

    Attributes:
        seconds: From the host's features to the checkpoint.
        reports: (iterations done, seconds) at each report; the device had finished them.
    """

    seconds: float
    reports: list[tuple[int, float]]

    def each(self, since: int) -> float:
        """Seconds of an iteration, between the first report from iteration ``since`` on and the last one."""
        first = next(report for report in self.reports if report[0] >= since)
        last = self.reports[-1]
        return (last[1] - first[1]) / (last[0] - first[0])


def run(sizes: Sizes, dataset: Dataset, device: torch.device, precision: str, graph: bool, iterations: int) -> Run:
    reports: list[tuple[int, float]] = []
    gc.collect()
    with tempfile.TemporaryDirectory() as out:
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
            progress=lambda done, _: reports.append((done, time.perf_counter() - begin)),
        ).run()
        synchronize(device)
        return Run(time.perf_counter() - begin, reports)


def measure(
    sizes: Sizes, dataset: Dataset, device: torch.device, precision: str, graph: bool, iterations: int
) -> dict[str, Any]:
    """The numbers of one row; ``iterations`` are run, and the rest is extrapolated."""
    found = run(sizes, dataset, device, precision, graph, iterations)
    full = iterations == ITERATIONS
    each = found.each(0 if full else iterations // 2)
    bare = bare_step(sizes, dataset, device, precision, graph)
    return {
        "seconds": found.seconds + each * (ITERATIONS - iterations),
        "how": "measured" if full else f"extrapolated from {iterations} iterations",
        "start_seconds": found.reports[0][1],
        "iterations_per_s": 1 / each,
        "bare_iterations_per_s": 1 / bare,
        "bare_share": bare / each,
    }


def bare_step(sizes: Sizes, dataset: Dataset, device: torch.device, precision: str, graph: bool) -> float:
    """Seconds of a step, the mean over whole epochs."""
    training = prepare(sizes, dataset, device, precision, graph)
    steps = whole_epochs(WARM_UP_STEPS if device.type == "cuda" else 1, training.epoch)
    clock(training.step, steps, device)  # warm-up
    return statistics.median(clock(training.step, steps, device) for _ in range(3 if device.type == "cuda" else 1))


def markdown(result: dict[str, Any]) -> str:
    lines = heading(result) + [
        "| lengths | network | execution | 20,000 iterations | start to iteration 10 | it/s | bare step, it/s | "
        "share | how |",
        "|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in result["rows"]:
        begin = f"| {row['lengths']} | {row['precision']} | {row['execution']} |"
        if "failed" in row:
            lines.append(f"{begin} - | - | - | - | - | {failure(row)} |")
            continue
        lines.append(
            f"{begin} {row['seconds']:.1f} s | {row['start_seconds']:.2f} s | {row['iterations_per_s']:.1f} | "
            f"{row['bare_iterations_per_s']:.1f} | {100 * row['bare_share']:.0f} % | {row['how']} |"
        )
    if "first_start_seconds" in result:
        lines += ["", f"Start to iteration 10 of the first run of this process: {result['first_start_seconds']:.2f} s."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--iterations", type=int, help="to extrapolate from; default 400, on a CPU 40")
    parser.add_argument("--full", action="store_true", help="run all 20,000 iterations of every row")
    add_options(parser, EXECUTIONS)
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    device = torch.device(options.device)
    sizes, lengths, precisions, executions = chosen(options, device)
    some = options.iterations or (400 if device.type == "cuda" else 40)
    iterations = ITERATIONS if options.full else max(some, 4 * TOLD_EVERY)
    rows: list[dict[str, Any]] = []
    result = {
        "title": "paper schedule",
        "sizes": str(sizes),
        "environment": environment(device),
        "rates": machine_rates(device),
        "rows": rows,
    }
    datasets = {name: sizes.dataset(name) for name in lengths}
    # Libraries load in the first run, which is of no row.
    first, _ = attempt(
        deadline, run, sizes, datasets[lengths[0]], device, precisions[0], executions[:1] == ["graph"], 2 * TOLD_EVERY
    )
    if first is not None:
        result["first_start_seconds"] = first.reports[0][1]
    for execution, precision, name in product(executions, precisions, lengths):
        numbers, failed = attempt(
            deadline, measure, sizes, datasets[name], device, precision, execution == "graph", iterations
        )
        row = {"lengths": name, "precision": precision, "execution": execution}
        rows.append(row | (numbers or {"failed": failed}))
        save(result, markdown(result), options.out)
    finish(result, markdown(result), options.out)


if __name__ == "__main__":
    main()
