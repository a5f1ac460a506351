"""``report.html`` in a real browser: quiet, without a network, and what is clicked is played."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2net.report import TimelineRow, Track

pytest.importorskip("bokeh", reason="Bokeh is not installed: pip install 'd2net[report]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
av = pytest.importorskip("av", reason="PyAV is not installed: pip install av")

from d2net.report.page import write_report  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SCRIPT = "<script>alert(1)</script>"
IMAGE = "<img src=x onerror=alert(2)>"
# Where on the page a time and a height of a figure are.
PLACE = """([name, x, y]) => {
  const model = Bokeh.documents[0].get_model_by_name(name);
  const view = Bokeh.index.find_one(model), box = view.el.getBoundingClientRect();
  return [box.x + view.frame.x_scale.compute(x), box.y + view.frame.y_scale.compute(y)];
}"""
CHOSEN = "Bokeh.documents[0].get_model_by_name('found').selected.indices"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no browser: apt-get install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def make_video(path: Path, seconds: int = 6) -> None:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 5
        for i in range(10 * seconds):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * i, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """report.html of four recordings; the first is without detections, the second has a video, the third no video."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "videos").mkdir()
    make_video(folder / "videos" / "a # film?.webm")
    (folder / "videos" / "damaged.webm").write_bytes(b"no film")
    tcam = np.zeros((12, 2))
    tcam[4:8, 0] = 0.9
    found = [(2.0, 4.0, "Jump", 0.8), (1.0, 5.0, "Jump", 0.4), (0.5, 1.0, SCRIPT, 0.7), (5.0, 5.5, "Jump", 0.1)]
    classes = ["Jump", SCRIPT]

    def row(name: str, found: list[Any]) -> TimelineRow:
        return TimelineRow(
            name, 0.5, classes, [(2.0, 4.0, "Jump")], [Track("", found, tcam, np.linspace(0, 1, 12))], 6.0
        )

    rows = [row("empty", []), row(f"film {SCRIPT}", found), row(f"no film {IMAGE}", found[:1]), row("damaged", found)]
    videos = {rows[1].name: folder / "videos" / "a # film?.webm", rows[3].name: folder / "videos" / "damaged.webm"}
    log = [{"iteration": i, "total": 1 / i, "discriminative": 1 / i, "video": 0.1} for i in range(10, 100, 10)]
    write_report(
        folder / "report.html",
        rows,
        title=f"title {SCRIPT}",
        facts=[("recipe", IMAGE)],
        logs={"": log},
        videos=videos,
    )
    return folder


@pytest.fixture
def open_page(browser: Any, folder: Path) -> Iterator[Any]:
    """Opens the report; afterwards nothing may have gone wrong, and nothing been asked for but the films."""
    wrong: list[str] = []
    contexts = []

    def open_page(width: int = 1200, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(allowed) else None)
        page.goto((folder / "report.html").as_uri())
        page.wait_for_selector("body[data-ready]")
        return page

    allowed = ((folder / "report.html").as_uri(), (folder / "videos").as_uri(), "data:")
    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def options(page: Any) -> list[str]:
    return page.locator("#recording option").all_inner_texts()


def shown(page: Any, name: str, prop: str) -> Any:
    return page.evaluate("([name, prop]) => Bokeh.documents[0].get_model_by_name(name)[prop]", [name, prop])


def column(page: Any, name: str, key: str) -> list[Any]:
    code = "([name, key]) => [...Bokeh.documents[0].get_model_by_name(name).data[key]]"
    return page.evaluate(code, [name, key])


def click(page: Any, figure: str, x: float, y: float) -> None:
    page.locator("#timeline").scroll_into_view_if_needed()
    page.mouse.click(*page.evaluate(PLACE, [figure, x, y]))


def wait_for(page: Any, condition: str) -> None:
    page.wait_for_function(condition, timeout=10_000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_it_opens_quietly_and_fits(open_page: Any, width: int, scheme: str) -> None:
    page = open_page(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert dark == (scheme == "dark")
    ink, paper = page.evaluate("['color', 'backgroundColor'].map((k) => getComputedStyle(document.body)[k])")
    assert (int(ink[4:].split(",")[0]) > int(paper[4:].split(",")[0])) == dark
    # The canvases' texts have the page's colour.
    soft = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--soft').trim()")
    colour = page.evaluate(
        "getComputedStyle(document.querySelector('.bokeh')).getPropertyValue('--bk-major-label-text-color').trim()"
    )
    assert colour == soft
    assert page.locator("h1").inner_text() == f"title {SCRIPT}" and page.locator("dd").inner_text() == IMAGE


def test_it_begins_with_a_recording_that_has_detections(open_page: Any) -> None:
    page = open_page()
    assert page.locator("#recording").input_value() == "1"
    assert options(page)[1].startswith(f"film {SCRIPT}")
    assert column(page, "names", "text") == ["Jump", SCRIPT]
    assert column(page, "truth", "left") == [2.0]
    assert max(column(page, "points", "c0")) == pytest.approx(0.9, abs=1 / 255)
    assert column(page, "points", "x")[:2] == [0.25, 0.75]
    assert column(page, "points", "up")[-1] == 1


def test_a_click_on_a_detection_plays_it_to_its_end(open_page: Any) -> None:
    page = open_page()
    wait_for(page, "player.readyState > 0")
    click(page, "top", 3.0, 1.1)  # where a lower one lies before it
    assert page.evaluate(CHOSEN) == [2]
    click(page, "top", 3.0, 1.45)
    assert page.evaluate(CHOSEN) == [0]
    wait_for(page, "!player.paused && player.currentTime > 2")
    assert page.locator("#list tr.chosen").inner_text().split("\t")[:2] == ["Jump", "2.00 – 4.00"]
    wait_for(page, "player.paused")
    assert 4 <= page.evaluate("player.currentTime") < 5
    heads = page.evaluate(
        "[...Bokeh.documents[0].all_models].filter((m) => m.name === 'playhead').map((m) => [m.visible, m.location])"
    )
    assert len(heads) == 3 and all(visible and 4 <= location < 5 for visible, location in heads)


@pytest.mark.parametrize(("figure", "x", "y"), [("top", 5.2, 0.5), ("top", 3.0, 1.8)])
def test_a_click_beside_them_seeks_and_goes_on(open_page: Any, figure: str, x: float, y: float) -> None:
    page = open_page()
    wait_for(page, "player.readyState > 0")
    click(page, figure, x, y)
    wait_for(page, f"player.currentTime >= {x - 0.1}")
    assert page.locator("#list tr.chosen").count() == 0


def test_the_list_plays_too_and_keyboards_reach_it(open_page: Any) -> None:
    page = open_page()
    wait_for(page, "player.readyState > 0")
    page.locator("#list button", has_text=SCRIPT).press("Enter")
    wait_for(page, "player.currentTime >= 0.5 && player.currentTime < 2")
    assert page.locator("#list tr.chosen").count() == 1


def test_the_choice_changes_the_recording(open_page: Any) -> None:
    page = open_page()
    page.select_option("#recording", "2")
    assert column(page, "found", "left") == [2.0] and page.locator("#player").is_hidden()
    page.click("#previous")
    assert len(column(page, "found", "left")) == 3 and page.locator("#player").is_visible()
    page.click("#previous")
    assert column(page, "found", "left") == [] and "no detection" in page.locator("#notes").inner_text()
    page.click("#previous")  # there is none before
    assert page.locator("#recording").input_value() == "0"


def test_the_slider_hides_low_scores(open_page: Any) -> None:
    page = open_page()
    assert column(page, "found", "score") == [0.8, 0.7, 0.4]  # from a quarter of the best
    page.fill("#least", "0")
    assert column(page, "found", "score") == [0.8, 0.7, 0.4, 0.1]
    page.fill("#least", "1")
    assert column(page, "found", "score") == [0.8]
    assert page.locator("#least-shown").inner_text() == "100 % of the best: 1 of 4"


def test_a_film_that_cannot_be_played_is_said(browser: Any, folder: Path) -> None:
    page = browser.new_page()
    page.goto((folder / "report.html").as_uri())
    page.wait_for_selector("body[data-ready]")
    page.select_option("#recording", "3")
    page.locator("#player-note").wait_for(state="visible")
    page.select_option("#recording", "2")
    assert page.locator("#player-note").is_hidden()
    page.close()


def test_zoom_and_reset(open_page: Any) -> None:
    page = open_page()

    def extent() -> tuple[float, float]:
        return shown(page, "time", "start"), shown(page, "time", "end")

    assert extent() == (0, 6)
    page.locator("[title*='Zoom in']").first.click()
    start, end = extent()
    assert 0 < start < end < 6
    page.mouse.move(*page.evaluate(PLACE, ["top", (start + end) / 2, 1.0]))
    page.mouse.down()
    page.mouse.move(*page.evaluate(PLACE, ["top", (start + end) / 2 + 0.3, 1.0]), steps=4)
    page.mouse.up()
    assert extent()[0] < start
    page.locator("[title*='All of the recording']").first.click()
    assert extent() == (0, 6)


def test_names_under_the_pointer_are_text(open_page: Any) -> None:
    page = open_page()
    page.locator("#timeline").scroll_into_view_if_needed()
    page.mouse.move(*page.evaluate(PLACE, ["top", 0.75, 0.1]))
    page.get_by_text(SCRIPT).last.wait_for()
    page.wait_for_timeout(200)


def test_of_many_recordings_one_is_found(browser: Any, tmp_path: Path) -> None:
    rows = [
        TimelineRow(
            f"clip {i}", 1.0, ["Jump", "Fall"], [], [Track("", [(i, i + 1.0, "Fall" if i == 7 else "Jump", 1.0)])]
        )
        for i in range(20)
    ]
    write_report(tmp_path / "r.html", rows, title="t")
    page = browser.new_page()
    page.goto((tmp_path / "r.html").as_uri())
    page.wait_for_selector("body[data-ready]")
    assert len(options(page)) == 20
    page.fill("#filter", "fall")
    assert options(page) == ["clip 7  ·  Fall"] and column(page, "found", "left") == [7]
    page.fill("#filter", "clip 1")
    assert len(options(page)) == 11 and column(page, "found", "left") == [1]
    page.fill("#filter", "nowhere")
    assert len(options(page)) == 20 and page.locator("#recording").input_value() == "1"
    assert page.locator("#filter[aria-invalid]").count() == 1
    page.close()
