"""Names in messages: a few of many, what may be meant by an unknown one, which are probably the same."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first of the names, and how many more there are."""
    names = list(names)
    text = ", ".join(f"'{name}'" for name in names[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def plain(name: str) -> str:
    """Equal for names that differ in case, blanks, underscores or the way an accent is coded."""
    return re.sub(r"[\s_]+", "", unicodedata.normalize("NFKC", name)).casefold()
