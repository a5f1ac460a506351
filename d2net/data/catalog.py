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
from d2net.words import listed

TRAINING = ("train", "training", "validation")  # THUMOS14 trains on its "validation"
TEST = ("test", "testing", "validation", "val")  # ActivityNet tests on its "validation": "testing" has no annotations
_MANY = 8  # recordings whose lengths together say more than each alone
_FEW = 4  # snippets that a length may be off its duration, and 1 % of it: a window cut at the end, 29.97 for 30 fps


@dataclass(frozen=True)
class Listing:
    """A recording as a dataset names it.

    Attributes:
        entry: What the annotations say of it.
        open: Finds its features, without reading them all: one array, or that of RGB and that of flow.
        why_not: Why it is to be left out although it may have features; empty where it is not.
        known: Whether the annotations know it.
    """

    name: str
    entry: Entry
    open: Callable[[], tuple[FeatureArray, ...]]
    why_not: str = ""
    known: bool = True

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
        convention: Stride and fps that are usual in the layout, for recordings of which the data says neither.
        streams: Widths of the streams, where the data says them.
        divide: Widths of the streams of features that lie in one array, by its width and source; None: an array is a
            stream.
        remarks: What a reader should know of the annotations, in sentences.
        made: Whether d2net made it, and so knows all about it.
        unused: Feature files that no recording has, found when it is called.
    """

    name: str
    source: Path | str
    classes: tuple[str, ...]
    listings: tuple[Listing, ...]
    convention: Times = field(default_factory=Times)
    streams: tuple[int, ...] | None = None
    divide: Callable[[int, str], tuple[int, ...]] | None = None
    remarks: tuple[str, ...] = ()
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
        chosen = choose(subsets, self.subsets, self.source)
        opening = Opening(self, times or Times(), streams, like)
        recordings: list[Recording] = []
        left_out: list[LeftOut] = []
        for each in (r for r in self.listings if r.subset in chosen):
            try:
                recordings.append(opening.recording(each))
            except MissingFeatures as error:
                if strict:
                    raise InputError(f"{error} (--strict)") from None
                left_out.append(LeftOut(each.name, str(error), each.entry))
        for subset in chosen:
            if not any(r.subset == subset for r in recordings):
                reasons = [r for r in left_out if r.subset == subset]
                raise InputError(
                    f"{self.source}: none of the {len(reasons)} recordings of subset '{subset}' has usable features; "
                    f"the first: {reasons[0].why}"
                )
        assert opening.widths is not None  # every subset chosen has a recording
        notes = opening.notes()
        wrong = duration_problems(recordings, opening.widths)
        if wrong and check_durations:
            more = f" ({len(wrong)} of {len(recordings)} recordings are off)" if len(wrong) > 1 else ""
            raise InputError(f"{next(iter(wrong.values()))}{more}; --ignore-durations, where the durations are wrong")
        if wrong:
            notes.append(f"the durations of {len(wrong)} recordings do not fit and are ignored: {listed(wrong)}")
            recordings = [replace(r, duration=None) if r.name in wrong else r for r in recordings]
        return Dataset(
            self.name, self.classes, opening.widths, tuple(recordings), tuple(left_out), tuple(notes), str(self.source)
        )


class Opening:
    """Opens recordings of a catalog one after the other, checking each against those before it.

    Args:
        times, streams, like: As of :meth:`Catalog.open`.

    Attributes:
        widths: Of the streams of the recordings so far, None before the first.

    Raises:
        InputError: times or streams for a dataset that d2net made, which knows them.
    """

    def __init__(
        self, catalog: Catalog, times: Times, streams: tuple[int, ...] | None, like: tuple[int, ...] | None = None
    ) -> None:
        if catalog.made and (times != Times() or streams is not None):
            raise InputError(
                f"{catalog.source}: knows when its snippets are and what its streams; leave --fps, --stride, --streams "
                "and the like out"
            )
        self.catalog, self.times, self.like = catalog, times, like
        self.streams = streams or catalog.streams
        self.widths: tuple[int, ...] | None = None
        self._opened: dict[str, str] = {}  # name by source
        self._divided = self._crops = self._conventional = 0

    def recording(self, listing: Listing) -> Recording:
        """A recording: found, measured and checked.

        Raises:
            MissingFeatures: it has no features that can be used.
            UnknownTime: its stride or fps are not known.
            InputError: a file that cannot be used, or that is another recording's too; other widths than those before.
        """
        arrays = listing.arrays()
        source = arrays[0].source
        if source in self._opened and not self.catalog.made:
            raise InputError(
                f"{source}: are the features of '{self._opened[source]}' and of '{listing.name}'; give each its own"
            )
        snippets = min(a.snippets for a in arrays)
        # Optical flow needs a next frame, so some extractors give one snippet fewer; more means a mix-up.
        if max(a.snippets for a in arrays) - snippets > 1:
            a, b = arrays
            raise InputError(
                f"{b.source}: has {b.snippets} snippets but {Path(a.source).parent.name}/{Path(a.source).name} has "
                f"{a.snippets}; extract both streams with the same stride"
            )
        widths = self._widths(arrays)
        try:
            seconds, first = self._times(listing.entry, snippets).resolve()
        except InputError as error:
            raise type(error)(f"{source}: '{listing.name}': {error}") from None
        self.widths = widths
        self._opened[source] = listing.name
        self._crops += arrays[0].crops > 1
        entry = listing.entry
        return Recording(
            name=listing.name,
            subset=entry.subset,
            labels=entry.labels,
            segments=entry.segments,
            seconds_per_snippet=seconds,
            source=source,
            read=arrays[0].read if len(arrays) == 1 else partial(_joined, arrays, snippets),
            duration=entry.duration,
            first_snippet=first,
            snippets=snippets,
            ambiguous=entry.ambiguous,
            withdrawn=entry.withdrawn,
        )

    def notes(self) -> list[str]:
        """What was taken for granted or done to the features so far, in sentences."""
        notes = list(self.catalog.remarks)
        if self._conventional:
            usual = self.catalog.convention
            notes.append(
                f"a snippet of {self._conventional} recordings, of which nothing says it, is taken as {usual.stride:g} "
                f"frames at {usual.fps:g} fps, as is usual in this layout; --stride, --fps say otherwise"
            )
        if self._divided and self.widths is not None:
            two = len(self.widths) > 1
            what = f"two streams, {self.widths[0]} + {self.widths[1]}" if two else f"one stream of {self.widths[0]}"
            notes.append(f"features of {sum(self.widths)} columns are taken as {what}; --streams says otherwise")
        if self._crops:
            notes.append(f"the features of {self._crops} recordings are the mean over their crops")
        return notes

    def _widths(self, arrays: tuple[FeatureArray, ...]) -> tuple[int, ...]:
        """Widths of a recording's streams, after checking them against the earlier recordings'."""
        own = tuple(a.width for a in arrays)
        total, others, streams = sum(own), self.widths, self.streams
        if others is not None and total != sum(others):
            raise InputError(
                f"{arrays[0].source}: has shape {(arrays[0].snippets, total)}, expected (T, {sum(others)}) as the "
                "recordings before it have; extract all with the same network, or save the transpose of arrays whose "
                "axes are swapped"
            )
        if streams is not None and (sum(streams) != total or (len(own) > 1 and streams != own)):
            raise InputError(
                f"{arrays[0].source}: is {' + '.join(map(str, own))} wide, not {' + '.join(map(str, streams))} as "
                '--streams (or the JSON\'s "streams") says; give the widths of this data, or none'
            )
        if len(own) == 1 and self.catalog.divide is not None:  # one array of all streams
            self._divided += streams is None
            fits = self.like is not None and sum(self.like) == total
            own = streams or others or (self.like if fits else None) or self.catalog.divide(total, arrays[0].source)
        if others is not None and own != others:
            raise InputError(
                f"{arrays[0].source}: has streams of {' and '.join(map(str, own))} columns, the recordings before it "
                f"of {' and '.join(map(str, others))}; extract all with the same network"
            )
        return own

    def _times(self, entry: Entry, snippets: int) -> Times:
        """What is given, over what the data says, over what is usual where it says nothing."""
        said = entry.times
        if entry.covered is not None and said.stride is None and said.seconds_per_snippet is None:
            said = replace(said, fps=None, seconds_per_snippet=entry.covered / snippets)
        if not said.has_rate:
            said = said.over(self.catalog.convention)
            given = self.times
            complete = given.seconds_per_snippet or (given.stride and given.fps)
            self._conventional += said.has_rate and not complete
        times = self.times.instead_of(said)
        if entry.num_frames is not None and times.window is None and times.stride is not None:
            if _is_window(entry.num_frames, times.stride, snippets):
                times = replace(times, window=entry.num_frames)
        return times


def _is_window(num_frames: float, stride: float, snippets: int) -> bool:
    """Whether a video's ``num_frames`` counts the frames of a window, as in some files, and not its own, as in others.

    Raises:
        InputError: it could be either, or can be neither.
    """
    if num_frames == stride:  # either way a window is a stride
        return True
    video = num_frames / (stride * snippets)  # about 1 where it counts those of the video; 1.2 at 25 of 30 fps
    if video < 0.25:
        return True
    if video <= 4 and num_frames > 4 * stride:
        return False
    raise InputError(
        f'"num_frames" is {num_frames:g}, with {snippets} snippets of {stride:g} frames: call it "window" where it is '
        'the frames that a snippet is computed from, "frame" where it is those of the video'
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
    return train, next(iter(subsets)) if len(subsets) == 1 else test


def duration_problems(recordings: Sequence[Recording], widths: tuple[int, ...]) -> dict[str, str]:
    """A sentence for every recording whose snippets do not fit its duration, by name, the worst first.

    Args:
        widths: Of the streams.
    """
    found: list[tuple[float, str, str]] = []
    known = [r for r in recordings if r.duration is not None and r.snippets]
    snippets = least = most = 0.0
    for r in known:
        assert r.duration is not None and r.snippets is not None
        seconds, first = r.seconds_per_snippet, max(r.first_snippet, 0)
        high = (r.duration - first) / seconds
        low = high - first / seconds  # the last whole window ends with the recording
        snippets, least, most = snippets + r.snippets, least + low, most + r.duration / seconds
        off = max(low - r.snippets, r.snippets - high)
        if off > _FEW + 0.01 * r.snippets:
            found.append((off / r.snippets, r.name, _does_not_fit(r, widths)))
    if not found and len(known) >= _MANY and not least / 1.1 <= snippets <= most * 1.1:
        # Each is within the few snippets that are allowed, and all are off the same way.
        text = (
            f"{known[0].source} and the others: their {len(known)} recordings have {snippets:g} snippets together, and "
            f"by their durations {(least + most) / 2:.0f}: stride or fps are probably not those of these features "
            "(--stride, --fps)"
        )
        return dict.fromkeys((r.name for r in known), text)
    return {name: text for _, name, text in sorted(found, key=lambda each: -each[0])}


def _does_not_fit(r: Recording, widths: tuple[int, ...]) -> str:
    assert r.duration is not None and r.snippets is not None
    begins = f", the first from {r.first_snippet:.4g} s on" if r.first_snippet else ""
    return (
        f"{r.source}: '{r.name}' has {r.snippets} snippets of {r.seconds_per_snippet:.4g} s{begins}, "
        f"{r.snippets * r.seconds_per_snippet:.5g} s in all, but lasts {r.duration:.5g} s by its annotations: "
        f"{_cause(r, widths)}, {r.duration / r.snippets:.4g} s per snippet would fit"
    )


def _cause(r: Recording, widths: tuple[int, ...]) -> str:
    assert r.duration is not None and r.snippets is not None
    expected = r.duration / r.seconds_per_snippet
    if 900 < expected / r.snippets < 1100:
        return "the duration may be in milliseconds"
    if any(abs(width - expected) <= _FEW + 0.01 * expected for width in (*widths, sum(widths))):
        return "the array's axes may be swapped (save its transpose)"
    if r.first_snippet > 2 * r.seconds_per_snippet:
        return "window or offset are probably not those of these features (--window, --offset)"
    return "stride or fps are probably not those of these features (--stride, --fps)"


def _listing(r: Recording, width: int) -> Listing:
    times = Times(seconds_per_snippet=r.seconds_per_snippet, first_snippet=r.first_snippet)
    entry = Entry(r.subset, r.labels, r.segments, r.ambiguous, r.duration, times, withdrawn=r.withdrawn)
    return Listing(r.name, entry, lambda: (FeatureArray(r.source, r.snippets or len(r.read()), width, r.read),))


def _joined(arrays: tuple[FeatureArray, ...], snippets: int) -> np.ndarray:
    """(T, sum of the widths) float32."""
    parts = [a.read()[:snippets] for a in arrays]
    return np.concatenate(parts, axis=1, dtype=np.float32, casting="unsafe")
