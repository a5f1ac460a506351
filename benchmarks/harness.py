"""What every benchmark shares: interleaved runs, medians, peak memory, a floor beside each result, tables, a plot.

A benchmark is a file `bench_NAME.py` that makes cases and calls :func:`main`. Machines are noisy, so in every round
each contender of a case runs once, one after the other, and only ratios of medians of one run are worth quoting.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

OURS = "d2net"
ROUND_SECONDS = 0.02  # a contender repeats its work within a round until about this much time has passed


@dataclass(frozen=True)
class Case:
    """One size of one piece of work.

    Attributes:
        name: the size, such as "B=10 T=750 C=20".
        contenders: what does the work, by name; :data:`OURS` is ours. Each is called without arguments.
        bytes: what must cross memory at least once: inputs read, outputs written, forward and backward.
        operations: floating-point operations that the work cannot do without, where they could be the floor.
        size: x of the plot of cost against size; None: not plotted.
        once: contenders so slow that one round is enough.
    """

    name: str
    contenders: dict[str, Callable[[], Any]]
    bytes: int = 0
    operations: int = 0
    size: int | None = None
    once: frozenset[str] = field(default_factory=frozenset)


def main(title: str, cases: Callable[[torch.device, bool], Iterable[Case]], doc: str | None = None) -> None:
    """Command line of a benchmark: run ``cases(device, quick)``, print a table, write JSON, Markdown and plot.

    Cases are made one after the other, so that a generator holds the data of one at a time.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads; default: torch's own choice")
    parser.add_argument("--rounds", type=int, default=15, help="default 15")
    parser.add_argument("--quick", action="store_true", help="small sizes and three rounds, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder for NAME.json, NAME.md and NAME.png; default: only print")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    keep_freed_memory()
    rates = machine_rates(device)
    rows = []
    for case in cases(device, arguments.quick):
        print(f"{title}: {case.name} …", flush=True)
        rows += measure(case, device, 3 if arguments.quick else arguments.rounds, rates)
    result = {"title": title, "environment": environment(device), "rates": rates, "rows": rows}
    table = markdown(result)
    print(table)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        name = title.replace(" ", "_")
        (arguments.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (arguments.out / f"{name}.md").write_text(table)
        if any(row["size"] is not None for row in rows):
            plot(result, arguments.out / f"{name}.png")


def keep_freed_memory() -> None:
    """Have glibc keep blocks of up to 32 MiB that were freed, for all contenders alike.

    By itself it gives memory back to the system, and pays for every page anew in the next call, or does not, as what
    ran before decides: the same contender then takes twice as long in one case as in the next.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 2**31 - 1)


def measure(case: Case, device: torch.device, rounds: int, rates: dict[str, float]) -> list[dict[str, Any]]:
    """Time and peak memory of every contender of a case; one row each."""
    repeats, memory = {}, {}
    for name, run in case.contenders.items():
        memory[name] = peak_memory(run, device)  # also warms up
        elapsed = clock(run, 1, device)
        repeats[name] = max(1, min(1000, int(ROUND_SECONDS / max(elapsed, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in case.contenders}
    for number in range(rounds):
        for name, run in case.contenders.items():
            if number == 0 or name not in case.once:
                times[name].append(clock(run, repeats[name], device))
    medians = {name: statistics.median(t) for name, t in times.items()}
    floor = max(case.bytes / rates["bytes_per_s"], case.operations / rates["flops"])
    return [
        {
            "case": case.name,
            "size": case.size,
            "contender": name,
            "ms": 1e3 * medians[name],
            "ms_quartiles": [1e3 * q for q in quartiles(times[name])],
            "rounds": len(times[name]),
            "ratio": medians[name] / medians[OURS],
            "peak_mib": memory[name] / 2**20,
            "floor_ms": 1e3 * floor,
            "floor": "bytes" if case.bytes / rates["bytes_per_s"] >= floor else "operations",
        }
        for name in case.contenders
    ]


def clock(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Seconds of one call, averaged over ``repeats``; waits for the device at both ends."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - begin) / repeats


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(run: Callable[[], Any], device: torch.device) -> float:
    """Bytes that one call adds to what is in use, at its highest; NaN where the system does not tell.

    On the CPU this is resident memory as the kernel counts it, so small blocks taken from memory that the process
    already holds do not show.
    """
    run()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except (OSError, AttributeError):
        return float("nan")
    before = resident("VmRSS")
    run()
    return float(max(0, resident("VmHWM") - before))


def resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def machine_rates(device: torch.device) -> dict[str, float]:
    """Bytes moved a second by a copy of 128 MiB and floating-point operations a second of a float32 product."""
    source = torch.ones(2**25, device=device)
    target = torch.empty_like(source)
    square = torch.ones(1024, 1024, device=device)
    out = torch.empty_like(square)
    copies, products = [], []
    for _ in range(7):
        copies.append(clock(lambda: target.copy_(source), 2, device))
        products.append(clock(lambda: torch.mm(square, square, out=out), 2, device))
    return {
        "bytes_per_s": 2 * 4 * len(source) / statistics.median(copies),
        "flops": 2 * 1024**3 / statistics.median(products),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what a result was measured."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
        except OSError:
            return ""

    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": os.environ.get("D2NET_COMMIT") or output("git", "describe", "--always", "--dirty") or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": next(
            (line.split(":")[1].strip() for line in output("lscpu").splitlines() if "Model name" in line), ""
        ),
        "threads": torch.get_num_threads(),
        "device": "cpu",
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["driver"] = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["cuda"] = torch.version.cuda
    return found


def quartiles(values: list[float]) -> list[float]:
    """First and third quartile; the value itself, twice, where there is one."""
    if len(values) < 2:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4)
    return [first, third]


def markdown(result: dict[str, Any]) -> str:
    """One table: time of each contender, how many times ours it takes, memory, and the floor."""
    where, rates = result["environment"], result["rates"]
    lines = [
        f"### {result['title']}",
        "",
        f"{where['device'] if where['device'] != 'cpu' else where['processor']}, {where['threads']} threads, "
        f"torch {where['torch']}, commit {where['commit']}, {where['date'][:10]}; copy bandwidth "
        f"{rates['bytes_per_s'] / 1e9:.1f} GB/s, float32 product {rates['flops'] / 1e9:.0f} GFLOP/s",
        "",
        "| case | contender | ms (median) | times ours | peak memory | floor ms |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['case']} | {row['contender']} | {row['ms']:.3f} | {row['ratio']:.1f} | "
            f"{row['peak_mib']:.1f} MiB | {row['floor_ms']:.3f} ({row['floor']}) |"
        )
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Cost against size, both axes logarithmic, one line a contender, with the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in result["rows"] if row["size"] is not None]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in dict.fromkeys(row["contender"] for row in rows):
        points = sorted((row["size"], row["ms"]) for row in rows if row["contender"] == name)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=2 if name == OURS else 1, label=name)
    floor = sorted({(row["size"], row["floor_ms"]) for row in rows if row["floor_ms"] > 0})
    if floor:
        axes.plot(*zip(*floor, strict=True), color="0.6", linestyle="--", label="floor")
    axes.set(xscale="log", yscale="log", xlabel="size", ylabel="ms (median)", title=result["title"])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def forward_backward(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], None]:
    """A contender that runs ``function`` on leaves made of ``inputs`` and the gradient of its output's sum to each."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def run() -> None:
        out = function(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run
