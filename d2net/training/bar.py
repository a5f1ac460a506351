"""How far a training is, and its loss, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class TrainingBar:
    """Shows progress: a bar on a terminal, elsewhere a line after every tenth of the run.

    Args:
        start: Iterations done before.
        total: All iterations.
        instead: Called with (iterations done, all iterations); nothing is shown then.
        shown: The terms of the loss to show, and the names to show them with.
    """

    def __init__(
        self, start: int, total: int, instead: Callable[[int, int], None] | None, shown: Mapping[str, str]
    ) -> None:
        self.start, self.total, self.instead, self.shown = start, total, instead, shown
        self.begun = time.monotonic()
        self.reported = 10 * start // total
        self.progress: Progress | None = None
        self.task: TaskID | None = None

    def __enter__(self) -> TrainingBar:
        if self.instead is None and sys.stderr.isatty():
            self.progress = Progress(
                BarColumn(bar_width=10),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                refresh_per_second=4,  # each draws for milliseconds, in which no step is launched
            )
            self.task = self.progress.add_task("", total=self.total, completed=self.start)
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def tell(self, text: str) -> None:
        """Print a line that stays above the bar."""
        if self.instead is not None:
            return
        if self.progress is not None:
            self.progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr)

    def update(self, iteration: int, terms: Mapping[str, float]) -> None:
        """Show the iterations done, the speed, and the loss with the terms in ``shown``."""
        if self.instead is not None:
            self.instead(iteration, self.total)
            return
        speed = (iteration - self.start) / max(time.monotonic() - self.begun, 1e-9)
        text = " ".join(f"{name} {terms[k]:.2f}" for k, name in self.shown.items()) + f" {speed:.1f} it/s"
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=iteration, description=text)
        elif 10 * iteration // self.total > self.reported:
            self.reported = 10 * iteration // self.total
            left = (self.total - iteration) / speed
            print(f"iteration {iteration}/{self.total}: {text}, {left:.0f} s left", file=sys.stderr)
