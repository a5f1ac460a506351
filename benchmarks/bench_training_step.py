"""A training step of D2-Net beside its floor: time, the loss's share of it, launches, peak memory; and plain PyTorch.

A step is what d2net.training.Trainer does in an iteration: gathering the next batch, network, loss, backward pass and
Adam. It is the mean over whole epochs, in which every recording is drawn once, of THUMOS14's lengths or of recordings
that are all as long as the longest batch. The loss is measured alone too, forward and backward, on the activations of
one batch after the other. The floor (training_floor.py) is that of the very batches, at rates measured between them.

Peers on the same recordings (peers/plain_training.py): the authors' formulation, a padded network and a loss that loops
over recordings, and the same with the loss in batched PyTorch. The features are random numbers.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from harness import (
    OUT_OF_TIME,
    arguments,
    attempt,
    clock,
    copy_rate,
    environment,
    machine_rates,
    peak_memory,
    product_rate,
    save,
    synchronize,
)
from peers.plain_training import PlainTraining
from training_floor import Network, floor, moved
from training_sizes import EXECUTIONS, Drawn, Sizes, add_options, chosen, prepare

from d2net.data.dataset import Dataset

LAUNCH_CALLS = ("cudaLaunch", "cuLaunch", "cudaMemcpy", "cudaMemset")  # what the profiler calls them, graphs included
PEERS = {"loops": "PyTorch, loops over recordings", "batched": "PyTorch, batched loss"}
WARM_UP_STEPS = 600  # of graphs: enough to meet nearly every size, each of which has one of its own, twice
LEAST_STEPS = 50  # in a round, rounded up to whole epochs


class Training(Protocol):
    """What is timed: :class:`training_sizes.Prepared`, or a peer."""

    @property
    def drawn(self) -> list[Drawn]: ...

    @property
    def epoch(self) -> int: ...

    def step(self) -> Any: ...

    def loss(self) -> Callable[[], Any]: ...


def make(sizes: Sizes, dataset: Dataset, device: torch.device, precision: str, execution: str) -> Training:
    if execution in PEERS:
        return PlainTraining(sizes, dataset, device, precision, execution == "batched")
    return prepare(sizes, dataset, device, precision, execution == "graph")


def measure(
    sizes: Sizes,
    dataset: Dataset,
    device: torch.device,
    precision: str,
    execution: str,
    rounds: int,
) -> dict[str, Any]:
    """The numbers of one row."""
    on_gpu, peer = device.type == "cuda", execution in PEERS
    copy, product_of_matrices = copy_rate(device), product_rate(device, precision)
    before = reserved(device)
    training = make(sizes, dataset, device, precision, execution)
    for _ in range(whole_epochs(WARM_UP_STEPS if on_gpu and not peer else 3, training.epoch)):
        training.step()
    synchronize(device)
    memory = {}
    if on_gpu and not peer:  # a peer's batches would count, which lie there beforehand
        memory["reserved_mib"] = (torch.cuda.max_memory_reserved(device) - before) / 2**20
    loss = training.loss()
    for _ in range(training.epoch):
        loss()
    steps = training.epoch if peer or not on_gpu else whole_epochs(LEAST_STEPS, training.epoch)
    training.drawn.clear()
    measured = [  # in turn: machines are noisy
        (clock(training.step, steps, device), clock(loss, training.epoch, device), product_of_matrices(), copy())
        for _ in range(rounds)
    ]
    step_seconds, loss_seconds, flops, bytes_per_s = (statistics.median(x) for x in zip(*measured, strict=True))

    drawn = list(training.drawn)
    rows, computed = (statistics.fmean(x) for x in zip(*drawn, strict=True))
    network = Network.of(sizes.width, sizes.classes, sizes.recipe(1).model)
    bound = floor(network, rows, precision, flops, bytes_per_s)
    parts = moved(network, rows, precision)
    return {
        "step_ms": 1e3 * step_seconds,
        "steps": steps,
        "rounds": rounds,
        "snippets": rows,
        "rows": computed,
        "filler_share": 1 - rows / computed,
        "flops": flops,
        "bytes_per_s": bytes_per_s,
        "floor_ms": 1e3 * bound.seconds,
        "floor_products_ms": 1e3 * bound.products,
        "floor_bytes_ms": 1e3 * bound.rest,
        "flop": bound.flop,
        "bytes": parts,
        "times_floor": step_seconds / bound.seconds,
        "loss_ms": 1e3 * loss_seconds,
        "loss_share": loss_seconds / step_seconds,
        "loss_bandwidth_share": parts["loss"] / loss_seconds / bytes_per_s,
        "step_launches": launches(training.step, device),
        "loss_launches": launches(loss, device),
        "step_peak_mib": peak_memory(training.step, device) / 2**20,
        **memory,
    }


def whole_epochs(steps: int, epoch: int) -> int:
    return -(-steps // epoch) * epoch


def reserved(device: torch.device) -> int:
    """Bytes that PyTorch holds on a GPU, from where on the peak counts."""
    if device.type != "cuda":
        return 0
    gc.collect()  # the row before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_reserved(device)


def launches(run: Callable[[], Any], device: torch.device) -> int | None:
    """Kernels, copies, fills and graphs that the host launches in a call, the least of three; None on a CPU."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    counts = []
    for _ in range(3):
        synchronize(device)
        with torch.profiler.profile(activities=activities) as profile:
            run()
            synchronize(device)
        counts.append(sum(event.name.startswith((*LAUNCH_CALLS, "cudaGraphLaunch")) for event in profile.events()))
    return min(counts)


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


def failure(row: dict[str, Any]) -> str:
    return row["failed"].replace("|", "/")


def markdown(result: dict[str, Any]) -> str:
    """Times, what they are of, and the bytes that the floor counts."""
    done = [row for row in result["rows"] if "failed" not in row]
    lines = heading(result) + [
        "| lengths | network | execution | step ms | floor ms = products + bytes | step / floor | loss ms | "
        "loss / step | launches: step | loss | loss GB/s / copy | step MiB | reserved MiB |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        begin = f"| {row['lengths']} | {row['precision']} | {PEERS.get(row['execution'], row['execution'])} |"
        if "failed" in row:
            lines.append(f"{begin} {failure(row)} ||||||||||")
            continue
        counts = [row[key] or "-" for key in ("step_launches", "loss_launches")]
        lines.append(
            f"{begin} {row['step_ms']:.3f} | {row['floor_ms']:.3f} = {row['floor_products_ms']:.3f} + "
            f"{row['floor_bytes_ms']:.3f} | {row['times_floor']:.2f} | {row['loss_ms']:.3f} | "
            f"{100 * row['loss_share']:.1f} % | {counts[0]} | {counts[1]} | "
            f"{100 * row['loss_bandwidth_share']:.0f} % | {row['step_peak_mib']:.0f} | "
            f"{format(row['reserved_mib'], '.0f') if 'reserved_mib' in row else '-'} |"
        )
    lines += [
        "",
        "| lengths | network | execution | snippets a batch | rows computed | of them padding, gaps, rounding | "
        "floor: GFLOP | MB | a product, TFLOP/s | a copy, GB/s |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in done:
        named = (row["lengths"], row["precision"], PEERS.get(row["execution"], row["execution"]))
        size = (row["snippets"], row["rows"], 100 * row["filler_share"])
        work = (row["flop"] / 1e9, sum(row["bytes"].values()) / 1e6, row["flops"] / 1e12, row["bytes_per_s"] / 1e9)
        cells = [*named, "{:.0f} | {:.0f} | {:.1f} %".format(*size), *(f"{x:.3g}" for x in work)]
        lines.append(f"| {' | '.join(cells)} |")
    columns = {f"{row['lengths']}, {row['precision']}": row["bytes"] for row in done}
    lines += ["", f"| bytes of the floor, MB a step | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name in next(iter(columns.values()), {}):
        lines.append(f"| {name} | {' | '.join(f'{parts[name] / 1e6:.3g}' for parts in columns.values())} |")
    lines.append(f"| all | {' | '.join(f'{sum(parts.values()) / 1e6:.3g}' for parts in columns.values())} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, help="default 5, on a CPU 3")
    add_options(parser, (*EXECUTIONS, *PEERS))
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    device = torch.device(options.device)
    sizes, lengths, precisions, executions = chosen(options, device)
    rounds = options.rounds or (5 if device.type == "cuda" else 3)
    rows: list[dict[str, Any]] = []
    result = {
        "title": "training step",
        "sizes": str(sizes),
        "environment": environment(device),
        "rates": machine_rates(device),
        "rows": rows,
    }
    datasets = {name: sizes.dataset(name) for name in lengths}
    for execution, precision, name in product(executions, precisions, lengths):  # peers last
        numbers, failed = attempt(deadline, measure, sizes, datasets[name], device, precision, execution, rounds)
        row = {"lengths": name, "precision": precision, "execution": execution}
        rows.append(row | (numbers or {"failed": failed}))
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
