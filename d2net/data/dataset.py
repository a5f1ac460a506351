"""One internal representation of every dataset layout: features + labels + annotations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from d2net.data.timeline import Entry, choose
from d2net.detections import Annotations
from d2net.errors import InputError
from d2net.words import listed


@dataclass(frozen=True)
class Recording:
    """One untrimmed recording.

    Attributes:
        name: Unique name (a video's id, for example).
        subset: The split it belongs to, as the dataset spells it (``train``, ``test`` …).
        labels: Names of the classes that occur in it; the only supervision of training.
        segments: (start s, end s, class name) rows, by time or as W-TALC's files have them; used by evaluation and
            pictures alone.
        seconds_per_snippet: Seconds from one snippet to the next (16 / 25 for I3D at 25 fps).
        source: Where the features come from, for messages (a path).
        read: Returns the features, (T, width), read anew each time where a file holds them.
        duration: Length in seconds, or None where the dataset does not say.
        first_snippet: Second at which snippet 0 begins (:mod:`d2net.data.times`).
        snippets: T, or None where only reading tells.
        ambiguous: (start s, end s) rows of doubtful segments, which are of no class.
        withdrawn: Whether its segments are no ground truth any longer (:class:`d2net.detections.Annotations`).
    """

    name: str
    subset: str
    labels: tuple[str, ...]
    segments: tuple[tuple[float, float, str], ...]
    seconds_per_snippet: float
    source: str
    read: Callable[[], np.ndarray]
    duration: float | None = None
    first_snippet: float = 0.0
    snippets: int | None = None
    ambiguous: tuple[tuple[float, float], ...] = ()
    withdrawn: bool = False

    def features(self, width: int) -> np.ndarray:
        """(T, width) float32 features, checked.

        Raises:
            InputError: wrong shape or width, no snippet, NaN or Inf; not as many snippets as when it was opened.
        """
        x = self.read()
        if x.ndim != 2 or x.shape[1] != width:
            raise InputError(
                f"{self.source}: features of '{self.name}' have shape {tuple(x.shape)}, expected "
                f"(T, {width}); extract all recordings with the same network and streams"
            )
        if len(x) == 0:
            raise InputError(f"{self.source}: '{self.name}' has no snippet; extract its features again")
        if self.snippets not in (None, len(x)):
            raise InputError(
                f"{self.source}: '{self.name}' has {len(x)} snippets and had {self.snippets} when it was opened; leave "
                "the files alone while they are in use, and start again"
            )
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes Inf, which is found below
            x = np.asarray(x, dtype=np.float32)
        if not np.isfinite(x).all():
            t = int(np.nonzero(~np.isfinite(x).all(axis=1))[0][0])
            raise InputError(
                f"{self.source}: features of '{self.name}' hold NaN or Inf (first at snippet {t}); "
                "extract them again or leave the recording out"
            )
        return x


@dataclass(frozen=True)
class LeftOut:
    """A recording that the dataset names but that was not opened, why, and its annotations (``entry``)."""

    name: str
    why: str
    entry: Entry

    @property
    def subset(self) -> str:
        return self.entry.subset


@dataclass(frozen=True)
class Dataset:
    """Recordings of one collection.

    Attributes:
        name: What it is called in results and pictures; contains "simulated" if it is.
        classes: Class names; labels are counted in this order.
        stream_widths: Width of each stream: one, or two (RGB, flow), whose concatenation the features are.
        recordings: All recordings of all subsets.
        left_out: Recordings that were named and could not be used.
        notes: What was assumed of the data or done to it, in sentences.
        source: Where it was found.
        extraction: What ``features.json`` says of how all features were made, without its recordings; None where there
            is no such file.
    """

    name: str
    classes: tuple[str, ...]
    stream_widths: tuple[int, ...]
    recordings: tuple[Recording, ...]
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    source: str = ""
    extraction: Mapping[str, Any] | None = None

    @property
    def width(self) -> int:
        return sum(self.stream_widths)

    @property
    def subsets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.subset for r in self.recordings))

    def __len__(self) -> int:
        return len(self.recordings)

    def subset(self, *names: str) -> Dataset:
        """The recordings of one subset, or of several. Raises InputError for an unknown or empty subset."""
        chosen = choose(names, self.subsets, f"dataset '{self.name}'")
        return replace(
            self,
            recordings=tuple(r for r in self.recordings if r.subset in chosen),
            left_out=tuple(r for r in self.left_out if r.subset in chosen),
        )

    def features(self, index: int) -> np.ndarray:
        """Checked features of one recording, (T, width) float32."""
        return self.recordings[index].features(self.width)

    def label_matrix(self, *, allow_unlabelled: bool = False) -> np.ndarray:
        """Multi-hot recording-level labels, (B, C) float32.

        Args:
            allow_unlabelled: A recording without a label is background alone: a row of zeros.

        Raises:
            InputError: an unlabelled recording, unless they are allowed; an unknown class.
        """
        column = {c: i for i, c in enumerate(self.classes)}
        y = np.zeros((len(self), len(self.classes)), np.float32)
        unlabelled = [r for r in self.recordings if not r.labels]
        if unlabelled and not allow_unlabelled:
            r = unlabelled[0]
            raise InputError(
                f"{r.source}: recording '{r.name}' has no label ({len(unlabelled)} of the {len(self)} have none: "
                f"{listed([u.name for u in unlabelled])}); label them, leave them out, or, where they are background "
                "alone, train with --set loss.skip_unlabelled=true"
            )
        for row, r in zip(y, self.recordings, strict=True):
            for label in r.labels:
                if label not in column:
                    raise InputError(
                        f"{r.source}: recording '{r.name}' is labelled '{label}', which is not one of the classes "
                        f"of '{self.name}': {', '.join(self.classes)}"
                    )
                row[column[label]] = 1
        return y

    def fingerprint(self) -> str:
        """A hash of everything that is known of the recordings, with those left out."""
        said = [
            (r.name, r.subset, r.labels, r.segments, r.ambiguous, r.withdrawn, r.snippets, r.seconds_per_snippet)
            for r in self.recordings
        ]
        left_out = [(x.name, x.entry) for x in self.left_out]
        return hashlib.sha256(repr((self.classes, said, left_out)).encode()).hexdigest()[:16]

    def annotations(self) -> Annotations:
        """Ground truth of all recordings, also of those left out, whose segments an evaluation must count as missed."""
        entries = [(r.name, r) for r in self.recordings] + [(r.name, r.entry) for r in self.left_out]
        return annotations_of(entries, self.classes)


def annotations_of(entries: Sequence[tuple[str, Recording | Entry]], classes: tuple[str, ...]) -> Annotations:
    """Segments and ambiguous segments of named recordings, in the order of the recordings and of their segments."""
    column = {c: i for i, c in enumerate(classes)}
    rows = [(v, column[label], start, end) for v, (_, r) in enumerate(entries) for start, end, label in r.segments]
    table = np.array(rows, np.float64).reshape(-1, 4)
    doubtful = [(v, start, end) for v, (_, r) in enumerate(entries) for start, end in r.ambiguous]
    return Annotations(
        videos=tuple(name for name, _ in entries),
        classes=classes,
        video=table[:, 0].astype(np.int64),
        label=table[:, 1].astype(np.int64),
        start=table[:, 2],
        end=table[:, 3],
        ambiguous=np.array(doubtful, np.float64).reshape(-1, 3),
        withdrawn=tuple(name for name, r in entries if r.withdrawn),
        rank=np.arange(len(table)),
    )
