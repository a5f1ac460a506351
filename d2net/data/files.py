"""Reading JSON, and writing files whole, with errors a user can act on."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from d2net.errors import InputError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError for a missing or malformed file, or another JSON type."""
    try:
        # Some editors begin a file with a mark, which is no JSON.
        value = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the path of an annotations JSON") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); repair it or download it again") from None
    if not isinstance(value, dict):
        raise InputError(f'{path}: holds a JSON {type(value).__name__}, expected an object with the key "database"')
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which Python would keep the last of two values under one key."""
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{next(k for k in keys if keys.count(k) > 1)}' stands twice in one object")
    return table


def one_component(name: str, where: str) -> str:
    """``name`` itself where it can be the name of a file, of any kind. Raises InputError that names ``where``."""
    if name in ("", ".", "..") or any(c in name for c in "/\\\0\n\r") or len(name.encode()) > 240:
        raise InputError(f"{where}: '{name[:80]}' cannot be a file name; rename it")
    return name


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls ``write(file)`` on a temporary file beside ``path`` and renames it: whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".d2net-")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would keep colleagues out of a shared folder
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
