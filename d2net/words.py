"""Names and values in messages: as they can be shown, a few of many, what may be meant by an unknown one.

A name may hold anything: line ends, what a terminal obeys, letters that are not seen or turn the line around, or five
thousand letters. :func:`escaped` makes a line of it. Every error is passed through it (:mod:`d2net.errors`), and every
line that the commands print (``d2net.cli.terminal.say`` and ``make_console``): no message has to think of it.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import unicodedata
from collections.abc import Iterable
from typing import Any

LINE, NAME = 2000, 80  # letters of a whole message, and of a name or value of many in it


def escaped(text: str, most: int = LINE) -> str:
    r"""``text`` in one line, with what is no visible letter escaped as ``\x1b``, and the middle of a long one left out.

    What is escaped is what Python's ``repr`` escapes: control characters, marks of direction, letters without width,
    halves of surrogate pairs, letters of private use, blanks other than the usual one. A backslash stays as it is.
    """
    text = cut(text, most)
    if text.isprintable():
        return text
    return cut("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), most)


def cut(text: str, most: int) -> str:
    """Both ends: a message begins with the thing and ends with the way out, and names often differ in their ends."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :]}"


class _Repr(reprlib.Repr):
    """Of a few entries and levels, so that no value is too large or too deep for it."""

    def repr1(self, x: Any, level: int) -> str:
        try:
            return super().repr1(x, level)
        except (ValueError, RecursionError, ArithmeticError):  # an integer too long for Python to write out
            return f"<{type(x).__name__}>"


_SHORT = _Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = NAME


def quoted(value: Any) -> str:
    """A value as Python writes it, cut where it is long."""
    return escaped(_SHORT.repr(value), 4 * NAME)


def reason(error: BaseException) -> str:
    """Why another library could not do something: the first line of what it says, without objects of its own."""
    text = re.sub(r":? ?<[\w.]+ object at 0x[0-9a-fA-F]+>", "", str(error))
    return escaped(text.strip().partition("\n")[0] or type(error).__name__, 4 * NAME)


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first of the names, and how many more there are."""
    names = list(names)
    text = ", ".join(f"'{escaped(name, NAME)}'" for name in names[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text


def counted(n: int, one: str, many: str = "") -> str:
    """A number and what of: ``1 detection``, ``2 detections``; ``many`` where that is not made with an s."""
    return f"{n} {one if n == 1 else many or one + 's'}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, or nothing where no known word is near."""
    if len(word) > 4 * NAME:  # comparing takes as long as the square of it
        return ""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def is_number(text: str) -> bool:
    """Whether ``int`` or ``float`` may read it: they would take digits of every script, and "1_0" as 10."""
    return text.isascii() and "_" not in text


def plain(name: str) -> str:
    """Equal for names that differ in case, blanks, underscores or the way an accent is coded."""
    return re.sub(r"[\s_]+", "", unicodedata.normalize("NFKC", name)).casefold()
