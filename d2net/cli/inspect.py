"""``d2net inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from d2net.cli.options import DataOptions, data_options
from d2net.cli.terminal import progress_bar, say


@data_options
def inspect(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Dataset, as --data of d2net train.")],
    options: DataOptions,
) -> None:
    """Describe a dataset and say what in it is missing, contradictory or strange; exit code 1 if anything is.

    Reads all features once.

    \b
    Examples:
      d2net inspect watch
      d2net inspect features/ --fps 25 --stride 16
      d2net inspect W-TALC-FOLDER --trust-pickle
    """
    from d2net.data.describe import describe
    from d2net.data.describe import inspect as look

    catalog = options.find(data)
    with progress_bar("reading") as progress:
        found = look(
            catalog,
            times=options.times(),
            streams=options.stream_widths(),
            check_durations=not options.ignore_durations,
            progress=progress,
        )
    if found.dataset is not None:
        for line in describe(found.dataset):
            say(line)
        for note in found.dataset.notes:
            say(f"note: {note}")
    if not found.problems:
        say("nothing suspicious")
        return
    say("suspicious:")
    for problem in found.problems:
        say(f"  {problem}")
    raise typer.Exit(1)
