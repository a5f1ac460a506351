"""Ways to make features, each a function of a file and what ``features.json`` says of it."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from d2net.data.statistics import WIDTH
from d2net.errors import InputError
from d2net.features import sensor, video
from d2net.features.extract import Extractor, Features, check_sampling, extract_video
from d2net.features.flow import flow_function
from d2net.features.i3d import FEATURES, I3D, SHORTEST
from d2net.features.sensor import Columns, extract_sensor
from d2net.features.weights import load_i3d, weights_sha256
from d2net.words import quoted

EXTRACTORS = ("i3d", "kinetics400", "windows")
PRECISIONS = ("float32", "bf16")


@dataclass(frozen=True)
class Method:
    """A way to make features.

    Attributes:
        about: What ``features.json`` says of it: ``extractor``; ``fps``, ``stride``, ``window`` and ``offset`` of its
            snippets; ``streams``, the width of each; and whatever else decides what the features are.
        extract: The features of a file; its second argument, if any, is called with the share that is done.
        suffixes: Of the files in a folder that it is for, in small letters.
    """

    about: Mapping[str, Any]
    extract: Callable[[Path, Callable[[float], None] | None], Features]
    suffixes: frozenset[str] = video.SUFFIXES


def video_method(
    extractor: str = "i3d",
    *,
    weights: Path | None = None,
    flow: str | None = None,
    flow_weights: Path | None = None,
    fps: float = 25.0,
    window: int = 16,
    stride: int = 16,
    batch: int = 4,
    device: str = "cpu",
    precision: str = "float32",
) -> Method:
    """Features of videos by I3D.

    Args:
        extractor: ``i3d`` (1024 features of a window) or ``kinetics400`` (scores of 400 classes, which add up to 1).
        weights: As :func:`d2net.features.weights.load_i3d` takes them; None: the published ones.
        flow: ``dis`` or ``tvl1``: 1024 features of the optical flow too; None: of RGB alone.
        flow_weights: Of the flow network; needed with ``flow``.
        fps: As :func:`d2net.features.extract.extract_video` takes it, and the next four too.
        window: See there.
        stride: See there.
        batch: See there.
        device: See there.
        precision: ``float32`` or ``bf16``.

    Raises:
        InputError: values that do not go together, weights that cannot be used, no PyAV, no OpenCV where there is flow.
    """
    check_sampling(fps, window, stride)
    if window < SHORTEST:
        raise InputError(f"--window {window}: I3D needs windows of at least {SHORTEST} frames")
    if extractor not in ("i3d", "kinetics400"):
        raise InputError(f"--extractor {quoted(extractor)}: of videos give i3d or kinetics400")
    if precision not in PRECISIONS:
        raise InputError(f"--precision {quoted(precision)}: give {' or '.join(PRECISIONS)}")
    if flow is not None and extractor != "i3d":
        raise InputError(f"--flow goes with --extractor i3d, not with {extractor}; leave it out")
    if (flow is None) != (flow_weights is None):
        raise InputError("--flow and --flow-weights go together; give both, or neither")
    video.check_installed()
    about: dict[str, Any] = {"extractor": extractor, "fps": fps, "stride": stride, "window": window, "offset": 0}
    about |= {"streams": [FEATURES], "stream_names": ["rgb"], "weights": {"rgb": weights_sha256(weights)}}
    about["precision"] = precision
    options: dict[str, Any] = {"fps": fps, "window": window, "stride": stride, "batch": batch, "device": device}
    if flow is not None and flow_weights is not None:
        options["flow"] = flow_function(flow)
        options["flow_extractor"] = _features_of(_ready(load_i3d(flow_weights, channels=2), device, precision))
        about |= {"streams": [FEATURES, FEATURES], "stream_names": ["rgb", "flow"], "flow": flow}
        about["weights"]["flow"] = weights_sha256(flow_weights)
    network = _ready(load_i3d(weights), device, precision)
    if extractor == "kinetics400":
        classes = kinetics400()
        if network.classes != len(classes):
            raise InputError(
                f"{weights}: has a classifier of {network.classes} classes, and --extractor kinetics400 needs one of "
                f"{len(classes)}; give others, or use --extractor i3d"
            )
        about |= {"streams": [len(classes)], "classes": classes}
        return Method(about, _extract_video(_scores_of(network), options))
    return Method(about, _extract_video(_features_of(network), options))


def sensor_method(
    files: Sequence[Path],
    *,
    columns: Sequence[Sequence[str]] = (),
    time_column: str | None = None,
    time_unit: str | None = None,
    rate: float | None = None,
    fps: float = 50.0,
    window: int = 50,
    stride: int = 16,
) -> Method:
    """Features of recordings of sensors: statistics of windows.

    Args:
        files: Of the recordings. In the first that can be read what is not given is found; the others must be like it.
        columns: Of each sensor, as :func:`d2net.features.sensor.find_columns` takes them. Two sensors are two streams,
            another number one.
        time_column: The clock, as there.
        time_unit: Of the clock, as there.
        rate: Rows a second, as there.
        fps: Samples a second, as :func:`d2net.features.sensor.extract_sensor` takes it.
        window: Samples of a window.
        stride: Samples from one window to the next.

    Raises:
        InputError: what :func:`d2net.features.sensor.find_columns` raises, and a number out of range.
    """
    first: InputError | None = None
    for path in files:
        try:
            found = sensor.find_columns(path, columns, time_column, time_unit, rate)
            return _sensor_method(found, rate, fps, window, stride)
        except InputError as error:
            first = first or error
    raise first or InputError("no files of sensors; give some")


def method_like(
    about: Mapping[str, Any],
    *,
    weights: Path | None = None,
    flow_weights: Path | None = None,
    batch: int = 4,
    device: str = "cpu",
) -> Method:
    """The method that ``features.json`` tells of, for more recordings.

    Args:
        about: The JSON object; its ``recordings`` are not looked at.
        weights: File of the same weights; None: the published ones.
        flow_weights: The same of the flow network.
        batch: As :func:`video_method` takes it.
        device: As :func:`video_method` takes it.

    Raises:
        InputError: an extractor that d2net has not, values that are missing, other weights.
    """
    kind = about.get("extractor")
    try:
        fps, window, stride = float(about["fps"]), int(about["window"]), int(about["stride"])
        if kind == "windows":
            columns = Columns(tuple(tuple(s) for s in about["columns"]), about["time_column"], about["time_unit"])
            return _sensor_method(columns, about["rate"], fps, window, stride)
        if kind not in EXTRACTORS:
            raise InputError(
                f"features of extractor {quoted(kind)} were not made by d2net; make them as the others were"
            )
        method = video_method(
            kind,
            weights=weights,
            flow=about.get("flow"),
            flow_weights=flow_weights,
            batch=batch,
            device=device,
            precision=about["precision"],
            fps=fps,
            window=window,
            stride=stride,
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"features.json is not one of d2net features ({error!r}); make the features anew") from error
    if method.about["weights"] != about.get("weights"):
        raise InputError("the features were made with other weights of I3D; give these with --weights (--flow-weights)")
    return method


def kinetics400() -> list[str]:
    """Names of the classes of Kinetics-400, in the order of I3D's classifier."""
    return json.loads((importlib.resources.files("d2net.features") / "kinetics400.json").read_text(encoding="utf-8"))


def _ready(network: I3D, device: str, precision: str) -> I3D:
    return (network.in_bfloat16() if precision == "bf16" else network).to(device)


def _features_of(network: I3D) -> Extractor:
    return lambda frames: network(frames).features


def _scores_of(network: I3D) -> Extractor:
    return lambda frames: network(frames).logits.softmax(1)


def _extract_video(extractor: Extractor, options: dict[str, Any]) -> Callable[..., Features]:
    return lambda path, progress=None: extract_video(path, extractor, progress=progress, **options)


def _sensor_method(columns: Columns, rate: float | None, fps: float, window: int, stride: int) -> Method:
    widths = [WIDTH * (len(s) + (len(s) > 1)) for s in columns.sensors]
    about = {
        "extractor": "windows",
        "fps": fps,
        "stride": stride,
        "window": window,
        "offset": -((window - stride) // 2),
        "streams": widths if len(widths) == 2 else [sum(widths)],
        "stream_names": ["+".join(s) for s in columns.sensors] if len(widths) == 2 else ["sensors"],
        "columns": [list(s) for s in columns.sensors],
        "time_column": columns.time,
        "time_unit": columns.unit,
        "rate": rate,
    }
    extract = partial(_extract_sensor, columns, {"rate": rate, "fps": fps, "window": window, "stride": stride})
    return Method(about, extract, sensor.SUFFIXES)


def _extract_sensor(
    columns: Columns, options: dict[str, Any], path: Path, progress: Callable[[float], None] | None = None
) -> Features:
    return extract_sensor(path, columns, **options)
