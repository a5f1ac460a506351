"""One internal representation of every dataset layout: features + labels + annotations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from d2net.detections import Annotations
from d2net.errors import InputError


@dataclass(frozen=True)
class Recording:
    """One untrimmed recording.

    Attributes:
        name: Unique name (a video's id, for example).
        subset: The split it belongs to, as the dataset spells it (``train``, ``test`` …).
        labels: Names of the classes that occur in it; the only supervision of training.
        segments: (start s, end s, class name) rows; used by evaluation and pictures alone.
        seconds_per_snippet: Seconds from one snippet to the next (16 / 25 for I3D at 25 fps).
        source: Where the features come from, for messages (a path).
        read: Returns the features, (T, width) float32, memory-mapped where a file holds them.
        duration: Length in seconds, or None where the dataset does not say.
        first_snippet: Seconds at which snippet 0 begins: snippet t is for first_snippet + [t, t + 1) *
            seconds_per_snippet.
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

    def features(self, width: int) -> np.ndarray:
        """(T, width) float32 features, checked.

        Raises:
            InputError: wrong shape or width, no snippet, NaN or Inf.
        """
        x = self.read()
        if x.ndim != 2 or x.shape[1] != width:
            raise InputError(
                f"{self.source}: features of '{self.name}' have shape {tuple(x.shape)}, expected "
                f"(T, {width}); extract all recordings with the same network and streams"
            )
        if len(x) == 0:
            raise InputError(f"{self.source}: '{self.name}' has no snippet; extract its features again")
        x = np.asarray(x, dtype=np.float32)
        if not np.isfinite(x).all():
            t = int(np.nonzero(~np.isfinite(x).all(axis=1))[0][0])
            raise InputError(
                f"{self.source}: features of '{self.name}' hold NaN or Inf (first at snippet {t}); "
                "extract them again or leave the recording out"
            )
        return x


@dataclass(frozen=True)
class Dataset:
    """Recordings of one collection.

    Attributes:
        name: What it is called in results and pictures; contains "simulated" if it is.
        classes: Class names; labels are counted in this order.
        stream_widths: Widths of the two streams (RGB, flow); features are their concatenation.
        recordings: All recordings of all subsets.
    """

    name: str
    classes: tuple[str, ...]
    stream_widths: tuple[int, int]
    recordings: tuple[Recording, ...]

    @property
    def width(self) -> int:
        return sum(self.stream_widths)

    @property
    def subsets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.subset for r in self.recordings))

    def __len__(self) -> int:
        return len(self.recordings)

    def subset(self, name: str) -> Dataset:
        """The recordings of one split. Raises InputError when it holds none."""
        chosen = tuple(r for r in self.recordings if r.subset == name)
        if not chosen:
            raise InputError(
                f"dataset '{self.name}': subset '{name}' is empty; there are {', '.join(self.subsets) or 'none'}"
            )
        return replace(self, recordings=chosen)

    def features(self, index: int) -> np.ndarray:
        """Checked features of one recording, (T, width) float32."""
        return self.recordings[index].features(self.width)

    def label_matrix(self) -> np.ndarray:
        """Multi-hot recording-level labels, (B, C) float32. Raises InputError for an unlabelled
        recording or an unknown class."""
        column = {c: i for i, c in enumerate(self.classes)}
        y = np.zeros((len(self), len(self.classes)), np.float32)
        for row, r in zip(y, self.recordings, strict=True):
            if not r.labels:
                raise InputError(
                    f"{r.source}: recording '{r.name}' has no label; add one or leave it out of '{r.subset}'"
                )
            for label in r.labels:
                if label not in column:
                    raise InputError(
                        f"{r.source}: recording '{r.name}' is labelled '{label}', which is not one of the classes "
                        f"of '{self.name}': {', '.join(self.classes)}"
                    )
                row[column[label]] = 1
        return y

    def annotations(self) -> Annotations:
        """Ground-truth segments of all recordings here."""
        column = {c: i for i, c in enumerate(self.classes)}
        rows = [
            (v, column[label], start, end) for v, r in enumerate(self.recordings) for start, end, label in r.segments
        ]
        table = np.array(rows, np.float64).reshape(-1, 4)
        return Annotations(
            videos=tuple(r.name for r in self.recordings),
            classes=self.classes,
            video=table[:, 0].astype(np.int64),
            label=table[:, 1].astype(np.int64),
            start=table[:, 2],
            end=table[:, 3],
            ambiguous=np.zeros((0, 3)),
        )
