"""``d2net predict``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2net.cli.options import Device, Settings, Threads, choose_device
from d2net.cli.outputs import claim_folder, command_of
from d2net.cli.ranks import in_ranks, join
from d2net.cli.terminal import notes, progress_bar, say
from d2net.errors import InputError
from d2net.words import counted, listed

if TYPE_CHECKING:
    from d2net.data.dataset import Dataset
    from d2net.detections import Detections
    from d2net.distributed import Ranks
    from d2net.features import Method
    from d2net.prediction import Inputs, Predictor
    from d2net.recipes import Recipe
    from d2net.report.timeline import Track

BEST = 10  # detections that are printed
FILES = ("detections.json", "detections.csv", "timeline.png", "report.html")
_VIDEOS = "Videos"


@in_ranks
def predict(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A run, a checkpoint, or kinetics400: I3D's own 400 classes, without training."
        ),
    ],
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT...", help="Videos, CSV files of sensors, .npy of features, or folders of them."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results, and of the features made.")],
    min_score: Annotated[float, typer.Option(metavar="SCORE", help="Leave out detections of a lower score.")] = 0.0,
    seconds_per_snippet: Annotated[
        float | None, typer.Option(metavar="S", help="Of features, where no features.json says it.")
    ] = None,
    settings: Settings = None,
    weights: Annotated[
        Path | None, typer.Option(help="Of I3D; default: the published ones.", rich_help_panel=_VIDEOS)
    ] = None,
    flow_weights: Annotated[
        Path | None, typer.Option(help="Of the I3D of optical flow.", rich_help_panel=_VIDEOS)
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows at a time.", rich_help_panel=_VIDEOS)] = 4,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Find the actions in videos, sensors' recordings or features: which, from when to when, with a report.

    \b
    Examples:
      d2net predict kinetics400 holiday.mp4 --out found/
      d2net predict runs/mine new-videos/ --out found/
      d2net predict runs/mine features/video7.npy --out found/ --seconds-per-snippet 0.64
      torchrun --nproc-per-node 4 -m d2net predict runs/mine new-videos/ --out found/
    """
    if not math.isfinite(min_score):
        raise InputError(f"--min-score {min_score}: give a number")
    for setting in settings or []:
        if not setting.startswith("localization."):
            raise InputError(
                f"--set {setting}: a trained model takes only localization.KEY=VALUE; train again for others"
            )
    ranks, device = join(context, choose_device(device))
    claim_folder(context, out, *FILES, reads=[*inputs, model])
    find_actions(
        model,
        inputs,
        out,
        min_score=min_score,
        seconds_per_snippet=seconds_per_snippet,
        settings=settings or [],
        weights=weights,
        flow_weights=flow_weights,
        batch=batch,
        device=device,
        command=command_of(context),
        ranks=ranks,
    )


def find_actions(
    model: str,
    inputs: Sequence[Path],
    out: Path,
    *,
    min_score: float = 0.0,
    seconds_per_snippet: float | None = None,
    settings: Sequence[str] = (),
    weights: Path | None = None,
    flow_weights: Path | None = None,
    batch: int = 4,
    device: str = "cpu",
    command: str = "",
    ranks: Ranks | None = None,
) -> None:
    """What ``d2net predict`` does, in a folder that is claimed."""
    from d2net.data.times import Times
    from d2net.detections import write_detections
    from d2net.distributed import ALONE
    from d2net.files import inside
    from d2net.localization import localize
    from d2net.prediction import load, open_inputs
    from d2net.report.plot import model_tracks

    ranks = ranks or ALONE
    with notes():
        predictor = load(model, device)
    assert predictor.model.recipe is not None
    recipe = predictor.model.recipe.override(list(settings))

    def method() -> Method:
        return _method(predictor, weights, flow_weights, batch, device)

    with notes(), progress_bar("features") as show:
        found = open_inputs(
            predictor,
            inputs,
            method=method,
            store=inside(out, "features"),
            times=Times(seconds_per_snippet=seconds_per_snippet),
            progress=show,
            tell=lambda note: say(f"note: {note}", err=True),
            ranks=ranks,
        )
    for note in found.notes:
        say(f"note: {note}", err=True)
    for why in found.failed.values():
        say(f"failed: {why}", err=True)
    with notes(), progress_bar("localizing") as show:
        every = localize(predictor.model, found.dataset, recipe.localization, progress=show, ranks=ranks)
    if not ranks.leads:
        return  # an exit code of its own would have torchrun end rank 0, which writes
    detections = every.at_least(min_score)
    for name in FILES[:2]:
        write_detections(out / name, detections, features=f"by {predictor.name}")
    with notes():
        tracks = model_tracks(predictor.model, found.dataset, detections)
        _draw(found.dataset, tracks, out / FILES[2])
    wrote = [*FILES[:3], *([FILES[3]] if _report(predictor, recipe, found, detections, tracks, out, command) else [])]
    _say_best(detections)
    low = len(every) - len(detections)
    empty = len(found.dataset) - len(set(detections.video.tolist()))
    say(
        f"wrote {counted(len(detections), 'detection')} in {counted(len(found.dataset), 'recording')} to {out}: "
        + ", ".join(wrote)
        + (f"; {low} below --min-score {min_score:g} left out" if low else "")
        + (f"; {counted(empty, 'recording')} without any" if empty else "")
        + (f"; {len(found.failed)} failed: {listed(found.failed)}" if found.failed else "")
    )
    if found.failed:
        raise typer.Exit(1)


def _method(predictor: Predictor, weights: Path | None, flow_weights: Path | None, batch: int, device: str) -> Method:
    """How the features that the model takes are made of a video or a sensor's file."""
    from d2net.features import method_like, video_method
    from d2net.prediction import KINETICS400

    if predictor.name == KINETICS400:
        return video_method(KINETICS400, weights=weights, batch=batch, device=device)
    if (predictor.model.extraction or {}).get("extractor") is None:
        raise InputError(
            f"{predictor.name} was trained on features of which nothing says how they were made; make such of these "
            "inputs and give the .npy, or train on the folder that d2net features writes"
        )
    assert predictor.model.extraction is not None
    return method_like(
        predictor.model.extraction, weights=weights, flow_weights=flow_weights, batch=batch, device=device
    )


def _draw(dataset: Dataset, tracks: Sequence[Track], path: Path) -> None:
    """The picture of the first recordings."""
    from d2net.report.plot import PICTURED, timeline_rows
    from d2net.report.timeline import draw_timeline

    few = replace(dataset, recordings=dataset.recordings[:PICTURED])
    hidden = draw_timeline(path, timeline_rows(few, [tracks[:PICTURED]]))
    if hidden:
        say(f"note: {counted(hidden, 'weak detection')} not drawn in {path.name}", err=True)
    if len(few) < len(dataset):
        say(f"note: {path.name} shows the first {len(few)} of {len(dataset)} recordings", err=True)


def _report(
    predictor: Predictor,
    recipe: Recipe,
    found: Inputs,
    detections: Detections,
    tracks: Sequence[Track],
    out: Path,
    command: str,
) -> bool:
    """Writes the page; False, and a word, where what makes it is not installed."""
    from d2net.report.dataset_report import write_dataset_report
    from d2net.report.facts import data_facts, recipe_fact, report_facts
    from d2net.report.page import NotInstalledError, check_installed
    from d2net.report.videos import SUFFIXES

    try:
        check_installed()
    except NotInstalledError as error:
        say(f"note: no {FILES[3]}: {error}", err=True)
        return False
    write_dataset_report(
        out / FILES[3],
        found.dataset,
        detections,
        tracks,
        title=f"{found.dataset.name}: found by {predictor.name}",
        facts=[
            ("model", f"{predictor.name}, trained on {predictor.model.trained_on}"),
            recipe_fact(recipe),
            *data_facts(found.dataset),
            *report_facts(command),
        ],
        videos={name: path for name, path in found.sources.items() if path.suffix.lower() in SUFFIXES},
    )
    return True


def _say_best(detections: Detections) -> None:
    order = (-detections.score).argsort(kind="stable")[:BEST]
    for i in order.tolist():
        say(
            f"  {detections.videos[detections.video[i]]}: {detections.classes[detections.label[i]]} "
            f"{detections.start[i]:.1f} - {detections.end[i]:.1f} s, score {detections.score[i]:.2f}"
        )
