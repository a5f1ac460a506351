"""``d2net features``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2net.cli.options import Device, Threads, choose_device
from d2net.cli.outputs import claim_folder
from d2net.cli.ranks import in_ranks, join
from d2net.cli.terminal import progress_bar, say
from d2net.errors import InputError
from d2net.words import counted, listed

if TYPE_CHECKING:
    from d2net.features import Method, Written

_VIDEOS, _SENSORS = "Videos", "Sensors (--extractor windows)"


@in_ranks
def features(
    context: typer.Context,
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help="Videos, CSV files of sensors, or folders of them.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the features; those that are there already stay.")],
    extractor: Annotated[
        str,
        typer.Option(
            metavar="i3d|kinetics400|windows",
            help="I3D's 1024 features of a video, its scores of 400 classes, or statistics of sensors' signals.",
        ),
    ] = "i3d",
    fps: Annotated[
        float | None,
        typer.Option(metavar="N", help="Frames or samples a second to bring all to; default: 25, sensors 50."),
    ] = None,
    window: Annotated[
        int | None, typer.Option(metavar="FRAMES", help="That a snippet is computed from; default: 16, sensors 50.")
    ] = None,
    stride: Annotated[int, typer.Option(metavar="FRAMES", help="From one snippet to the next.")] = 16,
    weights: Annotated[
        Path | None,
        typer.Option(help="Of I3D: .pt, .safetensors or .ckpt; default: the published ones.", rich_help_panel=_VIDEOS),
    ] = None,
    flow: Annotated[
        str | None,
        typer.Option(metavar="dis|tvl1", help="Features of the optical flow too, by OpenCV.", rich_help_panel=_VIDEOS),
    ] = None,
    flow_weights: Annotated[
        Path | None, typer.Option(help="Of the I3D of optical flow.", rich_help_panel=_VIDEOS)
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows at a time.", rich_help_panel=_VIDEOS)] = 4,
    precision: Annotated[
        str, typer.Option(metavar="float32|bf16", help="Of I3D.", rich_help_panel=_VIDEOS)
    ] = "float32",
    columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,NAME]", help="Of a sensor; once for each sensor. Default: found.", rich_help_panel=_SENSORS
        ),
    ] = None,
    time_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the clock; default: found.", rich_help_panel=_SENSORS)
    ] = None,
    time_unit: Annotated[
        str | None, typer.Option(metavar="s|ms|us|ns|date", help="Default: found.", rich_help_panel=_SENSORS)
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(metavar="N", help="Rows a second; default: by the clock.", rich_help_panel=_SENSORS),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Make features of videos or of sensors' recordings: an .npy file each, and features.json, which says how.

    \b
    Examples:
      d2net features holiday.mp4 --out features/
      d2net features videos/ --out scores/ --extractor kinetics400
      d2net features wrist/ --out features/ --extractor windows --columns ax,ay,az --columns gx,gy,gz
      torchrun --nproc-per-node 4 -m d2net features videos/ --out features/
    """
    import d2net.features as package
    from d2net.features.log import NAME
    from d2net.features.sensor import SUFFIXES as TABLES
    from d2net.features.video import SUFFIXES as VIDEOS

    of_sensors = {"--columns": columns, "--time-column": time_column, "--time-unit": time_unit, "--rate": rate}
    of_videos = {"--weights": weights, "--flow": flow, "--flow-weights": flow_weights}
    tables = extractor == "windows"
    others = of_videos if tables else of_sensors
    wrong = next((option for option, value in others.items() if value), None)
    if wrong is not None:
        raise InputError(f"{wrong} says nothing of --extractor {extractor}; leave it out")
    for path in inputs:
        if path.suffix.lower() in (VIDEOS if tables else TABLES):
            way = "leave --extractor windows out" if tables else "give --extractor windows"
            raise InputError(f"{path}: is a {'video' if tables else 'table'} by its name; {way}")
    ranks, device = join(context, "cpu" if tables else choose_device(device))
    paths, ignored = package.find_recordings(inputs, TABLES if tables else VIDEOS)
    claim_folder(context, out, NAME, *(f"{name}.npy" for name in paths), reads=inputs)
    given = {"fps": fps, "window": window}
    sampling: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if tables:
        sensors = [[name.strip() for name in sensor.split(",")] for sensor in columns or ()]
        method = package.sensor_method(
            list(paths.values()),
            columns=sensors,
            time_column=time_column,
            time_unit=time_unit,
            rate=rate,
            stride=stride,
            **sampling,
        )
        _say_columns(method)
    else:
        method = package.video_method(
            extractor,
            weights=weights,
            flow=flow,
            flow_weights=flow_weights,
            stride=stride,
            **sampling,
            batch=batch,
            device=device,
            precision=precision,
        )
    if ignored:
        say(f"note: {counted(ignored, 'other file')} in the folders left out, by the names", err=True)
    with progress_bar("recordings") as show:
        result = package.write_features(
            paths, method, out, progress=show, tell=lambda note: say(f"note: {note}", err=True), ranks=ranks
        )
    _say_result(result, method, out)
    if result.failed and ranks.leads:  # the exit code of another would have torchrun end rank 0
        raise typer.Exit(1)


def _say_columns(method: Method) -> None:
    about = method.about
    sensors = "; ".join(", ".join(columns) for columns in about["columns"])
    clock = f"the clock is '{about['time_column']}' in {about['time_unit']}" if about["rate"] is None else ""
    say(f"note: sensors: {sensors}; {clock or format(about['rate'], 'g') + ' rows a second'}", err=True)


def _say_result(result: Written, method: Method, out: Path) -> None:
    for why in result.failed.values():
        say(f"failed: {why}", err=True)
    made = list(result.written.values())
    text = f"wrote features of {counted(len(made), 'recording')}"
    if made:
        rates = sorted(f["rate"] for f in made)
        text += (
            f" ({counted(sum(f['snippets'] for f in made), 'snippet')} of {sum(method.about['streams'])} numbers; "
            f"the files have {rates[0]:.4g}"
            + (f" to {rates[-1]:.4g}" if rates[-1] > 1.001 * rates[0] else "")
            + " a second)"
        )
    text += f" to {out}"
    if result.skipped:
        text += f"; {len(result.skipped)} were there already"
    if result.failed:
        text += f"; {len(result.failed)} failed: {listed(result.failed)}"
    say(text)
