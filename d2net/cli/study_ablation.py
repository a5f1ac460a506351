"""``d2net study ablation``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

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
from d2net.cli.outputs import REPORT_NAME, claim_folder, command_of
from d2net.cli.terminal import make_console, notes, say
from d2net.errors import InputError
from d2net.spec import is_watch, settings_of
from d2net.words import NAME, counted, escaped

if TYPE_CHECKING:
    from d2net.studies.ablation import Ablation, Progress, Row


@data_options
def ablation(
    context: typer.Context,
    data: Data,
    options: DataOptions,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Of this study alone; given again, the study goes on in it.")
    ] = Path("runs/ablation"),
    recipe: RecipeName = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="Trainings of each variant, with seeds 0 to N - 1.")] = 3,
    losses: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Rows: cross-entropy,focal,dis,d2net (Table 3), l1,bce,dmi (Table 4); default: all, or none where "
            "--variant is given.",
        ),
    ] = None,
    complement: Annotated[
        str | None, typer.Option("--with", metavar="um", help="A row more: D2-Net with the terms of UM.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar='"NAME: KEY=VALUE …"',
            help="A row of your own, settings as of --set, which takes watch.difficulty, watch.tilt, "
            "watch.tempo and watch.train_recordings here too. Many times.",
        ),
    ] = None,
    settings: Settings = None,
    cross_validate: Annotated[
        bool,
        typer.Option("--cross-validate", help="watch: leave out one training person at a time, and judge on that one."),
    ] = False,
    folds: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --cross-validate: groups of people to leave out; default: each alone."),
    ] = None,
    subset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Subset to train on; default: the one named as training data.")
    ] = None,
    eval_subset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Subset to judge on; default: the one named as test data.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    workers: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=1024,
            help="Processes to train in, each with as many --threads; the results are the same whatever N.",
        ),
    ] = 1,
) -> None:
    """What each loss term is worth: variants trained with several seeds (Tables 3 and 4).

    A study goes on where it stopped: give the same command again. More seeds and variants can be added like that.
    On other machines, with Slurm or Dask: docs/studies.md.

    \b
    Examples:
      d2net study ablation --data watch --seeds 3 --out runs/ablation
      d2net study ablation --data watch --seeds 3 --out runs/ablation --workers 4
      d2net study ablation --data watch --cross-validate --losses focal,dis,d2net --seeds 1 --out runs/folds
      d2net study ablation --data watch --cross-validate --out runs/tilt \\
          --variant "recipe:" --variant "flat: watch.tilt=0" --variant "dropout: model.dropout=0.5"
      d2net study ablation --data simulated --with um --set training.iterations=300 --out runs/ablation-simulated
      d2net study ablation --data features/ --recipe thumos14-paper --out runs/ablation-thumos14
    """
    from d2net.data import open_dataset
    from d2net.data.describe import describe
    from d2net.data.watch import TRAIN_SUBJECTS
    from d2net.recipes import load_recipe
    from d2net.report.page import NotInstalledError
    from d2net.studies.ablation import (
        COMPLEMENTS,
        LOSSES,
        TABLES,
        Ablation,
        choose_losses,
        make_rows,
        parse_variant,
        write_page,
        write_tables,
    )
    from d2net.studies.workers import Workers

    claim_folder(context, out, "study.json", *TABLES, REPORT_NAME, reads=[data])
    variants = choose_losses(losses) if losses is not None else [] if variant else list(LOSSES.values())
    if complement is not None:
        if complement not in COMPLEMENTS:
            raise InputError(f"--with {complement}: is not known; there is {', '.join(COMPLEMENTS)}")
        variants.append(COMPLEMENTS[complement])
    variants += map(parse_variant, variant or [])
    making = tuple(s for s in settings or [] if s.startswith("watch."))  # of the data, not of the recipe
    where = choose_device(device)
    names: dict[str, list[str]] = {}
    dataset = reopen = None
    if is_watch(data) and "," in data:
        making = (*(f"watch.{key}={x}" for key, x in settings_of(data, {"difficulty": "easy"}).items()), *making)
    variants = [replace(v, settings=(*making, *v.settings)) for v in variants]
    if is_watch(data):  # the study makes its own
        options.refuse(data)
        recipe = recipe or "watch"
    else:
        catalog = options.find(data)
        recipe = choose_recipe(recipe, data, catalog)
    values = load_recipe(recipe).override([s for s in settings or [] if not s.startswith("watch.")])
    if not is_watch(data):
        names["train"] = choose_subsets(catalog, subset, 0, "--subset")
        names["test"] = choose_subsets(catalog, eval_subset, 1, "--eval-subset")
        subsets = [*names["train"], *names["test"]]
        dataset = options.open(catalog, subsets)
        reopen = partial(
            open_dataset,
            absolute(data),
            trust_pickle=options.trust_pickle,
            subsets=subsets,
            times=options.times(),
            streams=options.stream_widths(),
            strict=options.strict,
            check_durations=not options.ignore_durations,
        )
        for line in describe(dataset):
            say(line)
    elif subset or eval_subset:
        raise InputError("--data watch has its subsets train and test; leave --subset and --eval-subset out")
    if cross_validate:
        folds = len(TRAIN_SUBJECTS) if folds is None else folds
    elif folds is not None:
        raise InputError("--folds is for --cross-validate; give that too")
    experiment = Ablation(
        out, values, variants, seeds=seeds, data=dataset, folds=folds, device=where, reopen=reopen, **names
    )
    for name, other in experiment.duplicates():
        say(f"note: '{name}' has the same settings as '{other}' with this recipe", err=True)
    if workers == 1:
        with _study_progress() as progress:
            results = experiment.execute(progress)
    else:
        say_crowding(workers, experiment.threads())
        with _study_progress() as progress, notes(), Workers(workers) as executor:
            results = experiment.execute(progress, executor)
    rows = make_rows(experiment, results)
    with notes():
        written = write_tables(experiment, rows)
    why = ""
    try:
        write_page(experiment, rows, out / REPORT_NAME, command_of(context))
        written.append(out / REPORT_NAME)
    except NotInstalledError as error:
        why = str(error)
    _print_ablation(experiment, rows)
    say(f"wrote {', '.join(map(str, written))}")
    if why:
        say(f"note: {why}", err=True)


def say_crowding(workers: int, threads: int) -> None:
    """A note where so many workers of so many threads each are more than there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers * threads > cores:
        fewer = f", or --threads {max(1, cores // workers)}, which gives other last bits" if threads > 1 else ""
        say(
            f"note: {workers} workers of {counted(threads, 'thread')} wait for each other on {counted(cores, 'core')}; "
            f"--workers {max(1, cores // threads)} is faster{fewer}",
            err=True,
        )


def _print_ablation(study: Ablation, rows: list[Row]) -> None:
    from d2net.studies.ablation import tables_of

    console = make_console()
    console.width = max(console.width, 150)
    for printed in tables_of(study, rows):
        table = Table(title=escaped(printed.title, 2 * NAME), title_justify="left")
        for column in printed.header:
            table.add_column(escaped(column, NAME), justify="left" if column in ("variant", "TCAM") else "right")
        for cells in printed.cells:
            table.add_row(*(escaped(cell, NAME) for cell in cells))
        if printed.cells:
            console.print(table)
        else:
            say(escaped(printed.title, 2 * NAME))
        for note in printed.notes:
            say(escaped(note, 4 * NAME))
    # What the numbers are of: of each variant's last training, where there is more to say than how many.
    for row in (r for r in rows if r.tcam == "raw"):
        for line in row.results[-1]["raw"]["said"][: 1 if row is not rows[0] else None]:
            say(f"{row.variant.name}, raw: {line}")


@contextmanager
def _study_progress() -> Iterator[Progress]:
    """A bar over the whole study on a terminal, and everywhere a line for each training that is finished."""
    console = make_console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    begun = time.monotonic()
    with Bar(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def tell(what: str, done: int, total: int, result: dict[str, Any] | None) -> None:
            bar.update(task, description=what, completed=done, total=total)
            if result is not None:
                iou, score = min(result["map"].items(), key=lambda item: abs(float(item[0]) - 0.5))
                minutes = (time.monotonic() - begun) * (total - done) / done / 60
                console.print(f"{what}: mAP@{iou} {score:.1f}; {done / total:.0%} done, about {minutes:.1f} min left")

        yield tell
