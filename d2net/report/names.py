"""Names in pictures: fonts that have their letters, and lines that fit the place they have."""

from __future__ import annotations

import logging
import os
import unicodedata
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache

import matplotlib
from fontTools.ttLib import TTFont  # matplotlib needs it too
from matplotlib import font_manager
from matplotlib.font_manager import FontEntry, FontProperties
from matplotlib.ft2font import FT2Font
from matplotlib.textpath import text_to_path

from d2net.words import cut

LONGEST = 500  # letters of a name: more fit into no picture
BREAKS = " _-/,;"  # a line may end after one of these


@contextmanager
def fonts_for(names: Iterable[str]) -> Iterator[None]:
    """Draw with installed fonts that have the letters of ``names``, where the usual font has not.

    A figure must be made and saved inside. Where no font has a letter, one ``UserWarning`` says what to install, in
    place of matplotlib's for every glyph.
    """
    letters = frozenset(c for name in names for c in plain(name) if c.isprintable() and not c.isspace())
    usual = tuple(matplotlib.rcParams["font.family"])
    families, absent, fonttype = _find_fonts(letters, usual)
    if absent:
        some = "".join(sorted(absent)[:8]) + ("…" if len(absent) > 8 else "")
        packages = " and ".join(sorted(set(map(_package, absent))))
        warnings.warn(
            f"no installed font has the letters {some} of the names drawn, so that they are boxes; install a font that "
            f"has them (Debian, Ubuntu: {packages}) and draw again",
            stacklevel=4,  # where the picture is asked for
        )
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    fonts = matplotlib.rc_context({"font.family": [*usual, *families], "pdf.fonttype": fonttype})
    with warnings.catch_warnings(), fonts:
        if absent:
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            warnings.filterwarnings("ignore", "Matplotlib currently does not support")
        if families:
            log.setLevel(logging.ERROR)  # many a font that fills in has no bold letters, which is no news
        try:
            yield
        finally:
            log.setLevel(level)


def plain(text: str) -> str:
    """``text`` in one line: a name may hold line ends, tabs, bytes that are no text, and marks that are not seen or
    turn the line around. Of a very long one the middle is left out."""
    box = "\N{REPLACEMENT CHARACTER}"
    instead = {"Cc": " ", "Zl": " ", "Zp": " ", "Cf": "", "Cs": box, "Co": box, "Cn": box}
    return "".join(instead.get(unicodedata.category(c), c) for c in cut(text, LONGEST))


def text_inches(text: str, size: float, *, bold: bool = False) -> float:
    """Width in inches of a line in letters of ``size`` points, nothing in it read as mathematics."""
    font = FontProperties(size=size, weight="bold" if bold else "normal")
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def fit(text: str, inches: float, size: float, *, lines: int = 1, bold: bool = False) -> str:
    """``text`` in at most so many ``lines`` of this width.

    Where it is longer, its middle gives way to "…": names often differ in their ends.
    """
    text = cut(plain(text), 8 + int(lines * 5 * inches * 72 / size))  # no letter is narrower than a fifth of its height

    def wrapped(kept: int) -> list[str]:
        short = text if kept >= len(text) else f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
        return _wrap(short, inches, size, bold)

    kept = len(text)
    if len(wrapped(kept)) > lines:
        kept = bisect_right(range(len(text)), lines, key=lambda n: len(wrapped(n))) - 1
    return "\n".join(wrapped(max(kept, 1)))


def _wrap(text: str, inches: float, size: float, bold: bool) -> list[str]:
    lines = []
    while text:
        end = bisect_right(range(len(text) + 1), inches, key=lambda n: text_inches(text[:n].rstrip(), size, bold=bold))
        end = max(end - 1, 1)
        if end < len(text):
            # Between words, unless that leaves most of the line empty.
            end = next((n for n in range(end, end // 2, -1) if text[n - 1] in BREAKS), end)
        lines.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return lines


@lru_cache(maxsize=16)
def _find_fonts(letters: frozenset[str], usual: tuple[str, ...]) -> tuple[tuple[str, ...], frozenset[str], int]:
    """Families of installed fonts that have what the ``usual`` ones lack, the letters that none has, and the type of
    fonts for PDFs: 42, which journals ask for, where matplotlib can embed all of them so, else 3."""
    missing: set[str] = set()
    used: list[str] = []
    for weight in ("normal", "bold"):  # the bold one has fewer
        files = [font_manager.findfont(FontProperties(family=[family], weight=weight)) for family in usual]
        missing |= letters.difference(*(_letters_of(file, letters) for file in files))
        used += files
    families = []
    covered = {entry.fname: _letters_of(entry.fname, missing) for entry in _installed()} if missing else {}
    while missing and covered:
        best = max(covered, key=lambda file: len(covered[file] & missing))  # the first of equals
        if not covered[best] & missing:
            break
        families.append(FT2Font(best).family_name)
        used.append(best)
        missing -= covered[best]
    return tuple(families), frozenset(missing), 42 if all(map(_is_truetype, used)) else 3


def _is_truetype(file: str) -> bool:
    """Whether the outlines are TrueType's. PostScript's, as Noto's for Chinese, are invisible in a font of type 42."""
    with TTFont(file, fontNumber=0, lazy=True) as font:  # the first of a collection; not used for single fonts
        return "glyf" in font


def _letters_of(file: str, letters: Iterable[str]) -> set[str]:
    font = FT2Font(file)
    return {c for c in letters if font.get_char_index(ord(c))}


def _installed() -> list[FontEntry]:
    """Upright fonts of the system, those that suit a picture best first."""
    manager = font_manager.fontManager
    # matplotlib keeps its list of fonts in a file, which lacks those installed since.
    for file in set(font_manager.findSystemFonts()) - {entry.fname for entry in manager.ttflist}:
        with suppress(OSError, RuntimeError, KeyError, ValueError):  # no outline font, or damaged
            manager.addfont(file)
    # matplotlib's own are for mathematics, or have a box for every letter ("Last Resort").
    own = os.path.join(matplotlib.get_data_path(), "")
    upright = [
        e for e in manager.ttflist if e.style == "normal" and not e.fname.startswith(own) and os.path.exists(e.fname)
    ]
    return sorted(
        upright,
        key=lambda e: ("Noto Sans" not in e.name, "Sans" not in e.name, "Mono" in e.name, e.weight != 400, e.name),
    )


def _package(letter: str) -> str:
    """The package of Debian that has a font with this letter."""
    if unicodedata.category(letter).startswith("S"):
        return "fonts-symbola"
    wide = unicodedata.east_asian_width(letter) in "WFH"  # Chinese, Japanese, Korean
    return "fonts-noto-cjk" if wide else "fonts-noto"
