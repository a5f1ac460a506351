"""How many threads are taken, and that the caller has as many afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from d2net.data.watch import load_watch
from d2net.errors import InputError
from d2net.localization import predict
from d2net.model import D2Net
from d2net.recipes import load_recipe
from d2net.threads import WORK_PER_THREAD, computing, multiply_adds, threads, threads_for


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("work", "number"),
    [(0, 1), (WORK_PER_THREAD, 1), (2 * WORK_PER_THREAD, 2), (3 * WORK_PER_THREAD + 1, 3), (10**15, 4)],
)
def test_the_work_decides_up_to_what_pytorch_would_take(work: int, number: int) -> None:
    assert threads_for(work) == number
    torch.set_num_threads(1)
    assert threads_for(work) == 1


def test_a_given_number_decides_whatever_the_work() -> None:
    with threads(3):
        assert torch.get_num_threads() == 3 and threads_for(0) == 3
        with threads(None):
            assert threads_for(0) == 3
        with threads(2):
            assert threads_for(0) == 2
        assert threads_for(0) == 3
    assert torch.get_num_threads() == 4 and threads_for(0) == 1


def test_an_error_gives_the_threads_back() -> None:
    for context in (threads(2), computing(2)):
        with pytest.raises(ZeroDivisionError), context:
            raise ZeroDivisionError
        assert torch.get_num_threads() == 4 and threads_for(0) == 1


@pytest.mark.parametrize("number", [0, -1, 1.5, "2", True])
def test_numbers_that_are_none(number: object) -> None:
    with pytest.raises(InputError, match="threads .--threads. is .*; it must be a whole number of at least 1"):
        with threads(number):  # type: ignore[arg-type]
            pass


def test_multiply_adds_are_those_of_the_convolutions() -> None:
    model = D2Net(20)
    weights = sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight"))
    assert weights == 2 * (2 * 1024 * 1024 * 3 + 1024 * 20 * 3)
    assert multiply_adds(model, 750) == pytest.approx(750 * weights, rel=1e-3)


def test_localization_of_a_small_network_takes_one_thread() -> None:
    model, seen = D2Net(3, (4, 4)), []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    features = np.zeros((20, 8), np.float32)
    predict(model, features)
    with threads(2):
        predict(model, features)
    assert seen == [1, 2] and torch.get_num_threads() == 4


def test_the_demo_takes_one_thread_and_the_papers_network_all() -> None:
    """One: so that the same seed gives the same numbers on any machine."""
    watch, paper = load_recipe("watch"), load_recipe("thumos14-paper")
    data = load_watch(train_recordings=2)
    for recipe, widths, classes, number in ((watch, data.stream_widths, 5, 1), (paper, (1024, 1024), 20, 4)):
        model = D2Net.from_recipe(recipe.model, num_classes=classes, stream_widths=widths)
        snippets = recipe.training.batch_size * recipe.training.max_snippets
        assert threads_for(multiply_adds(model, snippets)) == number
