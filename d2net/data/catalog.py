"""What a dataset says it holds, before any of its features is looked at; and opening the part that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from d2net.data.containers import FeatureArray
from d2net.data.dataset import Dataset, LeftOut, Recording, annotations_of
from d2net.data.labels import check_labels
from d2net.data.locate import MissingFeatures
from d2net.data.timeline import Entry, choose
from d2net.data.times import Times
from d2net.detections import Annotations
from d2net.errors import InputError

TRAINING = ("train", "training", "validation")  # THUMOS14 trains on its "validation"
TEST = ("test", "testing", "validation", "val")  # ActivityNet tests on its "validation": "testing" has no annotations
_FEW = 4  # snippets that a length may be off its duration, and 1 % of it: a window cut at the end, 29.97 for 30 fps


@dataclass(frozen=True)
class Listing:
    """A recording as a dataset names it.

    Attributes:
        entry: What the annotations say of it.
        open: Finds its features, without reading them all: one array, or that of RGB and that of flow.
        why_not: Why it is to be left out although it may have features; empty where it is not.
    """

    name: str
    entry: Entry
    open: Callable[[], tuple[FeatureArray, ...]]
    why_not: str = ""

    @property
    def subset(self) -> str:
        return self.entry.subset

    def arrays(self) -> tuple[FeatureArray, ...]:
        """Its features, not read yet: one array, or that of RGB and that of flow.

        Raises:
            MissingFeatures: there are none that can be used.
            InputError: a file that cannot be used.
        """
        if self.why_not:
            raise MissingFeatures(self.why_not)
        arrays = self.open()
        if all(a.zero for a in arrays):
            what = "every feature is 0, as of a dead video" if arrays[0].snippets else "has no snippet"
            raise MissingFeatures(f"{arrays[0].source}: {what}; extract it again or take the recording out")
        return arrays


@dataclass(frozen=True)
class Catalog:
    """All recordings that a dataset names.

    Attributes:
        name: Of the dataset.
        source: Its folder or file, for messages.
        classes: Class names; labels are counted in this order.
        listings: All recordings of all subsets.
        times: What the layout says of time where the data does not (16 frames at 25 fps, for example).
        streams: Widths of the streams, where the data says them.
        divide: Widths of the streams of features that lie in one array, by its width and source; None: an array is a
            stream.
        notes: What was taken for granted, in sentences.
        made: Whether d2net made it, and so knows all about it.
        unused: Feature files that no recording has, found when it is called.
    """

    name: str
    source: Path | str
    classes: tuple[str, ...]
    listings: tuple[Listing, ...]
    times: Times = field(default_factory=Times)
    streams: tuple[int, ...] | None = None
    divide: Callable[[int, str], tuple[int, ...]] | None = None
    notes: tuple[str, ...] = ()
    made: bool = False
    unused: Callable[[], list[Path]] = list

    @classmethod
    def of(cls, dataset: Dataset) -> Catalog:
        """The catalog of a dataset that is open already."""
        return cls(
            name=dataset.name,
            source=dataset.name,
            classes=dataset.classes,
            listings=tuple(_listing(r, dataset.width) for r in dataset.recordings),
            streams=dataset.stream_widths,
            divide=lambda width, source: dataset.stream_widths,
            made=True,
        )

    @property
    def subsets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.subset for r in self.listings))

    @property
    def annotated_subsets(self) -> set[str]:
        return {r.subset for r in self.listings if r.entry.segments}

    def annotations(self, subsets: Sequence[str] | None = None) -> Annotations:
        """Ground truth of the subsets (None: all). Needs no features.

        Raises:
            InputError: a subset that is not there, labels that are nearly the same.
        """
        check_labels(self)
        chosen = choose(subsets, self.subsets, self.source)
        return annotations_of([(r.name, r.entry) for r in self.listings if r.subset in chosen], self.classes)

    def open(
        self,
        subsets: Sequence[str] | None = None,
        *,
        times: Times | None = None,
        streams: tuple[int, ...] | None = None,
        like: tuple[int, ...] | None = None,
        strict: bool = False,
        check_durations: bool = True,
    ) -> Dataset:
        """The recordings of the subsets (None: all), found, measured and checked; their values are not read.

        Recordings without features, whose features are all 0, or without any snippet are left out.

        Args:
            subsets: Only these must exist.
            times: What is known better than the data says.
            streams: Widths of the streams of features that lie in one array.
            like: The widths that a model was trained on: those of features in one array where nothing says otherwise.
            strict: A recording that would be left out is an error.
            check_durations: A recording's length must fit its duration.

        Raises:
            InputError: a subset that is not there or has no usable recording; a file that cannot be used; widths that
                differ; time that is not known or does not fit; labels that are nearly the same.
        """
        check_labels(self)
        if self.made and (times or Times()) != Times():
            raise InputError(f"{self.source}: knows when its snippets are; leave --fps, --stride and the like out")
        chosen = choose(subsets, self.subsets, self.source)
        recordings: list[Recording] = []
        left_out: list[LeftOut] = []
        widths: tuple[int, ...] | None = None
        crops, joint = 0, False
        for each in (r for r in self.listings if r.subset in chosen):
            try:
                arrays = each.arrays()
            except MissingFeatures as error:
                if strict:
                    raise InputError(f"{error} (--strict)") from None
                left_out.append(LeftOut(each.name, str(error), each.entry))
                continue
            widths = self.widths(arrays, widths, streams, like)
            crops += arrays[0].crops > 1
            joint = len(arrays) == 1 and self.divide is not None
            recordings.append(self.recording(each, arrays, times))
        for subset in chosen:
            if not any(r.subset == subset for r in recordings):
                reasons = [r for r in left_out if r.subset == subset]
                raise InputError(
                    f"{self.source}: none of the {len(reasons)} recordings of subset '{subset}' has usable features; "
                    f"the first: {reasons[0].why}"
                )
        if check_durations and (wrong := duration_problems(recordings)):
            more = f" ({len(wrong)} of {len(recordings)} recordings are off)" if len(wrong) > 1 else ""
            raise InputError(f"{wrong[0]}{more}; or, where the durations are wrong, --ignore-durations")
        assert widths is not None  # every subset chosen has a recording
        notes = list(self.notes)
        if joint and not (streams or self.streams):
            what = f"two streams, {widths[0]} + {widths[1]}" if len(widths) > 1 else f"one stream of {widths[0]}"
            notes.append(f"features of {sum(widths)} columns are taken as {what}; --streams says otherwise")
        if crops:
            notes.append(f"the features of {crops} recordings are the mean over their crops")
        return Dataset(self.name, self.classes, widths, tuple(recordings), tuple(left_out), tuple(notes))

    def widths(
        self,
        arrays: tuple[FeatureArray, ...],
        others: tuple[int, ...] | None,
        streams: tuple[int, ...] | None,
        like: tuple[int, ...] | None = None,
    ) -> tuple[int, ...]:
        """Widths of a recording's streams, after checking them against the earlier recordings'."""
        own = tuple(a.width for a in arrays)
        total = sum(own)
        if others is not None and total != sum(others):
            raise InputError(
                f"{arrays[0].source}: has shape {(arrays[0].snippets, total)}, expected (T, {sum(others)}) as the "
                "recordings before it have; extract all with the same network, or save the transpose of arrays whose "
                "axes are swapped"
            )
        streams = streams or self.streams
        if streams is not None and (sum(streams) != total or (len(own) > 1 and streams != own)):
            raise InputError(
                f"{arrays[0].source}: is {' + '.join(map(str, own))} wide, not {' + '.join(map(str, streams))} as "
                '--streams (or the JSON\'s "streams") says; give the widths of this data, or none'
            )
        if len(own) == 1 and self.divide is not None:  # one array of all streams
            fits = like is not None and sum(like) == total
            own = streams or others or (like if fits and like else self.divide(total, arrays[0].source))
        if others is not None and own != others:
            raise InputError(
                f"{arrays[0].source}: has streams of {' and '.join(map(str, own))} columns, the other recordings of "
                f"{' and '.join(map(str, others))}; extract all with the same network"
            )
        return own

    def recording(self, listing: Listing, arrays: tuple[FeatureArray, ...], times: Times | None = None) -> Recording:
        """A recording and its features, with its time.

        Raises:
            UnknownTime: stride or fps are not known.
            InputError: streams of different lengths; values of time that contradict each other.
        """
        times = (times or Times()).over(listing.entry.times).over(self.times)
        entry = listing.entry
        snippets = min(a.snippets for a in arrays)
        # Optical flow needs a next frame, so some extractors give one snippet fewer; more means a mix-up.
        if max(a.snippets for a in arrays) - snippets > 1:
            a, b = arrays
            raise InputError(
                f"{b.source}: has {b.snippets} snippets but {Path(a.source).parent.name}/{Path(a.source).name} has "
                f"{a.snippets}; extract both streams with the same stride"
            )
        if entry.covered is not None and times.stride is None and times.seconds_per_snippet is None:
            times = replace(times, seconds_per_snippet=entry.covered / snippets)
        try:
            seconds, first = times.resolve()
        except InputError as error:
            raise type(error)(f"{arrays[0].source}: '{listing.name}': {error}") from None
        return Recording(
            name=listing.name,
            subset=entry.subset,
            labels=entry.labels,
            segments=entry.segments,
            seconds_per_snippet=seconds,
            source=arrays[0].source,
            read=arrays[0].read if len(arrays) == 1 else partial(_joined, arrays, snippets),
            duration=entry.duration,
            first_snippet=first,
            snippets=snippets,
            ambiguous=entry.ambiguous,
            withdrawn=entry.withdrawn,
        )


def train_and_test(subsets: Sequence[str], annotated: Sequence[str] | set[str] = ()) -> tuple[str | None, str | None]:
    """Which subset a collection trains on and which it tests on, None where there is none.

    THUMOS14 trains on ``validation`` and tests on ``test``; ActivityNet trains on ``training`` and tests on
    ``validation``, since its ``testing`` has no annotations. A collection with one subset alone tests on that.

    Args:
        annotated: Those that have segments; one of them is tested on, where there is one.
    """
    lower = {s.lower(): s for s in subsets}
    train = next((lower[s] for s in TRAINING if s in lower), None)
    tests = [lower[s] for s in TEST if s in lower and lower[s] != train]
    test = next((s for s in tests if s in annotated), tests[0] if tests else None)
    if test is None and len(lower) == 1 and train is None:
        test = next(iter(subsets))
    return train, test


def duration_problems(recordings: Sequence[Recording]) -> list[str]:
    """A sentence for every recording whose number of snippets does not fit its duration, the worst first."""
    found: list[tuple[float, str]] = []
    for r in recordings:
        if r.duration is None or r.snippets is None:
            continue
        seconds = r.seconds_per_snippet
        most = r.duration / seconds
        least = most - 2 * max(r.first_snippet, 0) / seconds  # the last whole window ends with the recording
        off = max(least - r.snippets, r.snippets - most)
        if off > _FEW + 0.01 * r.snippets:
            fit = r.duration / r.snippets
            found.append(
                (
                    max(most / r.snippets, r.snippets / most),
                    f"{r.source}: '{r.name}' has {r.snippets} snippets of {seconds:.4g} s, "
                    f"{r.snippets * seconds:.5g} s in all, but lasts {r.duration:.5g} s by its annotations: "
                    f"{_cause(r, most)}, {fit:.4g} s per snippet would fit",
                )
            )
    return [text for _, text in sorted(found, key=lambda each: -each[0])]


def _cause(recording: Recording, expected: float) -> str:
    assert recording.snippets is not None
    ratio = expected / recording.snippets
    if 900 < ratio < 1100:
        return "the duration may be in milliseconds"
    width = recording.read().shape[1]
    if abs(width - expected) <= _FEW + 0.01 * expected:
        return "the array's axes may be swapped (save its transpose)"
    return "stride or fps are probably not those of these features (--stride, --fps)"


def _listing(r: Recording, width: int) -> Listing:
    times = Times(seconds_per_snippet=r.seconds_per_snippet, first_snippet=r.first_snippet)
    entry = Entry(r.subset, r.labels, r.segments, r.ambiguous, r.duration, times, withdrawn=r.withdrawn)
    return Listing(r.name, entry, lambda: (FeatureArray(r.source, r.snippets or len(r.read()), width, r.read),))


def _joined(arrays: tuple[FeatureArray, ...], snippets: int) -> np.ndarray:
    """(T, sum of the widths) float32."""
    parts = [a.read()[:snippets] for a in arrays]
    return np.concatenate(parts, axis=1, dtype=np.float32, casting="unsafe")
