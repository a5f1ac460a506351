"""``d2net report``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2net.cli.options import DataOptions, Device, Threads, choose_device, choose_subsets, data_options, options_of
from d2net.cli.outputs import REPORT_NAME, check_output, command_of
from d2net.cli.terminal import notes, progress_bar, say
from d2net.errors import InputError
from d2net.words import counted

if TYPE_CHECKING:
    from d2net.report.facts import RunRecord


@data_options
def report(
    context: typer.Context,
    options: DataOptions,
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="Folder of d2net train or demo, or its checkpoint.")
    ] = None,
    detections: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Detections (.json or .csv) in place of a run, or in place of those it finds."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="SPEC", help="As --data of localize; default: the data of RUN, where it says.")
    ] = None,
    subset: Annotated[
        str | None,
        typer.Option(metavar="NAME[,NAME]", help="Subsets to look at, or all; default: the one named as test data."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Default: report.html in RUN, or beside the detections.")
    ] = None,
    recordings: Annotated[
        str | None,
        typer.Option(metavar="NAME[,NAME]", help="Recordings of the timeline; default: all. The numbers are of all."),
    ] = None,
    videos: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Of the recordings' videos; default: what features.json says."),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="TABLE",
            help="Published results beside the run, as of evaluate --compare; default: those for the recipe.",
        ),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Write one HTML page of a run: what was run, mAP, what is wrong with the detections, a timeline per recording.

    The page needs no network; it plays videos that lie beside it.

    \b
    Examples:
      d2net report runs/watch
      d2net report runs/mine --data features/ --videos videos/ --out mine.html
      d2net report --detections theirs.json --data features/ --out theirs.html
    """
    from d2net.checkpoint import load_checkpoint, load_model, model_file
    from d2net.detections import read_detections
    from d2net.localization import localize
    from d2net.recipes import EvaluationRecipe
    from d2net.report.dataset_report import write_dataset_report
    from d2net.report.facts import data_facts, read_record, report_facts, run_facts
    from d2net.report.page import check_installed
    from d2net.report.paper_tables import table_for
    from d2net.report.plot import default_label, model_tracks
    from d2net.report.videos import find_videos
    from d2net.training_log import LOG_NAME, read_log

    check_installed()
    if run is None and detections is None:
        raise InputError("there is nothing to report on; give the folder of a RUN, or --detections FILE.json")
    where = choose_device(device)
    place = detections if run is None else model_file(run)
    assert place is not None
    folder = place.absolute().parent if run is None else place.parent
    out = folder / REPORT_NAME if out is None else out
    record: RunRecord | None = None
    checkpoint = None
    if run is not None:
        with notes():
            checkpoint = load_checkpoint(run)
        record = read_record(folder)
    spec, options = _data(data, options, record, run, folder)
    check_output(out, reads=[place, spec, *([detections] if detections else [])], suffixes=[".html"])
    catalog = options.find(spec)
    names = ",".join(record.test) if subset is None and record and data is None and record.test else subset
    like = checkpoint.stream_widths if checkpoint else None
    dataset = options.open(catalog, choose_subsets(catalog, names, 1, "--subset"), like=like)

    tracks = None
    log = []
    facts = data_facts(dataset)
    if checkpoint is not None:
        assert run is not None
        facts = [*run_facts(checkpoint, record), *facts]
        model = load_model(run, where)
        with progress_bar("localizing") as progress:
            found = read_detections(detections) if detections else localize(model, dataset, progress=progress)
        tracks = model_tracks(model, dataset, found)
        if (folder / LOG_NAME).exists():
            log = read_log(folder)
    else:
        found = read_detections(place)
    if detections is not None:
        facts = [("detections", str(detections)), *facts]
    settings = checkpoint.recipe.evaluation if checkpoint else EvaluationRecipe()
    table = compare or (table_for(checkpoint.recipe.name) if checkpoint else None)
    judged = write_dataset_report(
        out,
        dataset,
        found,
        tracks,
        title=f"{default_label(place)}: {dataset.name}",
        facts=[*facts, *report_facts(command_of(context))],
        protocol=settings.protocol,
        tiou=settings.tiou,
        table=table,
        features=dataset.name,
        logs={"": log} if log else None,
        videos=find_videos(dataset, videos),
        recordings=[n.strip() for n in recordings.split(",")] if recordings else None,
    )
    if isinstance(judged, str):
        say(f"note: {judged}", err=True)
    say(f"wrote {out}: {counted(len(dataset), 'recording')}, {counted(len(found), 'detection')}")


def _data(
    data: str | None, options: DataOptions, record: RunRecord | None, run: Path | None, folder: Path
) -> tuple[str, DataOptions]:
    """The data and what is said of them: as given, or as the run was given them."""
    if data is not None:
        return data, options
    if record is None:
        of = "the detections are of" if run is None else f"{run} is to be judged on, as it does not say"
        raise InputError(f"--data: name the recordings that {of}, as --data of d2net localize")
    from d2net.report.facts import RUN_NAME

    given = replace(options, trust_pickle=False).again()
    if given:
        raise InputError(f"{given[0]} says something of the data; give --data too")
    return record.data, options_of(record.options, folder / RUN_NAME, options.trust_pickle)
