"""``d2net study condition-number``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from d2net.cli.options import (
    Data,
    DataOptions,
    Device,
    Settings,
    Threads,
    choose_device,
    choose_subsets,
    data_options,
)
from d2net.cli.outputs import RUN_FILES, check_apart, claim_folder
from d2net.cli.terminal import make_console, notes, progress_bar, say
from d2net.errors import InputError


@data_options
def condition_number(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where figure, points, summary go; replaces earlier ones.")
    ],
    options: DataOptions,
    samples: Annotated[int, typer.Option(metavar="N", help="Random matrices; the paper took 25000.")] = 25_000,
    classes: Annotated[int, typer.Option(metavar="C", help="Their size, C x C.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling and of the training.")] = 0,
    data: Data = "watch",
    recipe: Annotated[str, typer.Option(metavar="NAME", help="Recipe of the training, or FILE.yaml.")] = "watch",
    checkpoint_run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Train with the recipe of this run, folder or checkpoint, instead."),
    ] = None,
    iterations: Annotated[
        int, typer.Option(metavar="N", min=0, help="Training iterations to watch; 0: random matrices alone.")
    ] = 200,
    settings: Settings = None,
    subset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Subset to train on; default: the one named as training data.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Condition number against determinant of joint distributions, at random and in training (Fig. 3).

    Ctrl-C stops it; the figure is written at the end.

    \b
    Examples:
      d2net study condition-number --out runs/fig3
      d2net study condition-number --classes 20 --iterations 0 --out runs/fig3-20-classes
      d2net study condition-number --data features/ --recipe thumos14-paper --iterations 500 --out runs/fig3-thumos14
    """
    from d2net.checkpoint import load_checkpoint, model_file
    from d2net.data.describe import describe
    from d2net.files import inside
    from d2net.recipes import load_recipe
    from d2net.studies.condition_number import check_sampling, sample_points, summarise, training_points, write_study
    from d2net.training import Trainer

    check_sampling(samples, classes)
    names = ("points.csv", "summary.json", "figure.png", "figure.pdf")
    claim_folder(context, out, *names, reads=[data, *([checkpoint_run] if checkpoint_run else [])])
    facts: dict[str, Any] = {
        "random": "entries >= 0 that sum to 1, uniformly distributed",
        "samples": samples,
        "classes": classes,
        "seed": seed,
    }
    name, trainer = "", None
    if iterations:
        values = load_checkpoint(checkpoint_run).recipe if checkpoint_run else load_recipe(recipe)
        values = values.override([*(settings or []), f"training.iterations={iterations}"])
        where = choose_device(device)
        catalog = options.find(data)
        train = options.open(catalog, choose_subsets(catalog, subset, 0, "--subset"))
        name = train.name
        for line in describe(train):
            say(line)
        place = inside(out, "training")
        check_apart(place, RUN_FILES[:3], [model_file(checkpoint_run)] if checkpoint_run else [])
        if (place / RUN_FILES[0]).exists() and not (out / "summary.json").exists():
            raise InputError(f"{place}: holds a run that is of no such study; choose another --out")
        trainer = Trainer(train, values, out=place, seed=seed, device=where, save_every=0, overwrite=True)
        facts |= {"dataset": name, "recipe": values.name, "iterations": iterations}
    elif checkpoint_run or settings:
        raise InputError("--iterations 0 trains nothing; leave --checkpoint-run and --set out")
    with progress_bar("sampling") as progress:
        points = {"random": sample_points(samples, classes, seed, progress)}
    if trainer is not None:
        points |= training_points(trainer)
    with notes():
        written = write_study(out, points, facts, name)

    table = Table("matrices", "size", "number", "singular", "Spearman", title="Condition number against |det U|")
    table.title_justify = "left"
    for kind, row in summarise(points).items():
        rho = row["spearman"]
        size = f"{row['classes']} x {row['classes']}"
        cells = (kind, size, str(row["matrices"]), str(row["singular"]), "-" if rho is None else f"{rho:.3f}")
        table.add_row(*cells)
    make_console().print(table)
    if trainer is not None and "snippet" not in points:
        say("note: no recording had both pseudo-foreground and pseudo-background; train for more --iterations")
    say(f"wrote {', '.join(map(str, written))}")
