"""The command line: ``d2net demo``, ``train``, ``localize``, ``evaluate``, ``plot``, ``study``, ``convert`` and so on.

Each command reads its options, calls one function of the library and shows the result. What needs torch is imported
inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from typer.core import TyperGroup

from d2net.cli_options import (
    OFF_TERMINAL_WIDTH,
    Data,
    DataOptions,
    Device,
    Settings,
    Threads,
    TrustPickle,
    check_output,
    choose_device,
    choose_subsets,
    claim_folder,
    data_options,
    make_console,
    notes,
    progress_bar,
    refuse_odd_numbers,
    say,
    say_warning,
)
from d2net.errors import D2NetError, InputError
from d2net.studies.cli import study
from d2net.words import escaped, is_number

if TYPE_CHECKING:
    from d2net.detections import Annotations
    from d2net.evaluation import Evaluation


class _Commands(TyperGroup):
    """The commands, with one place where what went wrong becomes one line and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--debug" in args:  # it belongs to the group, but is typed at the end of the line that failed
            args = ["--debug", *(a for a in args if a != "--debug")]
        ctx.meta["d2net.arguments"] = list(args)
        try:
            with _usage():
                return super().parse_args(ctx, args)
        except KeyboardInterrupt as error:  # of which typer would say nothing
            _report(error, "interrupted", "--debug" in args)
            raise typer.Exit(130) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        found = super().resolve_command(ctx, args)
        refuse_odd_numbers(found[1])
        return found

    def invoke(self, ctx: Any) -> Any:
        try:
            with _usage():
                return super().invoke(ctx)
        except BrokenPipeError:  # the reader of a pipe has left, as in `d2net recipes | head -1`
            raise
        except KeyboardInterrupt as error:
            code, message = 130, f"interrupted; {error}".rstrip("; ")
            if ctx.invoked_subcommand == "train" and str(error):  # then something is saved
                again = [a for a in ctx.meta["d2net.arguments"] if a not in ("--resume", "--overwrite")]
                message += f"; go on with: {shlex.join(['d2net', *again, '--resume'])}"
            _report(error, message, ctx.params["debug"])
        except (D2NetError, OSError, MemoryError, ImportError) as error:
            code = 2
            _report(error, f"error: {_one_line(error)}", ctx.params["debug"])
        except RuntimeError as error:
            # Torch's, without importing torch for its name; on a CPU it has none.
            if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
                raise
            code = 2
            _report(error, f"error: {_one_line(MemoryError())}", ctx.params["debug"])
        raise typer.Exit(code)


_UsageError: Any = typer.BadParameter.__base__  # click's, or that of the copy of click that typer has


@contextmanager
def _usage() -> Iterator[None]:
    """What click says of arguments repeats them: escaped, as in every message."""
    try:
        yield
    except _UsageError as error:
        error.message = escaped(error.message)
        raise


def _one_line(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "out of memory; lower training.batch_size or training.max_snippets with --set"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'input/output'}: {error.strerror}; check the path, its rights and the free space"
    return str(error) if isinstance(error, D2NetError) else " ".join(str(error).split())


def _report(error: BaseException, message: str, debug: bool) -> None:
    if debug:
        for line in "".join(traceback.format_exception(error)).rstrip().split("\n"):
            say(line, err=True)
    say(message, err=True)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(study, name="study")


def main() -> None:
    """The command ``d2net``, which begins in :mod:`d2net.__main__`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # where the terminal lacks a letter its number is better than an error
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = say_warning
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", str(OFF_TERMINAL_WIDTH))
    try:
        app(prog_name="d2net")
    except KeyboardInterrupt:  # before there is a command
        say("interrupted", err=True)
        sys.exit(130)


def _show_version(value: bool) -> None:
    if value:
        from d2net import __version__

        say(f"d2net {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool,
        typer.Option("--debug", envvar="D2NET_DEBUG", help="Show the traceback of an error, after any command too."),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Learn from recording-level labels alone which action happens when (D2-Net, ICCV 2021).

    Begin with: d2net demo
    """


@app.command()
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write; replaces an earlier demo.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of initialisation and sampling.")] = 0,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Training iterations; default: those of the recipe watch.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Train on real smartwatch recordings and find the exercises of unseen people: minutes on a CPU.

    The recordings come with a package: pip install seglearn==1.2.5

    \b
    Examples:
      d2net demo
      d2net demo --out /tmp/demo --seed 1
    """
    from d2net.demo import run_demo

    claim_folder(context, out, "metrics.json")
    run_demo(out, seed, iterations=iterations, console=make_console())


@app.command()
@data_options
def train(
    context: typer.Context,
    data: Data,
    recipe: Annotated[str, typer.Option(metavar="NAME", help="Name of a recipe; d2net recipes lists them.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where checkpoint and log go.")],
    options: DataOptions,
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
    save_every: Annotated[int, typer.Option(metavar="N", min=0, help="Save every N iterations; 0: at the end.")] = 500,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
) -> None:
    """Train D2-Net on a dataset, from recording-level labels alone.

    \b
    Examples:
      d2net train --data watch --recipe watch --out runs/watch
      d2net train --data features/ --recipe thumos14-paper --out runs/t14 --set training.batch_size=20
      d2net train --data features/ --recipe thumos14-paper --out runs/t14 --resume
    """
    from d2net.data.describe import describe
    from d2net.recipes import load_recipe
    from d2net.training import Trainer

    if resume and overwrite:
        raise InputError("--resume goes on with a run and --overwrite replaces it; give one of them")
    chosen = load_recipe(recipe).override(settings or [])
    where = choose_device(device)
    claim_folder(context, out, "checkpoint.safetensors")
    catalog = options.find(data)
    training = choose_subsets(catalog, subset, 0, "--subset")
    if eval_subset and not eval_every:
        raise InputError("--eval-subset says where --eval-every looks; give that too")
    evaluating = choose_subsets(catalog, eval_subset, 1, "--eval-subset") if eval_every else []
    if set(evaluating) & set(training):
        say(f"note: --eval-every looks at the training data itself ({', '.join(evaluating)})", err=True)
    dataset = options.open(catalog, [*training, *evaluating])
    for line in describe(dataset):
        say(line)
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
    )
    with notes():
        checkpoint = trainer.run(resume=resume)
    if not trainer.trained:
        say(f"nothing left to train, as {checkpoint} is at iteration {trainer.iteration}: raise training.iterations")
    if trainer.saved:
        say(f"wrote {checkpoint}" + ("" if trainer.trained else " with the settings of now, and the weights it had"))
    command = ["d2net", "localize", str(checkpoint), "--data", data, "--out", str(out / "detections.json")]
    say(f"next: {shlex.join(command + options.again())}")


@app.command()
@data_options
def localize(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="checkpoint.safetensors of d2net train, or its folder.")
    ],
    data: Data,
    out: Annotated[Path, typer.Option(metavar="DETECTIONS.json", help="Where the detections go: .json, or .csv.")],
    options: DataOptions,
    subset: Annotated[
        str | None,
        typer.Option(metavar="NAME[,NAME]", help="Subsets to localize, or all; default: the one named as test data."),
    ] = None,
    settings: Settings = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Find the actions in recordings and write them as ActivityNet JSON or CSV, in seconds.

    \b
    Examples:
      d2net localize runs/watch/checkpoint.safetensors --data watch --out detections.json
      d2net localize runs/mine --data features/ --subset validation,test --out detections.csv
      d2net localize model.safetensors --data features/ --subset all --out d.json --set localization.nms_iou=0.3
    """
    from d2net.checkpoint import load_model
    from d2net.detections import write_detections
    from d2net.localization import localize as find

    where = choose_device(device)
    for setting in settings or []:
        if not setting.startswith("localization."):
            raise InputError(
                f"--set {setting}: a trained model takes only localization.KEY=VALUE; train again for others"
            )
    check_output(out)
    with notes():
        model, reference, saved = load_model(checkpoint, where)
    recipe = saved.recipe.override(settings or [])
    catalog = options.find(data)
    dataset = options.open(catalog, choose_subsets(catalog, subset, 1, "--subset"), like=saved.stream_widths)
    if dataset.stream_widths != saved.stream_widths:
        raise InputError(
            f"{checkpoint} was trained on streams of widths {saved.stream_widths}, dataset '{dataset.name}' has "
            f"{dataset.stream_widths}; localize in features of the same extractor"
        )
    # The network's outputs are counted in the order of its training, whatever the dataset's own.
    chosen = replace(dataset, classes=saved.classes)
    with progress_bar("localizing") as progress:
        detections = find(model, reference, chosen, recipe.localization, device=where, progress=progress)
    features = f"{dataset.name} ({' + '.join(map(str, dataset.stream_widths))})"
    if saved.dataset != dataset.name:
        features += f", trained on {saved.dataset}"
    write_detections(out, detections, features=features)
    empty = len(chosen) - len(set(detections.video.tolist()))
    say(
        f"wrote {len(detections)} detections of {len(chosen)} recordings ({', '.join(chosen.subsets)}) to {out}"
        + (f"; {empty} recordings have none" if empty else "")
    )


@app.command()
def evaluate(
    detections: Annotated[
        Path, typer.Argument(metavar="DETECTIONS", help="Detections as ActivityNet JSON, or as CSV.")
    ],
    annotations: Annotated[
        str, typer.Option(metavar="PATH", help="Annotations: JSON, W-TALC folder, or a dataset as --data of localize.")
    ],
    subset: Annotated[
        str | None,
        typer.Option(metavar="NAME[,NAME]", help="Subsets that were localized, or all; default: the test data."),
    ] = None,
    protocol: Annotated[
        str, typer.Option(metavar="activitynet|wtalc", help="How matches and AP are counted.")
    ] = "activitynet",
    tiou: Annotated[
        str,
        typer.Option(metavar="LIST", help="Temporal IoUs: START:STOP:STEP, STOP included, or a list as 0.3,0.5,0.7."),
    ] = "0.1:0.7:0.1",
    compare: Annotated[
        str | None,
        typer.Option(metavar="thumos14|activitynet12", help="Print the run beside this table of the paper too."),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Features to name in --compare, where the detections do not say."),
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT.json", help="Write all numbers here too.")
    ] = None,
    ignore_unknown_videos: Annotated[
        bool, typer.Option("--ignore-unknown-videos", help="Drop detections in recordings without annotations.")
    ] = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Compare detections with annotations: mAP at each temporal IoU, its average and F1.

    \b
    Examples:
      d2net evaluate detections.json --annotations watch
      d2net evaluate detections.json --annotations gt.json --subset test --protocol wtalc --tiou 0.1:0.7:0.1
      d2net evaluate detections.json --annotations anet.json --subset validation --tiou 0.5:0.95:0.05 --json out.json
      d2net evaluate detections.json --annotations gt.json --compare thumos14 --features "I3D (Kinetics)"
    """
    from d2net.detections import read_detections, read_features
    from d2net.evaluation import evaluate as judge
    from d2net.files import write_whole

    levels = parse_tiou(tiou)
    if json_out:
        check_output(json_out, "--json")
        if os.path.realpath(json_out) in (os.path.realpath(detections), os.path.realpath(annotations)):
            raise InputError(f"--json {json_out}: is a file that is read here; give another path")
    if compare:
        from d2net.report import paper_tables

        table = paper_tables.load_table(compare)
    elif features:
        raise InputError("--features names the features of a run in a table; give one with --compare")
    truth, data_name = _annotations(annotations, subset, trust_pickle)
    found = read_detections(detections)
    unknown: Literal["ignore", "error"] = "ignore" if ignore_unknown_videos else "error"
    result = judge(found, truth, protocol=protocol, tiou=levels, unknown_videos=unknown)  # type: ignore[arg-type]
    make_console().print(evaluation_table(result, title=f"{detections.name}, protocol {protocol}, in percent"))
    for line in result.coverage.lines():
        say(line)
    numbers = result.to_json()
    if compare:
        covered = set(table.levels) <= set(levels)
        comparison = paper_tables.compare(
            table,
            result if covered else judge(found, truth, protocol=protocol, tiou=table.levels, unknown_videos=unknown),  # type: ignore[arg-type]
            run=f"this run: {detections.name}",
            features="; ".join(filter(None, (read_features(detections), (features or "").strip()))) or None,
            data=data_name,
            classes=result.coverage.classes,
        )
        make_console().print(paper_tables.comparison_table(comparison))
        for note in comparison.notes:
            say(f"note: {note}")
        numbers["comparison"] = comparison.to_json()
    if json_out:
        text = json.dumps(numbers, indent=1) + "\n"
        write_whole(json_out, text)
        say(f"wrote {json_out}")


@app.command()
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
    from d2net.checkpoint import load_checkpoint
    from d2net.report.plot import (
        PICTURED,
        checkpoint_tracks,
        choose_recordings,
        default_label,
        detections_tracks,
        find_recordings,
        timeline_rows,
    )
    from d2net.report.timeline import check_picture, draw_timeline

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
    check_output(out)
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


@app.command()
@data_options
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Dataset, as --data of d2net train.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; an earlier conversion is replaced.")],
    options: DataOptions,
) -> None:
    """Turn a dataset into plain .npy files and one JSON, which open fast and need no pickle.

    \b
    Examples:
      d2net convert THUMOS14-I3D-JOINTFeatures.npy thumos14/ --trust-pickle
      d2net convert watch watch-as-files/
    """
    from d2net.data.convert import convert as convert_dataset
    from d2net.data.convert import writing

    with writing(out):
        dataset = options.open(options.find(source), None)
        with progress_bar("converting") as progress:
            written = convert_dataset(dataset, out, progress=progress)
    say(f"wrote {len(written)} recordings ({', '.join(written.subsets)}) to {out}")


@app.command()
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


@app.command()
def recipes(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Recipe to show, or to compare.")
    ] = None,
) -> None:
    """List the recipes, show every value of one, or show where several differ.

    \b
    Examples:
      d2net recipes
      d2net recipes thumos14-paper
      d2net recipes thumos14-paper thumos14-release
    """
    import yaml

    from d2net.recipes import differences, load_recipe, recipe_names

    if not names:
        table = Table("recipe", "description", box=None)
        for each in recipe_names():
            table.add_row(each, load_recipe(each).description)
        make_console().print(table)
        return
    loaded = [load_recipe(name) for name in names]
    if len(loaded) == 1:
        for line in yaml.safe_dump(loaded[0].to_dict(), sort_keys=False, default_flow_style=None).splitlines():
            say(line)
        return
    table = Table("setting", *names, box=None)
    for key, values in differences(loaded):
        table.add_row(key, *(_yaml_value(value) for value in values))
    make_console().print(table if table.rows else "the recipes have the same values")


@app.command()
def info() -> None:
    """Show versions, the build of the extension, the devices and which backend each operator runs on.

    \b
    Examples:
      d2net info
    """
    from d2net.info import show

    show(make_console())


MOST_LEVELS = 10_000


def parse_tiou(text: str) -> tuple[float, ...]:
    """Temporal IoUs from ``START:STOP:STEP`` (STOP included) or a comma-separated list, in rising order.

    Raises:
        InputError: not such a text, or a value outside (0, 1].
    """
    wrong = InputError(
        f"--tiou {text}: give START:STOP:STEP as 0.1:0.7:0.1 or a list as 0.3,0.5,0.7, each above 0 and at most 1"
    )
    try:
        values = [float(v) for v in text.replace(":", ",").split(",") if is_number(text)]
    except ValueError:
        raise wrong from None
    if not values or not all(0 < v <= 1 for v in values):
        raise wrong
    if ":" in text:
        if len(values) != 3 or "," in text:
            raise wrong
        start, stop, step = values
        if stop < start or step > stop:  # START:STEP:STOP, as some papers write it
            raise wrong
        if (stop - start) / step > MOST_LEVELS:
            raise InputError(f"--tiou {text}: more than {MOST_LEVELS:,} levels; give a larger STEP")
        # In floating point 0.1 + 6 * 0.1 is more than 0.7: half a step of a millionth decides.
        values = [start + i * step for i in range(int((stop - start) / step + 1e-6) + 1)]
    return tuple(sorted({round(v, 6) for v in values}))


def evaluation_table(result: Evaluation, *, title: str) -> Table:
    """One row: mAP at each temporal IoU, its average, and F1, in percent."""
    table = Table(title=title, title_justify="left")
    for name in (*(f"mAP@{level:g}" for level in result.tiou), "average", "F1@0.5"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(*(f"{v:.1f}" for v in (*result.map, result.average, result.f1)))
    return table


def _yaml_value(value: object) -> str:
    """As --set takes it."""
    return json.dumps(value) if not isinstance(value, str) else value


def _annotations(place: str, subset: str | None, trust_pickle: bool) -> tuple[Annotations, str]:
    """The annotations of a file, W-TALC folder or dataset, and the name of the data."""
    from d2net.data import find_dataset

    catalog = find_dataset(place, trust_pickle=trust_pickle)
    for remark in catalog.remarks:
        say(f"note: {remark}", err=True)
    return catalog.annotations(choose_subsets(catalog, subset, 1, "--subset")), catalog.name
