"""Names in pictures: fonts with their letters are found, a missing one is said once, and long names fit."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.t2CharStringPen import T2CharStringPen
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from typer.testing import CliRunner

from d2net.cli import app
from d2net.report import TimelineRow, Track, draw_timeline, names
from d2net.report.names import fit, fonts_for, plain, text_inches

ROW = TimelineRow(
    "recording 視頻", 1.0, ["日本"], [(1.0, 2.0, "日本")], [Track("", [(1.0, 2.0, "日本", 0.5)])], duration=5.0
)


def make_font(path: Path, family: str, letters: str, *, truetype: bool = True) -> Path:
    """A font with a filled square for each of these letters."""
    glyphs = [".notdef", *(f"u{ord(c):X}" for c in letters)]
    builder = FontBuilder(1000, isTTF=truetype)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap({ord(c): f"u{ord(c):X}" for c in letters})
    pens = {}
    for glyph in glyphs:
        pen = TTGlyphPen(None) if truetype else T2CharStringPen(900, None)
        for k, point in enumerate(((0, 0), (0, 800), (800, 800), (800, 0))):
            (pen.lineTo if k else pen.moveTo)(point)
        pen.closePath()
        pens[glyph] = pen
    if truetype:
        builder.setupGlyf({g: pen.glyph() for g, pen in pens.items()})
    else:
        builder.setupCFF(family, {}, {g: pen.getCharString() for g, pen in pens.items()}, {})
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (900, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular", "psName": family.replace(" ", "")})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The files of all fonts of a system, to be filled; matplotlib's own are always there."""
    files: list[str] = []
    manager = font_manager.fontManager
    own = matplotlib.get_data_path()
    monkeypatch.setattr(manager, "ttflist", [f for f in manager.ttflist if f.fname.startswith(own)])
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: files)
    names._find_fonts.cache_clear()
    manager._findfont_cached.cache_clear()
    yield files
    names._find_fonts.cache_clear()
    manager._findfont_cached.cache_clear()


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_missing_font_is_said_once_and_not_for_every_glyph(installed: list[str], tmp_path: Path, suffix: str) -> None:
    with pytest.warns(UserWarning) as said:
        draw_timeline(tmp_path / f"p.{suffix}", [ROW])
    assert len(said) == 1 and said[0].filename == __file__
    assert str(said[0].message).startswith("no installed font has the letters 日本視頻 of the names drawn")
    assert "fonts-noto-cjk" in str(said[0].message)


@pytest.mark.parametrize(
    ("letters", "package"),
    [("日", "fonts-noto-cjk"), ("한글", "fonts-noto-cjk"), ("ｱ", "fonts-noto-cjk"), ("ไทย", "fonts-noto"),
     ("\N{BROOM}", "fonts-symbola"), ("日\N{BROOM}", "fonts-noto-cjk and fonts-symbola")],
)  # fmt: skip
def test_the_package_to_install(installed: list[str], letters: str, package: str) -> None:
    with pytest.warns(UserWarning, match=rf"Ubuntu: {package}\)"), fonts_for([letters]):
        pass


def test_usual_letters_need_nothing(installed: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fonts_for(["naïve $x$ Ωж\n", ""]):
            assert matplotlib.rcParams["font.family"] == ["sans-serif"] and matplotlib.rcParams["pdf.fonttype"] == 42


@pytest.mark.parametrize("truetype", [True, False])
def test_an_installed_font_is_used(
    installed: list[str], tmp_path: Path, truetype: bool, caplog: pytest.LogCaptureFixture
) -> None:
    installed += [
        str(make_font(tmp_path / "half.ttf", "Aaa Sans", "日本", truetype=truetype)),
        str(make_font(tmp_path / "all.ttf", "Whole Sans", "日本視頻", truetype=truetype)),
    ]
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    installed.append(str(tmp_path / "damaged.ttf"))
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        with fonts_for([ROW.name, "日本"]):
            assert matplotlib.rcParams["font.family"] == ["sans-serif", "Whole Sans"]
            # A square of 0.8 em a letter; the box of a missing glyph is narrower.
            assert text_inches("日日", 10) == pytest.approx(2 * 9 / 72, abs=0.03)
        for suffix in ("png", "pdf", "svg"):
            draw_timeline(tmp_path / f"p.{suffix}", [ROW])
    assert not caplog.records  # nor of a bold font, which it has not
    assert matplotlib.rcParams["font.family"] == ["sans-serif"]
    # Outlines of PostScript in a font of type 42 are invisible.
    content = (tmp_path / "p.pdf").read_bytes()
    assert b"WholeSans" in content and (b"/Type3" in content) != truetype


def test_several_fonts_share_the_letters(installed: list[str], tmp_path: Path) -> None:
    installed += [
        str(make_font(tmp_path / f"{c}.ttf", f"Only {c}", letters)) for c, letters in (("a", "日"), ("b", "한"))
    ]
    with pytest.warns(UserWarning, match="letters ไ of"), fonts_for(["日한ไ"]):
        assert matplotlib.rcParams["font.family"] == ["sans-serif", "Only a", "Only b"]


def test_the_command_says_it_in_a_line(installed: list[str], tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text('{"results": {"v": [{"label": "日本", "score": 1, "segment": [1, 2]}]}}')
    data = tmp_path / "data"
    (data / "features").mkdir(parents=True)
    np.save(data / "features" / "v.npy", np.ones((9, 4), np.float32))
    (data / "gt.json").write_text(
        '{"fps": 1, "stride": 1, "streams": [4], "database": {"v": {"subset": "test", "annotations": []}}}'
    )
    arguments = ["plot", "--detections", tmp_path / "found.json", "--data", data, "--out", tmp_path / "p.png"]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith(
        "note: no installed font has the letters 日本"
    )


def test_plain() -> None:
    assert plain("a\nb\tc\u2028d\udc80\x00") == "a b c d\N{REPLACEMENT CHARACTER} "


def test_what_fits_is_left_alone() -> None:
    assert fit("", 1, 8) == "" and fit("short", 1, 8) == "short"
    name = "a name of $forty$ letters_and_underscores"
    assert fit(name, text_inches(name, 8) + 0.01, 8) == name


@pytest.mark.parametrize("lines", [1, 2])
@pytest.mark.parametrize(
    "name", ["CleanAndJerk_with_a_very_long_name_0001", "x" * 60, "one two three four five six " * 3]
)
def test_long_names_are_broken_and_their_middle_left_out(name: str, lines: int) -> None:
    text = fit(name, 1.2, 8, lines=lines)
    parts = text.split("\n")
    assert len(parts) == lines and all(text_inches(part, 8) <= 1.2 for part in parts)
    joined = "".join(parts)
    assert joined[:5] == name[:5] and joined[-3:].strip() == name.rstrip()[-len(joined[-3:].strip()) :]
    assert text_inches(joined, 8) > 0.75 * 1.2 * lines  # as much as there is room for


def test_lines_end_between_words() -> None:
    assert fit("Cleaning the kitchen", 1.0, 8, lines=2) == "Cleaning the\nkitchen"
    assert fit("Cleaning_and_polishing", 0.9, 8, lines=2) == "Cleaning_and_\npolishing"
