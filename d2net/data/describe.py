"""Describes a dataset, and what in it looks wrong (``d2net inspect``)."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from d2net.data.catalog import Catalog, Listing, train_and_test
from d2net.data.dataset import Dataset, LeftOut, Recording
from d2net.data.ends import end_of
from d2net.data.labels import label_problems
from d2net.data.opening import Opening, duration_problems
from d2net.data.times import Times, UnknownTime
from d2net.errors import InputError
from d2net.words import counted, listed

_SHOWN = 25  # classes in a line
_PROBLEMS = 5  # sentences of one kind
_SLACK = 1.0  # seconds that a segment may end after its recording: annotations are not that exact


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found.

    Attributes:
        dataset: The recordings that can be used; None where there are none.
        problems: What is wrong or looks so, a sentence each.
    """

    dataset: Dataset | None
    problems: list[str] = field(default_factory=list)


def describe(dataset: Dataset) -> list[str]:
    """A dataset in a few lines: subsets, lengths, classes with counts, features, the time of a snippet."""
    lines = [f"dataset {dataset.name}: {len(dataset)} recordings, {_streams(dataset)}"]
    for name in dataset.subsets:
        part = dataset.subset(name)
        lines.append(f"  {name}: {len(part)} recordings, {_lengths(part.recordings)}; {_labelled(part.recordings)}")
    lines.append(f"  {_time(dataset.recordings)}")
    for name in dataset.subsets:
        lines.append(f"  {len(dataset.classes)} classes and their recordings in {name}: {_classes(dataset, name)}")
    return lines


def inspect(
    catalog: Catalog,
    *,
    times: Times | None = None,
    streams: tuple[int, ...] | None = None,
    check_durations: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Reads a whole dataset and looks for what is missing, contradictory or unusual.

    Args:
        catalog: From :func:`d2net.data.find_dataset`.
        times: As for :meth:`Catalog.open`.
        streams: As there.
        check_durations: As there.
        progress: Called as ``progress(done, total)`` after every recording.

    Raises:
        InputError: times or streams for a dataset that d2net made.
    """
    opening = Opening(catalog, times or Times(), streams)
    problems = label_problems(catalog) + list(catalog.remarks)
    recordings: list[Recording] = []
    left_out: list[LeftOut] = []
    timeless: list[str] = []
    why = ""
    # One recording at a time, so that one that cannot be used does not hide the others.
    for done, listing in enumerate(_usual_widths_first(catalog.listings), start=1):
        try:
            recordings.append(opening.recording(listing))
        except UnknownTime as error:
            timeless.append(listing.name)
            why = str(error)
        except InputError as error:
            left_out.append(LeftOut(listing.name, str(error), listing.entry))
        if progress:
            progress(done, len(catalog.listings))
    if timeless:
        problems.append(f"{len(timeless)} of {len(catalog.listings)} recordings have no known time; {why}")
    if left_out:
        problems.append(f"{len(left_out)} of {len(catalog.listings)} recordings cannot be used:")
        problems += [f"  {r.name} ({r.subset}): {r.why}" for r in left_out]
    with suppress(InputError):  # no folder of features, which is reported for every recording already
        if unused := catalog.unused():
            problems.append(f"{len(unused)} feature files belong to no recording: {listed([p.name for p in unused])}")
    if not recordings or opening.widths is None:
        return Inspection(None, problems)
    wrong = duration_problems(recordings, opening.widths)
    if check_durations:
        problems += _few(list(dict.fromkeys(wrong.values())), "recordings whose length does not fit their duration")
    else:
        recordings = [replace(r, duration=None) if r.name in wrong else r for r in recordings]
    problems += _features(recordings, opening.widths)
    problems += _few(catalog.check({r.name: end_of(r) for r in recordings}), "segments past the end")
    problems += _annotations(catalog, recordings)
    order = {listing.name: i for i, listing in enumerate(catalog.listings)}
    recordings.sort(key=lambda r: order[r.name])
    notes = tuple(note for note in opening.notes() if note not in catalog.remarks)
    dataset = Dataset(catalog.name, catalog.classes, opening.widths, tuple(recordings), tuple(left_out), notes)
    return Inspection(dataset, problems)


def _usual_widths_first(listings: Sequence[Listing]) -> list[Listing]:
    """The stream widths that most recordings have: the others are then reported, and not these."""
    widths: dict[str, int] = {}
    for listing in listings:
        with suppress(InputError):  # reported when it is opened
            widths[listing.name] = sum(a.width for a in listing.arrays())
    count = Counter(widths.values())
    return sorted(listings, key=lambda x: -count[widths.get(x.name, 0)])


def _features(recordings: Sequence[Recording], widths: tuple[int, ...]) -> list[str]:
    """Problems with features: NaN, constant ones, a stream of zeros, the same ones under two names."""
    width = sum(widths)
    problems = []
    seen: dict[bytes, list[str]] = {}
    constant: list[str] = []
    dead: list[str] = []
    for r in recordings:
        try:
            x = r.features(width)
        except InputError as error:
            problems.append(str(error))
            continue
        if len(x) > 1 and (x == x[0]).all():
            constant.append(r.name)
        if len(widths) > 1 and not (x[:, : widths[0]].any() and x[:, widths[0] :].any()):
            dead.append(r.name)
        seen.setdefault(hashlib.sha256(x.tobytes()).digest(), []).append(r.name)
    if constant:
        problems.append(f"{len(constant)} recordings have the same features in every snippet: {listed(constant)}")
    if dead:
        problems.append(f"one of the two streams of {len(dead)} recordings is 0 throughout: {listed(dead)}")
    twins = [names for names in seen.values() if len(names) > 1]
    if twins:
        more = f", and {len(twins) - 1} more such groups" if len(twins) > 1 else ""
        problems.append(f"recordings with the very same features: {listed(twins[0])}{more}")
    return problems


def _annotations(catalog: Catalog, recordings: Sequence[Recording]) -> list[str]:
    """Problems with annotations: classes in one subset only, missing labels, segments outside their recordings."""
    problems = []
    train, test = train_and_test(catalog.subsets, catalog.annotated_subsets)
    classes = {
        subset: {label for r in recordings if r.subset == subset for label in r.labels} for subset in catalog.subsets
    }
    if train and test and classes[test]:
        for here, there in ((train, test), (test, train)):
            if alone := sorted(classes[here] - classes[there]):
                problems.append(f"{len(alone)} classes occur in {here} and not in {there}: {listed(alone)}")
    if nowhere := [c for c in catalog.classes if not any(c in found for found in classes.values())]:
        problems.append(f"{len(nowhere)} classes are listed and occur in no recording: {listed(nowhere)}")
    if unlabelled := [r.name for r in recordings if r.subset == train and not r.labels]:
        problems.append(
            f"{len(unlabelled)} of the recordings of {train} have no label: {listed(unlabelled)}; train with "
            "--set loss.skip_unlabelled=true where they are background alone"
        )
    problems += everywhere([r for r in recordings if r.subset == train])
    late, reached = [], []
    for r in recordings:
        # Without a duration the features say how long it is, to about a window.
        end = r.duration or r.first_snippet + (r.snippets or 0) * r.seconds_per_snippet + _SLACK
        late += [(r.name, last, end) for _, last, _ in r.segments if last > end + _SLACK]
        reached += [max(last for _, last, _ in r.segments) / end] if r.segments else []
    if late:
        name, last, end = max(late, key=lambda each: each[1] - each[2])
        problems.append(
            f"{counted(len(late), 'segment')} past the end of the recording: one of '{name}' ends at {last:g} s of "
            f"{end:.4g} s"
        )
    if reached and max(reached) < 0.02:
        seconds = max(r.seconds_per_snippet for r in recordings if r.segments)
        problems.append(
            f"all segments lie in the first {100 * max(reached):.2g} % of their recordings: a snippet is probably not "
            f"{seconds:g} s long (milliseconds taken for seconds?)"
        )
    return problems


def everywhere(recordings: Sequence[Recording]) -> list[str]:
    """A sentence where a class is a label of every recording: labels tell then nothing of when it occurs."""
    counts = Counter(label for r in recordings for label in set(r.labels))
    found = [label for label, n in counts.items() if n == len(recordings)]
    if len(recordings) < 2 or not found:
        return []
    return [
        f"every recording to train on has the label {listed(found)}, so nothing shows what it is like without; add "
        "recordings in which it does not occur"
    ]


def _classes(dataset: Dataset, subset: str) -> str:
    count = Counter(label for r in dataset.subset(subset).recordings for label in r.labels)
    text = ", ".join(f"{c} {count[c]}" for c in dataset.classes[:_SHOWN])
    if len(dataset.classes) <= _SHOWN:
        return text
    rarest = min(dataset.classes, key=lambda c: count[c])
    return f"{text} and {len(dataset.classes) - _SHOWN} more; the rarest: {rarest} {count[rarest]}"


def _few(problems: list[str], what: str) -> list[str]:
    """The first of many sentences of one kind, and how many more there are."""
    more = len(problems) - _PROBLEMS
    return problems[:_PROBLEMS] + ([f"and {more} more {what}"] if more > 0 else [])


def _streams(dataset: Dataset) -> str:
    widths = dataset.stream_widths
    return f"one stream of {widths[0]}" if len(widths) == 1 else f"two streams, {widths[0]} + {widths[1]}"


def _lengths(recordings: Sequence[Recording]) -> str:
    snippets = [r.snippets for r in recordings if r.snippets is not None]
    if not snippets:
        return "of unknown lengths"
    middle = statistics.median_low(snippets)
    return f"{min(snippets)} / {middle} / {max(snippets)} snippets (shortest / median / longest)"


def _labelled(recordings: Sequence[Recording]) -> str:
    segments = sum(len(r.segments) for r in recordings)
    text = f"{sum(bool(r.labels) for r in recordings)} labelled, {segments} segments"
    doubtful = sum(len(r.ambiguous) for r in recordings)
    return text + (f", {doubtful} marked as ambiguous" if doubtful else "")


def _time(recordings: Sequence[Recording]) -> str:
    seconds = sorted({r.seconds_per_snippet for r in recordings})
    first = sorted({r.first_snippet for r in recordings})
    text = f"a snippet is {_range(seconds)} s"
    if first != [0.0]:
        text += f", the first begins at {_range(first)} s"
    known = [r for r in recordings if r.duration is not None]
    return text + (f"; {sum(r.duration or 0 for r in known) / 60:.1f} minutes in all" if known else "")


def _range(values: Sequence[float]) -> str:
    low, high = f"{values[0]:.4g}", f"{values[-1]:.4g}"
    return low if low == high else f"{low} to {high}"
