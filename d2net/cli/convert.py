"""``d2net convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2net.cli.options import DataOptions, data_options
from d2net.cli.outputs import check_apart
from d2net.cli.terminal import notes, progress_bar, say


@data_options
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Dataset, as --data of d2net train.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; an earlier conversion is replaced.")],
    options: DataOptions,
    layout: Annotated[
        str, typer.Option(metavar="cola|plain", help="With a JSON, or with labels.csv and segments.csv.")
    ] = "cola",
) -> None:
    """Turn a dataset into plain .npy files and a JSON, or two CSVs: they open fast and need no pickle.

    \b
    Examples:
      d2net convert THUMOS14-I3D-JOINTFeatures.npy thumos14/ --trust-pickle
      d2net convert watch watch-as-files/
      d2net convert thumos14/ as-csv/ --layout plain
    """
    from d2net.data.convert import convert as convert_dataset
    from d2net.data.convert import writing

    check_apart(out, [], [source])
    with writing(out):
        dataset = options.open(options.find(source), None)
        with notes(), progress_bar("converting") as progress:
            written = convert_dataset(dataset, out, layout=layout, progress=progress)
    say(f"wrote {len(written)} recordings ({', '.join(written.subsets)}) to {out}")
