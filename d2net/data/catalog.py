"""Lists the recordings that a dataset names, without reading features, and opens those that are wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from d2net.data.containers import FeatureArray
from d2net.data.dataset import Dataset, LeftOut, Recording, annotations_of
from d2net.data.ends import End, end_of, said_end
from d2net.data.labels import check_labels
from d2net.data.locate import MissingFeatures
from d2net.data.opening import Opening, duration_problems
from d2net.data.timeline import Entry, choose
from d2net.data.times import Times
from d2net.detections import Annotations
from d2net.errors import InputError
from d2net.words import listed

TRAINING = ("train", "training", "validation")  # THUMOS14 trains on its "validation"
UNLABELLED = "unlabelled"  # of recordings of which nobody says what occurs in them: never trained on by default
TEST = ("test", "testing", "validation", "val")  # ActivityNet tests on its "validation": "testing" has no annotations


@dataclass(frozen=True)
class Listing:
    """A recording as a dataset names it.

    Attributes:
        entry: What the annotations say of it.
        open: Finds its features, without reading them all: one array, or that of RGB and that of flow.
        why_not: Why it is left out although it may have features; "" if it is not.
        known: Whether the annotations list it.
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
        remarks: What in the annotations may be wrong or is not used, in sentences.
        assumed: What is taken for granted, in sentences.
        made: Whether d2net made it, and so knows all about it.
        unused: Feature files that no recording has, found when it is called.
        check: Of recordings by name, given their ends, says which segments end later, in sentences, the worst first.
        no_segments: What to say where an evaluation finds no segment.
        extraction: As of :class:`d2net.data.dataset.Dataset`.
    """

    name: str
    source: Path | str
    classes: tuple[str, ...]
    listings: tuple[Listing, ...]
    convention: Times = field(default_factory=Times)
    streams: tuple[int, ...] | None = None
    divide: Callable[[int, str], tuple[int, ...]] | None = None
    remarks: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    made: bool = False
    unused: Callable[[], list[Path]] = list
    check: Callable[[Mapping[str, End]], list[str]] = lambda ends: []
    no_segments: str = "the annotations hold no segment; choose a subset that has ground truth"
    extraction: Mapping[str, Any] | None = None

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
        entries = [(r.name, r.entry) for r in self.listings if r.subset in chosen]
        _refuse(self.check({name: end for name, entry in entries if (end := said_end(entry))}))
        return annotations_of(entries, self.classes)

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
        """Open the recordings of the subsets (None: all); checks shapes and times without reading the features.

        Recordings without features, whose features are all 0, or without any snippet are left out.

        Args:
            subsets: Only these must exist. Where all are opened, one of them may have no usable recording.
            times: Values that replace those in the data.
            streams: Widths of the streams of features that lie in one array.
            like: The stream widths of a model, by which features in one array are split where nothing else says how.
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
                left_out.append(LeftOut(each.name, str(error), replace(each.entry, times=opening.known(each.entry))))
        there = {r.subset for r in recordings}
        for subset in chosen:
            # If all subsets are opened, because none was asked for, one may be without features.
            if subset not in there and (subsets is not None or not there):
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
        _refuse(self.check({r.name: end_of(r) for r in recordings}))
        return Dataset(
            name=self.name,
            classes=self.classes,
            stream_widths=opening.widths,
            recordings=tuple(recordings),
            left_out=tuple(left_out),
            notes=tuple(notes),
            source=str(self.source),
            extraction=self.extraction,
        )


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        more = f" ({len(problems)} recordings have such)" if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{more}")


def train_and_test(subsets: Sequence[str], annotated: Sequence[str] | set[str] = ()) -> tuple[str | None, str | None]:
    """The subset to train on and the subset to test on; None where there is none.

    THUMOS14 trains on ``validation`` and tests on ``test``; ActivityNet trains on ``training`` and tests on
    ``validation``, since its ``testing`` has no annotations. A collection with one subset alone, but for recordings
    without a label, tests on that.

    Args:
        subsets: Names of all subsets.
        annotated: Names of those that have segments. If there are any, the subset to test on is one of them.
    """
    subsets = [s for s in subsets if s != UNLABELLED] or subsets
    lower = {s.lower(): s for s in subsets}
    train = next((lower[s] for s in TRAINING if s in lower), None)
    tests = [lower[s] for s in TEST if s in lower and lower[s] != train]
    test = next((s for s in tests if s in annotated), tests[0] if tests else None)
    return train, next(iter(subsets)) if len(subsets) == 1 else test


def _listing(r: Recording, width: int) -> Listing:
    times = Times(seconds_per_snippet=r.seconds_per_snippet, first_snippet=r.first_snippet)
    entry = Entry(r.subset, r.labels, r.segments, r.ambiguous, r.duration, times, withdrawn=r.withdrawn)
    return Listing(r.name, entry, lambda: (FeatureArray(r.source, r.snippets or len(r.read()), width, r.read),))
