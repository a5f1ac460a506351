"""Names and values in messages: escaped, shortened, listed; and suggestions for an unknown name.

A name from data may hold anything: line ends, a terminal's control sequences, invisible or right-to-left characters, or
five thousand letters. :func:`escaped` makes it one visible line. Every error (:mod:`d2net.errors`) and every line that
the commands print (``d2net.cli.terminal.say`` and ``make_console``) passes through it, so no message need do so itself.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import unicodedata
from collections.abc import Iterable
from typing import Any

LINE, NAME = 2000, 80  # characters of a whole message, and of one of several names or values in it


def escaped(text: str, most: int = LINE) -> str:
    r"""``text`` in one line, with invisible characters escaped as in ``\x1b``, and without the middle of a long one.

    Escaped is what Python's ``repr`` escapes: control characters, direction marks, characters without width, lone
    surrogates, private-use characters, and blanks other than the space. A backslash is not escaped.
    """
    text = cut(text, most)
    if text.isprintable():
        return text
    return cut("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), most)


def cut(text: str, most: int) -> str:
    """``text`` without its middle where it is longer than ``most``.

    Both ends stay: a message begins with the cause and ends with the way out, and names often differ at their ends.
    """
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :]}"


class _Repr(reprlib.Repr):
    """Shows a few entries and levels of a value, so that none is too large or too deep."""

    def repr1(self, x: Any, level: int) -> str:
        try:
            return super().repr1(x, level)
        except (ValueError, RecursionError, ArithmeticError):  # an integer too long for Python to write out
            return f"<{type(x).__name__}>"


_SHORT = _Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = NAME


def quoted(value: Any) -> str:
    """``repr(value)``, shortened where it is long."""
    return escaped(_SHORT.repr(value), 4 * NAME)


def reason(error: BaseException) -> str:
    """The first line of another library's error message, without the addresses of objects in it."""
    text = re.sub(r":? ?<[\w.]+ object at 0x[0-9a-fA-F]+>", "", str(error))
    return escaped(text.strip().partition("\n")[0] or type(error).__name__, 4 * NAME)


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    text = ", ".join(f"'{escaped(name, NAME)}'" for name in names[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text


def counted(n: int, one: str, many: str = "") -> str:
    """A number with its noun: ``1 detection``, ``2 detections``; ``many`` is the plural where it is not ``one`` + s."""
    return f"{n} {one if n == 1 else many or one + 's'}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, or "" where no known word is similar."""
    if len(word) > 4 * NAME:  # the comparison takes quadratic time
        return ""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def is_number(text: str) -> bool:
    """Whether ``text`` may be handed to ``int`` or ``float``, which also take digits of any script, and "1_0" as 10."""
    return text.isascii() and "_" not in text


def plain(name: str) -> str:
    """A key that is equal for names that differ only in case, blanks, underscores or Unicode normalisation."""
    return re.sub(r"[\s_]+", "", unicodedata.normalize("NFKC", name)).casefold()
