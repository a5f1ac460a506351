"""``d2net train``."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2net.cli.options import (
    Data,
    DataOptions,
    Device,
    RecipeName,
    Settings,
    Threads,
    absolute,
    choose_device,
    choose_recipe,
    choose_subsets,
    data_options,
)
from d2net.cli.outputs import REPORT_NAME, RUN_FILES, claim_folder, command_of
from d2net.cli.ranks import MARK, goes_on, in_ranks, join
from d2net.cli.terminal import notes, say
from d2net.errors import InputError

if TYPE_CHECKING:
    from d2net.data import Dataset
    from d2net.report.facts import RunRecord
    from d2net.training import Trainer


@in_ranks
@data_options
def train(
    context: typer.Context,
    data: Data,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where checkpoint and log go.")],
    options: DataOptions,
    recipe: RecipeName = None,
    subset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME]", help="Subsets to train on, or all; default: the one named as training data."
        ),
    ] = None,
    settings: Settings = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Seed of initialisation and sampling; default: 0, or that of the run to --resume."),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="fp32|tf32|bf16",
            help="Of the network; default: tf32 on a GPU, fp32 on a CPU, or that of the run to --resume.",
        ),
    ] = None,
    graph: Annotated[
        bool | None,
        typer.Option("--graph/--no-graph", help="Replay the step as a CUDA graph; default: where that is possible."),
    ] = None,
    eval_every: Annotated[
        int, typer.Option(metavar="N", min=0, help="Evaluate every N iterations, to watch; 0: never. Chooses nothing.")
    ] = 0,
    eval_subset: Annotated[
        str | None,
        typer.Option(metavar="NAME[,NAME]", help="Subsets of --eval-every; default: the one named as test data."),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Save every N iterations; 0: at the end; default: every 500, but not twice within 30 s.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
) -> None:
    """Train D2-Net on a dataset, from recording-level labels alone.

    \b
    Examples:
      d2net train --data my-data --out runs/mine
      d2net train --data watch --recipe watch --out runs/watch
      d2net train --data features/ --recipe thumos14-paper --out runs/t14 --set training.batch_size=20
      d2net train --data features/ --recipe mine.yaml --out runs/t14 --resume
      torchrun --nproc-per-node 4 -m d2net train --data features/ --out runs/t14
    """
    from d2net.data.describe import describe, everywhere
    from d2net.recipes import load_recipe
    from d2net.report.facts import RUN_NAME, RunRecord
    from d2net.training import Trainer

    if resume and overwrite:
        raise InputError("--resume goes on with a run and --overwrite replaces it; give one of them")
    if recipe is not None:
        load_recipe(recipe).override(settings or [])  # what is wrong with it is said before the data are looked at
    ranks, where = join(context, choose_device(device))
    reads = [data] if recipe is None else [data, recipe]
    claim_folder(context, out, *RUN_FILES[:3], RUN_NAME, *([REPORT_NAME] if eval_every else []), reads=reads)
    catalog = options.find(data)
    chosen = load_recipe(choose_recipe(recipe, data, catalog)).override(settings or [])
    training = choose_subsets(catalog, subset, 0, "--subset")
    if eval_subset and not eval_every:
        raise InputError("--eval-subset says where --eval-every looks; give that too")
    evaluating = choose_subsets(catalog, eval_subset, 1, "--eval-subset") if eval_every else []
    if evaluating and not catalog.annotated_subsets & set(evaluating):
        raise InputError(f"--eval-every, {', '.join(evaluating)}: {catalog.no_segments}")
    if set(evaluating) & set(training):
        say(f"note: --eval-every looks at the training data itself ({', '.join(evaluating)})", err=True)
    dataset = options.open(catalog, [*training, *evaluating])
    for line in describe(dataset):
        say(line)
    for line in everywhere(dataset.subset(*training).recordings):
        say(f"note: {line}", err=True)
    trainer = Trainer(
        dataset.subset(*training),
        chosen,
        out=out,
        seed=seed,
        device=where,
        precision=precision,
        graph=graph,
        eval_every=eval_every,
        evaluation_dataset=dataset.subset(*evaluating) if evaluating else None,
        save_every=save_every,
        overwrite=overwrite,
        ranks=ranks,
    )
    resume = goes_on(ranks, trainer.path) or resume
    said = asdict(options)
    del said["trust_pickle"]
    said = {name: value for name, value in said.items() if value not in (None, False)}
    record = RunRecord(command_of(context), absolute(data), said, evaluating)
    with notes():
        try:
            checkpoint = trainer.run(resume=resume)
        except KeyboardInterrupt:
            if trainer.saved and ranks.leads:
                record.write(out)
            raise
        if not ranks.leads:
            return
        (out / MARK).unlink(missing_ok=True)
        record = record.write(out)
    if not trainer.trained:
        say(f"nothing left to train, as {checkpoint} is at iteration {trainer.iteration}: raise training.iterations")
    if trainer.saved:
        say(f"wrote {checkpoint}" + ("" if trainer.trained else " with the settings of now, and the weights it had"))
    if evaluating:
        say(_write_report(out, dataset.subset(*evaluating), trainer, record))
    command = ["d2net", "localize", str(checkpoint), "--data", data, "--out", str(out / "detections.json")]
    say(f"next: {shlex.join(command + options.again())}")


def _write_report(out: Path, dataset: Dataset, trainer: Trainer, record: RunRecord) -> str:
    """``report.html`` of the network as it is now, and the line to say of it: one that cannot be made stops nothing."""
    from d2net.localization import localize
    from d2net.report.dataset_report import write_dataset_report
    from d2net.report.facts import data_facts, report_facts, run_facts
    from d2net.report.page import check_installed
    from d2net.report.paper_tables import table_for
    from d2net.report.plot import model_tracks
    from d2net.report.videos import find_videos
    from d2net.training_log import LOG_NAME, read_log

    recipe, path = trainer.recipe, out / REPORT_NAME
    try:
        check_installed()
        detections = localize(trainer.result, dataset, recipe.localization)
        write_dataset_report(
            path,
            dataset,
            detections,
            model_tracks(trainer.result, dataset, detections),
            title=f"{out.resolve().name}: {dataset.name}",
            facts=[*run_facts(trainer.checkpoint(), record), *data_facts(dataset), *report_facts()],
            protocol=recipe.evaluation.protocol,
            tiou=recipe.evaluation.tiou,
            table=table_for(recipe.name),
            features=dataset.name,
            logs={"": read_log(out)} if (out / LOG_NAME).exists() else None,
            videos=find_videos(dataset),
        )
    except InputError as error:
        return f"note: no {REPORT_NAME}: {error}"
    return f"wrote {path}"
