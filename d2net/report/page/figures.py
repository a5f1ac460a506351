"""The figures of a report, in Bokeh. Those of the timeline are empty: the page fills them, a recording at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bokeh.embed import json_item
from bokeh.events import DoubleTap, Tap
from bokeh.layouts import gridplot
from bokeh.models import (
    ColumnDataSource,
    CrosshairTool,
    CustomJS,
    FactorRange,
    HoverTool,
    LabelSet,
    PanTool,
    Range1d,
    ResetTool,
    Span,
    WheelZoomTool,
    ZoomInTool,
    ZoomOutTool,
)
from bokeh.plotting import figure

from d2net.evaluation import VERDICTS, ErrorAnalysis
from d2net.report.page import colours
from d2net.report.timeline import MAX_CLASSES
from d2net.words import NAME, escaped

MARK = colours.BOTTOM_UP  # of what is chosen and played
LEFT, RIGHT = 40, 12  # pixels beside the frames, so that those above each other share their time
_Points = tuple[list[int], list[float]]  # iterations, values
FLOOR = -0.03  # of lanes: their lowest line is drawn as the others
LANE = 66  # pixels of a class: its name, its annotations, its detections


def timeline_item(lanes: int, curves: bool) -> dict[str, Any]:
    """Lanes, activations and attention of one recording, above each other over one time axis.

    Args:
        lanes: How many the first figure has room for before it is filled.
        curves: Whether any recording has activations: else there are lanes only.
    """
    time = Range1d(0, 1, name="time", min_interval=0.05)
    cursor = Span(dimension="height", line_color="#8a9099", line_width=1)
    shared: dict[str, Any] = {"tools": "", "toolbar_location": None, "x_range": time, "sizing_mode": "stretch_width"}

    top = figure(height=lanes * LANE + 12, y_range=Range1d(FLOOR, max(lanes, 1), name="lanes"), name="top", **shared)
    floors = ColumnDataSource({"y": [], "color": []}, name="floors")
    top.hspan(y="y", source=floors, line_color="color", line_width=1.5)
    sides = {"left": "left", "right": "right", "bottom": "bottom", "top": "top"}
    truth = ColumnDataSource({key: [] for key in (*sides, "label", "span")}, name="truth")
    shown_truth = top.quad(
        **sides, source=truth, fill_color=colours.ANNOTATION, line_color=colours.ANNOTATION, line_width=1
    )
    found = ColumnDataSource(
        {key: [] for key in (*sides, "color", "shade", "label", "span", "score", "verdict")}, name="found"
    )
    shown_found = top.quad(
        **sides,
        source=found,
        fill_color="color",
        fill_alpha="shade",
        line_color="color",
        line_width=1,
        selection_line_width=2.5,
        selection_line_color=MARK,
        nonselection_fill_alpha="shade",
        nonselection_line_alpha=1.0,
        hover_line_width=2.5,
    )
    names = ColumnDataSource({"y": [], "text": [], "color": []}, name="names")
    top.add_layout(
        LabelSet(x=4, x_units="screen", y="y", text="text", text_color="color", source=names, text_font_size="13px",
                 text_font_style="bold", text_baseline="top")
    )  # fmt: skip
    top.yaxis.visible = False
    top.ygrid.visible = False
    parts = [top]
    if curves:
        parts += _curves_below(shared)
        top.xaxis.visible = False
    parts[-1].xaxis.axis_label = "time (s)"

    of_truth = [("annotation", "@label"), ("seconds", "@span")]
    of_found = [("class", "@label"), ("seconds", "@span"), ("score", "@score"), ("verdict", "@verdict")]
    tools = [
        ZoomInTool(dimensions="width", description="Zoom in"),
        ZoomOutTool(dimensions="width", description="Zoom out", maintain_focus=False),
        WheelZoomTool(dimensions="width", description="Zoom with the wheel"),
        PanTool(dimensions="width", description="Move"),
        ResetTool(description="All of the recording"),
    ]
    for each in parts:
        _plain(each)
        playhead = Span(location=0, dimension="height", line_color=MARK, line_width=2, visible=False, name="playhead")
        each.add_layout(playhead)
        each.add_tools(*(tool.clone() for tool in tools), CrosshairTool(overlay=cursor, visible=False))
        each.toolbar.active_drag = each.select_one(PanTool)
        each.toolbar.active_scroll = None
        for event in (Tap, DoubleTap):  # of two quick clicks at different places the second is one
            each.js_on_event(event, CustomJS(code="d2net.tap(cb_obj.x, cb_obj.y, cb_obj.origin.name)"))
    top.add_tools(
        HoverTool(renderers=[shown_found], tooltips=of_found, visible=False),
        HoverTool(renderers=[shown_truth], tooltips=of_truth, visible=False),
    )
    grid = gridplot(
        [[each] for each in parts],
        merge_tools=True,
        toolbar_location="above",
        toolbar_options={"logo": None},
        sizing_mode="stretch_width",
    )
    return json_item(grid)


def _curves_below(shared: dict[str, Any]) -> list[Any]:
    """The figures of activations and attention."""
    points = ColumnDataSource(
        {"x": [], **{f"c{i}": [] for i in range(MAX_CLASSES)}, "down": [], "up": []}, name="points"
    )
    middle = figure(height=150, y_range=Range1d(-0.03, 1.03), title="class activations", **shared)
    for i, colour in enumerate(colours.CLASSES):
        middle.line("x", f"c{i}", source=points, color=colour, line_width=1.6)
    middle.xaxis.visible = False
    bottom = figure(height=150, y_range=Range1d(-0.03, 1.03), title="attention: λ grey, λ′ red", **shared)
    bottom.line("x", "down", source=points, color=colours.TOP_DOWN, line_width=1.6)
    bottom.line("x", "up", source=points, color=colours.BOTTOM_UP, line_width=1.6)
    for each in (middle, bottom):
        each.yaxis.ticker = [0, 0.5, 1]
        each.title.text_font_size = "12px"
    return [middle, bottom]


@dataclass(frozen=True)
class Lines:
    """Curves over the iterations of a training: their figure, what they are, and the colour of each."""

    title: str
    item: dict[str, Any]
    legend: Mapping[str, str]


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Lines]:
    """The loss and its terms, and mAP where it was watched; as far as there is any.

    Args:
        runs: Entries of the log of each training; of several the total loss alone is drawn.
    """
    one = len(runs) == 1
    loss: dict[str, _Points] = {}
    watched: dict[str, _Points] = {}
    for run, entries in runs.items():
        for entry in entries:
            if isinstance(entry.get("map"), dict):
                for level, number in entry["map"].items():
                    _add(watched, f"mAP@{level}", entry["iteration"], number)
                continue
            for key, value in entry.items():
                if not (key == "iteration" or isinstance(value, dict)) and (one or key == "total"):
                    _add(loss, key if one else run, entry["iteration"], value)
    loss = {name: points for name, points in loss.items() if any(points[1])}  # a term that is off is 0 throughout
    found = [_lines("Loss and its terms, before they are weighed" if one else "Loss of each training", loss)]
    if one:
        found.append(_lines("mAP while it was trained, in percent", watched))
    return [lines for lines in found if lines is not None]


def _lines(title: str, series: Mapping[str, _Points]) -> Lines | None:
    if not series:
        return None
    shown = figure(height=240, tools="", toolbar_location=None, sizing_mode="stretch_width")
    legend = {}
    # The total below its terms: of one term only it is equal to that.
    for i, (name, (x, y)) in enumerate(series.items()):
        legend[name] = colours.CURVES[i % len(colours.CURVES)]
        shown.line(
            x, y, color=legend[name], line_width=3.5 if i == 0 and len(series) > 1 else 1.6, name=escaped(name, NAME)
        )
    shown.xaxis.axis_label = "iteration"
    shown.add_tools(
        HoverTool(tooltips=[("line", "$name"), ("iteration", "$x{0}"), ("value", "$y{0.000}")], visible=False)
    )
    _plain(shown)
    return Lines(title, json_item(shown), legend)


def shares_item(errors: ErrorAnalysis) -> dict[str, Any]:
    """What the best 1 G, …, 10 G detections are, in percent of each."""
    totals = errors.counts.sum(axis=1)
    slices = [f"{i + 1}G" for i, total in enumerate(totals.tolist()) if total]
    counts = errors.counts[: len(slices)]
    data: dict[str, Any] = {"slice": slices, "total": totals[: len(slices)].tolist()}
    for i, name in enumerate(VERDICTS):
        data[name] = (100 * counts[:, i] / totals[: len(slices)]).round(1).tolist()
        data[f"{name}_n"] = counts[:, i].tolist()
    shown = figure(
        height=300,
        x_range=FactorRange(*slices),
        y_range=Range1d(0, 100),
        tools="",
        toolbar_location=None,
        sizing_mode="stretch_width",
    )
    bars = shown.vbar_stack(
        list(VERDICTS),
        x="slice",
        width=0.86,
        color=[colours.VERDICTS[v] for v in VERDICTS],
        source=data,
        line_color=None,
    )
    for bar, name in zip(bars, VERDICTS, strict=True):
        words = name.replace("_", " ")
        tips = [("rank", "@slice"), (words, f"@{{{name}}} % (@{{{name}_n}} of @total)")]
        shown.add_tools(HoverTool(renderers=[bar], tooltips=tips, visible=False))
    shown.xgrid.visible = False
    _plain(shown)
    return json_item(shown)


def gains_item(errors: ErrorAnalysis) -> dict[str, Any]:
    """How much mAP each kind of error costs."""
    names = sorted(errors.gain, key=lambda name: -errors.gain[name])
    words = [name.replace("_", " ") for name in names]
    values = [errors.gain[name] for name in names]
    data = {
        "kind": words,
        "gain": values,
        "text": [f"{v:.1f}" for v in values],
        "color": [colours.VERDICTS[name] for name in names],
    }
    most = max(values)
    shown = figure(
        height=300,
        y_range=FactorRange(*reversed(words)),
        x_range=Range1d(0, 1.18 * most if most > 0 else 1),
        tools="",
        toolbar_location=None,
        sizing_mode="stretch_width",
    )
    source = ColumnDataSource(data)
    shown.hbar(y="kind", right="gain", height=0.7, color="color", source=source, line_color=None)
    label = LabelSet(
        x="gain",
        y="kind",
        text="text",
        x_offset=5,
        text_baseline="middle",
        text_font_size="12px",
        text_color="#8a9099",
        source=source,
    )
    shown.add_layout(label)
    shown.ygrid.visible = False
    _plain(shown, left=None)
    return json_item(shown)


def _add(series: dict[str, _Points], name: str, iteration: int, value: object) -> None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        x, y = series.setdefault(name, ([], []))
        x.append(iteration)
        y.append(round(float(value), 5))


def _plain(shown: Any, left: int | None = LEFT) -> None:
    """No frame, no background: the page's shows, and its style colours the text."""
    shown.background_fill_color = None
    shown.border_fill_color = None
    shown.outline_line_color = None
    shown.min_border_right = RIGHT
    if left is not None:
        shown.min_border_left = left
    shown.axis.minor_tick_line_color = None
    shown.axis.axis_label_text_font_style = "normal"
    shown.title.text_font_style = "normal"
