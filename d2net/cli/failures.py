"""Turns the errors of commands into one line on stderr and an exit code."""

from __future__ import annotations

import shlex
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from d2net.cli.options import refuse_odd_numbers
from d2net.cli.terminal import say
from d2net.errors import D2NetError, InputError
from d2net.launch import launched, launched_rank
from d2net.words import escaped


class Commands(TyperGroup):
    """A group of commands, which catches the errors of all of them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--debug" in args:  # an option of the group, but users append it to the command that failed
            args = ["--debug", *(a for a in args if a != "--debug")]
        ctx.meta["d2net.arguments"] = list(args)
        try:
            with _usage():
                return super().parse_args(ctx, args)
        except KeyboardInterrupt as error:  # typer would say nothing
            _report(error, "interrupted", "--debug" in args)
            raise typer.Exit(130) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        found = super().resolve_command(ctx, args)
        if launched() and not getattr(getattr(found[1], "callback", None), "in_ranks", False):
            raise InputError(f"d2net {found[0]} runs in one process; start it without torchrun")
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
                start = "torchrun OPTIONS -m " * launched()
                message += f"; go on with: {start}{shlex.join(['d2net', *again, '--resume'])}"
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
        speaks = not launched() or _speaks(error)
        if speaks and not launched_rank():
            error.message = escaped(error.message)
            raise
        if speaks:  # its words are others than rank 0's
            say(f"error: {error.message}", err=True, any_rank=True)
        raise typer.Exit(error.exit_code) from None


def _one_line(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return (
            "out of memory; lower training.batch_size or training.max_snippets with --set; of d2net features, --batch"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'input/output'}: {error.strerror}; check the path, its rights and the free space"
    return str(error) if isinstance(error, D2NetError) else " ".join(str(error).split())


def _report(error: BaseException, message: str, debug: bool) -> None:
    if launched() and not _speaks(error):
        return
    if debug:
        for line in "".join(traceback.format_exception(error)).rstrip().split("\n"):
            say(line, err=True, any_rank=True)
    say(message, err=True, any_rank=True)


def _speaks(error: BaseException) -> bool:
    try:
        from d2net.distributed import speaks
    except Exception:  # whatever PyTorch says when it is imported anew after Ctrl-C in its import
        return launched_rank() == 0
    return speaks(error)
