"""A training step in one thread of the CPU against all, by the size of its work: where a second one begins to pay.

The threshold of d2net.threads is from here. Sizes from the demo's network up; the work is the multiply-adds of a
forward pass. In every round each number of threads computes for about 0.1 s, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from training_sizes import Sizes

from d2net.threads import computing, multiply_adds, threads_for
from d2net.training import Trainer

SIZES = [
    Sizes(batch=10, snippets=t, width=w, classes=c, recordings=12)
    for t, w, c in [(100, 32, 5), (100, 64, 5), (300, 64, 5), (100, 128, 20), (200, 128, 20), (400, 128, 20)]
    + [(200, 256, 20), (750, 256, 20), (300, 512, 20), (300, 1024, 20)]
]
ROUND_SECONDS = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="default 30")
    rounds, most = parser.parse_args().rounds, torch.get_num_threads()
    print(f"| step | multiply-adds | 1 thread ms | {most} threads ms | ratio of medians | of the best | chosen |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for sizes in SIZES:
        with tempfile.TemporaryDirectory() as out:
            trainer = Trainer(sizes.dataset(), sizes.recipe(1), out=Path(out), tensorboard=False)
        batch = trainer.sampler.next()
        step = partial(trainer.update, batch, True)
        times: dict[int, list[float]] = {1: [], most: []}
        for _ in range(rounds):
            for number, found in times.items():
                with computing(number):
                    count, begin = 0, time.perf_counter()
                    while time.perf_counter() - begin < ROUND_SECONDS or count == 0:
                        step()
                        count += 1
                    found.append(1e3 * (time.perf_counter() - begin) / count)
        work = multiply_adds(trainer.model, sizes.batch * sizes.snippets)
        (one, all_), (best, best_all) = (list(map(f, times.values())) for f in (statistics.median, min))
        ratios = f"{all_ / one:.2f} | {best_all / best:.2f}"
        print(f"| {sizes} | {work:.1e} | {one:.2f} | {all_:.2f} | {ratios} | {threads_for(work)} |", flush=True)


if __name__ == "__main__":
    main()
