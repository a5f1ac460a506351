"""Reads files from outside: ordinary files, text, JSON and the values in it; errors say what a user can do.

Whatever is in a file that cannot be used, it raises an InputError: every value is checked when it is read, rather than
by catching exceptions of later code.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, TypeVar

from d2net.errors import InputError
from d2net.words import is_number, quoted

LONGEST = 1e9  # seconds, 31 years; no time in a recording is larger
_KINDS = {dict: "an object", list: "a list", str: "text"}
_Kind = TypeVar("_Kind", dict[str, Any], list[Any], str)


def check_ordinary(path: Path) -> None:
    """Raises InputError for anything but an ordinary file: a pipe would block, a device may never end."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from None
    except ValueError:  # a NUL, or characters that no file system takes
        raise InputError(f"{path}: cannot be the path of a file; check it") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: is a pipe or a device; write what comes from it to a file, and give that")


def read_bytes(path: Path) -> bytes:
    """The contents of an ordinary file. Raises InputError where it cannot be read."""
    check_ordinary(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from None


def read_text(path: Path) -> str:
    """The contents of a text file in UTF-8, with or without BOM. Raises InputError where it cannot be read."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = path.suffix[1:].upper() or "text"
        raise InputError(f"{path}: not UTF-8 ({error}); save it as {kind} in UTF-8") from None


def load_json(path: Path, content: bytes | None = None) -> Any:
    """The value in a JSON file. A byte-order mark, which some editors write, is skipped.

    Args:
        path: The file.
        content: What is in it, where it has been read already.

    Raises:
        InputError: a missing or malformed file, or an object in which a key occurs twice.
    """
    content = read_bytes(path) if content is None else content
    try:
        return parse_json(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid JSON, which is UTF-8 ({error}); save it in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); truncated perhaps: write or download it again") from None


def parse_json(content: str | bytes) -> Any:
    """The value of a JSON text. All JSON that d2net reads is parsed here.

    Raises:
        InputError: an object in which a key occurs twice.
        ValueError: no JSON, or no UTF-8.
        RecursionError: too deeply nested.
    """
    if not isinstance(content, str):  # json.loads would also decode bytes in UTF-16 and UTF-32
        content = content.decode("utf-8-sig")
    return json.loads(content, object_pairs_hook=_once)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError for a missing or malformed file, or another JSON type."""
    value = load_json(path)
    if not isinstance(value, dict):
        raise InputError(f'{path}: holds a JSON {type(value).__name__}, expected an object with the key "database"')
    return value


def typed(value: Any, kind: type[_Kind], what: str) -> _Kind:
    """``value`` itself, if it is of type ``kind``. Raises InputError that names ``what``."""
    if not isinstance(value, kind):
        raise InputError(f"{what} is not {_KINDS[kind]}, but {quoted(value)}")
    return value


def number(value: Any, what: str, way_out: str = "") -> float:
    """A finite number, also one in a string, as THUMOS14's files have them. Raises InputError that names ``what``."""
    try:
        value = value.decode("latin1") if isinstance(value, bytes) else value
        wrong = isinstance(value, bool) or (isinstance(value, str) and not is_number(value))  # float(True) is 1
        result = math.nan if wrong else float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise InputError(f"{what} is {quoted(value)}, not a finite number" + (f"; {way_out}" if way_out else ""))
    return result


def seconds(value: Any, what: str) -> float:
    """A time in seconds, as :func:`number`, within :data:`LONGEST`. Raises InputError that names ``what``."""
    found = number(value, what)
    if abs(found) > LONGEST:
        raise InputError(f"{what} is {found:g}, more than {LONGEST:g} s, which no recording lasts; give seconds")
    return found


def missing(path: Path) -> str:
    """The words of a message for a path at which there is nothing."""
    return "a symbolic link that leads nowhere" if path.is_symlink() else "no such file"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises InputError where a key occurs twice: Python would keep the last value."""
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InputError(f"'{key}' comes twice in one object; merge or drop one of them")
            seen.add(key)
    return table
