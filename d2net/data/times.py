"""The time of a snippet in seconds, from fps, stride, window and offset.

Snippet t is computed from the window of frames that begins at frame ``offset + stride * t``. It stands for the
stretch of ``stride`` frames around the middle of that window::

    frames   0       16      32      48      64      80        stride 16, window 32, offset 0
             |-------|-------|-------|-------|-------|
    window 0 [---------------]                                 middle: frame 16
    window 1         [---------------]                         middle: frame 32
    snippet          0       1       2
                 |-------|-------|-------|                     snippet 0: frames 8 to 24

So it runs from ``first + t * seconds_per_snippet`` to ``first + (t + 1) * seconds_per_snippet``, where
``seconds_per_snippet = stride / fps`` and ``first = (offset + (window - stride) / 2) / fps``, which is 0 where windows
follow each other without overlap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from d2net.errors import InputError
from d2net.reading import LONGEST, number

# What the field's files call each of them.
KEYS = {
    "fps": ("fps",),
    "stride": ("feat_stride", "stride", "snippet_stride", "feature_stride"),
    "window": ("window", "num_frames"),
    "offset": ("offset",),
    "middle": ("offset_frames",),
    "seconds_per_snippet": ("seconds_per_snippet",),
    "first_snippet": ("first_snippet",),
}
_MAY_BE_ZERO = ("middle",)
# The first window may begin before the recording, where it is padded; and a window may be shorter than the stride.
_MAY_BE_NEGATIVE = ("offset", "first_snippet")


class UnknownTime(InputError):
    """Stride or fps are not known; the user must give them."""


@dataclass(frozen=True)
class Times:
    """What is known of the time of a recording's snippets; None: not known.

    Attributes:
        fps: Frames a second.
        stride: Frames from one snippet to the next.
        window: Frames that a snippet is computed from; None: as many as the stride.
        offset: Frame at which the first window begins; None: 0.
        seconds_per_snippet: In place of stride / fps.
        middle: Frame in the middle of the first window, in place of offset + window / 2 (OpenTAD's ``offset_frames``).
        first_snippet: Second at which snippet 0 begins, in place of all that is derived from window and offset.
    """

    fps: float | None = None
    stride: float | None = None
    window: float | None = None
    offset: float | None = None
    seconds_per_snippet: float | None = None
    middle: float | None = None
    first_snippet: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            name = "offset_frames" if field.name == "middle" else field.name
            value = number(value, f'"{name}"')
            object.__setattr__(self, field.name, value)
            if field.name in _MAY_BE_NEGATIVE:
                continue
            if value < 0 or (value == 0 and field.name not in _MAY_BE_ZERO):
                least = "at least 0" if field.name in _MAY_BE_ZERO else "above 0"
                raise InputError(f"{name} is {value:g}; it must be a number {least}")

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> Times:
        """The values of a JSON object, under any of the names that they have in the field.

        Raises:
            InputError: a value that is no positive number, or two names of one thing with different values.
        """
        found: dict[str, float] = {}
        for name, keys in KEYS.items():
            there = {key: number(table[key], f'"{key}"') for key in keys if table.get(key) is not None}
            if len(set(there.values())) > 1:
                said = " and ".join(f'"{key}": {value:g}' for key, value in there.items())
                raise InputError(f"{said} are two names of the {name}; keep the one that is right")
            if there:
                found[name] = next(iter(there.values()))
        return cls(**found)

    @property
    def has_rate(self) -> bool:
        """Whether anything is known of the time from one snippet to the next."""
        return not (self.fps is None and self.stride is None and self.seconds_per_snippet is None)

    def over(self, other: Times) -> Times:
        """These values, and those of ``other`` where they are None."""
        stride, fps = self.stride or other.stride, self.fps or other.fps
        if self.seconds_per_snippet is not None:
            # Of the other's stride and fps one may stay: the fps, in which its window counts.
            if self.stride is not None:
                other = replace(other, fps=None)
            elif fps is not None:
                other = replace(other, stride=None)
        elif (self.stride or self.fps) and stride and fps:
            other = replace(other, seconds_per_snippet=None)
        if self != Times():  # the other's is of its own stride, fps and window
            other = replace(other, first_snippet=None)
        if any(x is not None for x in (self.window, self.offset, self.middle, self.first_snippet)):
            other = replace(other, middle=None)
        if self.middle is not None:
            other = replace(other, window=None, offset=None)
        values = {f.name: getattr(other if getattr(self, f.name) is None else self, f.name) for f in fields(self)}
        return Times(**values)

    def instead_of(self, said: Times) -> Times:
        """``said``, the values of the data, with these values in their place where they are not None."""
        if self.stride is not None or self.fps is not None:
            said = replace(said, seconds_per_snippet=None)
        return self.over(said)

    def resolve(self) -> tuple[float, float]:
        """Seconds per snippet, and the second at which snippet 0 begins.

        Raises:
            UnknownTime: something is not known; says how to give it.
            InputError: values that contradict each other, or of which no time can be computed.
        """
        seconds, first = self._resolved()
        if not (1 / LONGEST <= seconds <= LONGEST and abs(first) <= LONGEST):
            raise InputError(
                f"a snippet would be {seconds:g} s and the first begin at {first:g} s; mend stride and fps"
            )
        return seconds, first

    def _resolved(self) -> tuple[float, float]:
        seconds, stride, fps = self.seconds_per_snippet, self.stride, self.fps
        if seconds is None:
            missing = [name for name, value in (("stride", stride), ("fps", fps)) if value is None]
            if missing:
                names = " and ".join(missing)
                options = " ".join(f"--{name} N" for name in missing)
                raise UnknownTime(
                    f"the {names} of the features {'are' if len(missing) > 1 else 'is'} not known, and so no second of "
                    f"a detection; give {options} (or --seconds-per-snippet S), or add "
                    + " and ".join(f'"{name}"' for name in missing)
                    + " to the JSON"
                )
            assert stride is not None and fps is not None
            seconds = stride / fps
        elif stride is not None and fps is not None and not math.isclose(seconds, stride / fps, rel_tol=1e-3):
            raise InputError(
                f"{seconds:g} seconds per snippet contradict a stride of {stride:g} frames at {fps:g} fps "
                f"({stride / fps:g} s); leave one of the three out"
            )
        if self.first_snippet is not None:
            return seconds, self.first_snippet
        if self.window is None and self.offset is None and self.middle is None:
            return seconds, 0.0
        if fps is None:
            fps = None if stride is None else stride / seconds
        if fps is None:
            raise UnknownTime(
                "window and offset count frames, and the fps is not known; give --fps N and --stride N, or leave them "
                "out"
            )
        window = self.window if self.window is not None else seconds * fps
        middle = (self.offset or 0.0) + window / 2
        if self.middle is not None:
            if (self.window is not None or self.offset is not None) and not math.isclose(self.middle, middle):
                raise InputError(
                    f'"offset_frames" {self.middle:g} is the middle of the first window (as in OpenTAD), but a window '
                    f"of {window:g} frames from frame {self.offset or 0:g} on has its middle at {middle:g}; keep the "
                    "one that is right"
                )
            middle = self.middle
        return seconds, middle / fps - seconds / 2
