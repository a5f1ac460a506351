"""``d2net localize``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

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
from d2net.cli.outputs import detection_files, write_all
from d2net.cli.ranks import in_ranks, join
from d2net.cli.terminal import notes, progress_bar, say
from d2net.errors import InputError


@in_ranks
@data_options
def localize(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="checkpoint.safetensors of d2net train, or its folder.")
    ],
    data: Data,
    out: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Where the detections go: .json, beside which a .csv is written; or .csv."),
    ],
    options: DataOptions,
    subset: Annotated[
        str | None,
        typer.Option(metavar="NAME[,NAME]", help="Subsets to localize, or all; default: the one named as test data."),
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(metavar="SCORE", help="Leave out detections of a lower score (in d2net plot: share of the best)."),
    ] = None,
    settings: Settings = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Find the actions in recordings and write them as ActivityNet JSON and CSV, in seconds.

    \b
    Examples:
      d2net localize runs/watch/checkpoint.safetensors --data watch --out detections.json
      d2net localize runs/mine --data features/ --subset validation,test --out detections.csv
      d2net localize runs/mine --data my-data --out detections.json --min-score 0.3
      d2net localize model.safetensors --data features/ --subset all --out d.json --set localization.nms_iou=0.3
      torchrun --nproc-per-node 4 -m d2net localize runs/mine --data my-data --out detections.json
    """
    from d2net.checkpoint import load_model, model_file
    from d2net.localization import localize as find

    ranks, where = join(context, choose_device(device))
    for setting in settings or []:
        if not setting.startswith("localization."):
            raise InputError(
                f"--set {setting}: a trained model takes only localization.KEY=VALUE; train again for others"
            )
    if min_score is not None and not math.isfinite(min_score):
        raise InputError(f"--min-score {min_score}: give a number, as 0.3")
    files = detection_files(out, reads=[model_file(checkpoint), data])
    with notes():
        model = load_model(checkpoint, where)
    assert model.recipe is not None  # as every checkpoint has one
    recipe = model.recipe.override(settings or [])
    catalog = options.find(data)
    dataset = options.open(catalog, choose_subsets(catalog, subset, 1, "--subset"), like=model.stream_widths)
    if dataset.stream_widths != model.stream_widths:
        raise InputError(
            f"{checkpoint} was trained on streams of widths {model.stream_widths}, dataset '{dataset.name}' has "
            f"{dataset.stream_widths}; localize in features of the same extractor"
        )
    with progress_bar("localizing") as progress:
        detections = find(model, dataset, recipe.localization, progress=progress, ranks=ranks)
    if not ranks.leads:
        return
    features = f"{dataset.name} ({' + '.join(map(str, dataset.stream_widths))})"
    if model.trained_on != dataset.name:
        features += f", trained on {model.trained_on}"
    found = len(detections)
    if min_score is not None:
        detections = detections.at_least(min_score)
    written = write_all(files, detections, features)
    empty = len(dataset) - len(set(detections.video.tolist()))
    say(
        f"wrote {len(detections)} detections of {len(dataset)} recordings ({', '.join(dataset.subsets)}) to "
        + " and ".join(map(str, written))
        + (f"; {empty} recordings have none" if empty else "")
        + (f"; {found - len(detections)} of a score below {min_score:g} are left out" if min_score is not None else "")
    )
