"""The command line: ``d2net demo``, ``train``, ``localize``, ``evaluate``, ``convert``, ``recipes``, ``info``.

Each command reads its options, calls one function of the library and shows the result. What needs torch is imported
inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

from d2net.errors import D2NetError, InputError

if TYPE_CHECKING:
    from d2net.data import Dataset
    from d2net.detections import Annotations
    from d2net.evaluation import Evaluation

OFF_TERMINAL_WIDTH = 120  # columns of tables that go to a file or a pipe


class _Commands(TyperGroup):
    """The commands, with one place where what went wrong becomes one line and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--debug" in args:  # it belongs to the group, but is typed at the end of the line that failed
            args = ["--debug", *(a for a in args if a != "--debug")]
        ctx.meta["d2net.arguments"] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of a pipe has left, as in `d2net recipes | head -1`
            raise
        except KeyboardInterrupt as error:
            code, message = 130, f"interrupted; {error}".rstrip("; ")
            if ctx.invoked_subcommand == "train":
                again = [a for a in ctx.meta["d2net.arguments"] if a not in ("--resume", "--overwrite")]
                message += f"; go on with: {shlex.join(['d2net', *again, '--resume'])}"
            _report(error, message, ctx.params["debug"])
        except (D2NetError, OSError, MemoryError, ImportError) as error:
            code = 2
            _report(error, f"error: {_one_line(error)}", ctx.params["debug"])
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, without importing torch for its name
                raise
            code = 2
            _report(error, f"error: {_one_line(MemoryError())}", ctx.params["debug"])
        raise typer.Exit(code)


def _one_line(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "out of memory; lower training.batch_size or training.max_snippets with --set"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'input/output'}: {error.strerror}; check the path, its rights and the free space"
    return " ".join(str(error).split())


def _report(error: BaseException, message: str, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    typer.echo(message, err=True)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point of the command ``d2net``."""
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", str(OFF_TERMINAL_WIDTH))
    app(prog_name="d2net")


def _console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = max(console.width, OFF_TERMINAL_WIDTH)
    return console


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for ``progress(done, total)``; nothing is drawn where stderr is no terminal."""
    console = _console(stderr=True)
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show_version(value: bool) -> None:
    if value:
        from d2net import __version__

        typer.echo(f"d2net {__version__}")
        raise typer.Exit


# Options that more than one command has.
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="watch, simulated, simulated:ANNOTATIONS.json, or the path of a dataset in a supported layout.",
    ),
]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle", help="Open W-TALC's pickled files, which can run code: only from a source you trust."
    ),
]
Device = Annotated[
    str, typer.Option(metavar="auto|cpu|cuda", help="Where to compute; auto takes the GPU if there is one.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a value of the recipe. Can be given many times."),
]


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
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write; replaces an earlier demo.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of initialisation and sampling.")] = 0,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Training iterations; default: the recipe's 600.")
    ] = None,
) -> None:
    """Train on real smartwatch recordings and find the exercises of unseen people: minutes on a CPU.

    The recordings come with a package: pip install seglearn==1.2.5

    \b
    Examples:
      d2net demo
      d2net demo --out /tmp/demo --seed 1
    """
    from d2net.demo import run_demo

    run_demo(out, seed, iterations=iterations, console=_console())


@app.command()
def train(
    data: Data,
    recipe: Annotated[str, typer.Option(metavar="NAME", help="Name of a recipe; d2net recipes lists them.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where checkpoint and log go.")],
    subset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Subset to train on; default: the one named as training data.")
    ] = None,
    settings: Settings = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of initialisation and sampling.")] = 0,
    device: Device = "auto",
    eval_every: Annotated[
        int, typer.Option(metavar="N", min=0, help="Evaluate every N iterations, to watch; 0: never. Chooses nothing.")
    ] = 0,
    eval_subset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Subset of --eval-every; default: the one named as test data.")
    ] = None,
    save_every: Annotated[int, typer.Option(metavar="N", min=0, help="Save every N iterations; 0: at the end.")] = 500,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Train D2-Net on a dataset, from recording-level labels alone.

    \b
    Examples:
      d2net train --data watch --recipe watch --out runs/watch
      d2net train --data features/ --recipe thumos14-paper --out runs/t14 --set training.batch_size=20
      d2net train --data features/ --recipe thumos14-paper --out runs/t14 --resume
    """
    from d2net.recipes import load_recipe
    from d2net.training import Trainer

    if resume and overwrite:
        raise InputError("--resume goes on with a run and --overwrite replaces it; give one of them")
    chosen = load_recipe(recipe).override(settings or [])
    where = _device(device)
    dataset = _open(data, trust_pickle)
    trainer = Trainer(
        dataset.subset(_subset(dataset, subset, 0, "--subset")),
        chosen,
        out=out,
        seed=seed,
        device=where,
        eval_every=eval_every,
        evaluation_dataset=dataset.subset(_subset(dataset, eval_subset, 1, "--eval-subset")) if eval_every else None,
        save_every=save_every,
        overwrite=overwrite,
    )
    checkpoint = trainer.run(resume=resume)
    typer.echo(f"wrote {checkpoint}")
    command = ["d2net", "localize", str(checkpoint), "--data", data, "--out", str(out / "detections.json")]
    typer.echo(f"next: {shlex.join(command + (['--trust-pickle'] if trust_pickle else []))}")


@app.command()
def localize(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="checkpoint.safetensors of d2net train.")],
    data: Data,
    out: Annotated[Path, typer.Option(metavar="DETECTIONS.json", help="Where the detections go.")],
    subset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Subset to localize; default: the one named as test data.")
    ] = None,
    settings: Settings = None,
    device: Device = "auto",
    trust_pickle: TrustPickle = False,
) -> None:
    """Find the actions in recordings and write them as ActivityNet JSON, in seconds.

    \b
    Examples:
      d2net localize runs/watch/checkpoint.safetensors --data watch --out detections.json
      d2net localize model.safetensors --data features/ --subset test --out d.json --set localization.nms_iou=0.3
    """
    from d2net.checkpoint import load_model
    from d2net.detections import write_detections
    from d2net.localization import localize as find

    where = _device(device)
    for setting in settings or []:
        if not setting.startswith("localization."):
            raise InputError(
                f"--set {setting}: a trained model takes only localization.KEY=VALUE; train again for others"
            )
    model, reference, saved = load_model(checkpoint, where)
    recipe = saved.recipe.override(settings or [])
    dataset = _open(data, trust_pickle)
    if dataset.stream_widths != saved.stream_widths:
        raise InputError(
            f"{checkpoint} was trained on streams of widths {saved.stream_widths}, dataset '{dataset.name}' has "
            f"{dataset.stream_widths}; localize in features of the same extractor"
        )
    # The network's outputs are counted in the order of its training, whatever the dataset's own.
    chosen = replace(dataset.subset(_subset(dataset, subset, 1, "--subset")), classes=saved.classes)
    with _progress("localizing") as progress:
        detections = find(model, reference, chosen, recipe.localization, device=where, progress=progress)
    write_detections(out, detections)
    typer.echo(f"wrote {len(detections)} detections of {len(chosen)} recordings to {out}")


@app.command()
def evaluate(
    detections: Annotated[Path, typer.Argument(metavar="DETECTIONS.json", help="Detections as ActivityNet JSON.")],
    annotations: Annotated[
        str, typer.Option(metavar="PATH", help="Annotations: JSON, W-TALC folder, or a dataset as --data of localize.")
    ],
    subset: Annotated[str, typer.Option(metavar="NAME", help="Subset that was localized.")] = "test",
    protocol: Annotated[
        str, typer.Option(metavar="activitynet|wtalc", help="How matches and AP are counted.")
    ] = "activitynet",
    tiou: Annotated[
        str,
        typer.Option(metavar="LIST", help="Temporal IoUs: START:STOP:STEP, STOP included, or a list as 0.3,0.5,0.7."),
    ] = "0.1:0.7:0.1",
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
    """
    from d2net.data.files import write_atomically
    from d2net.detections import read_detections
    from d2net.evaluation import evaluate as judge

    levels = parse_tiou(tiou)
    truth = _annotations(annotations, subset, trust_pickle)
    found = read_detections(detections, truth)
    unknown: Literal["ignore", "error"] = "ignore" if ignore_unknown_videos else "error"
    result = judge(found, truth, protocol=protocol, tiou=levels, unknown_videos=unknown)  # type: ignore[arg-type]
    _console().print(evaluation_table(result, title=f"{detections.name}, protocol {protocol}, in percent"))
    if json_out:
        text = json.dumps(result.to_json(), indent=1) + "\n"
        write_atomically(json_out, lambda file: file.write(text.encode()))
        typer.echo(f"wrote {json_out}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Dataset, as --data of d2net train.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; made where it is missing.")],
    trust_pickle: TrustPickle = False,
) -> None:
    """Turn a dataset into plain .npy files and one JSON, which open fast and need no pickle.

    \b
    Examples:
      d2net convert THUMOS14-I3D-JOINTFeatures.npy thumos14/ --trust-pickle
      d2net convert watch watch-as-files/
    """
    from d2net.data import convert as convert_dataset

    with _progress("converting") as progress:
        dataset = convert_dataset(source, out, trust_pickle=trust_pickle, progress=progress)
    typer.echo(f"wrote {len(dataset)} recordings ({', '.join(dataset.subsets)}) to {out}")


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
        _console().print(table)
        return
    loaded = [load_recipe(name) for name in names]
    if len(loaded) == 1:
        typer.echo(yaml.safe_dump(loaded[0].to_dict(), sort_keys=False, default_flow_style=None), nl=False)
        return
    table = Table("setting", *names, box=None)
    for key, values in differences(loaded):
        table.add_row(key, *(_yaml_value(value) for value in values))
    _console().print(table if table.rows else "the recipes have the same values")


@app.command()
def info() -> None:
    """Show versions, the build of the extension, the devices and which backend each operator runs on.

    \b
    Examples:
      d2net info
    """
    from d2net.info import show

    show(_console())


def parse_tiou(text: str) -> tuple[float, ...]:
    """Temporal IoUs from ``START:STOP:STEP`` (STOP included) or a comma-separated list, in rising order.

    Raises:
        InputError: not such a text, or a value outside (0, 1].
    """
    wrong = InputError(
        f"--tiou {text}: give START:STOP:STEP as 0.1:0.7:0.1 or a list as 0.3,0.5,0.7, each above 0 and at most 1"
    )
    try:
        values = [float(v) for v in text.replace(":", ",").split(",")]
    except ValueError:
        raise wrong from None
    if not all(0 < v <= 1 for v in values):
        raise wrong
    if ":" in text:
        if len(values) != 3 or "," in text:
            raise wrong
        start, stop, step = values
        if stop < start or step > stop:  # START:STEP:STOP, as some papers write it
            raise wrong
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


def _open(spec: str, trust_pickle: bool) -> Dataset:
    from d2net.data import open_dataset

    return open_dataset(spec, trust_pickle=trust_pickle)


def _subset(dataset: Dataset, name: str | None, which: int, option: str) -> str:
    """The subset asked for, or the training (0) or test (1) subset of the dataset."""
    from d2net.data import train_and_test

    name = name or train_and_test(dataset.subsets)[which]
    if name is None:
        raise InputError(f"dataset '{dataset.name}' has subsets {', '.join(dataset.subsets)}; choose one with {option}")
    return name


def _annotations(place: str, subset: str, trust_pickle: bool) -> Annotations:
    from d2net.detections import read_annotations

    path = Path(place)
    if path.is_file() or (path / "classlist.npy").exists():  # a W-TALC folder of annotations has that file
        return read_annotations(path, subset=subset, trust_pickle=trust_pickle)
    return _open(place, trust_pickle).subset(subset).annotations()


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: give auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch {torch.__version__} sees no GPU; use --device cpu, or see d2net info")
    return name
