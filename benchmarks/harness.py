"""What every benchmark shares: interleaved runs, medians, peak memory, a floor beside each result, tables, a plot.

A benchmark is a file `bench_NAME.py` that makes cases, the two that matter most first, and calls :func:`main`. Machines
are noisy, so in every round each contender of a case runs once, one after the other, and only ratios of medians of one
run are worth quoting. Results are written after every case; a contender that fails is a row with its error.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import gc
import itertools
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

OURS = "d2net"
ROUND_SECONDS = 0.02  # a contender repeats its work within a round until about this much time has passed
SLOW_SECONDS = 2.0  # a contender whose second call takes longer is measured by that call alone
OUT_OF_TIME = "out of time (--seconds)"
COMPILED = "compile"  # in the name of a contender that torch.compile made


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

    Cases are made one after the other, so that a generator holds the data of one at a time. The exit status is 1 where
    ours failed, a case could not be made, or nothing of ours was measured.
    """
    parser = arguments(doc)
    parser.add_argument("--threads", type=int, help="torch.set_num_threads; default: torch's own choice")
    parser.add_argument("--rounds", type=int, default=15, help="default 15")
    parser.add_argument("--first", type=int, metavar="N", help="the first N cases, which matter most; default: all")
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile, which takes many seconds a case")
    parser.add_argument("--no-plot", action="store_true", help="write no plot")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    deadline = time.monotonic() + options.seconds
    device = torch.device(options.device)
    keep_freed_memory()
    gc.freeze()  # what is imported stays, and need not be looked at before every measurement of memory
    rows: list[dict[str, Any]] = []
    result = {"title": title, "rates": machine_rates(device), "environment": environment(device), "rows": rows}
    if options.first:
        result["first"] = options.first
    left = itertools.islice(cases(device, options.quick), options.first)
    while True:
        case, why = attempt(deadline, next, left, None)
        if why:
            result["left_out"] = f"{'what comes after ' + rows[-1]['case'] if rows else 'everything'}: {why}"
        if case is None:
            break
        print(f"{title}: {case.name} …", flush=True)
        rounds = 3 if options.quick else options.rounds
        rows += measure(case, device, rounds, result["rates"], deadline, options.no_compile)
        save(result, markdown(result), options.out)
    print(markdown(result))
    save(result, markdown(result), options.out)
    if options.out and not options.no_plot and any(row["size"] is not None and "ms" in row for row in rows):
        plot(result, options.out / f"{file_name(result)}.png")
    ours = [row.get("failed", "") for row in rows if row["contender"] == OURS]
    failed = [why for why in [result.get("left_out", ""), *ours] if why and not why.endswith(OUT_OF_TIME)]
    sys.exit(bool(failed) or "" not in ours)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to see that it runs")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop measuring after so long; default: never")
    parser.add_argument("--out", type=Path, help="folder for the results; default: only print")
    return parser


class OutOfTime(BaseException):
    """--seconds are up; no Exception, which a contender might catch."""


def attempt(deadline: float, work: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """What ``work(*args)`` returns and "", or None and why it did not end. It is interrupted at ``deadline``."""
    try:
        with until(deadline):
            return work(*args), ""
    except OutOfTime:
        return None, OUT_OF_TIME
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


@contextmanager
def until(deadline: float) -> Iterator[None]:
    """Raise OutOfTime at ``deadline``, of time.monotonic(); a call into a library ends first."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise OutOfTime
    if left == math.inf:
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    # Again every second: Python ignores what is raised in a finalizer or a callback of its garbage collection.
    signal.setitimer(signal.ITIMER_REAL, left, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def file_name(result: dict[str, Any]) -> str:
    return result["title"].replace(" ", "_")


def save(result: dict[str, Any], table: str, out: Path | None) -> None:
    """NAME.json and NAME.md in the folder ``out``, if any: whole files at any time."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    for ending, text in ((".json", json.dumps(result, indent=1) + "\n"), (".md", table)):
        part = out / f"{file_name(result)}{ending}.part"
        part.write_text(text)
        part.replace(part.with_suffix(""))


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


@dataclass
class Timing:
    """A contender and what is known of it."""

    run: Callable[[], Any]
    peak: float = math.nan  # bytes
    repeats: int = 0  # calls in a round
    seconds: list[float] = field(default_factory=list)  # of a call, by round
    failed: str = ""

    def warm_up(self, device: torch.device) -> None:
        """The first call loads, compiles and takes memory, the second gives the peak."""
        clock(self.run, 1, device)
        second: list[float] = []
        self.peak = peak_memory(lambda: second.append(clock(self.run, 1, device)), device)
        if second[0] > SLOW_SECONDS:
            self.seconds = second
        elif second[0] > ROUND_SECONDS:
            self.repeats = 1
        else:
            self.repeats = repeats_in_a_round(self.run, device)


def measure(
    case: Case,
    device: torch.device,
    rounds: int,
    rates: dict[str, float],
    deadline: float = math.inf,
    no_compile: bool = False,
) -> list[dict[str, Any]]:
    """Time and peak memory of every contender of a case; one row each."""
    timings = {name: Timing(run) for name, run in case.contenders.items()}
    for name, timing in timings.items():
        if no_compile and COMPILED in name:
            timing.failed = "left out (--no-compile)"
            continue
        # Half of what is left at most, so that one that takes long to compile leaves time for the cases to come.
        half = (time.monotonic() + deadline) / 2
        _, timing.failed = attempt(deadline if name == OURS else half, timing.warm_up, device)
    for number in range(rounds):
        if number and time.monotonic() > deadline:
            break
        for name, timing in timings.items():
            if timing.repeats and not timing.failed and (number == 0 or name not in case.once):
                seconds, timing.failed = attempt(math.inf, clock, timing.run, timing.repeats, device)
                timing.seconds.append(seconds)
    graph_seconds, _ = attempt(deadline, replayed, timings[OURS].run, device)
    floor = max(case.bytes / rates["bytes_per_s"], case.operations / rates["flops"])
    rows = []
    for name, timing in timings.items():
        row: dict[str, Any] = {"case": case.name, "size": case.size, "contender": name}
        rows.append(row)
        if timing.failed:
            row["failed"] = timing.failed
            continue
        median = statistics.median(timing.seconds)
        row |= {
            "ms": 1e3 * median,
            "ms_quartiles": [1e3 * q for q in quartiles(timing.seconds)],
            "rounds": len(timing.seconds) if timing.repeats else 0,  # 0: a single call
            "peak_mib": timing.peak / 2**20,
            "floor_ms": 1e3 * floor,
            "floor": "bytes" if case.bytes / rates["bytes_per_s"] >= floor else "operations",
        }
        if not timings[OURS].failed:
            row["ratio"] = median / statistics.median(timings[OURS].seconds)
        if name == OURS and graph_seconds:
            row["graph_ms"] = 1e3 * graph_seconds
    return rows


def replayed(run: Callable[[], Any], device: torch.device) -> float | None:
    """Seconds of one call as a replayed CUDA graph: the device's part, without Python and with one launch.

    None on a CPU, and for a call that waits for the device, which no graph can hold.
    """
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    clock(graph.replay, 1, device)
    repeats = repeats_in_a_round(graph.replay, device)
    return statistics.median(clock(graph.replay, repeats, device) for _ in range(5))


def captured(run: Callable[[], Any], generators: Iterable[torch.Generator]) -> Callable[[], None]:
    """``run`` as a CUDA graph; ``generators`` are those on the device that it draws from, besides PyTorch's own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries take memory
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, stream=stream):
        run()

    def replay(_: object = run) -> None:  # what the graph reads lives as long as this function
        graph.replay()

    return replay


def repeats_in_a_round(run: Callable[[], Any], device: torch.device) -> int:
    return max(1, min(1000, int(ROUND_SECONDS / max(clock(run, 1, device), 1e-7))))


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
    """Bytes that one call, not the first, adds to what is in use, at its highest; NaN where the system does not tell.

    On the CPU this is resident memory as the kernel counts it, so small blocks taken from memory that the process
    already holds do not show.
    """
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
    """Bytes moved a second by a copy, and floating-point operations a second of a float32 product."""
    copy, product = copy_rate(device), product_rate(device, "fp32")
    copies, products = zip(*((copy(), product()) for _ in range(7)), strict=True)
    return {"bytes_per_s": statistics.median(copies), "flops": statistics.median(products)}


def copy_rate(device: torch.device) -> Callable[[], float]:
    """A function that measures how many bytes a second a copy of 128 MiB reads and writes."""
    repeats = 20 if device.type == "cuda" else 2
    source = torch.ones(2**25, device=device)
    target = torch.empty_like(source)
    return lambda: 2 * source.nbytes / clock(lambda: target.copy_(source), repeats, device)


def product_rate(device: torch.device, precision: str) -> Callable[[], float]:
    """A function that measures the floating-point operations a second of a large matrix product.

    Args:
        device: Where.
        precision: "fp32", "bf16", or "tf32" on a GPU.
    """
    # On a GPU so large that a launch and the wait for it are nothing beside it.
    side, repeats = (8192, 3) if device.type == "cuda" else (1024, 2)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Of random numbers: a GPU computes faster with zeros, which take less power.
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def measured() -> float:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        try:
            return 2 * side**3 / clock(lambda: torch.mm(a, b, out=out), repeats, device)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    measured()  # libraries load
    return measured


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
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["architecture"] = f"{properties.major}{properties.minor}"
        found["l2_mib"] = properties.L2_cache_size / 2**20
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
    on_gpu = where["device"] != "cpu"
    graph_heading, graph_rule = (" as a graph |", "---:|") if on_gpu else ("", "")
    lines = [
        f"### {result['title']}",
        "",
        f"{where['device'] if on_gpu else where['processor']}, {where['threads']} threads, "
        f"torch {where['torch']}, commit {where['commit']}, {where['date'][:10]}; copy bandwidth "
        f"{rates['bytes_per_s'] / 1e9:.1f} GB/s, float32 product {rates['flops'] / 1e9:.0f} GFLOP/s"
        + (f"; L2 cache {where['l2_mib']:.0f} MiB" if on_gpu else ""),
        "",
        f"| case | contender | ms (median) |{graph_heading} times ours | peak memory | floor ms |",
        f"|---|---|---:|{graph_rule}---:|---:|---:|",
    ]
    for row in result["rows"]:
        begin = f"| {row['case']} | {row['contender']} |"
        if "failed" in row:
            lines.append(f"{begin} {row['failed'].replace('|', '/')[:160]} |||{'|' if on_gpu else ''}|")
            continue
        graph = (f" {row['graph_ms']:.3f} |" if "graph_ms" in row else " |") if on_gpu else ""
        lines.append(
            f"{begin} {row['ms']:.3f}{'' if row['rounds'] else ' (one call)'} |{graph} "
            f"{format(row['ratio'], '.1f') if 'ratio' in row else '-'} | "
            f"{row['peak_mib']:.1f} MiB | {row['floor_ms']:.3f} ({row['floor']}) |"
        )
    if "first" in result:
        lines += ["", f"Only the first {result['first']} cases were asked for (--first)."]
    if "left_out" in result:
        lines += ["", f"Left out: {result['left_out']}."]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Cost against size, both axes logarithmic, one line a contender, with the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in result["rows"] if row["size"] is not None and "ms" in row]
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


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile(function), made by the first call: loading the compiler alone takes seconds."""
    make = functools.cache(lambda: torch.compile(function))
    return lambda *args, **options: make()(*args, **options)


def forward_backward(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], None]:
    """A contender that runs ``function`` on leaves made of ``inputs`` and the gradient of its output's sum to each."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def run() -> None:
        out = function(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run
