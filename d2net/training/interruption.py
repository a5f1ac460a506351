"""Turns Ctrl-C and SIGTERM into a request to stop after the current iteration."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Stop:
    """Within the block the first SIGINT or SIGTERM only sets ``requested``; a second one has its usual effect."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        except ValueError:  # not the main thread, which alone receives signals
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.__exit__()
