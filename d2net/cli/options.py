"""Options that more than one command has, and the dataset, subsets and device that they choose."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2net.cli.terminal import say
from d2net.errors import InputError
from d2net.spec import is_made, is_simulated
from d2net.words import is_number, quoted, reason

if TYPE_CHECKING:
    from d2net.data import Catalog, Dataset, Times

_WIDEST = 2**31  # columns of features
_LISTED = 20  # recordings that are named when they are left out
_PANEL = "What the data does not say, or says wrongly"

Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="watch, simulated, simulated:ANNOTATIONS.json, or the path of a dataset in a known layout; with settings "
        "as in watch,difficulty=hard and simulated,width=64,difficulty=hard:ANNOTATIONS.json.",
    ),
]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle",
        help="Open W-TALC's pickled files, of which arrays alone are read: only from a source you trust.",
    ),
]
Device = Annotated[
    str, typer.Option(metavar="auto|cpu|cuda", help="Where to compute; auto takes the GPU if there is one.")
]


def _compute_in(context: typer.Context, number: int | None) -> int | None:
    """For as long as the command runs."""
    if number is not None:
        from d2net.threads import threads

        context.with_resource(threads(number))
    return number


Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        max=65_536,
        callback=_compute_in,
        help="Of the CPU to compute in; default: as many as the work is worth.",
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="Recipe, or FILE.yaml (d2net recipes); default: that of the data, for your own generic.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a value of the recipe. Can be given many times."),
]


@dataclass(frozen=True)
class DataOptions:
    """The options of :func:`data_options`: how to open a dataset."""

    trust_pickle: TrustPickle = False
    fps: Annotated[
        float | None,
        typer.Option(metavar="N", help="Frames a second that the features were extracted at.", rich_help_panel=_PANEL),
    ] = None
    stride: Annotated[
        float | None, typer.Option(metavar="FRAMES", help="From one snippet to the next.", rich_help_panel=_PANEL)
    ] = None
    window: Annotated[
        float | None,
        typer.Option(
            metavar="FRAMES", help="That a snippet is computed from; default: the stride.", rich_help_panel=_PANEL
        ),
    ] = None
    offset: Annotated[
        float | None,
        typer.Option(metavar="FRAME", help="At which the first window begins; default: 0.", rich_help_panel=_PANEL),
    ] = None
    seconds_per_snippet: Annotated[
        float | None, typer.Option(metavar="S", help="In place of stride and fps.", rich_help_panel=_PANEL)
    ] = None
    streams: Annotated[
        str | None,
        typer.Option(
            metavar="W[,W]", help="Width of each stream of features that lie in one array.", rich_help_panel=_PANEL
        ),
    ] = None
    ignore_durations: Annotated[
        bool,
        typer.Option(
            "--ignore-durations", help="Take durations that do not fit the features as wrong.", rich_help_panel=_PANEL
        ),
    ] = False
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="A recording without usable features is an error; default: left out and named.",
            rich_help_panel=_PANEL,
        ),
    ] = False

    def times(self) -> Times:
        from d2net.data import Times

        return Times(
            fps=self.fps,
            stride=self.stride,
            window=self.window,
            offset=self.offset,
            seconds_per_snippet=self.seconds_per_snippet,
        )

    def find(self, spec: str) -> Catalog:
        """What the dataset holds; its features are not looked at."""
        from d2net.data import find_dataset

        if is_made(spec):
            self.refuse(spec)
        return find_dataset(spec, trust_pickle=self.trust_pickle)

    def open(self, catalog: Catalog, subsets: list[str] | None, like: tuple[int, ...] | None = None) -> Dataset:
        """Open the subsets of a dataset; what was assumed or left out is said on stderr.

        Args:
            catalog: The dataset.
            subsets: Names of the subsets; None: all.
            like: Stream widths of a model. Features in one array are split into these where nothing else says how.
        """
        dataset = catalog.open(
            subsets,
            times=self.times(),
            streams=self.stream_widths(),
            like=like,
            strict=self.strict,
            check_durations=not self.ignore_durations,
        )
        for note in said_of(dataset):
            say(note, err=True)
        return dataset

    def refuse(self, spec: str) -> None:
        """Raises InputError for an option that has no meaning for a dataset that d2net makes."""
        if given := self.again():
            raise InputError(f"{spec} is made by d2net, which knows all about it; leave {given[0]} out")

    def again(self) -> list[str]:
        """The options as they were given, for a command that opens the same data."""
        words: list[str] = []
        for name, value in vars(self).items():
            option = f"--{name.replace('_', '-')}"
            if value is True:
                words.append(option)
            elif value not in (None, False):
                words += [option, f"{value:.15g}" if isinstance(value, float) else value]
        return words

    def stream_widths(self) -> tuple[int, ...] | None:
        if self.streams is None:
            return None
        try:
            widths = tuple(int(w) for w in self.streams.split(",") if is_number(self.streams))
        except ValueError:
            widths = ()
        if not 1 <= len(widths) <= 2 or not all(1 <= w <= _WIDEST for w in widths):
            raise InputError(f"--streams {self.streams}: give the width of the stream, or of both as 1024,1024")
        return widths


def absolute(spec: str) -> str:
    """``--data`` as it can be given anywhere: with the whole path, where it is one."""
    kind, colon, rest = spec.partition(":")
    if is_simulated(spec):
        return f"{kind}{colon}{Path(rest).absolute() if rest else ''}"
    return spec if is_made(spec) else str(Path(spec).absolute())


def options_of(said: Mapping[str, Any], where: Path, trust_pickle: bool) -> DataOptions:
    """The options that a run's record holds; whether pickles are trusted is for the user to say again.

    Raises:
        InputError: something that is none of them.
    """
    for name, value in said.items():
        known = DataOptions.__dataclass_fields__.get(name)
        if known is None or not isinstance(value, (bool, int, float, str, type(None))):
            raise InputError(
                f"{where}: option {quoted(name)} is {quoted(value)}, which d2net does not write; give --data"
            )
    return replace(DataOptions(**said), trust_pickle=trust_pickle)


def refuse_odd_numbers(command: Any) -> None:
    """Have the options of a command that are numbers refuse what :func:`d2net.words.is_number` does."""
    for each in getattr(command, "commands", {}).values():
        refuse_odd_numbers(each)
    for parameter in command.params:
        parameter.process_value = functools.partial(_process_value, parameter, parameter.process_value)


def _process_value(parameter: Any, process: Callable[..., Any], context: Any, value: Any) -> Any:
    found = process(context, value)
    number = isinstance(found, (int, float)) and not isinstance(found, bool)
    if number and isinstance(value, str) and not is_number(value):
        raise typer.BadParameter(f"{quoted(value)} is no number in the digits 0 to 9", context, parameter)
    return found


def data_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of ``DataOptions`` to a command, which gets them as the argument ``options``."""

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        own = {name: values.pop(name) for name in DataOptions.__dataclass_fields__}
        command(**values, options=DataOptions(**own))

    parameters = dict(inspect.signature(command, eval_str=True).parameters)
    del parameters["options"]
    added = inspect.signature(DataOptions, eval_str=True).parameters
    # Keyword-only, so that an option with a default may stand before an argument without.
    together = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*parameters.values(), *added.values())]
    wrapper.__signature__ = inspect.Signature(together)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in together}
    return wrapper


def said_of(dataset: Dataset) -> list[str]:
    """Print what was assumed when a dataset was opened, and which recordings were left out and why."""
    lines = [f"note: {note}" for note in dataset.notes]
    if dataset.left_out:
        number = f"{len(dataset.left_out)} of {len(dataset.left_out) + len(dataset)}"
        lines.append(f"left out: {number} recordings without usable features (--strict makes that an error):")
        lines += [f"  {r.name} ({r.subset}): {r.why}" for r in dataset.left_out[:_LISTED]]
        if len(dataset.left_out) > _LISTED:
            lines.append(f"  and {len(dataset.left_out) - _LISTED} more; d2net inspect lists all")
    return lines


def choose_subsets(catalog: Catalog, names: str | None, which: int, option: str) -> list[str]:
    """The subsets asked for, as "A,B" or "all", or the training (0) or test (1) subset of the dataset.

    Raises:
        InputError: one that is not there, or none that is known as what is wanted.
    """
    from d2net.data import train_and_test
    from d2net.data.catalog import UNLABELLED
    from d2net.data.timeline import choose

    if names is not None:
        wanted = [names] if names in catalog.subsets else [n.strip() for n in names.split(",")]
        return list(choose(wanted, catalog.subsets, catalog.source))
    name = train_and_test(catalog.subsets, catalog.annotated_subsets)[which]
    if which == 0 and catalog.subsets == (UNLABELLED,):
        raise InputError(f"{catalog.source}: no recording has a label, and so there is nothing to learn; fill them in")
    if name is None:
        raise InputError(f"dataset '{catalog.name}' has subsets {', '.join(catalog.subsets)}; choose one with {option}")
    return [name]


# Classes that tell the benchmarks from all other data. ActivityNet1.3 has those of 1.2 and a hundred more.
_BENCHMARKS = {
    "thumos14-paper": {"BaseballPitch", "CliffDiving", "ThrowDiscus"},
    "activitynet12-paper": {"Archery", "Bathing dog", "Cumbia"},
}
_ACTIVITYNET12_CLASSES = 100


def choose_recipe(name: str | None, data: str, catalog: Catalog) -> str:
    """The recipe asked for, or the one for this data: ``generic`` where it is one's own, which is said on stderr."""
    if name is not None:
        return name
    if is_made(data):
        return "watch"
    known = [recipe for recipe, classes in _BENCHMARKS.items() if classes <= set(catalog.classes)]
    chosen = known[0] if known else "generic"
    if chosen == "activitynet12-paper" and len(catalog.classes) > _ACTIVITYNET12_CLASSES:
        chosen = "activitynet13"
    why = "by the classes of this data" if known else "for data of your own"
    say(f"note: the recipe is {chosen}, {why}; --recipe NAME or FILE.yaml takes another", err=True)
    return chosen


def choose_device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: give auto, cpu or cuda")
    try:
        torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: is no device ({reason(error)}); give auto, cpu or cuda") from None
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch {torch.__version__} sees no GPU; use --device cpu, or see d2net info")
    return name
