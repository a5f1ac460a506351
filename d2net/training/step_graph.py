"""A training step as a CUDA graph, which the host launches with one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from d2net.errors import D2NetError

# Text of PyTorch's warning. Other warnings speak of synchronization too: that the mode is a prototype, about streams.
WAITS = "called a synchronizing CUDA operation"
WARM_UP = 3  # eager steps of each flag before its first capture, in which libraries and modules make what they keep
WARM_UP_TOGETHER = 11  # with DistributedDataParallel, as PyTorch's notes on CUDA graphs say


class StepGraph:
    """Runs a step eagerly when a size comes for the first time, captures it the second time, and then replays it.

    Every call is one step, whichever way it runs. The size is the number of elements of the step's input; the step is
    captured once for each size and each value of its flag. It must read its input from the tensor that it is given. A
    step that makes the host wait for the device cannot be captured: the eager steps detect that, and the step stays
    eager, with a warning.

    The graphs share one pool of memory: they never run at the same time, and what a step leaves in the pool is only its
    result, which must be read before the next call.

    Args:
        step: ``step(rows, flag)`` returns a tensor, which the next call may overwrite.
        device: where it runs.
        generators: generators on the device that the step draws from, besides PyTorch's default one.
        required: whether a step that cannot be captured is an error.
        warm_up: eager steps of each flag before its first capture.

    Attributes:
        captured: the sizes and flags whose step has been captured.
    """

    def __init__(
        self,
        step: Callable[[Tensor, bool], Tensor],
        device: torch.device,
        generators: list[torch.Generator],
        *,
        required: bool = False,
        warm_up: int = WARM_UP,
    ) -> None:
        self.step = step
        self.device = device
        self.generators = generators
        self.required = required
        self.warm_up = warm_up
        self._waits = False
        self._stream = torch.cuda.Stream(device)  # the default stream cannot be captured
        self._pool = torch.cuda.graph_pool_handle()
        self._inputs: dict[int, Tensor] = {}  # by size
        self._warm = {False: 0, True: 0}  # eager steps, by flag
        self._checked: set[tuple[int, bool]] = set()
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @property
    def captured(self) -> set[tuple[int, bool]]:
        return set(self._graphs)

    def __call__(self, rows: Tensor, flag: bool) -> Tensor:
        """One step with ``rows`` (size,), on the device or in pinned memory. Does not wait for the device.

        Raises:
            D2NetError: the step cannot be captured although it waits for nothing, or although that is required.
        """
        size = len(rows)
        if size not in self._inputs:
            self._inputs[size] = torch.empty(size, dtype=rows.dtype, device=self.device)
        given = self._inputs[size]
        given.copy_(rows, non_blocking=True)
        if self._waits:
            return self.step(given, flag)
        key = size, flag
        if key not in self._graphs:
            if key not in self._checked:
                self._warm[flag] += 1
                check = self._warm[flag] >= self.warm_up
                if check:
                    self._checked.add(key)
                return self._eager(given, flag, check)
            self._graphs[key] = self._capture(given, flag)
        graph, result = self._graphs[key]
        graph.replay()
        return result

    def _eager(self, rows: Tensor, flag: bool, check: bool) -> Tensor:
        """An eager step, on the stream of the captures. Where it is checked, it detects whether the step waits."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        mode = torch.cuda.get_sync_debug_mode()
        with torch.cuda.stream(self._stream), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                if check:
                    torch.cuda.set_sync_debug_mode("warn")
                result = self.step(rows, flag)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        current.wait_stream(self._stream)
        waits = [str(w.message) for w in caught if WAITS in str(w.message)]
        for other in caught:
            if WAITS not in str(other.message):
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        if check and waits:
            self._waits = True
            message = f"the training step waits for the device ({waits[0].splitlines()[0]}): it cannot be a CUDA graph"
            if self.required:
                raise D2NetError(f"{message}; train with --no-graph")
            warnings.warn(message, stacklevel=3)
        return result

    def _capture(self, rows: Tensor, flag: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        try:
            torch.cuda.empty_cache()  # of what the eager step used
            # Not torch.cuda.graph(), which would also collect garbage and the caches of pinned memory, for every size.
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool)
                try:
                    result = self.step(rows, flag)
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise D2NetError(
                f"the training step cannot be captured in a CUDA graph ({reason}); train with --no-graph"
            ) from error
        return graph, result
