"""Reading JSON, and writing files whole, with errors a user can act on."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from d2net.errors import InputError


def load_json(path: Path, content: bytes | None = None) -> Any:
    """What a JSON file holds; some editors begin it with a mark, which is no JSON.

    Args:
        content: Of the file, where it has been read already.

    Raises:
        InputError: a missing or malformed file, or an object in which a key stands twice.
    """
    try:
        return json.loads(path.read_bytes() if content is None else content, object_pairs_hook=_once)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); truncated perhaps: write or download it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError for a missing or malformed file, or another JSON type."""
    value = load_json(path)
    if not isinstance(value, dict):
        raise InputError(f'{path}: holds a JSON {type(value).__name__}, expected an object with the key "database"')
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which Python would keep the last of two values under one key."""
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(k for k in keys if keys.count(k) > 1)
        raise InputError(f"'{twice}' comes twice in one object; merge or drop one of them")
    return table


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
        content = content.encode()
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
