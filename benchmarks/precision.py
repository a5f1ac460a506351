"""Whether the precision of a training changes what it learns: trainings in each precision that the device has, with the
same seeds, judged on recordings that were held out.

The data are `simulated,difficulty=hard` on the timeline that ships with d2net: 16 recordings to train on, 8 to judge,
four classes. Nothing measured on them says how good a method is on real videos. A training is one of `d2net train`, a
judgement what `d2net localize` and `d2net evaluate` do with its checkpoint: localization computes in float32 (on a GPU
in TF32, as PyTorch does by itself) whatever the training did. The recipe is thumos14-paper with layers as in the
authors' code (residual, dropout, N(0, 0.01)) and L_D from half-way on. Without these changes mAP@0.5 was between 37 and
61 from seed to seed (two seeds each, 64 and 128 features a stream), and such a spread would hide anything.

The rule: a mean differs from that of fp32 by more than the spread of seeds where the difference is above its standard
error, from the pooled standard deviation over seeds, times Student's t (95 %, two-sided). For 3 and 3 trainings that is
2.27 pooled deviations. What is smaller cannot be told from seeds by so many trainings; the table says how much that is.
One comparison in 20 crosses the line by chance. Trainings of one seed begin with the same weights and draw the same
batches, so they can be compared one by one too.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bench_training_step import failure, finish
from harness import arguments, attempt, environment, save, synchronize

from d2net import load_model, localize
from d2net.data import Dataset
from d2net.data.simulated import open_simulated
from d2net.evaluation import evaluate
from d2net.recipes import Recipe, load_recipe
from d2net.studies.ablation.table import student
from d2net.training import Trainer
from d2net.training_log import read_log

REFERENCE = "fp32"
TERMS = ("total", "discriminative", "snippet", "video")
LAST = 100  # iterations over which the terms at the end are averaged, as a batch's own are noisy
COMPARED = {  # title, digits
    "map": ("mAP@0.5", 1),
    "average": ("average mAP", 1),
    "total": ("loss at the end", 4),
    "discriminative": ("L_Dis at the end", 4),
}
SHOWN = {
    **COMPARED,
    "snippet": ("L_DS at the end", 4),
    "video": ("L_DV at the end", 4),
    "train_seconds": ("training, s", 1),
    "judge_seconds": ("judgement, s", 1),
}
TELLING = (10, 90)  # a mAP@0.5 outside hardly moves, whatever a training loses


def recipe_of(iterations: int, width: int) -> Recipe:
    return load_recipe("thumos14-paper").override(
        [
            f"training.iterations={iterations}",
            f"training.denoising_start={iterations // 2}",
            f"training.learning_rate={max(1e-4, 0.032 / width):g}",  # 1e-4 is the paper's, too low for narrow layers
            "model.residual=true",
            "model.dropout=0.7",
            "model.weight_std=0.01",
        ]
    )


def measure(dataset: Dataset, recipe: Recipe, device: torch.device, precision: str, seed: int) -> dict[str, Any]:
    """Train once and judge: mAP in percent, the loss and its terms (before their weights) at the end, seconds."""
    held_out, settings = dataset.subset("test"), recipe.evaluation
    since = max(recipe.training.iterations - LAST, recipe.training.denoising_start)  # L_D is 0 before it begins
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        checkpoint = Trainer(
            dataset.subset("train"),
            recipe,
            out=Path(out),
            seed=seed,
            device=device,
            precision=precision,
            save_every=0,
            tensorboard=False,
            progress=lambda *_: None,
        ).run()
        log = [entry for entry in read_log(Path(out)) if entry["iteration"] > since]
        model = load_model(checkpoint, device)
    synchronize(device)
    trained = time.perf_counter()
    detections = localize(model, held_out, recipe.localization)
    found = evaluate(detections, held_out.annotations(), protocol=settings.protocol, tiou=settings.tiou)
    return {
        "map": found.to_json()["map"]["0.5"],
        "average": found.average,
        **{term: statistics.fmean(entry[term] for entry in log) for term in TERMS},
        "train_seconds": trained - begin,
        "judge_seconds": time.perf_counter() - trained,
    }


def values(rows: list[dict[str, Any]], precision: str, measure: str) -> list[float]:
    """Of the trainings that ended."""
    return [row[measure] for row in rows if row["precision"] == precision and "failed" not in row]


def compare(a: list[float], b: list[float]) -> dict[str, float | bool]:
    """By how much the mean of ``a`` is above that of ``b``, beside the spread within both; each has two values or more.

    Returns:
        "difference" of the means; "pooled", the standard deviation within both; "spread", the difference from which on
        the seeds do not explain it; "differ", whether it is beyond that.
    """
    degrees = len(a) + len(b) - 2
    pooled = math.sqrt(((len(a) - 1) * statistics.variance(a) + (len(b) - 1) * statistics.variance(b)) / degrees)
    difference = statistics.fmean(a) - statistics.fmean(b)
    spread = student(degrees) * pooled * math.sqrt(1 / len(a) + 1 / len(b))
    return {"difference": difference, "pooled": pooled, "spread": spread, "differ": abs(difference) > spread}


def comparisons(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every precision with fp32, where both have two trainings or more."""
    found = []
    for key, precision in product(COMPARED, dict.fromkeys(row["precision"] for row in rows)):
        a, b = values(rows, precision, key), values(rows, REFERENCE, key)
        if precision != REFERENCE and min(len(a), len(b)) > 1:
            found.append({"measure": key, "precision": precision, **compare(a, b)})
    return found


def verdict(result: dict[str, Any]) -> str:
    """One sentence: whether precisions differ, and whether these sizes can tell."""
    compared, rows = result["comparisons"], result["rows"]
    if not compared:
        return f"Nothing to compare: {REFERENCE} and another precision need two trainings each that ended."
    differ = [f"{COMPARED[x['measure']][0]} in {x['precision']}" for x in compared if x["differ"]]
    said = (
        f"By more than the spread of seeds differ from {REFERENCE}: {', '.join(differ)}"
        if differ
        else f"No mean differs from that of {REFERENCE} by more than the spread of seeds"
    )
    said += f" ({len(compared)} comparisons)."
    level = statistics.fmean(values(rows, REFERENCE, "map"))
    if not TELLING[0] <= level <= TELLING[1]:
        low, high = TELLING
        said += f" This tells little: mAP@0.5 in {REFERENCE} is {level:.1f}, not between {low} and {high}."
    return said


def markdown(result: dict[str, Any]) -> str:
    where, rows = result["environment"], result["rows"]
    name = where["device"] if where["device"] != "cpu" else f"{where['processor']}, {where['threads']} threads"
    driver = f", driver {where['driver']}" if "driver" in where else ""
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    lines = [
        f"### {result['title']}",
        "",
        f"{name}{driver}, torch {where['torch']}, commit {where['commit']}, {where['date'][:10]}; {result['sizes']}",
        "",
        f"| | network | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | deviation |",
        "|---|---|" + "---:|" * (len(seeds) + 2),
    ]
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    for (key, (title, digits)), precision in product(SHOWN.items(), precisions):
        by_seed = {row["seed"]: row[key] for row in rows if row["precision"] == precision and "failed" not in row}
        cells = [f"{by_seed[seed]:.{digits}f}" if seed in by_seed else "-" for seed in seeds]
        numbers = list(by_seed.values())
        cells.append(f"{statistics.fmean(numbers):.{digits}f}" if numbers else "-")
        cells.append(f"{statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else "-")
        lines.append(f"| {title} | {precision} | {' | '.join(cells)} |")
    lines += [
        "",
        f"| | network | mean, less that of {REFERENCE} | pooled deviation over seeds | beyond the seeds' spread from |",
        "|---|---|---:|---:|---:|",
    ]
    for x in result["comparisons"]:
        title, digits = COMPARED[x["measure"]]
        numbers = [f"{x['difference']:+.{digits + 1}f}", *(f"{x[key]:.{digits + 1}f}" for key in ("pooled", "spread"))]
        lines.append(f"| {title} | {x['precision']} | {' | '.join(numbers)}{' (it is)' if x['differ'] else ''} |")
    lines += ["", verdict(result)]
    lines += [f"{row['precision']}, seed {row['seed']}: {failure(row)}." for row in rows if "failed" in row]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--iterations", type=int, metavar="N", help="of a training; default 1500, on a CPU 600")
    parser.add_argument("--seeds", type=int, metavar="N", help="trainings in each precision, 2 or more; default 3")
    parser.add_argument("--width", type=int, metavar="N", help="of a stream; default 1024, on a CPU 64")
    options = parser.parse_args()
    if options.seeds is not None and options.seeds < 2:
        parser.error(f"--seeds {options.seeds}: a spread needs 2 or more")
    deadline = time.monotonic() + options.seconds
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    iterations, seeds, width = (20, 2, 8) if options.quick else (1500, 3, 1024) if on_gpu else (600, 3, 64)
    iterations, seeds, width = options.iterations or iterations, options.seeds or seeds, options.width or width
    dataset = open_simulated(f"simulated,width={width},difficulty=hard")
    recipe = recipe_of(iterations, width)
    rows: list[dict[str, Any]] = []
    result = {
        "title": "precision",
        "sizes": f"{dataset.name}, D=2x{width}, {iterations} iterations, learning rate "
        f"{recipe.training.learning_rate:g}, {seeds} seeds",
        "recipe": recipe.to_dict(),
        "environment": environment(device),
        "rows": rows,
        "comparisons": [],
    }
    # Seeds outside, so that --seconds cuts all precisions alike.
    for seed, precision in product(range(seeds), ("bf16", "tf32", "fp32") if on_gpu else ("bf16", "fp32")):
        print(f"precision: {precision}, seed {seed} …", flush=True)
        numbers, failed = attempt(deadline, measure, dataset, recipe, device, precision, seed)
        rows.append({"precision": precision, "seed": seed} | (numbers or {"failed": failed}))
        result["comparisons"] = comparisons(rows)
        save(result, markdown(result), options.out)
    finish(result, markdown(result), options.out)


if __name__ == "__main__":
    main()
