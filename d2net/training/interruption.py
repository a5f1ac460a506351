"""Ctrl-C and SIGTERM as a request that is heard at the next good moment."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Stop:
    """Turns the first SIGINT or SIGTERM into a request; the second acts as it did before."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        except ValueError:  # not the main thread: signals go elsewhere
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.__exit__()
