"""``d2net demo``: from recording-level labels to exercises found in the recordings of unseen people."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from d2net.checkpoint import CHECKPOINT_NAME, load_checkpoint, load_model
from d2net.data.watch import load_watch
from d2net.detections import Detections, write_detections
from d2net.errors import InputError
from d2net.evaluation import THUMOS14_TIOU, Evaluation, evaluate
from d2net.files import locked, write_whole
from d2net.localization import localize
from d2net.recipes import Recipe, load_recipe
from d2net.report.dataset_report import write_dataset_report
from d2net.report.facts import RunRecord, data_facts, report_facts, run_facts
from d2net.report.page import NotInstalledError, check_installed
from d2net.report.plot import choose_recordings, model_tracks, timeline_rows
from d2net.report.timeline import MIN_SCORE, draw_timeline
from d2net.training import Trainer
from d2net.training_log import LOG_NAME, read_log


def run_demo(
    out: Path, seed: int = 0, *, iterations: int | None = None, console: Console | None = None, command: str = ""
) -> dict[str, Any]:
    """Train on ``watch``, localize the test subjects' recordings, evaluate and draw; a demo in ``out`` is replaced.

    Writes ``checkpoint.safetensors``, ``detections.json``, ``metrics.json``, ``timeline.png`` and, where Bokeh is
    installed, ``report.html``. Nothing of the test
    subset is used before training is over. The network is so small that it is computed in one thread of the CPU
    (:mod:`d2net.threads`): the same seed gives the same numbers however many cores there are.

    Args:
        out: Folder; made where it is missing.
        seed: Of initialisation and sampling; the dataset is always the same.
        iterations: Of training; None takes the recipe's.
        console: Where to print; None prints nothing.
        command: That was typed, for the report.

    Returns:
        What ``metrics.json`` holds: the settings and the numbers, in percent.

    Raises:
        InputError: the package that ships the recordings is missing, a file cannot be written, another d2net writes in
            ``out``, or the run that is there is no demo's.
    """
    with locked(out):
        return _run(out, seed, iterations, console or Console(quiet=True), command)


def _run(out: Path, seed: int, iterations: int | None, console: Console, command: str) -> dict[str, Any]:
    recipe = load_recipe("watch").override([f"training.iterations={iterations}"] if iterations else [])
    dataset = load_watch()
    _check_replaceable(out, recipe, dataset.name)
    train = dataset.subset("train")
    console.print(
        f"watch: {len(train)} training recordings of a smartwatch, {len(dataset.classes)} exercises "
        f"({', '.join(dataset.classes)}), labels per recording only",
        soft_wrap=True,
    )
    record = RunRecord(command, dataset.name, test=["test"])
    console.print(f"training {recipe.training.iterations} iterations …")
    checkpoint = Trainer(train, recipe, out=out, seed=seed, device="cpu", overwrite=True).run()
    record = record.write(out)

    model = load_model(checkpoint)
    test = dataset.subset("test")
    console.print(f"localizing in {len(test)} recordings of people not seen in training …")
    detections = localize(model, test)
    write_detections(out / "detections.json", detections)
    result = evaluate(detections, test.annotations(), protocol="activitynet", tiou=THUMOS14_TIOU)
    metrics = {
        "dataset": dataset.name,
        "subset": "test",
        "recipe": recipe.name,
        "iterations": recipe.training.iterations,
        "seed": seed,
        **result.to_json(),
    }
    text = json.dumps(metrics, indent=1) + "\n"
    write_whole(out / "metrics.json", text)
    pictured = choose_recordings(test)
    tracks = model_tracks(model, pictured, detections)
    hidden = draw_timeline(out / "timeline.png", timeline_rows(pictured, [tracks]))
    why_no_report = ""
    try:
        check_installed()
        write_dataset_report(
            out / "report.html",
            test,
            detections,
            model_tracks(model, test, detections),
            title="d2net demo: exercises of people not seen in training",
            facts=[*run_facts(load_checkpoint(checkpoint), record), *data_facts(test), *report_facts()],
            logs={"": read_log(out)} if (out / LOG_NAME).exists() else None,
        )
    except NotInstalledError as error:
        why_no_report = str(error)
    _print_result(console, out, result, detections, hidden, why_no_report)
    return metrics


def _check_replaceable(out: Path, recipe: Recipe, dataset: str) -> None:
    """Raises InputError if ``out`` holds a run that is no demo: of another dataset, or with another recipe."""
    if not os.path.lexists(out / CHECKPOINT_NAME):
        return
    there = load_checkpoint(out)
    training = replace(there.recipe.training, iterations=recipe.training.iterations)  # which --iterations changes
    if there.dataset != dataset or replace(there.recipe, training=training) != recipe:
        raise InputError(
            f"{out / CHECKPOINT_NAME}: a checkpoint is there already, of '{there.dataset}' by recipe "
            f"'{there.recipe.name}', which is no demo's; choose another --out"
        )


def _print_result(
    console: Console, out: Path, result: Evaluation, detections: Detections, hidden: int, why_no_report: str
) -> None:
    table = Table(title="Subjects not seen in training, in percent", title_justify="left")
    for name in [f"mAP@{t:g}" for t in result.tiou] + ["F1@0.5"]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(*(f"{n:.1f}" for n in (*result.map, result.f1)))
    console.print(table)
    for line in (result.averages_line(), *result.coverage.lines()):
        console.print(line, soft_wrap=True)
    # Without this a row of equal numbers looks like a bug.
    console.print(
        "The recordings are joined with hard cuts, so boundaries are easy here and mAP may hardly depend on the IoU; "
        "what is left to get wrong is the class. F1 counts every detection written, whatever its score.",
        soft_wrap=True,
    )
    left_out = f"; {hidden} detections below {100 * MIN_SCORE:g} % of the best score are not drawn" if hidden else ""
    for name, what in {
        "timeline.png": f"what was found where, in three recordings{left_out}",
        "report.html": why_no_report or "all of it to look at: timelines, AP of each class, errors, training",
        "detections.json": f"{len(detections)} detections (ActivityNet JSON)",
        "metrics.json": "the numbers above, and AP of each class",
        "checkpoint.safetensors": "the trained model",
    }.items():
        console.print(f"  {out / name}: {what}", soft_wrap=True)
    console.print("your own recordings (docs/own-data.md):")
    for command in (
        ["d2net", "features", "videos/", "--out", "features/"],
        ["d2net", "train", "--data", "features/", "--out", "runs/mine"],
        ["d2net", "predict", "runs/mine", "new.mp4", "--out", "found/"],
        ["d2net", "demo", "--video", "new.mp4"],
    ):
        console.print(f"  {shlex.join(command)}", soft_wrap=True)
    console.print("or go on with these:")
    checkpoint, again = str(out / "checkpoint.safetensors"), str(out / "detections-2.json")
    for command in (
        ["d2net", "localize", checkpoint, "--data", "watch", "--out", again, "--set", "localization.nms_iou=0.3"],
        ["d2net", "evaluate", again, "--annotations", "watch"],
        ["d2net", "train", "--data", "watch", "--recipe", "watch", "--out", "runs/watch"],
        ["d2net", "train", "--help"],
    ):
        console.print(f"  {shlex.join(command)}", soft_wrap=True)
