"""Writing files whole, with errors a user can act on."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from d2net.errors import InputError


def one_component(name: str, where: str) -> str:
    """``name`` itself where it can be the name of a file, of any kind. Raises InputError that names ``where``."""
    if not name.strip() or name in (".", "..") or any(c in name for c in "/\0\n\r") or len(name.encode()) > 240:
        raise InputError(f"{where}: {name[:80]!r} cannot be the name of a file and a line of a split; rename it")
    return name


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, whole or not at all: beside its place, to the disk, and then moved there. Makes its folder.

    Raises:
        InputError: it cannot be written; an earlier file is as it was.
    """
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")  # of half a surrogate pair, which JSON writes like that too
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not an ordinary file; give the path of a file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".d2net-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # a full disk may only show here; the move must not come first
            os.chmod(temporary, 0o644)  # mkstemp's 0600 would keep colleagues out of a shared folder
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); make space, or give another path; what was there "
            "is intact"
        ) from error
