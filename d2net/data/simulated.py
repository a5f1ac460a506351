"""Layout 6: generated features on real (or made-up) timelines, for performance work and tests without downloads.

Nothing measured on them says how good a method is on real videos, so the dataset's name says "simulated".
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from d2net.data.dataset import Dataset, Recording
from d2net.data.timeline import Entry, choose, read_timeline
from d2net.errors import InputError

MADE_UP = Path(__file__).with_name("made_up_timeline.json")
SECONDS_PER_SNIPPET = 16 / 25
BACKGROUNDS = 8
CONTEXT_SNIPPETS = 6
LONGEST = 86_400.0  # seconds


def simulate(
    timeline: Path | None = None,
    *,
    stream_widths: tuple[int, int] = (1024, 1024),
    seed: int = 0,
    action: float = 6.0,
    context: float = 4.0,
    noise: float = 1.0,
    subsets: Sequence[str] | None = None,
) -> Dataset:
    """Two-stream features generated for the videos of an annotations file.

    A snippet is noise, smoothed over time as overlapping receptive fields do, plus prototypes of Euclidean length
    ``action`` or ``context`` (so that difficulty does not depend on the width): its class where an action runs; the
    scene shared by all classes around every action, stronger in the RGB stream, which is what misleads weakly
    supervised localization; one of a few backgrounds elsewhere. Like I3D's, features are not negative.
    Features are generated when read and depend on the video's name, the seed and the arguments alone.

    Args:
        timeline: ActivityNet-style JSON with subsets, labels and segments; a small made-up one by default. Videos
            without ``duration`` end up to a quarter after their last segment.
        stream_widths: Widths of the RGB and flow streams.
        seed: Draws other prototypes and noise.
        action: Length of a class prototype; noise per direction is about ``noise``.
        context: Length of context and background prototypes.
        noise: Standard deviation of every feature before smoothing.
        subsets: Generate only these.

    Raises:
        InputError: unreadable timeline, a video with neither duration nor segment, a width below 1.
    """
    if len(stream_widths) != 2 or min(stream_widths) < 1:
        raise InputError(f"stream_widths={stream_widths}: expected two widths of at least 1")
    annotated = read_timeline(timeline or MADE_UP)
    chosen = choose(subsets, tuple(e.subset for e in annotated.videos.values()), annotated.path)
    recordings = []
    for name, entry in annotated.videos.items():
        if entry.subset not in chosen:
            continue
        duration = _duration(name, entry, annotated.path)
        recordings.append(
            Recording(
                name=name,
                subset=entry.subset,
                labels=entry.labels,
                segments=entry.segments,
                seconds_per_snippet=SECONDS_PER_SNIPPET,
                source=f"simulated from {annotated.path}",
                read=partial(
                    _generate,
                    name,
                    entry.segments,
                    duration,
                    annotated.classes,
                    stream_widths,
                    seed,
                    (action, context, noise),
                ),
                duration=duration,
                snippets=_snippets(duration),
                ambiguous=entry.ambiguous,
                withdrawn=entry.withdrawn,
            )
        )
    name = f"simulated {annotated.name or annotated.path.name}"
    return Dataset(name, annotated.classes, stream_widths, tuple(recordings))


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


def _generate(
    name: str,
    segments: tuple[tuple[float, float, str], ...],
    duration: float,
    classes: tuple[str, ...],
    stream_widths: tuple[int, int],
    seed: int,
    strengths: tuple[float, float, float],
) -> np.ndarray:
    """(T, sum of widths) float32 features of one video."""
    action, context, noise = strengths
    length = _snippets(duration)
    active = np.zeros((length, len(classes)), np.float32)
    near = np.zeros((length, 1), np.float32)
    for start, end, label in segments:
        first = int(start / SECONDS_PER_SNIPPET)
        last = max(first + 1, round(end / SECONDS_PER_SNIPPET))
        active[first:last, classes.index(label)] = 1
        near[max(0, first - CONTEXT_SNIPPETS) : last + CONTEXT_SNIPPETS] = 1

    rng = _generator(seed, "video", name)
    # A shot shows one background for a while; about 30 snippets on average.
    shots = np.cumsum(rng.random(length) < 1 / 30)
    background = np.eye(BACKGROUNDS, dtype=np.float32)[rng.integers(BACKGROUNDS, size=shots[-1] + 1)[shots]]
    background *= 1 - near

    streams = []
    for stream, width in enumerate(stream_widths):
        prototypes = _prototypes(seed, stream, width, len(classes))
        shared = context if stream == 0 else 0.5 * context
        weights = np.concatenate((action * active, shared * near, context * background), axis=1)
        x = rng.standard_normal((length, width), dtype=np.float32)
        x *= noise
        x += weights @ prototypes
        streams.append(_smooth(x))
    return np.maximum(np.concatenate(streams, axis=1), 0)


@lru_cache(maxsize=8)
def _prototypes(seed: int, stream: int, width: int, classes: int) -> np.ndarray:
    """(classes + 1 context + backgrounds, width) float32 directions of length 1."""
    p = _generator(seed, "prototypes", stream).standard_normal((classes + 1 + BACKGROUNDS, width))
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
