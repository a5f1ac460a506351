"""Where a command is to write: seen to be writable, and nobody else's, before anything is computed."""

from __future__ import annotations

from pathlib import Path

import typer

from d2net.cli.terminal import notes
from d2net.errors import InputError


def check_output(path: Path, option: str = "--out") -> None:
    """Make the folder that a file is to be written to, and see whether it can be: before anything is computed.

    Raises:
        InputError: a folder, a link or a device of that name is there, or its folder cannot be made or written to.
    """
    import tempfile

    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written ({error.strerror}); give another path") from error
    if path.is_symlink():
        raise InputError(f"{option} {path}: a symbolic link, which is not followed; give the path that it leads to")
    if path.exists() and not path.is_file():
        raise InputError(f"{option} {path}: not an ordinary file; give the path of a file to write")


def claim_folder(context: typer.Context, folder: Path, file_name: str) -> None:
    """As :func:`check_output` of a file in there; and no other d2net writes in ``folder`` while the command runs.

    Raises:
        InputError: as there; another d2net writes in ``folder``.
    """
    from d2net.files import locked

    check_output(folder / file_name)
    with notes():
        context.with_resource(locked(folder))
