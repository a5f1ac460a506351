"""Which steps run eagerly, which are captured and which replayed, with a stand-in for CUDA: no GPU is needed."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from d2net.errors import D2NetError
from d2net.training import step_graph
from d2net.training.step_graph import WAITS, WARM_UP, StepGraph


class FakeCuda:
    """What StepGraph uses of ``torch.cuda``. ``ran`` lists what happened: eager steps, captures, replays."""

    def __init__(self) -> None:
        self.capturing = False
        self.mode = 0
        self.ran: list[str] = []
        self.pools: list[object] = []
        self.registered = 0
        fake = self

        class CUDAGraph:
            def register_generator_state(self, generator: torch.Generator) -> None:
                fake.registered += 1

            def capture_begin(self, pool: object) -> None:
                fake.capturing = True
                fake.pools.append(pool)

            def capture_end(self) -> None:
                fake.capturing = False

            def replay(self) -> None:
                assert not fake.capturing
                fake.ran.append("replay")

        self.CUDAGraph = CUDAGraph
        self.Stream = self.current_stream = lambda device: SimpleNamespace(wait_stream=lambda other: None)
        self.graph_pool_handle = object
        self.stream = lambda stream: nullcontext()
        self.get_sync_debug_mode = lambda: self.mode
        self.empty_cache = lambda: None

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.mode = mode

    def step(self, rows: Tensor, flag: bool) -> Tensor:
        self.ran.append("capture" if self.capturing else "checked" if self.mode == "warn" else "eager")
        return rows.clone() if self.capturing else rows + 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    names = vars(torch) | {"cuda": fake}
    monkeypatch.setattr(step_graph, "torch", SimpleNamespace(**names))
    return fake


def rows_of(size: int, value: int = 0) -> Tensor:
    return torch.full((size,), value)


def ran(cuda: FakeCuda, graph: StepGraph, size: int, flag: bool = True) -> list[str]:
    """What one call does."""
    before = len(cuda.ran)
    graph(rows_of(size), flag)
    return cuda.ran[before:]


def test_each_size_and_flag_is_checked_then_captured_then_replayed(cuda: FakeCuda) -> None:
    graph = StepGraph(cuda.step, torch.device("cpu"), [torch.Generator()])
    assert [ran(cuda, graph, 64) for _ in range(WARM_UP + 2)] == [
        *[["eager"]] * (WARM_UP - 1),
        ["checked"],
        ["capture", "replay"],
        ["replay"],
    ]
    assert [ran(cuda, graph, 128) for _ in range(3)] == [["checked"], ["capture", "replay"], ["replay"]]
    assert ran(cuda, graph, 64) == ["replay"]
    assert [ran(cuda, graph, 64, flag=False) for _ in range(WARM_UP + 1)][-2:] == [["checked"], ["capture", "replay"]]
    assert graph.captured == {(64, True), (128, True), (64, False)}
    assert len(set(cuda.pools)) == 1 and cuda.registered == 3


def test_sizes_that_alternate_in_the_warm_up_are_all_checked(cuda: FakeCuda) -> None:
    graph = StepGraph(cuda.step, torch.device("cpu"), [])
    for size in (64, 128, 64, 128, 192, 192, 64, 128):
        ran(cuda, graph, size)
    # Two eager steps, then 64, 128 and 192 are checked; the other calls capture and replay.
    assert cuda.ran == ["eager", "eager", *["checked"] * 3, *["capture", "replay"] * 3]


def test_a_replay_reads_what_it_is_given_and_returns_its_own_result(cuda: FakeCuda) -> None:
    given = []
    graph = StepGraph(lambda rows, flag: given.append(rows) or cuda.step(rows, flag), torch.device("cpu"), [])
    for size in (64, 128):
        for _ in range(WARM_UP + 1):
            result = graph(rows_of(size, 1), True)
        static = given[-1]
        assert len(static) == size and result.tolist() == [1] * size
        assert graph(rows_of(size, 7), True) is result and static.tolist() == [7] * size
    assert graph(rows_of(64, 3), True).shape == (64,)  # that of its size, not of the last one


@pytest.mark.parametrize("required", [False, True])
def test_a_step_that_waits_at_one_size_stays_eager(cuda: FakeCuda, required: bool) -> None:
    def step(rows: Tensor, flag: bool) -> Tensor:
        if len(rows) == 128 and cuda.mode == "warn":
            warnings.warn(f"here {WAITS}", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        return cuda.step(rows, flag)

    graph = StepGraph(step, torch.device("cpu"), [], required=required)
    with pytest.warns(UserWarning, match="something else") as caught:
        for _ in range(WARM_UP + 1):
            graph(rows_of(64), True)
        assert graph.captured == {(64, True)}
        if required:
            with pytest.raises(D2NetError, match="waits for the device .*; train with --no-graph"):
                graph(rows_of(128), True)
        else:
            graph(rows_of(128), True)
            assert [ran(cuda, graph, size) for size in (64, 128)] == [["eager"], ["eager"]]
    said = [str(w.message) for w in caught if "waits for the device" in str(w.message)]
    assert len(said) == (0 if required else 1)
    assert cuda.mode == 0  # the caller's again


def test_a_step_that_cannot_be_captured_is_an_error(cuda: FakeCuda) -> None:
    def step(rows: Tensor, flag: bool) -> Tensor:
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return cuda.step(rows, flag)

    graph = StepGraph(step, torch.device("cpu"), [])
    for _ in range(WARM_UP):
        graph(rows_of(64), True)
    with pytest.raises(
        D2NetError, match=r"\(operation not permitted when stream is capturing\); train with --no-graph"
    ):
        graph(rows_of(64), True)
    assert not cuda.capturing
