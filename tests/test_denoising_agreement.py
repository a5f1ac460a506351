"""``training.denoising_agreement``: what is measured, when L_D begins, and that a resumed run knows it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from d2net.checkpoint import load_checkpoint
from d2net.data.dataset import Dataset, Recording
from d2net.errors import InputError
from d2net.losses import bottom_up_attention
from d2net.ops.packed import padded
from d2net.recipes import load_recipe
from d2net.training import Trainer
from d2net.training.agreement import MEMORY, agreement
from d2net.training_log import read_log

pytestmark = pytest.mark.usefixtures("one_thread")


def by_definition(attention: Tensor, scores: Tensor, lengths: Tensor, fg: float, bg: float) -> float:
    """One pair after the other."""
    inside = [(i, t) for i, n in enumerate(lengths.tolist()) for t in range(n)]
    foreground = [attention[i].item() for i in inside if scores[i] > fg]
    background = [attention[i].item() for i in inside if scores[i] < bg]
    wins = [(f > b) + 0.5 * (f == b) for f in foreground for b in background]
    return float(np.mean(wins)) if wins else 0.5


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("thresholds", [(0.5, 0.5), (0.7, 0.3), (0.5, 0.0), (1.0, 0.5)])
def test_equals_its_definition(seed: int, thresholds: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    attention = torch.randint(0, 9, (4, 15), generator=generator) / 8  # with ties, and with 0 and 1
    scores = torch.rand(4, 15, generator=generator)
    lengths = torch.tensor([15, 7, 0, 1])
    expected = by_definition(attention, scores, lengths, *thresholds)
    assert agreement(attention, scores, lengths, *thresholds).item() == pytest.approx(expected, abs=1e-6)
    attention[1, 7:], scores[1, 7:] = torch.nan, torch.nan  # past the length
    assert agreement(attention, scores, lengths, *thresholds).item() == pytest.approx(expected, abs=1e-6)


LAMBDA = torch.tensor([[0.9, 0.8, 0.2, 0.1]])


@pytest.mark.parametrize(
    ("attention", "scores", "expected"),
    [
        (LAMBDA, [0.7, 0.6, 0.4, 0.3], 1),
        (0.1 * LAMBDA, [0.7, 0.6, 0.4, 0.3], 1),  # no threshold on lambda
        (LAMBDA, [0.3, 0.4, 0.6, 0.7], 0),  # swapped
        (LAMBDA, [0.7, 0.4, 0.6, 0.3], 0.75),
        (LAMBDA, [0.1, 0.1, 0.1, 0.1], 0.5),  # everything is background to lambda'
        (LAMBDA, [0.9, 0.9, 0.9, 0.9], 0.5),
        (LAMBDA, [0.5, 0.5, 0.5, 0.5], 0.5),  # no x_ref yet
        (0 * LAMBDA, [0.7, 0.6, 0.4, 0.3], 0.5),  # everything is background to lambda
    ],
)
def test_only_agreement_is_above_chance(attention: Tensor, scores: list[float], expected: float) -> None:
    assert agreement(attention, torch.tensor([scores]), torch.tensor([4])).item() == expected


def test_nothing_is_chance() -> None:
    for b, t in ((0, 4), (2, 0), (0, 0)):
        assert agreement(torch.rand(b, t), torch.rand(b, t), torch.zeros(b, dtype=torch.int64)).item() == 0.5


CLASSES = ("jump", "throw")


def make_dataset() -> Dataset:
    """Snippets 4 to 8 of each recording show its action."""
    rng = np.random.default_rng(0)
    recordings = []
    for i in range(6):
        x = rng.normal(0, 0.3, (int(rng.integers(12, 31)), 12)).astype(np.float32)
        x[4:9, i % 2 :: 2] += 1.5
        recordings.append(Recording(f"r{i}", "train", (CLASSES[i % 2],), (), 1.0, "memory", lambda x=x: x))
    return Dataset("tiny", CLASSES, (6, 6), tuple(recordings))


def make_trainer(out: Path, iterations: int, *settings: str, save_every: int = 0, resident: bool = False) -> Trainer:
    recipe = load_recipe("watch").override(
        [
            "model.embedding_dim=8",
            "model.dropout=0.3",
            "loss.alpha_snippet=0.2",
            "loss.alpha_video=0.01",
            "loss.background_threshold=0.4",  # so that x_ref is made of something from the start
            "training.batch_size=4",
            "training.learning_rate=5e-3",
            f"training.iterations={iterations}",
            *settings,
        ]
    )
    return Trainer(make_dataset(), recipe, out=out, tensorboard=False, save_every=save_every, resident=resident)


def flags_of(trainer: Trainer) -> list[bool]:
    """Whether L_D is on, of every iteration that will be trained."""
    seen: list[bool] = []
    trainer.loss.register_forward_pre_hook(
        lambda module, args, keywords: seen.append(keywords["denoise"]), with_kwargs=True
    )
    return seen


def began(out: Path) -> int | None:
    return read_log(out)[-1]["denoising"].get("began")


AGREED = "training.denoising_agreement=0.8"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bool]]:
    """The folder of a run in which L_D begins on the way, and when it was on."""
    out = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(out, 140, AGREED)
    seen = flags_of(trainer)
    trainer.run()
    return out, seen


def test_it_begins_when_they_agree_and_for_good(whole: tuple[Path, list[bool]]) -> None:
    out, seen = whole
    lines = read_log(out)
    at = next(i for i, line in enumerate(lines) if "began" in line["denoising"])
    first = lines[at]["iteration"]
    assert 0 < first < 130 and first % 10 == 0
    assert seen == [False] * first + [True] * (140 - first)
    assert [line["denoising"]["agreement"] >= 0.8 for line in lines[: at + 1]] == [False] * at + [True]
    assert {line["denoising"].get("began") for line in lines[at:]} == {first}
    assert all((line["snippet"] > 0) == (line["iteration"] > first) for line in lines)
    assert load_checkpoint(out).tensors["denoising.began"] == first


def test_the_running_mean_is_of_every_batch_and_begins_at_chance(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 40, AGREED)
    running = [0.5]

    def see(module: Any, args: Any, keywords: Any, result: Any) -> None:
        lengths = args[2]
        tcam, embeddings = (padded(x, keywords["offsets"], lengths, keywords["max_length"]) for x in args[:2])
        scores = bottom_up_attention(embeddings.detach(), module.reference, lengths)
        now = by_definition(tcam.detach().amax(2), scores, lengths, 0.5, 0.5)
        running.append(MEMORY * running[-1] + (1 - MEMORY) * now)

    trainer.loss.register_forward_hook(see, with_kwargs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.run()
    logged = [line["denoising"]["agreement"] for line in read_log(tmp_path)]
    assert logged == pytest.approx(running[10::10], abs=1e-5) and len(logged) == 4


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_resumed_run_is_the_same_to_the_bit(
    whole: tuple[Path, list[bool]], tmp_path: Path, after: bool, resident: bool
) -> None:
    """Stopped before L_D began or after, between two looks, and with other checkpoints."""
    first = began(whole[0])
    assert first is not None
    expected = make_trainer(tmp_path / "whole", 140, AGREED, resident=True).run() if resident else whole[0]
    at = first + 7 if after else first - 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # L_D was never on
        make_trainer(tmp_path / "parts", at, AGREED, save_every=7, resident=resident).run()
    assert (began(tmp_path / "parts") is not None) == after
    make_trainer(tmp_path / "parts", 140, AGREED, save_every=3, resident=resident).run(resume=True)
    one, other = load_checkpoint(expected).tensors, load_checkpoint(tmp_path / "parts").tensors
    assert one.keys() == other.keys() and {"denoising.agreement", "denoising.began"} <= one.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_resumed_run_needs_its_agreement(whole: tuple[Path, list[bool]], tmp_path: Path) -> None:
    make_trainer(tmp_path, 5).run()
    with pytest.raises(InputError, match="training.denoising_agreement was None and is 0.8"):
        make_trainer(tmp_path, 10, AGREED).run(resume=True)


def test_that_it_never_began_is_said(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 30, "training.denoising_agreement=1")
    seen = flags_of(trainer)
    with pytest.warns(UserWarning, match=r"L_D was never on: at the last iteration .* to 0\.\d+, .* is 1; lower that"):
        trainer.run()
    assert not any(seen) and began(tmp_path) is None
    assert all(line["snippet"] == 0 for line in read_log(tmp_path))


def test_a_start_after_the_end_is_said(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 5, "training.denoising_start=5")
    with pytest.warns(UserWarning, match="L_D was never on: it begins after iteration 5, of a training of 5; lower"):
        trainer.run()


def test_it_begins_no_earlier_than_its_start(whole: tuple[Path, list[bool]], tmp_path: Path) -> None:
    first = began(whole[0])
    assert first is not None
    trainer = make_trainer(
        tmp_path, first + 30, AGREED, f"training.denoising_start={first + 5}", "training.denoising_every=2"
    )
    seen = flags_of(trainer)
    trainer.run()
    assert began(tmp_path) == first + 10  # the next look
    assert seen == [i >= first + 10 and i % 2 == 0 for i in range(first + 30)]


def test_beginning_is_said_to_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, 120, AGREED).run()
    assert f"iteration {began(tmp_path)}: L_D begins, as lambda' agrees with lambda\n" in capsys.readouterr().err


def test_a_report_draws_the_terms_alone(whole: tuple[Path, list[bool]]) -> None:
    figures = pytest.importorskip("d2net.report.page.figures")
    (lines,) = figures.curves({"": read_log(whole[0])})
    assert list(lines.legend) == ["total", "discriminative", "snippet", "video"]


def test_recordings_that_do_not_count_do_not_count_here(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 1, AGREED, "loss.skip_unlabelled=true", "loss.min_snippets=5")
    measured = trainer.state.agreement
    assert measured is not None
    tcam = torch.tensor([[0.9, 0.1] * 3, [0.1, 0.9] * 3, [0.1, 0.9] * 3])[:, :, None].expand(3, 6, 2)
    embeddings = torch.tensor([1.0, -1.0] * 3)[None, :, None].expand(3, 6, 8)
    labels = torch.tensor([[1.0, 0], [0, 0], [0, 1]])  # the second has none, the third is short
    measured.add(tcam, embeddings, torch.tensor([6, 6, 4]), labels, -torch.ones(8))
    assert measured.running.item() == pytest.approx(MEMORY * 0.5 + (1 - MEMORY) * 1.0)


@pytest.mark.parametrize(
    "settings", [[], [AGREED, "loss.alpha_snippet=0", "loss.alpha_video=0"]], ids=["not asked", "no L_D"]
)
def test_without_it_nothing_is_measured(tmp_path: Path, settings: list[str]) -> None:
    trainer = make_trainer(tmp_path, 11, *settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.run()
    assert trainer.state.agreement is None
    assert not any("denoising" in line for line in read_log(tmp_path))
    assert not any(name.startswith("denoising") for name in load_checkpoint(tmp_path).tensors)


@pytest.mark.parametrize("value", ["0", "0.5", "1.01", "-1", "high", "true"])
def test_what_chance_would_reach_is_refused(value: str) -> None:
    with pytest.raises(InputError, match="training.denoising_agreement is .*; it must be .* or null"):
        load_recipe("watch").override([f"training.denoising_agreement={value}"])
