"""The page as a whole: :func:`write_report`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from d2net.errors import InputError
from d2net.evaluation import AverageRecall, ErrorAnalysis, Evaluation, LengthAnalysis
from d2net.files import write_whole
from d2net.report.page import colours
from d2net.report.page.recordings import recordings_json
from d2net.report.page.table import Table, comparison_page_table, evaluation_page_table, lengths_page_table
from d2net.report.paper_tables import Comparison
from d2net.report.timeline import MIN_SCORE, TimelineRow
from d2net.words import counted, escaped

if TYPE_CHECKING:
    from markupsafe import Markup

INSTALL = "pip install 'd2net[report]'"


def write_report(
    path: str | Path,
    rows: Sequence[TimelineRow],
    *,
    title: str,
    facts: Sequence[tuple[str, str]] = (),
    evaluation: Evaluation | None = None,
    why_not_evaluated: str = "",
    errors: ErrorAnalysis | None = None,
    recall: AverageRecall | None = None,
    lengths: LengthAnalysis | None = None,
    comparison: Comparison | None = None,
    tables: Sequence[Table] = (),
    logs: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    videos: Mapping[str, Path] | None = None,
) -> None:
    """Write one HTML file that a browser opens without a network: what was run, what was found, what is wrong with it.

    Only what is given is shown. All text may hold anything: it is escaped.

    Args:
        path: Where to write: a ``.html``, whole or not at all.
        rows: Recordings of the timeline, each with one track, of which ``tcam``, ``attention`` and ``verdicts`` may be
            None. The page begins with the first one that has a detection.
        title: Heading of the page.
        facts: (name, text) of what was run; a text may have several lines.
        evaluation: For the table of mAP.
        why_not_evaluated: A sentence in place of that table where there is none, such as "no annotations".
        errors: For the pictures of errors.
        recall: For a line below the table of mAP.
        lengths: For the table of lengths.
        comparison: The run beside the paper's rows.
        tables: Others, after those.
        logs: Entries (:func:`d2net.training_log.read_log`) of each training by its name; "" is the name of an only one.
        videos: File of a recording's video, by the recording's name: the page plays it from where it lies, by the way
            from the page's folder to it.

    Raises:
        NotInstalledError: Bokeh or Jinja2 is not installed.
        InputError: a row that cannot be drawn, a name that is no ``.html``, or a
            file that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{path}: a report is an HTML page; name it .html")
    check_installed()
    from bokeh.resources import Resources
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    from d2net.report.page import figures

    addresses = {name: _address(file, path) for name, file in (videos or {}).items()}
    data = recordings_json(rows, addresses)
    has_curves = any(row.tracks[0].tcam is not None for row in rows)
    items: dict[str, Any] = {}
    if rows:
        items["timeline"] = figures.timeline_item(
            lanes=len(data["recordings"][data["first"]]["classes"]),
            curves=has_curves,
        )
    if errors is not None:
        items |= {"shares": figures.shares_item(errors), "gains": figures.gains_item(errors)}
    curves = figures.curves(logs) if logs else []
    items |= {f"curves-{i}": lines.item for i, lines in enumerate(curves)}
    shown = [evaluation_page_table(evaluation, recall)] if evaluation else []
    shown += [lengths_page_table(lengths)] if lengths else []
    shown += [comparison_page_table(comparison)] if comparison else []
    environment = Environment(loader=PackageLoader("d2net.report.page", ""), autoescape=True, finalize=_visible)
    # In its order: Bokeh's have each object before what refers to it.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "separators": (",", ":")}
    text = environment.get_template("template.html").render(
        title=title,
        facts=[(name, text.splitlines()) for name, text in facts],
        figures=_figures(rows, evaluation),
        why_not_evaluated=why_not_evaluated,
        tables=[*shown, *tables],
        errors=errors,
        curves=curves,
        verdicts={name: colours.VERDICTS[name] for name in colours.VERDICTS},
        annotation=colours.ANNOTATION,
        classes=colours.CLASSES,
        data=data,
        items=items,
        videos=bool(addresses),
        annotated=any(row.ground_truth for row in rows),
        curves_shown=has_curves,
        min_score=MIN_SCORE,
        bokeh=Markup("\n".join(Resources(mode="inline", components=["bokeh"], log_level="warn").js_raw)),
        script=_own("report.js"),
        style=_own("style.css"),
    )
    write_whole(path, text)


class NotInstalledError(InputError):
    """What makes the page is not installed; the message says how to get it."""


def check_installed() -> None:
    """Raises NotInstalledError where what makes the page is not installed: to be called before anything is computed."""
    try:
        import bokeh
        import jinja2  # noqa: F401
    except ImportError as error:
        raise NotInstalledError(
            f"report.html needs Bokeh and Jinja2, and {error.name} is not installed: {INSTALL}"
        ) from error
    if int(bokeh.__version__.partition(".")[0]) < 3:
        raise NotInstalledError(f"report.html needs Bokeh 3, and {bokeh.__version__} is installed: {INSTALL}")


def _own(name: str) -> Markup:
    from markupsafe import Markup

    return Markup((resources.files(__package__) / name).read_text(encoding="utf-8"))


def _address(video: Path, page: Path) -> str:
    """Of a file as a browser finds it from the page."""
    way = os.path.relpath(video.absolute(), page.absolute().parent)
    return quote(os.fsencode(Path(way).as_posix()))


def _visible(value: Any) -> Any:
    """What the page says, without letters that are not seen; the page's own style and script are no plain text."""
    return escaped(value) if type(value) is str else value


def _figures(rows: Sequence[TimelineRow], evaluation: Evaluation | None) -> list[tuple[str, str]]:
    """The numbers above everything: (number, of what)."""
    found = []
    if evaluation is not None:
        half = [(m, t) for m, t in zip(evaluation.map.tolist(), evaluation.tiou, strict=True) if t == 0.5]
        found += [(f"{m:.1f}", f"mAP@{t:g}, %") for m, t in half]
        if len(evaluation.tiou) > 1:
            low, high = min(evaluation.tiou), max(evaluation.tiou)
            found.append((f"{evaluation.average:.1f}", f"mean mAP @{low:g}–{high:g}, %"))
    if rows:
        detections = sum(len(row.tracks[0].detections) for row in rows)
        found += [(f"{len(rows):,}", counted(len(rows), "recording").split(" ", 1)[1])]
        found += [(f"{detections:,}", counted(detections, "detection").split(" ", 1)[1])]
        found += [(f"{len(rows[0].classes):,}", counted(len(rows[0].classes), "class", "classes").split(" ", 1)[1])]
    return found
