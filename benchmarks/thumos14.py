"""The paper's Tables 1, 3 and 4 on THUMOS14: with both recipes (the paper's settings and the released code's), cross-
entropy, focal loss, L_Dis, D2-Net and what Table 4 puts in L_D's place, several seeds, judged by both protocols.

Goes on where it stopped: give the same command again. The results, thumos14.json and thumos14.md in --out, are complete
after every training; checkpoints stay in --runs. docs/thumos14.md says more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from harness import environment

from d2net.data import find_dataset, train_and_test
from d2net.data.dataset import Dataset
from d2net.errors import D2NetError, InputError
from d2net.files import write_whole
from d2net.reading import load_json
from d2net.recipes import load_recipe
from d2net.report.paper_tables import load_table
from d2net.studies.ablation import LOSSES, Ablation, Variant
from d2net.studies.ablation.table import plus_minus
from d2net.words import counted, listed

RECIPES = ("thumos14-paper", "thumos14-release")
ROWS = ("cross-entropy", "focal", "dis", "d2net", "l1", "bce")
PAPER_NAMES = {"cross-entropy": "L_CE", "focal": "L_F", "dis": "L_Dis", "d2net": "D2-Net", "l1": "L1", "bce": "BCE"}
PROTOCOLS = ("activitynet", "wtalc")
TIOU = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
EVERY = 60.0  # seconds between lines of progress within a training
PUBLISHED = {"train": "200", "test": "210 to 213"}  # videos of the published lists


def variants() -> list[Variant]:
    """Every row by every protocol; rows that differ in the protocol alone share a training."""
    levels = f"evaluation.tiou=[{','.join(map(str, TIOU))}]"
    return [
        Variant(f"{name}-{protocol}", name, (*LOSSES[name].settings, f"evaluation.protocol={protocol}", levels))
        for name in ROWS
        for protocol in PROTOCOLS
    ]


class Clock:
    """Seconds that trainings take, from the iterations that they report; kept in a file, since trainings are resumed.

    What is timed are iterations alone: not reading the features, localization and evaluation.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = load_json(path) if path.exists() else {}
        self.run, self.began, self.last = "", (0.0, 0), (0.0, 0)

    def tick(self, run: str, done: int) -> None:
        now = (time.monotonic(), done)
        if run != self.run:
            self.run, self.began = run, now
        self.last = now

    def finished(self, run: str, iterations: int) -> None:
        """Extrapolates to the whole training what was timed of it, where it was resumed."""
        seconds, done = (b - a for a, b in zip(self.began, self.last, strict=True))
        if run == self.run and done > 0:
            self.seconds[run] = seconds / done * iterations
            write_whole(self.path, json.dumps(self.seconds, indent=1) + "\n")
        self.run = ""


def described(dataset: Dataset, train: str, test: str) -> dict[str, Any]:
    """What there is of the data, and what is missing, by name."""
    found = {}
    for kind, subset in (("train", train), ("test", test)):
        missing = [x for x in dataset.left_out if x.subset == subset]
        usable = sum(r.subset == subset for r in dataset.recordings)
        found[kind] = {
            "subset": subset,
            "listed": usable + len(missing),
            "usable": usable,
            "published": PUBLISHED[kind],
            "missing": {x.name: x.why for x in missing},
        }
    return {
        "name": dataset.name,
        "simulated": "simulated" in dataset.name.lower(),
        "stream_widths": list(dataset.stream_widths),
        "subsets": found,
        "notes": list(dataset.notes),
    }


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """What this report takes of a training's result: the one place that knows how a study writes it."""
    mine = {key: result[key] for key in ("seed", "map", "average", "f1", "detections", "said")}
    of_each = ("map", "f1", "best_f1", "auc", "false_positives")
    return mine | {tcam: {key: result[tcam][key] for key in of_each} for tcam in ("raw", "refined")}


def by_row(recipe: str, results: list[dict[str, Any]], seconds: dict[str, float]) -> list[dict[str, Any]]:
    """The finished trainings of a recipe, by loss and protocol."""
    found = []
    for variant in variants():
        mine = [r for r in results if r["variant"] == variant.name]
        loss, _, protocol = variant.name.rpartition("-")
        if mine:
            times = [seconds.get(f"{loss}-{PROTOCOLS[0]}, seed {r['seed']}") for r in mine]
            runs = [numbers(r) | {"training_seconds": t} for r, t in zip(mine, times, strict=True)]
            found.append({"recipe": recipe, "loss": loss, "protocol": protocol, "runs": runs})
    return found


def markdown(report: dict[str, Any]) -> str:
    """The report as tables: mean and sample deviation over the seeds, percent."""
    where, data = report["environment"], report["data"]
    lines = [
        f"# {'Simulated ' * data['simulated']}THUMOS14: {data['name']}",
        "",
        *["**The features are simulated: nothing here says anything about video.**", ""] * data["simulated"],
        f"{where['device']}, {where['processor']}, torch {where['torch']}, commit {where['commit']}, {where['date']}; "
        f"streams of {' + '.join(map(str, data['stream_widths']))} features; {report['done']} of {report['all']} "
        f"trainings and judgements done, {counted(report['seeds'], 'seed')}. mAP and F1 in percent, mean ± sample "
        "deviation over the seeds; raw: of the TCAM before lambda' refines it; rows without a recipe are published "
        "ones, and `-` is what is not known of them.",
        *([f"Settings changed in every recipe: {', '.join(report['settings'])}."] if report["settings"] else []),
        "",
        *_missing(data),
        "",
    ]
    rows = report["rows"]
    lines += _table("Table 1", "thumos14", [r for r in rows if r["loss"] == "d2net"], TIOU)
    lines += _table("Table 3", "thumos14-losses", [r for r in rows if r["loss"] in ROWS[:4]], TIOU)
    lines += _table("Table 4", "thumos14-denoising", [r for r in rows if r["loss"] in ("l1", "bce", "d2net")], (0.5,))
    lines += ["## Training time", "", "| recipe | loss | s, iterations alone |", "|---|---|---:|"]
    for row in rows:
        times = [r["training_seconds"] for r in row["runs"] if r["training_seconds"] is not None]
        if times and row["protocol"] == PROTOCOLS[0]:
            lines.append(f"| {row['recipe']} | {row['loss']} | {_mean(times)} |")
    lines += ["", "## What was judged", ""]
    for protocol in PROTOCOLS:  # the same recordings count whatever the network: said once
        row = next((r for r in rows if r["protocol"] == protocol), None)
        said = row["runs"][0]["said"] if row else []
        lines += [f"- {protocol} ({row['recipe']}, {row['loss']}): {line}" for line in said]
    return "\n".join(lines) + "\n"


def _missing(data: dict[str, Any]) -> list[str]:
    lines = []
    for kind, subset in data["subsets"].items():
        names = list(subset["missing"])
        lines.append(
            f"- {kind} ({subset['subset']}): {subset['usable']} of {subset['listed']} listed videos have features; the "
            f"published lists have {subset['published']}. Missing: {len(names)}{': ' * bool(names)}{', '.join(names)}"
            + "; the segments of missing test videos count as missed"
            * (kind == "test" and bool(names))
        )
    return lines + [f"- {note}" for note in data["notes"]]


def _table(title: str, name: str, rows: list[dict[str, Any]], levels: tuple[float, ...]) -> list[str]:
    table = load_table(name)
    lines = [
        f"## {title}",
        "",
        f"| method | recipe | protocol | {' | '.join(f'@{t:g}' for t in levels)} | F1@0.5 | raw @0.5 | raw F1 |",
    ]
    lines.append("|---|---|---|" + "---:|" * (len(levels) + 3))
    for paper in table.rows:
        known = dict(zip(table.tiou, paper.map, strict=True))
        cells = ["-" if known.get(t) is None else f"{known[t]:.1f}" for t in levels]
        supervised = " (segments)" * (paper.supervision == "strong")
        lines.append(f"| {paper.method}{supervised} | - | - | {' | '.join(cells)} | - | - | - |")
    for row in rows:
        values = [[r["map"][f"{t:g}"] for r in row["runs"]] for t in levels]
        values += [[r["f1"] for r in row["runs"]]]
        values += [[r["raw"]["map"]["0.5"] for r in row["runs"]], [r["raw"]["f1"] for r in row["runs"]]]
        method = f"**{PAPER_NAMES[row['loss']]}** ({counted(len(row['runs']), 'seed')})"
        lines.append(f"| {method} | {row['recipe']} | {row['protocol']} | {' | '.join(map(_mean, values))} |")
    return [*lines, ""]


def _mean(values: list[float]) -> str:
    return plus_minus((statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None))


def run(options: argparse.Namespace) -> None:
    catalog = find_dataset(options.features)
    subsets = train_and_test(catalog.subsets, catalog.annotated_subsets)
    train, test = (s or "" for s in subsets)
    if not train or not test or train == test:
        raise InputError(f"{options.features}: has subsets {listed(catalog.subsets)}; a training and a test subset")
    dataset = catalog.open([train, test])
    device = torch.device(
        options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    report: dict[str, Any] = {
        "environment": environment(device),
        "data": described(dataset, train, test),
        "settings": options.set,
        "seeds": options.seeds,
    }
    for line in _missing(report["data"]):
        print(line, flush=True)
    studies = [
        Ablation(
            options.runs / name,
            load_recipe(name).override(options.set),
            variants(),
            seeds=options.seeds,
            data=dataset,
            train=[train],
            test=[test],
            device=str(device),
        )
        for name in RECIPES
    ]
    report["recipes"] = {s.recipe.name: s.recipe.to_dict() for s in studies}
    total = sum(len(s.runs) for s in studies)
    rows: list[dict[str, Any]] = []
    for one in studies:
        rows += work(one, rows, report, total, options.out)
    print(f"wrote {options.out / 'thumos14.json'}, {options.out / 'thumos14.md'}")


def work(
    one: Ablation, before: list[dict[str, Any]], report: dict[str, Any], total: int, out: Path
) -> list[dict[str, Any]]:
    """Finish one recipe; returns its rows. The report is written after every training."""
    clock = Clock(one.out.parent / f"{one.recipe.name}-seconds.json")
    done_before = [path for run in one.runs if (path := one.out / run.folder / "result.json").exists()]
    results = [load_json(path) for path in done_before]
    begun = told = time.monotonic()

    def save() -> list[dict[str, Any]]:
        mine = by_row(one.recipe.name, results, clock.seconds)
        rows = [*before, *mine]
        done = sum(len(row["runs"]) for row in rows)
        whole = report | {"done": done, "all": total, "rows": rows}
        write_whole(out / "thumos14.json", json.dumps(whole, indent=1) + "\n")
        write_whole(out / "thumos14.md", markdown(whole))
        return mine

    def tell(what: str, done: int, all_of_them: int, result: dict[str, Any] | None) -> None:
        nonlocal told
        if result is None:
            clock.tick(what, done)
            if time.monotonic() - told > EVERY:
                told = time.monotonic()
                print(f"{one.recipe.name}, {what}: {done / all_of_them:.0%}", flush=True)
            return
        clock.finished(what, one.recipe.training.iterations)
        results.append(result)
        save()
        left = (time.monotonic() - begun) * (all_of_them - done) / max(done, 1) / 60
        shown = f"mAP@0.5 {result['map']['0.5']:.1f}, F1 {result['f1']:.1f}"
        print(f"{one.recipe.name}, {what}: {shown}; {done / all_of_them:.0%}, about {left:.0f} min left", flush=True)

    results[:] = one.execute(tell)
    return save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", metavar="FEATURES", help="folder in CoLA's layout (docs/data.md, layout 2)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/thumos14"), help="of the results")
    parser.add_argument("--runs", type=Path, default=Path("runs/thumos14"), help="of the checkpoints, about 5 GB")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each row; default 3")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="changes both recipes")
    try:
        run(parser.parse_args())
    except D2NetError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"interrupted; {error or 'the same command goes on from there'}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
