"""When recordings end, and segments that end later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from d2net.words import NAME, escaped

if TYPE_CHECKING:
    from d2net.data.dataset import Recording
    from d2net.data.timeline import Entry
    from d2net.tables import Row

FEW = 4  # snippets that a length may be off its duration, and 1 % of it: a window cut at the end, 29.97 for 30 fps


class End(NamedTuple):
    """The second at which a recording ends, the seconds that a segment may end later, and how the end is known."""

    second: float
    slack: float
    how: str


def end_of(r: Recording) -> End:
    """By its duration, where it is known, or by its features."""
    if r.duration is not None:
        return End(r.duration, _slack(r.duration, r.seconds_per_snippet), "its duration")
    snippets = r.snippets or 0
    end = r.first_snippet + snippets * r.seconds_per_snippet
    return End(end, _slack(end, r.seconds_per_snippet), f"{snippets} snippets of {r.seconds_per_snippet:.4g} s")


def said_end(entry: Entry) -> End | None:
    """Of what annotations say alone; None where they do not say it."""
    return None if entry.duration is None else End(entry.duration, _slack(entry.duration, 1.0), "its duration")


def _slack(end: float, seconds_per_snippet: float) -> float:
    return max(1.0, FEW * seconds_per_snippet) + 0.01 * end


@dataclass(frozen=True)
class LastSegments:
    """The end of the last segment of each recording, by name, with its line."""

    last: Mapping[str, tuple[float, Row]]

    def problems(self, ends: Mapping[str, End]) -> list[str]:
        """A sentence for every recording whose last segment ends after it, the worst first."""
        late: list[tuple[float, str]] = []
        times = [(self.last[name][0], end) for name, end in ends.items() if name in self.last]
        cause = _cause([second / end.second for second, end in times])
        for name, end in ends.items():
            second, row = self.last.get(name, (0.0, None))
            if row is not None and second > end.second + end.slack:
                text = (
                    f"{row.where}: segment ends at {second:g} s, and recording '{escaped(name, NAME)}' at "
                    f"{end.second:.5g} s ({end.how}); {cause}"
                )
                late.append((second / end.second, text))
        return [text for _, text in sorted(late, key=lambda each: -each[0])]


def _cause(shares: Sequence[float]) -> str:
    """Why segments end after their recordings, by their last times as multiples of the recordings' lengths."""
    most = max(shares, default=0.0)
    if 120 < most <= 1050:  # more than any usual rate of frames
        return "times are probably in milliseconds: divide them by 1000"
    if 5 < most <= 120:
        return "times are probably in frames or milliseconds: write seconds"
    return "mend the line, or say when snippets are (--seconds-per-snippet, or --fps and --stride)"
