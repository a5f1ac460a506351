"""Opens recordings: finds their features, checks widths and lengths, and works out the time of a snippet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from d2net.data.containers import FeatureArray
from d2net.data.dataset import Recording
from d2net.data.ends import FEW
from d2net.data.timeline import Entry
from d2net.data.times import Times
from d2net.errors import InputError

if TYPE_CHECKING:
    from d2net.data.catalog import Catalog, Listing

_MANY = 8  # so many recordings whose lengths are off in the same direction are a problem, even if each is tolerated


class Opening:
    """Opens recordings of a catalog one after the other, checking each against those before it.

    Args:
        catalog: The dataset.
        times: As for :meth:`Catalog.open`.
        streams: As there.
        like: As there.

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
        self._divided = self._crops = self._conventional = self._replaced = 0

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
        # Optical flow needs a next frame, so some extractors give one snippet less. A larger difference is a mix-up.
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
            read=arrays[0].read if len(arrays) == 1 else partial(joined, arrays, snippets),
            duration=entry.duration,
            first_snippet=first,
            snippets=snippets,
            ambiguous=entry.ambiguous,
            withdrawn=entry.withdrawn,
        )

    def notes(self) -> list[str]:
        """What was assumed of the features or done to them so far, in sentences."""
        notes = [*self.catalog.remarks, *self.catalog.assumed]
        if self._conventional:
            usual, given = self.catalog.convention, self.times
            taken = [f"a stride of {usual.stride:g} frames"] if given.stride is None else []
            taken += [f"{usual.fps:g} fps"] if given.fps is None else []
            notes.append(
                f"{self._conventional} recordings, of which nothing says it, are taken to have {' and '.join(taken)}, "
                "as is usual in this layout; --stride, --fps say otherwise"
            )
        if self._replaced:
            notes.append(
                f"the data say when the first snippet of {self._replaced} recordings begins, in seconds: not used, "
                "since another time is given; give --window and --offset too, where windows overlap"
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
        """The times of a recording: as given, else as the data says, else the layout's convention."""
        said = entry.times
        if entry.covered is not None and said.stride is None and said.seconds_per_snippet is None:
            said = replace(said, seconds_per_snippet=entry.covered / snippets)
        if not said.has_rate:
            said = said.over(self.catalog.convention)
            given = self.times
            complete = given.seconds_per_snippet or (given.stride and given.fps)
            self._conventional += said.has_rate and not complete
        if entry.num_frames is not None:
            said = _with_num_frames(said, self.times.instead_of(said), entry, snippets)
        times = self.times.instead_of(said)
        self._replaced += said.first_snippet is not None and times.first_snippet is None
        return times

    def known(self, entry: Entry) -> Times:
        """The times that are given or known for a recording without features."""
        return self.times.instead_of(entry.times if entry.times.has_rate else entry.times.over(self.catalog.convention))


def _with_num_frames(said: Times, times: Times, entry: Entry, snippets: int) -> Times:
    """``said``, with what a video's ``num_frames`` says: in some files the window, in others the video's frames.

    Args:
        said: What the file says of the time.
        times: All that is known of the time without ``num_frames``.
        entry: The video.
        snippets: Of the video.

    Raises:
        InputError: it could be either, or can be neither.
    """
    frames, stride, rate = entry.num_frames, times.stride, None
    assert frames is not None
    if entry.duration is not None:
        rate = frames / entry.duration
    if stride is None and times.seconds_per_snippet is not None and times.fps is not None:
        stride = times.seconds_per_snippet * times.fps
    as_window = replace(said, window=frames, middle=None, first_snippet=None)
    if rate is not None and times.fps is not None and abs(rate / times.fps - 1) < 0.1:
        return said  # the frames of the video
    if stride is None:  # without fps a window cannot be used, and is asked about
        return said if rate is not None and 5 <= rate <= 130 else as_window
    if frames == stride:  # either way a window is a stride
        return as_window
    of_video = frames / (stride * snippets)  # about 1 where it counts those of the video; 1.2 at 25 of 30 fps
    if of_video < 0.25:
        return as_window
    if of_video <= 4 and frames > 4 * stride:
        return replace(said, fps=rate) if times.fps is None and times.seconds_per_snippet is None else said
    raise InputError(
        f'"num_frames" is {frames:g}, with {snippets} snippets of {stride:g} frames: call it "window" where it is the '
        'frames that a snippet is computed from, "frame" where it is those of the video'
    )


def duration_problems(recordings: Sequence[Recording], widths: tuple[int, ...]) -> dict[str, str]:
    """A sentence for every recording whose snippets do not fit its duration, by name, the worst first.

    Args:
        recordings: All recordings.
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
        if off > FEW + 0.01 * r.snippets:
            found.append((off / r.snippets, r.name, _does_not_fit(r, widths)))
    n = len(known)  # a part of a snippet may be left over in each
    if not found and n >= _MANY and not (least - n) / 1.1 <= snippets <= (most + n) * 1.1:
        # Each is within the tolerance, but all are off in the same direction.
        text = (
            f"{known[0].source} and the others: their {n} recordings have {snippets:g} snippets together, and by their "
            f"durations {least:.0f} to {most:.0f}: stride or fps are probably not those of these features (--stride, "
            "--fps)"
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
    far = not 0.5 < expected / r.snippets < 2
    if far and any(abs(width - expected) <= FEW + 0.01 * expected for width in (*widths, sum(widths))):
        return "the array's axes may be swapped (save its transpose)"
    if r.first_snippet > 2 * r.seconds_per_snippet:
        return "window or offset are probably not those of these features (--window, --offset)"
    return "stride or fps are probably not those of these features (--stride, --fps)"


def joined(arrays: tuple[FeatureArray, ...], snippets: int) -> np.ndarray:
    """(T, sum of the widths) float32."""
    parts = [a.read() for a in arrays]
    common = min(snippets, *map(len, parts))  # a file that was changed has fewer: Recording.features says so
    return np.concatenate([x[:common] for x in parts], axis=1, dtype=np.float32, casting="unsafe")
