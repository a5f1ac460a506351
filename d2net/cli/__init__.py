"""The command line: ``d2net demo``, ``train``, ``predict``, ``evaluate``, ``report``, ``features`` and so on.

A command is a file: it reads its options, calls one function of the library and shows the result. What needs torch is
imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import Annotated

import typer

from d2net.cli import (
    convert,
    demo,
    evaluate,
    features,
    info,
    inspect,
    localize,
    plot,
    predict,
    recipes,
    report,
    study_ablation,
    study_condition_number,
    train,
)
from d2net.cli.failures import Commands
from d2net.cli.terminal import OFF_TERMINAL_WIDTH, say, say_warning

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
study = typer.Typer(no_args_is_help=True, help="Repeat the paper's experiments about the method itself.")


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
def root_options(
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


# In the order of the help.
app.add_typer(study, name="study")
for command in (
    demo.demo,
    train.train,
    localize.localize,
    evaluate.evaluate,
    plot.plot,
    report.report,
    features.features,
    predict.predict,
    convert.convert,
    inspect.inspect,
    recipes.recipes,
    info.info,
):
    app.command()(command)
study.command("condition-number")(study_condition_number.condition_number)
study.command()(study_ablation.ablation)
