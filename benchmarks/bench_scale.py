"""Training in several processes, measured: a batch that is divided (strong) and one that grows with them (weak).

    python benchmarks/bench_scale.py --out benchmarks/results/cpu     # 1, 2 and 4 processes on the CPU, by gloo
    python benchmarks/bench_scale.py --device cuda --out FOLDER       # 1 and 2 on one GPU, by gloo
    python benchmarks/scale_model.py --page                           # puts the tables into docs/scale.md

A step is what `d2net train` does in an iteration: reading and packing the batch, network, loss with its gathers,
backward with the all-reduce of DistributedDataParallel, Adam, and in every tenth the all-reduce that lets all stop
together. Each process computes in one thread. In every round each row runs one epoch, in turn, so all train on the same
recordings; a figure is the median over the rounds. "plain DDP" leaves out the gather: each process the loss of its own
recordings, which is another method, to see what the gather costs.

Shares are of trainings of their own, in which all processes wait for each other before every gather, so that waiting
and sending can be told apart. The all-reduce's is the time from the moment when the last gradient is there to the end
of the backward: what is sent before costs no time, if it takes none from computing. Features are random numbers.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from harness import arguments, environment, quartiles, save
from training_sizes import ON_CPU, QUICK, Sizes

from d2net.data.deal import Share, Window
from d2net.distributed import ALONE, Ranks, of_group
from d2net.training import Trainer
from d2net.training.together import Decisions, in_parallel

LENGTHS = "THUMOS14"
RECORDINGS = 40  # an epoch: four batches of 10, or one of 40
LOOKED_AT = 2  # rounds whose shares are taken
DEALT = (8, 64)  # ranks whose dealing is timed, with as many recordings as of the paper for each
PARTS = {
    "wait": "waiting for the others at a gather",
    "gather": "gathers",
    "all_reduce": "all-reduce after the backward",
    "control": "control",
}


class Run(NamedTuple):
    """A row: a training in ``ranks`` processes.

    Attributes:
        kind: "strong", "weak" or "plain", which is strong without the gather.
        ranks: How many.
        sizes: Of the training; their batch is that of all processes.
    """

    kind: str
    ranks: int
    sizes: Sizes


class Counted(NamedTuple):
    """Seconds of this process in an epoch, by what took them."""

    seconds: float
    steps: int
    parts: dict[str, float]


class Training:
    """Of one process."""

    def __init__(self, run: Run, looks: bool, device: str, precision: str) -> None:
        ranks = ALONE if run.ranks == 1 else of_group(nccl=False)
        with tempfile.TemporaryDirectory() as out:
            self.trainer = Trainer(
                run.sizes.dataset(LENGTHS),
                run.sizes.recipe(1),
                out=Path(out),
                device=device,
                precision=precision,
                graph=False if device != "cpu" else None,
                tensorboard=False,
                ranks=ranks,
            )
        trainer, self.device, self.ranks = self.trainer, torch.device(device), ranks
        self.epoch = len(trainer.dataset) // trainer.sampler.batch_size
        self.decisions, self.iteration = Decisions(ranks, 0), 0
        self.parts = dict.fromkeys(PARTS, 0.0)
        if run.ranks > 1:
            trainer.network = in_parallel(trainer.model, self.device)
        if run.kind == "plain":
            update = trainer.update
            trainer.update = lambda batch, denoise: update(batch._replace(whole=None), denoise)  # type: ignore[method-assign]
        self.looks = looks and run.ranks > 1
        if self.looks:
            self._look()
        trainer.model.train()
        trainer.loss.train()

    def _look(self) -> None:
        """Time what the processes say to each other."""
        gather, step, last = dist.all_gather, self.trainer.state.optimizer.step, [0.0]

        def timed_gather(*arguments: Any) -> None:
            begin = time.perf_counter()
            dist.barrier()
            middle = time.perf_counter()
            gather(*arguments)
            self.parts["wait"] += middle - begin
            self.parts["gather"] += time.perf_counter() - middle

        def hook(_, bucket):  # PyTorch reads annotations, and takes no text for one
            last[0] = time.perf_counter()
            sent = dist.all_reduce(bucket.buffer().div_(self.ranks.size), async_op=True)
            return sent.get_future().then(lambda done: done.value()[0])

        def timed_step() -> None:
            self.parts["all_reduce"] += time.perf_counter() - last[0]
            step()

        self.gather = timed_gather
        self.trainer.network.register_comm_hook(None, hook)  # type: ignore[operator]
        self.trainer.state.optimizer.step = timed_step  # type: ignore[method-assign]

    def run(self) -> Counted:
        """An epoch."""
        if self.ranks.size > 1:
            dist.barrier()
        self.parts = dict.fromkeys(PARTS, 0.0)
        before = dist.all_gather
        if self.looks:
            dist.all_gather = self.gather
        try:
            begin = time.perf_counter()
            for _ in range(self.epoch):
                self._step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return Counted(time.perf_counter() - begin, self.epoch, self.parts)
        finally:
            dist.all_gather = before

    def _step(self) -> None:
        trainer = self.trainer
        if trainer.resident is None:
            trainer.update(trainer.sampler.next().to(self.device), True)
        else:
            trainer.update_resident(trainer.resident.rows(trainer.sampler.windows(trainer.resident.lengths)), True)
        self.iteration += 1
        begin = time.perf_counter()
        self.decisions.take(self.iteration, False, False, now=False)
        self.parts["control"] += time.perf_counter() - begin


def work(pipe: Connection, rank: int, size: int, store: str, device: str, precision: str) -> None:
    """A process, until the pipe ends: it makes trainings by name, and runs an epoch of one that it is told."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    trainings: dict[str, Training] = {}
    while True:
        try:
            what, name, *arguments = pipe.recv()
        except EOFError:
            break
        try:
            if what == "make":
                trainings[name] = Training(*arguments, device, precision)
                pipe.send(None)
            elif what == "run":
                pipe.send(trainings[name].run())
            else:
                trainings.clear()
                pipe.send(None)
        except Exception:
            pipe.send(traceback.format_exc())
    if size > 1:
        dist.destroy_process_group()


class Processes:
    """As many as the rows need, of each number of ranks a group; those that are not told to run wait."""

    def __init__(self, numbers: list[int], device: str, precision: str) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: dict[int, list[Connection]] = {}
        self._processes = []
        for size in numbers:
            for rank in range(size):
                mine, theirs = context.Pipe()
                store = f"{self._folder.name}/{size}"
                process = context.Process(target=work, args=(theirs, rank, size, store, device, precision), daemon=True)
                process.start()
                theirs.close()
                self._pipes.setdefault(size, []).append(mine)
                self._processes.append(process)

    def tell(self, size: int, *message: Any) -> list[Any]:
        """What each rank of that group answers."""
        for pipe in self._pipes[size]:
            pipe.send(message)
        answers = [pipe.recv() for pipe in self._pipes[size]]
        failed = [text for text in answers if isinstance(text, str)]
        if failed:
            raise RuntimeError(failed[0])
        return answers

    def end(self) -> None:
        for pipes in self._pipes.values():
            for pipe in pipes:
                pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()
        self._folder.cleanup()


def measure(processes: Processes, runs: list[Run], rounds: int) -> list[dict[str, Any]]:
    """A row each."""
    names = [f"{run.kind} {run.ranks}" for run in runs]
    for name, run in zip(names, runs, strict=True):
        for ending, looks in (("", False), (" looked at", True)):
            if not looks or run.ranks > 1:
                processes.tell(run.ranks, "make", name + ending, run, looks)
                processes.tell(run.ranks, "run", name + ending)  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in names}
    parts: dict[str, list[Counted]] = {name: [] for name in names}
    for number in range(rounds):
        for name, run in zip(names, runs, strict=True):
            counted = processes.tell(run.ranks, "run", name)
            seconds[name].append(max(x.seconds / x.steps for x in counted))
            if run.ranks > 1 and number < LOOKED_AT:
                parts[name] += processes.tell(run.ranks, "run", f"{name} looked at")
    alone = statistics.median(seconds[names[0]])
    rows = []
    for name, run in zip(names, runs, strict=True):
        step = statistics.median(seconds[name])
        ideal = alone if run.kind == "weak" else alone / run.ranks
        row = {
            "width": run.sizes.width,
            "kind": run.kind,
            "ranks": run.ranks,
            "recordings": run.sizes.batch,
            "step_ms": 1e3 * step,
            "step_ms_quartiles": [1e3 * q for q in quartiles(seconds[name])],
            "iterations_per_s": 1 / step,
            "recordings_per_s": run.sizes.batch / step,
            "efficiency": ideal / step,
            "speedup": run.ranks * ideal / step,
        }
        if parts[name]:
            each = [{key: x.parts[key] / x.seconds for key in PARTS} for x in parts[name]]
            row["shares"] = {key: statistics.fmean(x[key] for x in each) for key in PARTS}
        rows.append(row)
    for name in {run.ranks for run in runs}:
        processes.tell(name, "forget", "")
    return rows


def dealing(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of Python in which a rank finds which recordings of a batch are its own, and where they lie."""
    known, found = Sizes().lengths(LENGTHS), []
    for ranks in DEALT:
        batch = Sizes().batch * ranks
        windows = [Window(i, 0, min(known[i % len(known)], Sizes().snippets)) for i in range(batch)]
        seconds = []
        for _ in range(rounds):
            begin = time.perf_counter()
            Share(windows, Ranks(size=ranks)).row_numbers(8192, 1)
            seconds.append(time.perf_counter() - begin)
        found.append({"ranks": ranks, "recordings": batch, "ms": 1e3 * statistics.median(seconds)})
    return found


# --- tables

KINDS = {"strong": "divided", "weak": "grows", "plain": "divided, plain DDP"}


def rates_table(result: dict[str, Any]) -> str:
    lines = [
        "| two streams of | the batch | processes | recordings a batch | step, ms | quartiles | iterations / s | "
        "recordings / s | times one process | efficiency |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        quarter = "{:.1f} to {:.1f}".format(*row["step_ms_quartiles"])
        kind = "one process" if row["ranks"] == 1 else KINDS[row["kind"]]
        cells = [row["width"], kind, row["ranks"], row["recordings"], f"{row['step_ms']:.1f}", quarter]
        cells += [f"{row['iterations_per_s']:.2f}", f"{row['recordings_per_s']:.0f}"]
        cells += [f"{row['speedup']:.2f}", f"{100 * row['efficiency']:.0f} %"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def shares_table(result: dict[str, Any]) -> str:
    lines = [
        f"| two streams of | the batch | processes | {' | '.join(PARTS.values())} |",
        "|---|---|---:|" + "---:|" * len(PARTS),
    ]
    for row in result["rows"]:
        if "shares" in row:
            cells = [f"{100 * row['shares'][name]:.1f} %" for name in PARTS]
            lines.append(f"| {row['width']} | {KINDS[row['kind']]} | {row['ranks']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def dealing_in_words(result: dict[str, Any]) -> str:
    return ", ".join(f"{x['recordings']} recordings to {x['ranks']} ranks {x['ms']:.2f} ms" for x in result["dealing"])


def in_words(result: dict[str, Any]) -> str:
    """One line: the efficiency of two processes, for each network."""
    of = {(row["width"], row["kind"], row["ranks"]): row["efficiency"] for row in result["rows"]}
    shares = "; ".join(
        f"{100 * of[width, 'strong', 2]:.0f} % of one batch divided and {100 * of[width, 'weak', 2]:.0f} % of one that "
        f"grows, two streams of {width}"
        for width in sorted({row["width"] for row in result["rows"]}, reverse=True)
    )
    return f"efficiency of 2 processes on {result['cores']} CPU cores: {shares}"


def markdown(result: dict[str, Any]) -> str:
    where = result["environment"]
    name = where["device"] if where["device"] != "cpu" else f"{where['processor']}, {result['cores']} cores"
    lines = [
        f"### {result['title']}",
        "",
        f"{name}, one thread a process, torch {where['torch']}, commit {where['commit']}, {where['date'][:10]}; "
        f"{result['sizes']}; {result['rounds']} rounds",
        "",
        rates_table(result),
        shares_table(result),
        f"Dealing a batch in Python, in every process and step: {dealing_in_words(result)}.",
    ]
    return "\n".join(lines) + "\n"


def runs_of(sizes: Sizes, numbers: list[int]) -> list[Run]:
    many = [n for n in numbers if n > 1]
    return [
        Run("strong", 1, sizes),
        *(Run("strong", n, sizes) for n in many),
        *(Run("weak", n, sizes._replace(batch=sizes.batch * n)) for n in many),
        *(Run("plain", n, sizes) for n in many),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, help="default 7, with --quick 2")
    parser.add_argument("--ranks", type=int, nargs="+", help="processes; 1 is always among them; default 2 4, cuda 2")
    parser.add_argument("--width", type=int, nargs="+", help="of a stream; default 128 512, cuda 1024")
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    numbers = sorted({1, *(options.ranks or ([2] if on_gpu else [2, 4]))})
    sizes = QUICK._replace(recordings=8) if options.quick else ON_CPU._replace(recordings=RECORDINGS)
    widths = options.width or ([sizes.width] if options.quick else [1024] if on_gpu else [128, 512])
    if sizes.batch * numbers[-1] > sizes.recordings:
        sys.exit(
            f"--ranks {numbers[-1]}: {sizes.recordings} recordings are less than a batch of {sizes.batch} for each"
        )
    rounds = options.rounds or (2 if options.quick else 7)
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "title": "scale",
        "sizes": f"B={sizes.batch} T<={sizes.snippets} C={sizes.classes}, {sizes.recordings} of {LENGTHS}'s lengths",
        "environment": environment(device),
        "cores": len(os.sched_getaffinity(0)),
        "rounds": rounds,
        "rows": [],
        "dealing": dealing(rounds),
    }
    deadline = time.monotonic() + options.seconds
    processes = Processes(numbers, options.device, "bf16" if on_gpu else "fp32")
    try:
        for width in widths:
            if time.monotonic() > deadline:
                result["left_out"] = f"widths from {width} on: out of time (--seconds)"
                break
            result["rows"] += measure(processes, runs_of(sizes._replace(width=width), numbers), rounds)
            save(result, markdown(result), options.out)
    finally:
        processes.end()
    print(markdown(result))
    save(result, markdown(result), options.out)


if __name__ == "__main__":
    main()
