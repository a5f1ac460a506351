"""Options that more than one command has, and what the commands do with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from d2net.errors import InputError

if TYPE_CHECKING:
    from d2net.data import Dataset

OFF_TERMINAL_WIDTH = 120  # columns of tables that go to a file or a pipe

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


def make_console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = max(console.width, OFF_TERMINAL_WIDTH)
    return console


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for ``progress(done, total)``; nothing is drawn where stderr is no terminal."""
    console = make_console(stderr=True)
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def notes() -> Iterator[None]:
    """Each warning within as one line on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: typer.echo(f"note: {' '.join(str(message).split())}", err=True)
        yield


def open_data(spec: str, trust_pickle: bool) -> Dataset:
    from d2net.data import open_dataset

    return open_dataset(spec, trust_pickle=trust_pickle)


def choose_subset(dataset: Dataset, name: str | None, which: int, option: str) -> str:
    """The subset asked for, or the training (0) or test (1) subset of the dataset."""
    from d2net.data import train_and_test

    name = name or train_and_test(dataset.subsets)[which]
    if name is None:
        raise InputError(f"dataset '{dataset.name}' has subsets {', '.join(dataset.subsets)}; choose one with {option}")
    return name


def choose_device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: give auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch {torch.__version__} sees no GPU; use --device cpu, or see d2net info")
    return name
