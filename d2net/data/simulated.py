"""Layout 6: generated features on real (or made-up) timelines, for performance work and tests without downloads.

Nothing measured on them says how good a method is on real videos, so the dataset's name says "simulated".
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from d2net.data.dataset import Dataset, Recording
from d2net.data.timeline import Entry, choose, read_timeline
from d2net.errors import InputError
from d2net.spec import settings_of
from d2net.words import is_number, quoted

MADE_UP = Path(__file__).with_name("made_up_timeline.json")
SECONDS_PER_SNIPPET = 16 / 25
BACKGROUNDS = 8
CONTEXT_SNIPPETS = 6
LOOKALIKE_SNIPPETS = 5.0  # mean length
LONGEST = 86_400.0  # seconds
KEPT = 2**29  # bytes of features that a dataset keeps in memory; more are made again whenever they are read
# Hard: tuned until cross-entropy and L_Dis gave about what the paper reports (docs/simulated.md).
DIFFICULTIES: dict[str, dict[str, Any]] = {
    "easy": {},
    "hard": {"scene": 0.7, "lookalikes": 2.0, "variation": 1.0, "fade": 1.3},
}


@dataclass(frozen=True)
class Making:
    """How the features of a video are made: see :func:`simulate`."""

    classes: tuple[str, ...]
    stream_widths: tuple[int, int]
    seed: int
    action: float
    context: float
    scene: float
    lookalikes: float
    variation: float
    fade: float
    noise: float


def simulate(
    timeline: Path | None = None,
    *,
    stream_widths: tuple[int, int] = (1024, 1024),
    seed: int = 0,
    action: float = 6.0,
    context: float = 4.0,
    scene: float = 0.0,
    lookalikes: float = 0.0,
    variation: float = 0.0,
    fade: float = 0.0,
    noise: float = 1.0,
    subsets: Sequence[str] | None = None,
) -> Dataset:
    """Two-stream features generated for the videos of an annotations file.

    A snippet is noise, smoothed over time as overlapping receptive fields do, plus prototypes of Euclidean length
    ``action``, ``context`` or ``scene`` (so that difficulty does not depend on the width): its class where an action
    runs; the surroundings shared by all classes around every action, stronger in the RGB stream, which is what
    misleads weakly supervised localization; one of a few backgrounds elsewhere. Like I3D's, features are not negative.
    Features depend on the video's name, the seed and the arguments alone. They are made when they are read, and kept
    where those of all videos take less than 512 MiB.

    What ``scene``, ``lookalikes``, ``variation`` and ``fade`` add makes them hard, as real video is; 0 leaves each out.
    ``simulate(**DIFFICULTIES["hard"])`` has all of them.

    Args:
        timeline: ActivityNet-style JSON with subsets, labels and segments; a small made-up one by default. Videos
            without ``duration`` end up to a quarter after their last segment.
        stream_widths: Widths of the RGB and flow streams.
        seed: Draws other prototypes and noise.
        action: Length of a class prototype; noise per direction is about ``noise``.
        context: Length of context and background prototypes.
        scene: Length of the scene of each of a video's classes (a basketball court), which the RGB stream shows all
            over the video.
        lookalikes: How many times a minute each stream, for 3 s or so, shows one of the video's actions where there
            is none. The streams do so at different times: the pose without the motion, or the motion of something else.
        variation: Standard deviation of the logarithm of the strength of actions and lookalikes, in each stream by
            itself: half of the variance is between instances, half within one (correlated over about 2 s).
        fade: Seconds in which an action rises to its strength, and falls; its annotated ends are half-way.
        noise: Standard deviation of every feature before smoothing.
        subsets: Generate only these.

    Raises:
        InputError: unreadable timeline, a video with neither duration nor segment, a width below 1, a negative length.
    """
    if len(stream_widths) != 2 or min(stream_widths) < 1:
        raise InputError(f"stream_widths={stream_widths}: expected two widths of at least 1")
    annotated = read_timeline(timeline or MADE_UP)
    making = Making(annotated.classes, stream_widths, seed, action, context, scene, lookalikes, variation, fade, noise)
    for name in ("action", "context", "scene", "lookalikes", "variation", "fade", "noise"):
        if not 0 <= getattr(making, name) < 1000:
            raise InputError(f"simulate: {name}={getattr(making, name)}; give a number of 0 to 1000")
    chosen = choose(subsets, tuple(e.subset for e in annotated.videos.values()), annotated.path)
    durations = {
        name: _duration(name, entry, annotated.path)
        for name, entry in annotated.videos.items()
        if entry.subset in chosen
    }
    keep = 4 * sum(stream_widths) * sum(map(_snippets, durations.values())) < KEPT
    recordings = []
    for name, duration in durations.items():
        entry = annotated.videos[name]
        recordings.append(
            Recording(
                name=name,
                subset=entry.subset,
                labels=entry.labels,
                segments=entry.segments,
                seconds_per_snippet=SECONDS_PER_SNIPPET,
                source=f"simulated from {annotated.path}",
                read=_Generated(name, entry.segments, duration, making, keep),
                duration=duration,
                snippets=_snippets(duration),
                ambiguous=entry.ambiguous,
                withdrawn=entry.withdrawn,
            )
        )
    name = f"simulated {annotated.name or annotated.path.name}"
    return Dataset(name, annotated.classes, stream_widths, tuple(recordings))


def open_simulated(spec: str, annotations: Path | None = None) -> Dataset:
    """The dataset of ``simulated[,KEY=VALUE...][:ANNOTATIONS.json]``.

    Keys are ``width`` (of each stream; default 1024), ``difficulty`` (``easy``, the default, or ``hard``) and ``seed``
    (0). The dataset's name says which of them are not the defaults, but for the width.

    Args:
        spec: As of ``--data``.
        annotations: Used where ``spec`` names none.

    Raises:
        InputError: an unknown key or value, and as :func:`simulate`.
    """
    timeline = spec.partition(":")[2]
    given = settings_of(spec, {"width": "1024", "difficulty": "easy", "seed": "0"})
    for key, least, most in (("width", 1, 65_536), ("seed", 0, 2**31)):
        value = given[key]
        if not (value.isdigit() and is_number(value) and len(value) < 12 and least <= int(value) <= most):
            raise InputError(
                f"--data {quoted(spec)}: {key} is {quoted(value)}; give a whole number from {least} to {most}"
            )
    width, seed, difficulty = int(given["width"]), int(given["seed"]), given["difficulty"]
    if difficulty not in DIFFICULTIES:
        raise InputError(f"--data {quoted(spec)}: difficulty is {quoted(difficulty)}; give {' or '.join(DIFFICULTIES)}")
    dataset = simulate(
        Path(timeline) if timeline else annotations,
        stream_widths=(width, width),
        seed=seed,
        **DIFFICULTIES[difficulty],
    )
    said = [difficulty] * (difficulty != "easy") + [f"seed {seed}"] * (seed > 0)
    return replace(dataset, name=f"{dataset.name} ({', '.join(said)})" if said else dataset.name)


class _Generated:
    """Makes the features of one video, and keeps them where ``keep``; every reader gets its own copy."""

    def __init__(
        self, name: str, segments: tuple[tuple[float, float, str], ...], duration: float, making: Making, keep: bool
    ) -> None:
        self.name, self.segments, self.duration, self.making, self.keep = name, segments, duration, making, keep
        self.features: np.ndarray | None = None

    def __call__(self) -> np.ndarray:
        if self.features is not None:
            return self.features.copy()
        features = _generate(self.name, self.segments, self.duration, self.making)
        if self.keep:
            self.features = features.copy()
        return features


def _duration(name: str, entry: Entry, path: Path) -> float:
    duration = entry.duration
    if duration is None:
        last = max((end for _, end, _ in entry.segments), default=0.0)
        if last <= 0:
            raise InputError(f"{path}: video '{name}' has neither a duration nor a segment; add one or take it out")
        duration = last * (1 + 0.25 * _generator("duration", name).random())
    if duration > LONGEST:
        raise InputError(f"{path}: video '{name}' lasts {duration:g} s; features are made in memory, of a day at most")
    return duration


def _snippets(duration: float) -> int:
    return max(1, int(duration / SECONDS_PER_SNIPPET))


def _generate(name: str, segments: tuple[tuple[float, float, str], ...], duration: float, making: Making) -> np.ndarray:
    """(T, sum of widths) float32 features of one video."""
    length, classes, seed = _snippets(duration), making.classes, making.seed
    near = np.zeros((length, 1), np.float32)
    scenes = np.zeros((length, len(classes)), np.float32)
    for start, end, label in segments:
        first, last = _ends(start, end)
        near[max(0, first - CONTEXT_SNIPPETS) : last + CONTEXT_SNIPPETS] = 1
        scenes[:, classes.index(label)] = 1

    rng = _generator(seed, "video", name)
    # A shot shows one background for a while; about 30 snippets on average.
    shots = np.cumsum(rng.random(length) < 1 / 30)
    background = np.eye(BACKGROUNDS, dtype=np.float32)[rng.integers(BACKGROUNDS, size=shots[-1] + 1)[shots]]
    background *= 1 - near

    streams = []
    for stream, width in enumerate(making.stream_widths):
        active = _active(segments, length, making, _generator(seed, "actions", stream, name))
        shared = making.context if stream == 0 else 0.5 * making.context
        weights = np.concatenate((making.action * active, shared * near, making.context * background), axis=1)
        x = rng.standard_normal((length, width), dtype=np.float32)
        x *= making.noise
        x += weights @ _prototypes(seed, stream, width, len(classes))
        if stream == 0 and making.scene:
            x += making.scene * scenes @ _directions(len(classes), width, _generator(seed, "scenes"))
        streams.append(_smooth(x))
    return np.maximum(np.concatenate(streams, axis=1), 0)


def _active(
    segments: tuple[tuple[float, float, str], ...], length: int, making: Making, rng: np.random.Generator
) -> np.ndarray:
    """(length, C) strength with which one stream shows each class: 1 within its segments where nothing varies."""
    active = np.zeros((length, len(making.classes)), np.float32)
    labels = [making.classes.index(label) for *_, label in segments]
    spread = making.variation / np.sqrt(2)
    middle = np.arange(length) + 0.5
    fade = making.fade / SECONDS_PER_SNIPPET
    for (start, end, _), column in zip(segments, labels, strict=True):
        first, last = _ends(start, end)
        if fade:
            rise, fall = (middle - first) / fade + 0.5, (last - middle) / fade + 0.5
            shown = np.clip(np.minimum(rise, fall), 0, 1)
        else:
            shown = (first < middle) & (middle < last)
        strength = np.exp(spread * rng.standard_normal()) * shown
        active[:, column] = np.maximum(active[:, column], strength)
    free = active.max(axis=1, initial=0) == 0
    minutes = length * SECONDS_PER_SNIPPET / 60
    for _ in range(rng.poisson(making.lookalikes * minutes) if labels else 0):
        column, begin = labels[rng.integers(len(labels))], rng.integers(length)
        stretch = np.zeros(length, bool)
        stretch[begin : begin + rng.geometric(1 / LOOKALIKE_SNIPPETS)] = True
        active[stretch & free, column] = np.exp(spread * rng.standard_normal())
    if making.variation:
        kernel = np.exp(-np.abs(np.arange(-8, 9)) / 3)
        wave = np.convolve(rng.standard_normal(length + 16), kernel / np.linalg.norm(kernel), "valid")
        active *= np.exp(spread * wave)[:, None]
    return active


def _ends(start: float, end: float) -> tuple[int, int]:
    """First snippet of a segment, and the one after its last."""
    first = int(start / SECONDS_PER_SNIPPET)
    return first, max(first + 1, round(end / SECONDS_PER_SNIPPET))


@lru_cache(maxsize=8)
def _prototypes(seed: int, stream: int, width: int, classes: int) -> np.ndarray:
    """(classes + 1 context + backgrounds, width) float32 directions of length 1."""
    return _directions(classes + 1 + BACKGROUNDS, width, _generator(seed, "prototypes", stream))


def _directions(number: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(number, width) float32, each of length 1."""
    p = rng.standard_normal((number, width))
    return (p / np.linalg.norm(p, axis=1, keepdims=True)).astype(np.float32)


def _smooth(x: np.ndarray) -> np.ndarray:
    """Weights 1/4, 1/2, 1/4 over time, the ends repeated."""
    y = 0.5 * x
    y[1:] += 0.25 * x[:-1]
    y[:-1] += 0.25 * x[1:]
    y[0] += 0.25 * x[0]
    y[-1] += 0.25 * x[-1]
    return y


def _generator(*key: object) -> np.random.Generator:
    """A generator seeded by the key alone: the same on every machine and run, unlike ``hash``."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode(errors="surrogatepass")).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))
