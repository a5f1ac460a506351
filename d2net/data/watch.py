"""The embedded dataset: untrimmed recordings made of real smartwatch exercises.

The PyPI package ``seglearn`` ships 140 recordings of a smartwatch's accelerometer and gyroscope (50 Hz): seven
shoulder exercises, ten subjects, both arms, one recording of each. Each holds one exercise only, so an untrimmed
recording is made here by joining stretches of one subject's exercises, done with one arm (a left arm is mirrored into
a right one). Five exercises are actions. Two play the background and are never labelled: PEN (pendulum, a passive
swing of the relaxed arm) and TRAP (trapezius extension). That choice, and the test subjects, were fixed before
anything was trained.

These recordings are easy: every network tells their background from their actions. Those of difficulty ``hard``
(:data:`JOININGS`) are made of the same signals: their background resembles the actions, stretches are short and fade
into each other, and most recordings have one label. What tells methods apart shows there (docs/studies.md).

Seven training people wear a watch and move in only so many ways, so every training recording is turned by a small
random rotation of the sensor's axes, as if the watch sat a little differently, and played faster or slower, as if by a
person of another tempo. Test recordings are left as they were measured.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from d2net.data.dataset import Dataset, Recording
from d2net.data.statistics import WIDTH, window_statistics
from d2net.errors import InputError
from d2net.words import quoted

SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
TRAIN_SUBJECTS, TEST_SUBJECTS = (1, 2, 3, 4, 5, 6, 7), (8, 9, 10)

RATE = 50  # samples a second
WINDOW = 50  # samples a snippet looks at: 1 s
HOP = 16  # samples from one snippet to the next: 0.32 s
# A left arm's signal becomes a right arm's by mirroring the watch's x axis: of the acceleration the x component changes
# sign, of the angular velocity (a pseudovector) the other two.
MIRROR = np.array([-1, 1, 1, 1, -1, -1])
# Both chosen by cross-validation over the training subjects (docs/demo.md)
TILT = 15.0  # degrees
TEMPO = 0.2  # of the logarithm of the factor: two thirds of the recordings are played 0.82 to 1.22 times as fast
STREAM_WIDTH = 4 * WIDTH  # three axes and their magnitude


@dataclass(frozen=True)
class Joining:
    """How stretches of exercises become an untrimmed recording.

    Attributes:
        background: Exercises that are never labelled.
        action: Samples of the shortest and of the longest stretch of an action.
        rest: The same of a stretch of background.
        labels: Number of classes of a recording; one of these, at random.
        repeats: Fewest and most stretches of each class of a recording.
        fade: Samples over which one stretch fades into the next; the middle is the boundary.
    """

    background: tuple[str, ...]
    action: tuple[int, int]
    rest: tuple[int, int]
    labels: tuple[int, ...]
    repeats: tuple[int, int]
    fade: int


JOININGS = {
    "easy": Joining(("PEN", "TRAP"), (6 * RATE, 20 * RATE), (6 * RATE, 20 * RATE), (1, 2), (1, 3), 0),
    "hard": Joining(("ABD", "ER"), (2 * RATE, 6 * RATE), (3 * RATE, 8 * RATE), (1, 1, 1, 1, 2), (2, 4), RATE // 2),
}


@dataclass(frozen=True)
class _Source:
    """The exercises of the file: (n, 6) float64 signals by (exercise, subject, side), left arms mirrored."""

    exercises: tuple[str, ...]
    signals: dict[tuple[str, int, int], np.ndarray]


def load_watch(
    *,
    seed: int = 0,
    difficulty: str = "easy",
    train_recordings: int = 1000,
    test_recordings: int = 40,
    tilt: float = TILT,
    tempo: float = TEMPO,
    train_subjects: Sequence[int] = TRAIN_SUBJECTS,
    test_subjects: Sequence[int] = TEST_SUBJECTS,
    path: Path | None = None,
) -> Dataset:
    """Make the ``watch`` dataset: real signals, untrimmed by joining, the same for the same arguments.

    Each recording alternates background and action stretches of 6 to 20 s (shorter where the source is), begins and
    ends with background, and holds one or two action classes, each one to three times. A stretch begins at a random
    place of its source; two stretches of one source may overlap. Features are the :func:`window_statistics` of the
    accelerometer (stream one) and the gyroscope (stream two), standardised with the mean and standard deviation of the
    training recordings. Snippet t stands for [0.32 t, 0.32 (t + 1)) s: its 1 s window is centred there.
    Features are computed when the first of them is read, and stay in memory (about 130 MB by default).

    A recording is named ``watch_SUBSET_sNN_NNNN``, where sNN is the subject; no subject is in both subsets.
    A recording keeps its signal whatever the number of recordings, so that a larger set contains the smaller one.

    Args:
        seed: Seed of the joining.
        difficulty: ``easy`` or ``hard``, see :data:`JOININGS`; the text above is of ``easy``.
        train_recordings: Number of recordings of subset ``train``; at least 1.
        test_recordings: Number of recordings of subset ``test``; may be 0.
        tilt: Standard deviation in degrees of the random angles by which each training recording is turned about
            the sensor's three axes; 0 turns none.
        tempo: Standard deviation of the logarithm of the random factor by which each training recording is played
            faster; 0 changes none. Angular velocities grow by it. Accelerations stay: most of them is gravity.
        train_subjects: The people (1 to 10) of subset ``train``.
        test_subjects: The people of subset ``test``; nobody may be in both.
        path: The file ``watch_dataset.npy``; None takes it from the installed package ``seglearn``.

    Raises:
        InputError: the file is missing or is not the published one, or a number is out of range.
    """
    if seed < 0 or train_recordings < 1 or test_recordings < 0 or not (0 <= tilt < math.inf and 0 <= tempo <= 1):
        raise InputError(
            f"watch: seed={seed}, train_recordings={train_recordings}, test_recordings={test_recordings}, "
            f"tilt={tilt}, tempo={tempo}; give seed >= 0, at least 1 training recording, at least 0 test recordings, "
            "a tilt >= 0 and a tempo of 0 to 1"
        )
    if difficulty not in JOININGS:
        raise InputError(f"watch: unknown difficulty {quoted(difficulty)}; give {' or '.join(JOININGS)}")
    joining = JOININGS[difficulty]
    if not set(train_subjects) or not set(test_subjects) or set(train_subjects) & set(test_subjects):
        raise InputError(
            f"watch: training subjects {tuple(train_subjects)} and test subjects {tuple(test_subjects)}; "
            "give at least one of each and nobody twice"
        )
    path = _installed_file() if path is None else Path(path)
    source = _read(path)
    unknown = {*train_subjects, *test_subjects} - {subject for _, subject, _ in source.signals}
    if unknown:
        raise InputError(f"watch: no subject {', '.join(map(str, sorted(unknown)))}; there are 1 to 10")
    making = _Making(
        joining, seed, (train_recordings, test_recordings), tilt, tempo, (tuple(train_subjects), tuple(test_subjects))
    )
    features = _Features(making, source)
    recordings = []
    for position, (number, index) in enumerate(making.recordings()):
        subset, subject = ("train", "test")[number], making.subject(number, index)
        signal, segments = _join(source, joining, subject, making.random(number, index))
        samples = len(signal)
        if subset == "train":
            factor = making.factor(index)
            samples = int(samples / factor)
            segments = tuple((start / factor, end / factor, label) for start, end, label in segments)
        recordings.append(
            Recording(
                name=f"watch_{subset}_s{subject:02d}_{index:04d}",
                subset=subset,
                labels=tuple(sorted({label for *_, label in segments})),
                segments=segments,
                seconds_per_snippet=HOP / RATE,
                source=str(path),
                read=partial(features.read, position),
                duration=samples / RATE,
                snippets=samples // HOP,
            )
        )
    return Dataset(
        name="watch" if difficulty == "easy" else f"watch ({difficulty})",
        classes=tuple(e for e in source.exercises if e not in joining.background),
        stream_widths=(STREAM_WIDTH, STREAM_WIDTH),
        recordings=tuple(recordings),
    )


@dataclass(frozen=True)
class _Making:
    """What recordings are made: arguments of :func:`load_watch`, of the subsets train and test."""

    joining: Joining
    seed: int
    numbers: tuple[int, int]
    tilt: float
    tempo: float
    subjects: tuple[tuple[int, ...], tuple[int, ...]]

    def recordings(self) -> list[tuple[int, int]]:
        """(number of the subset, index in it) of each."""
        return [(number, index) for number in range(2) for index in range(self.numbers[number])]

    def subject(self, number: int, index: int) -> int:
        return self.subjects[number][index % len(self.subjects[number])]

    def factor(self, index: int) -> float:
        """By which a training recording is played faster."""
        return math.exp(self.tempo * self.random(3, index).normal())

    def random(self, number: int, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, number, index])


class _Features:
    """The features of all recordings, computed when the first is read: what needs none need not wait for them."""

    def __init__(self, making: _Making, source: _Source) -> None:
        self._making, self._source = making, source

    def read(self, position: int) -> np.ndarray:
        return self._all[position].copy()  # every reader gets its own

    @cached_property
    def _all(self) -> list[np.ndarray]:
        made, making = [], self._making
        for number, index in making.recordings():
            signal, _ = _join(self._source, making.joining, making.subject(number, index), making.random(number, index))
            if number == 0:
                rotation = rotation_matrix(np.radians(making.tilt) * making.random(2, index).normal(size=3))
                signal = np.concatenate([signal[:, :3] @ rotation.T, signal[:, 3:] @ rotation.T], axis=1)
                signal = played_faster(signal, making.factor(index))
            streams = (
                window_statistics(sensor, rate=RATE, window=WINDOW, stride=HOP)
                for sensor in (signal[:, :3], signal[:, 3:])
            )
            made.append(np.concatenate(list(streams), axis=1))
        train = np.concatenate(made[: making.numbers[0]]).astype(np.float64)
        mean, std = train.mean(axis=0), np.maximum(train.std(axis=0), 1e-6)
        return [((x - mean) / std).astype(np.float32) for x in made]


def rotation_matrix(angles: np.ndarray) -> np.ndarray:
    """(3, 3) rotation by ``angles`` (x, y, z; radians), about x first."""
    turned = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        about = np.eye(3)
        about[[i, j], [i, j]] = np.cos(angle)
        about[i, j], about[j, i] = -np.sin(angle), np.sin(angle)
        turned = about @ turned
    return turned


def played_faster(signal: np.ndarray, factor: float) -> np.ndarray:
    """(n, 6) acceleration and angular velocity, as if everything went ``factor`` times as fast: (n / factor, 6)."""
    times = np.arange(int(len(signal) / factor)) * factor
    played = np.stack([np.interp(times, np.arange(len(signal)), column) for column in signal.T], axis=1)
    return played * np.array([1, 1, 1, factor, factor, factor])


def _installed_file() -> Path:
    """The file inside the installed package, found without importing the package and what it imports."""
    spec = importlib.util.find_spec("seglearn")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, "data", "watch_dataset.npy")
        if path.is_file():
            return path
    raise InputError("dataset 'watch' needs the file that the package seglearn ships: pip install 'd2net[demo]'")


def _read(path: Path) -> _Source:
    """Read the published file.

    The file is a pickle, and unpickling runs what the pickle says. It is safe here because nothing is unpickled
    until the very bytes that were read have the SHA-256 of the file of seglearn 1.2.5, which only rebuilds numpy
    arrays; anything else is refused.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); pip install 'd2net[demo]' brings it") from error
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise InputError(
            f"{path}: not the published watch_dataset.npy (its SHA-256 differs), so it is not opened; "
            "pip install --force-reinstall --no-deps seglearn==1.2.5"
        )
    table = np.load(io.BytesIO(content), allow_pickle=True).item()
    names = tuple(table["y_labels"])
    rows = zip(table["X"], table["y"], table["subject"], table["side"], strict=True)
    return _Source(
        exercises=names,
        signals={(names[y], int(subject), int(side)): x if side else x * MIRROR for x, y, subject, side in rows},
    )


def _join(
    source: _Source, joining: Joining, subject: int, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[tuple[float, float, str], ...]]:
    """One untrimmed recording: its (n, 6) signal and its (start s, end s, class) segments."""
    side = int(rng.integers(2))
    actions = [e for e in source.exercises if e not in joining.background]
    chosen = rng.choice(actions, size=joining.labels[rng.integers(len(joining.labels))], replace=False)
    fewest, most = joining.repeats
    order = rng.permutation(np.repeat(chosen, rng.integers(fewest, most + 1, size=len(chosen))))
    # background, action, background, ..., background
    stretches = [name for action in order for name in (rng.choice(joining.background), action)]
    stretches.append(rng.choice(joining.background))
    pieces: list[np.ndarray] = []
    segments = []
    fade, samples = joining.fade, 0
    rising = (np.arange(fade)[:, None] + 0.5) / max(fade, 1)
    for exercise in map(str, stretches):
        is_action = exercise not in joining.background
        signal = source.signals[exercise, subject, side]
        length = min(int(rng.integers(*(joining.action if is_action else joining.rest), endpoint=True)), len(signal))
        offset = int(rng.integers(len(signal) - length, endpoint=True))
        piece = signal[offset : offset + length]
        begin = samples - fade / 2  # a boundary is in the middle of its fade
        if fade and pieces:
            before = pieces.pop()
            pieces += [before[:-fade], before[-fade:] * (1 - rising) + piece[:fade] * rising]
            piece = piece[fade:]
        pieces.append(piece)
        samples += len(piece)
        if is_action:  # background follows
            segments.append((begin / RATE, (samples - fade / 2) / RATE, exercise))
    return np.concatenate(pieces), tuple(segments)
