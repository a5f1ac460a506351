"""A training step as a CUDA graph, which the host launches with one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from d2net.errors import D2NetError

# Text of PyTorch's warning. Other warnings speak of synchronization too: that the mode is a prototype, about streams.
WAITS = "called a synchronizing CUDA operation"
WARM_UP = 3  # steps before a capture, in which libraries allocate their workspaces and the optimizer its state


class StepGraph:
    """Runs a step eagerly a few times, then captures it and from then on replays it.

    Every call is one step; those of the warm-up train like the others. The step is captured once for each value of its
    flag. It must read its input from the tensor that it is given. A step that makes the host wait for the device cannot
    be captured: the warm-up detects that, and the step stays eager, with a warning.

    Args:
        step: ``step(rows, flag)`` returns a tensor, which the next replay overwrites.
        rows: an input on the device, with the shape and dtype of all later ones.
        generators: generators on the device that the step draws from, besides PyTorch's default one.
        required: whether a step that cannot be captured is an error.

    Attributes:
        captured: the flags whose step has been captured.
    """

    def __init__(
        self,
        step: Callable[[Tensor, bool], Tensor],
        rows: Tensor,
        generators: list[torch.Generator],
        *,
        required: bool = False,
    ) -> None:
        self.step = step
        self.rows = rows.clone()
        self.generators = generators
        self.required = required
        self._waits = False
        self._stream = torch.cuda.Stream(rows.device)  # the default stream cannot be captured
        self._pool = torch.cuda.graph_pool_handle()
        self._warm: dict[bool, int] = {}
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @property
    def captured(self) -> set[bool]:
        return set(self._graphs)

    def __call__(self, rows: Tensor, flag: bool) -> Tensor:
        """One step with ``rows``, on the device or in pinned memory. Does not wait for the device.

        Raises:
            D2NetError: the step cannot be captured although it waits for nothing, or although that is required.
        """
        self.rows.copy_(rows, non_blocking=True)
        if self._waits:
            return self.step(self.rows, flag)
        if flag not in self._graphs:
            if self._warm.setdefault(flag, 0) < WARM_UP:
                self._warm[flag] += 1
                return self._eager(flag, last=self._warm[flag] == WARM_UP)
            self._graphs[flag] = self._capture(flag)
        graph, result = self._graphs[flag]
        graph.replay()
        return result

    def _eager(self, flag: bool, last: bool) -> Tensor:
        """A step of the warm-up, on the stream of the capture. The last one detects whether the step waits."""
        current = torch.cuda.current_stream(self.rows.device)
        self._stream.wait_stream(current)
        mode = torch.cuda.get_sync_debug_mode()
        with torch.cuda.stream(self._stream), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                if last:
                    torch.cuda.set_sync_debug_mode("warn")
                result = self.step(self.rows, flag)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        current.wait_stream(self._stream)
        waits = [str(w.message) for w in caught if WAITS in str(w.message)]
        for other in caught:
            if WAITS not in str(other.message):
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        if last and waits:
            self._waits = True
            message = f"the training step waits for the device ({waits[0].splitlines()[0]}): it cannot be a CUDA graph"
            if self.required:
                raise D2NetError(f"{message}; train with --no-graph")
            warnings.warn(message, stacklevel=3)
        return result

    def _capture(self, flag: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                return graph, self.step(self.rows, flag)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise D2NetError(
                f"the training step cannot be captured in a CUDA graph ({reason}); train with --no-graph"
            ) from error
