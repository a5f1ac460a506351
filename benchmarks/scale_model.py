"""What training in several processes costs, on paper: work, memory, what collectives move, and what efficiency follows.

    python benchmarks/scale_model.py                # the tables
    python benchmarks/scale_model.py --json FILE    # all numbers
    python benchmarks/scale_model.py --page         # puts the tables into docs/scale.md, and the measured ones, too

Bytes and operations are counted from the sizes of a training; tests/test_scale_model.py compares them with what real
processes send. The step of one GPU is the one that was measured, from benchmarks/results/h100. What links between GPUs
do is assumed (`LINKS`), as nothing has been measured on several GPUs. So the efficiencies are a prediction.

A step on n GPUs is that of one GPU with as many rows as the rank with the most has, with the loss of one process taken
out, and these added: the loss of the whole batch, which is many small operators of PyTorch; its two gathers; a copy of
the gradients into the buckets of DistributedDataParallel; what of its all-reduce outlasts the backward. A collective of
S bytes takes a latency, and 2 (n - 1) / n S / bandwidth for an all-reduce, (n - 1) S / bandwidth for a gather of S from
each: a ring.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from thumos14_lengths import thumos14_lengths
from training_floor import BYTES, FLOAT32, Network, moved, products

from d2net.data.batches import rounded_rows
from d2net.data.deal import Share, Window, packed_offsets
from d2net.distributed import Ranks
from d2net.model import D2Net
from d2net.ops.network_call import row_of
from d2net.recipes import LossRecipe, Recipe, load_recipe
from d2net.training.together import BUCKET_MB

HERE = Path(__file__).parent
MEASURED = HERE / "results" / "h100" / "2026-11-27-packed" / "training_step.json"
CURVES = HERE / "results" / "cpu" / "scale.json"
PAGE = HERE.parent / "docs" / "scale.md"
BEGIN, END = "<!-- figures: benchmarks/scale_model.py {} -->", "<!-- end of figures -->"

SNIPPETS = 750  # of a recording, at most
MACHINE = 8  # GPUs of a machine
LARGE = 80  # recordings of a large batch of one GPU
DRAWN = 2000  # recordings that are drawn, and at least 25 batches, to know how evenly they can be dealt
CONTROL_BYTES = 3 * 8  # three int64, in every tenth iteration

# Of the loss of a whole batch, forward and backward, counted on a CPU (tests/test_scale_model.py).
OPERATORS = 276
VALUES_A_WIDTH = 215  # numbers read or written for each recording of the whole batch and each column of embeddings
VALUES_A_RECORDING = 3180  # and those that do not depend on the width, with 20 classes
# Assumed: benchmarks/results/h100/profile.txt has 1.0 to 2.5 us for PyTorch's small kernels, 1.1 us between two.
OPERATOR_SECONDS = 2.5e-6
# Of the condition number of Eq. 10 with 20 classes: 30 us for 10 recordings, of which QR takes 6 (README of h100). That
# QR grows in proportion to the recordings is assumed.
CONDITION_SECONDS, QR_SECONDS_A_RECORDING = 30e-6, 0.6e-6


class Link(NamedTuple):
    """Assumed of a collective: seconds that it takes without data, and bus bandwidth in bytes a second."""

    latency: float
    bandwidth: float

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds to sum ``size`` bytes."""
        return self.latency + 2 * (ranks - 1) / ranks * size / self.bandwidth

    def all_gather(self, size: float, ranks: int) -> float:
        """Seconds until all have ``size`` bytes of each."""
        return self.latency + (ranks - 1) * size / self.bandwidth


# Within a machine: NCCL's rings over NVLink of H100 (450 GB/s each way) reach 370 GB/s (github.com/NVIDIA/nccl-tests,
# issue 212; NVIDIA/nccl, issue 1455); small all-reduces of 8 GPUs take 12.5 us (H20: deepseek-ai/DeepEP, issue 303).
# Between machines with 8 adapters of 400 Gb/s, 46 to 48 GB/s each (nccl-tests, issue 290): 331 GB/s for an all-reduce
# over four of them (Voltage Park's vpbenchmarking); small all-reduces take 47 us over 2 (NVIDIA/nccl, issue 1244), 63
# over 32 (issue 652).
LINKS = {"within a machine": Link(15e-6, 370e9), "between machines": Link(60e-6, 330e9)}
ADAPTER = 47e9  # bytes a second


def link_of(ranks: int, worse: float = 1.0) -> Link:
    """The link that so many GPUs are bound by; with ``worse`` times the latency, and as much less bandwidth."""
    link = LINKS["within a machine" if ranks <= MACHINE else "between machines"]
    return Link(link.latency * worse, link.bandwidth / worse)


# --- sizes


class Payload(NamedTuple):
    """What a rank gives to the collectives of one iteration, in bytes.

    Attributes:
        loss: To the gather before Eq. 3, of what Eq. 3, 4 and 10 and x_ref are computed from.
        snippet: To that of L_DS.
        gradients: To the all-reduces, bucket by bucket, in their order.
        early: How many of these buckets are there before the gradients of the first layers' weights.
    """

    loss: int
    snippet: int
    gradients: list[int]
    early: int


def payload(network: Network, loss: LossRecipe, recordings: int, most: int, itemsize: int = FLOAT32) -> Payload:
    """Of a batch of so many ``recordings``, of which a rank has ``most`` at most.

    Args:
        network: Its sizes.
        loss: Which terms there are.
        recordings: Of the whole batch.
        most: Of one rank.
        itemsize: Bytes of a number of the loss: float32, or float64 in tests.
    """
    columns = network.classifier.width_out + 2 * network.second.width_out  # p; x_fg, x_bg
    columns += 3  # whether there is an x_fg, an x_bg; whether the recording counts
    columns += network.second.width_out if loss.reference_update == "lowest_attention" else 0
    columns += 6 if loss.um_weight else 0
    random = (3 if loss.pairing == "different" else 4) * recordings  # of rank 0, but all send as much
    buckets, early = buckets_of(network)
    snippet = itemsize * 2 * most if loss.alpha_snippet else 0
    return Payload(itemsize * (columns * most + random), snippet, buckets, early)


def buckets_of(network: Network) -> tuple[list[int], int]:
    """Bytes of the pieces in which gradients are sent, and how many of them lack those of the first layers' weights.

    Gradients come in the order of autograd's nodes; a piece ends with the gradient that fills it.
    """
    first, second, last = (layer.weights for layer in (network.first, network.second, network.classifier))
    d, c = network.second.width_out, network.classifier.width_out
    if network.streams != 2:
        raise ValueError("the order is that of two streams")
    in_order = [d, last, c, c, last, d, second, second, d, d]  # of both streams
    sizes, early, filled = [], 0, 0
    for i, number in enumerate([*in_order, first, first]):
        filled += FLOAT32 * number
        if filled >= BUCKET_MB * 2**20 or i == len(in_order) + 1:
            sizes.append(filled)
            early += i < len(in_order)
            filled = 0
    return sizes, early


def exchanged(network: Network, snippets: float, precision: str, ranks: int) -> float:
    """Bytes of features that a rank gives, and gets, in a step where they are sharded over all: on average."""
    return (ranks - 1) / ranks * snippets * network.streams * network.first.width_in * BYTES[precision]


def all_to_all(size: float, ranks: int) -> float:
    """Seconds; what leaves a machine goes through the adapter of its GPU, at the same time as the rest over NVLink."""
    away = max(0, ranks - MACHINE) / (ranks - 1)
    within = LINKS["within a machine"].bandwidth
    return link_of(ranks).latency + max((1 - away) * size / within, away * size / ADAPTER)


def memory(network: Network, recipe: Recipe, precision: str, rows: float, held: int, gathered: int) -> dict[str, float]:
    """Bytes on a GPU, by what they are.

    Args:
        network: Its sizes.
        recipe: Of the training.
        precision: Of the network.
        rows: That it computes in a step.
        held: Snippets whose features it keeps.
        gathered: Bytes that the gathers bring; 0: one process.
    """
    size, s, p = BYTES[precision], network.streams, network.parameters
    d, c, width = network.second.width_out, network.classifier.width_out, network.first.width_in
    k = network.first.kernel
    copies = s * (k * width * d + 2 * k * d * d + row_of(c, network.classifier.kernel) * d) if size < FLOAT32 else 0
    found: dict[str, float] = {
        "weights": FLOAT32 * p,
        "gradients": FLOAT32 * p,
        "Adam": 2 * FLOAT32 * p,
        "copies of the weights in bfloat16": size * copies,
        # Features; of each stream both layers; embeddings; signs of both layers; logits and TCAM.
        "kept for the backward": rows
        * (size * (s * width + 2 * s * d + d) + 2 * s * -(-d // 8) + (s + 1) * c * FLOAT32),
        "features": (held + 1) * s * width * size,
    }
    if recipe.training.ema_decay:
        found["average of the weights"] = FLOAT32 * p
    if gathered:
        found["gradients before they are copied into buckets"] = FLOAT32 * p
        found["gathered for the loss"] = gathered
    return found


@cache
def _layout() -> D2Net:
    return D2Net(1, (1, 1), load_recipe("thumos14-paper").model)


class Rows(NamedTuple):
    """Means over drawn batches: rows that the rank with the most computes, and that all ranks compute on average."""

    most: float
    mean: float


@cache
def dealt(which: str, recordings: int, ranks: int) -> Rows:
    """How batches of so many recordings are dealt; of THUMOS14's, as often as needed, or full ones."""
    known = [min(n, SNIPPETS) for n in thumos14_lengths()] if which == "THUMOS14" else [SNIPPETS] * 200
    layout, generator = _layout(), np.random.default_rng(0)
    found, order = [], np.empty(0, int)
    for _ in range(max(25, DRAWN // recordings) if which == "THUMOS14" else 1):
        while len(order) < recordings:
            order = np.concatenate([order, generator.permutation(len(known))])
        lengths, order, rows = [known[i] for i in order[:recordings]], order[recordings:], []
        share = Share([Window(i, 0, length) for i, length in enumerate(lengths)], Ranks(size=ranks))
        for rank in range(ranks):
            own = [n for n, place in zip(lengths, share.places, strict=True) if place // share.most == rank]
            last = packed_offsets(own, layout.reach)[-1]
            rows.append(rounded_rows(last, len(own), SNIPPETS, layout))
        found.append((max(rows), statistics.fmean(rows)))
    return Rows(*(statistics.fmean(x) for x in zip(*found, strict=True)))


# --- seconds


class OneGpu(NamedTuple):
    """The measured step: a line through those of both sets of lengths, and what is known of each."""

    fixed: float
    a_row: float
    loss: dict[str, float]
    flops: float
    bytes_per_s: float
    reserved: dict[str, float]
    where: dict[str, Any]

    def step(self, rows: float) -> float:
        """Seconds of a step with so many rows."""
        return self.fixed + self.a_row * rows


@cache
def one_gpu(precision: str, execution: str = "graph") -> OneGpu:
    """From the committed result."""
    result = json.loads(MEASURED.read_text())
    rows = {
        row["lengths"]: row for row in result["rows"] if (row["precision"], row["execution"]) == (precision, execution)
    }
    small, large = rows["THUMOS14"], rows["full"]
    a_row = 1e-3 * (large["step_ms"] - small["step_ms"]) / (large["rows"] - small["rows"])
    return OneGpu(
        1e-3 * small["step_ms"] - a_row * small["rows"],
        a_row,
        {which: 1e-3 * row["loss_ms"] for which, row in rows.items()},
        small["flops"],
        small["bytes_per_s"],
        {which: row["reserved_mib"] * 2**20 for which, row in rows.items()},
        result["environment"],
    )


def loss_of_whole_batch(network: Network, recordings: int, bytes_per_s: float) -> float:
    """Seconds of the loss of a whole batch, on each rank: small operators, their bytes, the condition number."""
    values = recordings * (VALUES_A_WIDTH * network.second.width_out + VALUES_A_RECORDING)
    condition = CONDITION_SECONDS + QR_SECONDS_A_RECORDING * max(0, recordings - 10)
    return OPERATORS * OPERATOR_SECONDS + FLOAT32 * values / bytes_per_s + condition


def outlasting(sent: Payload, link: Link, ranks: int, products_seconds: float) -> float:
    """Seconds that the all-reduces outlast the backward: what is early is sent during the last products.

    Args:
        sent: The buckets.
        link: What they are sent over.
        ranks: How many.
        products_seconds: Of the gradients of all first layers' weights, whose buckets come at equal distances.
    """
    late = len(sent.gradients) - sent.early
    end = 0.0
    for i, size in enumerate(sent.gradients):
        ready = 0.0 if i < sent.early else products_seconds * (i - sent.early + 1) / late
        end = max(end, ready) + link.all_reduce(size, ranks)
    return max(0.0, end - products_seconds)


class Step(NamedTuple):
    """Seconds of a step, by what takes them; the efficiency beside one GPU."""

    computing: float
    waiting: float
    loss: float
    gathers: float
    copy: float
    all_reduce: float

    @property
    def seconds(self) -> float:
        return sum(self)


def predicted(
    network: Network, recipe: Recipe, precision: str, which: str, recordings: int, ranks: int, worse: float = 1.0
) -> Step:
    """A step of a batch of so many recordings in so many ranks."""
    gpu = one_gpu(precision)
    rows = dealt(which, recordings, ranks)
    if ranks == 1:
        return Step(gpu.step(rows.mean), 0.0, 0.0, 0.0, 0.0, 0.0)
    link, most = link_of(ranks, worse), -(-recordings // ranks)
    sent = payload(network, recipe.loss, recordings, most)
    first = 2 * network.streams * rows.most * network.first.weights / gpu.flops
    gathers = link.all_gather(sent.loss, ranks) + (link.all_gather(sent.snippet, ranks) if sent.snippet else 0)
    return Step(
        computing=gpu.step(rows.mean) - gpu.loss[which],
        waiting=gpu.a_row * (rows.most - rows.mean),
        loss=loss_of_whole_batch(network, recordings, gpu.bytes_per_s),
        gathers=gathers,
        copy=2 * sum(sent.gradients) / gpu.bytes_per_s,
        all_reduce=outlasting(sent, link, ranks, first),
    )


# --- tables


class Asked(NamedTuple):
    """What the tables are of."""

    recordings: int
    width: int
    classes: int
    ranks: Sequence[int]

    @property
    def recipe(self) -> Recipe:
        return load_recipe("thumos14-paper")

    @property
    def network(self) -> Network:
        return Network.of(self.width, self.classes, self.recipe.model)

    @property
    def as_measured(self) -> bool:
        return (self.width, self.classes) == (1024, 20)


PRECISIONS = ("bf16", "tf32")
LENGTHS = ("THUMOS14", "full")


def table(head: Sequence[str], rows: Sequence[Sequence[object]], text: int = 1) -> str:
    """Of Markdown; the first ``text`` columns are words."""
    lines = [head, ["---"] * text + ["---:"] * (len(head) - text), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


SHARDED = "features, only where they are sharded (bf16, THUMOS14)"


def cut_mean(which: str) -> float:
    """Snippets of a recording, on average."""
    return statistics.fmean(min(n, SNIPPETS) for n in thumos14_lengths()) if which == "THUMOS14" else SNIPPETS


def work(asked: Asked) -> list[dict[str, Any]]:
    network, found = asked.network, []
    for which in LENGTHS:
        snippets = asked.recordings * cut_mean(which)
        for precision in PRECISIONS:
            flop, parts = products(network, snippets), moved(network, snippets, precision)
            found.append({"lengths": which, "precision": precision, "snippets": snippets, "flop": flop, "bytes": parts})
    return found


def work_table(asked: Asked) -> str:
    rows = []
    for x in work(asked):
        rest = sum(x["bytes"].values()) - x["bytes"]["Adam"]
        rows.append(
            [x["lengths"], x["precision"], f"{x['snippets']:.0f}", f"{x['flop'] / 1e9:.0f}", f"{rest / 1e6:.0f}"]
            + [f"{x['bytes']['Adam'] / 1e6:.0f}"]
        )
    head = ["lengths", "network", "snippets", "GFLOP of products", "MB moved by all else", "MB moved by Adam"]
    return table(head, rows, 2)


def memories(asked: Asked) -> dict[str, dict[str, float]]:
    """By lengths and ranks: in bf16, of one process and of the most ranks."""
    network, recipe, found = asked.network, asked.recipe, {}
    for which in LENGTHS:
        held = sum(thumos14_lengths()) if which == "THUMOS14" else 200 * SNIPPETS
        for ranks in (1, max(asked.ranks)):
            recordings = asked.recordings * ranks
            gathered = 0
            if ranks > 1:
                sent = payload(network, recipe.loss, recordings, asked.recordings)
                gathered = ranks * (sent.loss + sent.snippet)
            rows = dealt(which, recordings, ranks).most
            found[f"{which}, {ranks} GPU{'s' * (ranks > 1)}"] = memory(network, recipe, "bf16", rows, held, gathered)
    return found


def memory_table(asked: Asked) -> str:
    found = memories(asked)
    names = list(dict.fromkeys(name for parts in found.values() for name in parts))
    rows = [
        [name, *(f"{parts[name] / 2**20:.0f}" if name in parts else "-" for parts in found.values())] for name in names
    ]
    rows.append(["all", *(f"{sum(parts.values()) / 2**20:.0f}" for parts in found.values())])
    if asked.as_measured:
        reserved = one_gpu("bf16").reserved
        seen = [f"{reserved[name.split(',')[0]] / 2**20:.0f}" if "1 GPU" in name else "-" for name in found]
        rows.append(["measured on an H100: reserved by PyTorch", *seen])
    return table(["MiB of a GPU, bf16", *found], rows)


def collectives(asked: Asked) -> list[dict[str, Any]]:
    network, recipe, found = asked.network, asked.recipe, []
    for ranks in asked.ranks:
        if ranks == 1:
            continue
        recordings = asked.recordings * ranks
        sent = payload(network, recipe.loss, recordings, asked.recordings)
        link = link_of(ranks)
        features = exchanged(network, recordings / ranks * cut_mean("THUMOS14"), "bf16", ranks)
        for name, size, seconds, bring in (
            ("gather of the loss", sent.loss, link.all_gather(sent.loss, ranks), (ranks - 1) * sent.loss),
            ("gather of L_DS", sent.snippet, link.all_gather(sent.snippet, ranks), (ranks - 1) * sent.snippet),
            *(
                (
                    f"all-reduce, bucket {i + 1}{', early' * (i < sent.early)}",
                    size,
                    link.all_reduce(size, ranks),
                    2 * (ranks - 1) / ranks * size,
                )
                for i, size in enumerate(sent.gradients)
            ),
            (SHARDED, features, all_to_all(features, ranks), features),
        ):
            found.append({"ranks": ranks, "what": name, "bytes": size, "arrive": bring, "seconds": seconds})
    return found


def kb(size: float) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.3g} KB" if size >= 1000 else f"{size:.0f} B"


def collectives_table(asked: Asked) -> str:
    found = collectives(asked)
    many = [n for n in asked.ranks if n > 1]
    rows: list[list[object]] = []
    for name in dict.fromkeys(x["what"] for x in found):
        of = {x["ranks"]: x for x in found if x["what"] == name}
        cells = [f"{kb(of[n]['bytes'])}, {kb(of[n]['arrive'])}, {1e6 * of[n]['seconds']:.0f} us" for n in many]
        rows.append([name, *cells])
    rows.append(["control, by gloo, every tenth iteration", *[f"{CONTROL_BYTES} B"] * len(many)])
    return table(["a rank gives, gets, in", *(f"{n} GPUs" for n in many)], rows)


def scaling(asked: Asked) -> list[dict[str, Any]]:
    """Weak: so many recordings a GPU, and 80. Strong: one batch of 10, and one of 80, divided."""
    cases = [("weak", each * n, n) for each in (asked.recordings, LARGE) for n in asked.ranks]
    cases += [("strong", batch, n) for batch in (10, LARGE) for n in asked.ranks if n <= batch]
    found = []
    for precision, which, (kind, batch, ranks) in product(PRECISIONS, LENGTHS, cases):
        sizes = asked.network, asked.recipe, precision, which
        alone = predicted(*sizes, batch // ranks if kind == "weak" else batch, 1).seconds
        ideal = alone if kind == "weak" else alone / ranks
        step, worse = (predicted(*sizes, batch, ranks, x) for x in (1.0, 2.0))
        found.append(
            {
                "kind": kind,
                "lengths": which,
                "precision": precision,
                "recordings": batch,
                "ranks": ranks,
                "step_ms": 1e3 * step.seconds,
                "efficiency": ideal / step.seconds,
                "efficiency_worse_links": ideal / worse.seconds,
                "parts_ms": {name: 1e3 * x for name, x in step._asdict().items()},
            }
        )
    return found


def scaling_table(asked: Asked) -> str:
    rows: dict[tuple[Any, ...], list[str]] = {}
    for x in scaling(asked):
        each = f"{x['recordings'] // x['ranks']} a GPU" if x["kind"] == "weak" else f"{x['recordings']} in all"
        shares = [f"{100 * x[name]:.0f}" for name in ("efficiency", "efficiency_worse_links")]
        cells = [f"{x['step_ms']:.2f}", f"{shares[0]} % ({shares[1]})"]
        rows.setdefault((x["lengths"], each, x["ranks"]), []).extend(cells)
    columns = [f"{precision}: {what}" for precision in PRECISIONS for what in ("step, ms", "efficiency (worse links)")]
    return table(["lengths", "recordings", "GPUs", *columns], [[*key, *cells] for key, cells in rows.items()], 2)


PARTS = {
    "computing": "network, Adam, batch",
    "waiting": "waiting for the rank with most rows",
    "loss": "loss of the whole batch",
    "gathers": "gathers",
    "copy": "copy into buckets",
    "all_reduce": "all-reduce after the backward",
}


def parts_table(asked: Asked) -> str:
    rows = []
    for x in scaling(asked):
        if x["kind"] == "weak" and x["precision"] == "bf16" and x["ranks"] > 1:
            parts = [f"{x['parts_ms'][name]:.2f}" for name in PARTS]
            each = f"{x['recordings'] // x['ranks']} a GPU"
            rows.append([x["lengths"], each, x["ranks"], *parts, f"{x['step_ms']:.2f}"])
    return table(["lengths", "recordings", "GPUs", *PARTS.values(), "step, ms"], rows, 2)


def links_table(_: Asked) -> str:
    rows = [[name, f"{1e6 * x.latency:.0f} us", f"{x.bandwidth / 1e9:.0f} GB/s"] for name, x in LINKS.items()]
    return table(["collectives", "latency", "bus bandwidth"], rows)


def curves() -> dict[str, Any]:
    return json.loads(CURVES.read_text())


def measured_table(_: Asked) -> str:
    from bench_scale import rates_table

    return rates_table(curves())


def shares_table(_: Asked) -> str:
    from bench_scale import shares_table

    return shares_table(curves())


def dealing_words(_: Asked) -> str:
    from bench_scale import dealing_in_words

    return dealing_in_words(curves())


def measured_words(_: Asked) -> str:
    from bench_scale import in_words

    return in_words(curves())


TABLES = {
    "work": work_table,
    "memory": memory_table,
    "collectives": collectives_table,
    "links": links_table,
    "efficiency": scaling_table,
    "parts": parts_table,
    "curves": measured_table,
    "shares": shares_table,
    "dealing": dealing_words,
    "measured": measured_words,
}


def filled(page: str, asked: Asked) -> str:
    """A page with its tables made anew."""
    for name, make in TABLES.items():
        begin = BEGIN.format(name)
        before, mark, rest = page.partition(begin)
        if mark:
            old, end, behind = rest.partition(END)
            text = make(asked)
            page = before + begin + ("\n" + text if old.startswith("\n") else text) + end + behind
    return page


DEFAULT = Asked(10, 1024, 20, (1, 8, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=int, default=DEFAULT.recordings, help="of a GPU; default 10")
    parser.add_argument("--width", type=int, default=DEFAULT.width, help="of a stream; default 1024")
    parser.add_argument("--classes", type=int, default=DEFAULT.classes, help="default 20")
    parser.add_argument("--ranks", type=int, nargs="+", default=DEFAULT.ranks, help="GPUs; default 1 8 64")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--page", action="store_true", help="put the tables of the default sizes into docs/scale.md")
    options = parser.parse_args()
    asked = Asked(options.recordings, options.width, options.classes, tuple(options.ranks))
    names = ["work", "memory", "collectives", "links"] + ["efficiency", "parts"] * asked.as_measured
    for name in names:
        print(f"{name}\n\n{TABLES[name](asked)}")
    if not asked.as_measured:
        print("No efficiency: the step was measured with --width 1024 --classes 20 alone.")
    if options.json:
        numbers = {"work": work(asked), "memory": memories(asked), "collectives": collectives(asked)}
        if asked.as_measured:
            numbers["efficiency"] = scaling(asked)
        numbers["assumed"] = {name: link._asdict() for name, link in LINKS.items()}
        options.json.write_text(json.dumps({**asked._asdict(), **numbers}, indent=1) + "\n")
    if options.page:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), DEFAULT), encoding="utf-8")


if __name__ == "__main__":
    main()
