"""Lines, tables and bars on the terminal: whatever names they hold, nothing in those is markup or a line of its own."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from d2net.launch import launched_rank
from d2net.words import escaped

OFF_TERMINAL_WIDTH = 120  # columns of tables that go to a file or a pipe


def say(text: str, *, err: bool = False, any_rank: bool = False) -> None:
    """Print one line, as :func:`d2net.words.escaped` makes it: whatever names it holds, it stays one.

    Of several processes that run a command together the first speaks; with ``any_rank`` another one says who it is.
    """
    rank = launched_rank()
    if rank and not any_rank:
        return
    typer.echo(f"rank {rank} on {escaped(socket.gethostname())}: " * (rank > 0) + escaped(text), err=err)


class _Console(Console):
    """Prints strings, those in tables too, as :func:`d2net.words.escaped` makes them: nothing in a name is markup."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escaped(text), **options)


def make_console(*, stderr: bool = False) -> Console:
    console = _Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = max(console.width, OFF_TERMINAL_WIDTH)
    return console


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[float, int], None]]:
    """A bar on stderr for ``progress(done, total)``; nothing is drawn where stderr is no terminal."""
    console = make_console(stderr=True)
    shown = console.is_terminal and launched_rank() == 0
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def notes() -> Iterator[None]:
    """Each warning within, once, as one line on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = say_warning
        yield


def say_warning(message: Warning | str, *_: object, **__: object) -> None:
    say(f"note: {' '.join(str(message).split())}", err=True)
