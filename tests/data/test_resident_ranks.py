"""Features kept by several processes: on each device, shared among the devices, or mapped from a file; read once."""

from __future__ import annotations

import io
import os
import resource
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from d2net.data import Dataset, Recording
from d2net.data.batches import Batch, BatchSampler
from d2net.data.keeping import keep_features, room_on
from d2net.data.kept import KeptFeatures, size_of
from d2net.distributed import ALONE, RankEnded, Ranks, of_group
from d2net.errors import InputError
from d2net.recipes import load_recipe
from d2net.training import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
KINDS = ("ResidentFeatures", "ShardedFeatures", "MappedFeatures")
UNKNOWN = (1, 4)  # of these only reading tells the length; the second is longer than a window


class Gaps(NamedTuple):
    """A layout of packed rows without a network."""

    reach: int = 2

    def rows(self, least: int) -> int:
        return least


SIZES = {"batch_size": 7, "max_snippets": 25, "layout": Gaps()}


def make_dataset(
    widths: tuple[int, ...] = (6, 6), reads: Counter[int] | None = None, nan: int | None = None
) -> Dataset:
    """Eleven recordings of 8 to 40 snippets.

    Args:
        widths: Of the streams.
        reads: Counts how often each is read.
        nan: One with a NaN.
    """
    rng = np.random.default_rng(0)
    recordings = []
    for i in range(11):
        x = rng.normal(0, 0.3, (8 + 7 * i % 33, sum(widths))).astype(np.float32)
        if i == nan:
            x[3, 1] = np.nan

        def read(i: int = i, x: np.ndarray = x) -> np.ndarray:
            if reads is not None:
                reads[i] += 1
            return x

        known = None if i in UNKNOWN else len(x)
        labels = (("jump", "run")[i % 2],)
        recordings.append(Recording(f"r{i}", "train", labels, (), 1.0, f"memory/r{i}.npy", read, snippets=known))
    return Dataset("tiny", ("jump", "run"), widths, tuple(recordings))


def whole_bytes(dtype: torch.dtype = torch.float32) -> int:
    return sum(len(r.read()) for r in make_dataset().recordings) * 12 * dtype.itemsize


def budget_of(kind: str, ranks: Ranks, dtype: torch.dtype = torch.float32) -> float:
    """Only the last rank's makes all keep their features in that way."""
    whole = whole_bytes(dtype)
    least = {"ResidentFeatures": whole, "ShardedFeatures": 0.7 * whole, "MappedFeatures": 0.7 * whole / ranks.size}
    return least[kind] if ranks.rank == ranks.size - 1 else 2.0 * whole


def on_machines(of: int) -> Ranks:
    """The ranks, so many on each machine."""
    ranks = of_group()
    return replace(ranks, local_rank=ranks.rank % of, local_size=of)


@contextmanager
def temporary_files(folder: str) -> Iterator[None]:
    """Within the block files for a while are made there."""
    before, tempfile.tempdir = tempfile.tempdir, folder
    yield
    tempfile.tempdir = before


def kept_as(kind: str, ranks: Ranks, dataset: Dataset, dtype: torch.dtype = torch.float32) -> KeptFeatures:
    kept = keep_features(dataset, CPU, dtype=dtype, budget=budget_of(kind, ranks, dtype), ranks=ranks, **SIZES)
    assert type(kept).__name__ == kind
    return kept


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """To the bit, but for gap rows at the end, of which there may be more in one than in the other."""
    n = min(len(found), len(wanted))
    rest = not found[n:].any() and not wanted[n:].any()
    return found.dtype == wanted.dtype and torch.equal(found[:n], wanted[:n]) and rest


def different(found: Batch, wanted: Batch, dtype: torch.dtype) -> list[str]:
    """The names of the fields that are not as wanted; the parts in this precision."""
    wrong = [f"part {k}" for k, x in enumerate(wanted.parts) if not same(found.parts[k], x.to(dtype))]
    names = ["lengths", "labels", "offsets", "mask", *(["numbers"] if wanted.numbers is not None else [])]
    wrong += [name for name in names if not same(getattr(found, name), getattr(wanted, name))]
    if (found.whole is None) != (wanted.whole is None) or (found.numbers is None) != (wanted.numbers is None):
        return [*wrong, "whole or numbers"]
    if found.whole is not None and wanted.whole is not None:
        a, b = found.whole, wanted.whole
        if not (same(a.labels, b.labels) and same(a.places, b.places) and a.most == b.most):
            wrong.append("whole")
    longest = int(wanted.lengths.max()) if wanted.whole is None else wanted.max_length
    return wrong + ["max_length"] * (len(found.parts) != len(wanted.parts) or found.max_length < longest)


def batches(kind: str, of: int, folder: str) -> tuple[list[str], list[dict[int, int]]]:
    """On this rank what differs from the batches of a sampler, and how often each recording was read, of four ways."""
    ranks, wrong, counts = on_machines(of), [], []
    for widths in ((6, 6), (12,)):
        for dtype in (torch.float32, torch.bfloat16):
            reads: Counter[int] = Counter()
            dataset = make_dataset(widths, reads)
            with temporary_files(folder):
                kept = kept_as(kind, ranks, dataset, dtype)
            assert not os.listdir(folder)  # although it is mapped
            counts.append(dict(reads))
            usual, other = (BatchSampler(dataset, seed=3, ranks=ranks, **SIZES) for _ in range(2))
            for k in range(9):
                if k == 6:
                    kept.convert(dtype := torch.bfloat16)
                found = kept.next(other.windows(kept.lengths))
                wrong += [f"{widths} {dtype} {k}: {name}" for name in different(found, usual.next(), dtype)]
    return wrong, counts


@pytest.mark.parametrize(
    ("kind", "size", "of"),
    [("ResidentFeatures", 1, 1), ("ResidentFeatures", 2, 1)]
    + [(kind, size, of) for kind in KINDS for size, of in ((2, 2), (3, 3), (4, 2))],
)
def test_the_batches_are_those_of_a_sampler_and_each_recording_is_read_once(processes, tmp_path, kind, size, of):
    told = processes.run(size, batches, kind, of, str(tmp_path))
    assert [wrong for wrong, _ in told] == [[]] * size
    once = dict.fromkeys(range(11), 1)
    for way in range(4):
        by_rank = [Counter(counts[way]) for _, counts in told]
        if kind == "ShardedFeatures":
            assert sum(by_rank, Counter()) == once  # not even once on each machine
            continue
        for first in range(0, size, of):
            assert sum(by_rank[first : first + of], Counter()) == once
        assert of == 1 or all(sum(c.values()) < 11 for c in by_rank)  # they do it together


def test_one_process_without_room_keeps_nothing_and_a_graph_needs_all():
    dataset = make_dataset()
    assert keep_features(dataset, CPU, budget=whole_bytes() - 1, **SIZES) is None
    assert keep_features(dataset, CPU, budget=whole_bytes(), graph=True, **SIZES) is not None
    with pytest.raises(
        InputError, match=r"^a CUDA graph needs resident features, which do not fit .*; use --no-graph$"
    ):
        keep_features(dataset, CPU, budget=whole_bytes() - 1, graph=True, **SIZES)


def test_what_is_too_much_to_hold_is_read_again(monkeypatch):
    monkeypatch.setattr("d2net.data.keeping.HELD", 0)
    reads: Counter[int] = Counter()
    assert keep_features(make_dataset(reads=reads), CPU, **SIZES) is not None
    assert [i for i in range(11) if reads[i] == 2] == list(UNKNOWN) and sum(reads.values()) == 13


@pytest.mark.parametrize(("number", "text"), [(1234, "1.2 kB"), (56_780_000, "56.8 MB"), (12.34e9, "12.3 GB")])
def test_sizes_in_words(number, text):
    assert size_of(number) == text


def test_ranks_that_share_a_gpu_share_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (800, 1000))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    device = torch.device("cuda:0")
    assert room_on(device, ALONE) == room_on(device, Ranks(size=8, local_size=2)) == 200
    assert room_on(device, Ranks(size=3, local_size=3)) == 100


# --- what goes wrong


def refused(kind: str, case: str, folder: str) -> tuple[str, str, list[str]]:
    ranks = on_machines(of_group().size)
    dataset = make_dataset(nan=6 if case == "nan" else None)
    if case == "data" and ranks.rank == 1:
        dataset = replace(dataset, recordings=dataset.recordings[:-1])
    if case == "full":  # by what they say; nothing is read before the space is there
        long = replace(dataset.recordings[0], snippets=10**6)
        dataset = replace(dataset, recordings=(long, *dataset.recordings[1:]))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with temporary_files(folder if case != "folder" else f"{folder}/none"):
            if case == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (16_000_000, before[1]))
            keep_features(dataset, CPU, budget=budget_of(kind, ranks), ranks=ranks, **SIZES)
    except (InputError, RankEnded) as error:
        return type(error).__name__, str(error), os.listdir(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        tempfile.tempdir = None
    return "", "", os.listdir(folder)


FILE = "{} of the features cannot be written there, once on each machine ({}); make space, or set TMPDIR to a folder"


@pytest.mark.parametrize(
    ("kind", "case", "line"),
    [
        *((kind, "nan", "memory/r6.npy: features of 'r6' hold NaN or Inf (first at snippet 3)") for kind in KINDS),
        ("ResidentFeatures", "data", "names, lengths or labels differ: give all machines the same data"),
        ("MappedFeatures", "full", FILE.format("48.0 MB", "File too large")),
        ("MappedFeatures", "folder", FILE.format("11.6 kB", "No such file or directory")),
    ],
)
def test_what_is_wrong_on_one_rank_ends_all_with_one_line(processes, tmp_path, kind, case, line):
    told = processes.run(3, refused, kind, case, str(tmp_path))
    assert sorted(name for name, _, _ in told) == ["InputError", "RankEnded", "RankEnded"]
    (text,) = (text for name, text, _ in told if name == "InputError")
    assert line in text and "\n" not in text and all(left == [] for _, _, left in told)


def left_alone(folder: str) -> str:
    ranks = on_machines(2)
    kept = kept_as("ShardedFeatures", ranks, make_dataset())
    windows = BatchSampler(make_dataset(), seed=3, ranks=ranks, **SIZES).windows(kept.lengths)
    if ranks.rank == 1:
        return ""
    try:
        kept.next(windows)
    except RankEnded as error:
        return str(error)
    return "nothing"


def test_a_rank_that_is_gone_is_told_of(processes, tmp_path):
    first, _ = processes.run(2, left_alone, str(tmp_path))
    assert first == "another process of this run has ended before its time"


# --- whole trainings


def trained(out: str, kind: str):
    recipe = load_recipe("thumos14-paper").override(
        ["model.embedding_dim=8", "model.dropout=0.3", "training.batch_size=7", "training.iterations=15"]
    )
    recipe = replace(recipe, training=replace(recipe.training, max_snippets=25, denoising_start=0))
    ranks, dataset, said = on_machines(2), make_dataset(), io.StringIO()
    trainer = Trainer(dataset, recipe, out=Path(out) / kind, resident=True, tensorboard=False, ranks=ranks)
    sizes = {**SIZES, "layout": trainer.model}
    trainer.resident = keep_features(dataset, CPU, budget=budget_of(kind, ranks), ranks=ranks, **sizes)
    with redirect_stderr(said):
        trainer.run()
    weights = [p.detach().numpy().copy() for p in trainer.model.parameters()]
    return weights, trainer.step_graph() is None, said.getvalue()


def test_a_training_has_the_same_bits_however_they_are_kept_and_rank_0_says_how(processes, tmp_path):
    whole = size_of(whole_bytes())
    wanted: list[np.ndarray] = []
    for kind, line in zip(
        KINDS,
        [
            "features: all on the device of every process, ",
            f"features: shared among the devices of 2 processes, 5.5 kB of {whole} on this one",
            f"features: mapped from a file of {whole} on each machine",
        ],
        strict=True,
    ):
        for rank, (weights, eager, said) in enumerate(processes.run(2, trained, str(tmp_path), kind)):
            wanted = wanted or weights
            assert eager and all(np.array_equal(a, b) for a, b in zip(weights, wanted, strict=True))
            assert (line in said) == (rank == 0), said
