"""``d2net plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2net.cli.options import Data, DataOptions, Device, Threads, choose_device, choose_subsets, data_options
from d2net.cli.outputs import check_output
from d2net.cli.terminal import notes, progress_bar, say
from d2net.errors import InputError


@data_options
def plot(
    data: Data,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Picture to write: .png, .pdf or .svg.")],
    options: DataOptions,
    checkpoints: Annotated[
        list[Path] | None, typer.Argument(metavar="CHECKPOINT", help="Checkpoints, or folders of runs.")
    ] = None,
    detections: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Detections (.json or .csv) to draw too, or alone. Can be given many times."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Name of each: first the checkpoints in order, then each --detections."),
    ] = None,
    video: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Recording to draw; default: a few that show many classes. Can be repeated."),
    ] = None,
    subset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME]", help="Where to look; default: the test data, or where each --video is. Or all."
        ),
    ] = None,
    frames: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Draw images of the recordings: FOLDER/VIDEO/*.jpg or .png.")
    ] = None,
    min_score: Annotated[
        float,
        typer.Option(
            metavar="SHARE", min=0, max=1, help="Draw detections from this share of their model's best; 0: all."
        ),
    ] = 0.25,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Draw what models found in recordings: frames, ground truth, detections, activations over time.

    Classes are those of the checkpoints; the recordings need no labels.

    \b
    Examples:
      d2net plot runs/watch --data watch --out timeline.png
      d2net plot runs/baseline runs/d2net --data features/ --video video_test_0000004 --frames frames/ --out fig5.pdf
      d2net plot --detections theirs.json --label BaS-Net --data features/ --min-score 0 --out theirs.svg
    """
    from d2net.checkpoint import load_checkpoint, model_file
    from d2net.report.pictures import check_picture
    from d2net.report.plot import (
        PICTURED,
        checkpoint_tracks,
        choose_recordings,
        default_label,
        detections_tracks,
        find_recordings,
        timeline_rows,
    )
    from d2net.report.timeline import draw_timeline

    check_picture(out)
    sources = [*(checkpoints or []), *(detections or [])]
    if not sources:
        raise InputError("there is nothing to draw; give a CHECKPOINT or --detections FILE.json")
    if label and len(label) != len(sources):
        raise InputError(f"--label is given {len(label)} times for {len(sources)} checkpoints and detections; name all")
    names = label or [default_label(path) for path in sources]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{names.count(name)} of the checkpoints and detections are called '{name}'; use --label")
    where = choose_device(device)
    if frames is not None and not frames.is_dir():
        raise InputError(f"{frames}: no such folder; --frames takes one that holds a folder of images per recording")
    files = [*map(model_file, checkpoints or []), *(detections or []), *([frames] if frames else [])]
    check_output(out, reads=[*files, data])
    catalog = options.find(data)
    if video and not subset:
        subsets = list(dict.fromkeys(r.subset for r in catalog.listings if r.name in video)) or None
    else:
        subsets = choose_subsets(catalog, subset, 1, "--subset")
    with notes():
        like = load_checkpoint(checkpoints[0]).stream_widths if checkpoints else None
    dataset = options.open(catalog, subsets, like=like)
    chosen = (
        find_recordings(dataset, video)
        if video
        else choose_recordings(dataset, PICTURED if len(sources) == 1 else PICTURED - 1)
    )
    tracks = []
    with notes(), progress_bar("localizing") as progress:
        for i, (path, name) in enumerate(zip(sources, names, strict=True)):
            if i < len(checkpoints or []):
                tracks.append(checkpoint_tracks(path, name, chosen, where))
            else:
                tracks.append(detections_tracks(path, name, chosen))
            progress(i + 1, len(sources))
    with notes():
        hidden = draw_timeline(out, timeline_rows(chosen, tracks, frames), min_score=min_score)
    if hidden:
        found = sum(len(t.detections) for of in tracks for t in of)
        say(
            f"note: {hidden} of {found} detections are below {100 * min_score:g} % of the best score of their model in "
            "the picture and not drawn; --min-score 0 draws all"
        )
    say(f"wrote {out}: {', '.join(r.name for r in chosen.recordings)}")
