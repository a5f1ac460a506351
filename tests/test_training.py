"""The training loop on a tiny dataset in memory: it learns, resumes, stops and refuses as it should."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from d2net.checkpoint import CHECKSUM, Checkpoint, checksum, load_checkpoint, load_model, save_checkpoint
from d2net.data.batches import Batch, BatchSampler, rounded_rows
from d2net.data.dataset import Dataset, Recording
from d2net.data.keeping import keep_features
from d2net.data.resident import ResidentFeatures
from d2net.errors import D2NetError, InputError
from d2net.files import locked
from d2net.localization import localize, predict
from d2net.losses import D2NetLoss
from d2net.model import D2Net
from d2net.ops.packed import padded
from d2net.recipes import ModelRecipe, Recipe, TrainingRecipe, load_recipe
from d2net.threads import threads
from d2net.training import Trainer, denoising_is_on, loop
from d2net.training.adam import Adam
from d2net.training.terms import TERMS, RecentTerms
from d2net.training_log import read_log

CLASSES = ("jump", "throw")


pytestmark = pytest.mark.usefixtures("one_thread")


class Gaps(NamedTuple):
    """A layout of packed rows without a network: gaps of ``reach`` rows, and any number of rows."""

    reach: int = 0

    def rows(self, least: int) -> int:
        return least


def make_dataset(
    count: int = 6, read: Callable[[np.ndarray], np.ndarray] = lambda x: x, widths: tuple[int, ...] = (6, 6)
) -> Dataset:
    """Recordings of 12 to 30 snippets of 12 features; snippets 4 to 8 of each show its action."""
    rng = np.random.default_rng(0)
    recordings = []
    for i in range(count):
        label = i % 2
        x = rng.normal(0, 0.3, (int(rng.integers(12, 31)), 12)).astype(np.float32)
        x[4:9, label::2] += 1.5
        recordings.append(
            Recording(
                name=f"r{i}",
                subset="train",
                labels=(CLASSES[label],),
                segments=((4.0, 9.0, CLASSES[label]),),
                seconds_per_snippet=1.0,
                source=f"memory/r{i}.npy",
                read=lambda x=x: read(x),
            )
        )
    return Dataset("tiny", CLASSES, widths, tuple(recordings))


def make_recipe(iterations: int = 20, **training: float) -> Recipe:
    settings = TrainingRecipe(iterations=iterations, batch_size=4, learning_rate=1e-3, max_snippets=20)
    recipe = load_recipe("watch").override(["model.embedding_dim=8", "model.dropout=0.3"])
    return replace(recipe, training=replace(settings, **training))


def make_trainer(out: Path, iterations: int = 20, dataset: Dataset | None = None, **options: object) -> Trainer:
    return Trainer(dataset or make_dataset(), make_recipe(iterations), out=out, tensorboard=False, **options)


def log_of(out: Path) -> list[dict]:
    return read_log(out)


def write_older(path: Path, checkpoint: Checkpoint, version: int) -> None:
    """As an older d2net did, in format 1 or 2."""
    metadata = {**checkpoint.metadata(), "format": version}
    tensors = {"loss.reference" if key == "model.x_ref" else key: t for key, t in checkpoint.tensors.items()}
    if version == 1:
        tensors = {key: t for key, t in tensors.items() if not key.startswith("recordings.")}
        del metadata["precision"]
    else:
        metadata = {**metadata, CHECKSUM: checksum(metadata, tensors)}
    save_file(tensors, path, {"d2net": json.dumps(metadata)})


def assert_same_checkpoint(a: Path, b: Path) -> None:
    first, second = load_checkpoint(a).tensors, load_checkpoint(b).tensors
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


def test_the_loss_falls(tmp_path: Path) -> None:
    make_trainer(tmp_path, 150).run()
    totals = [line["total"] for line in log_of(tmp_path)]
    assert np.mean(totals[-3:]) < 0.8 * totals[0]


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", 27).run()
    make_trainer(tmp_path / "parts", 13).run()
    parts = make_trainer(tmp_path / "parts", 27).run(resume=True)
    assert_same_checkpoint(whole, parts)
    assert load_checkpoint(parts).iteration == 27


@pytest.mark.parametrize(
    "setting", ["loss.video_queue=9", "loss.snippet_oriented=true", "loss.um_margin_unit=embedding"]
)
@pytest.mark.parametrize("resident", [False, True])
def test_variants_of_the_loss_resume_to_the_bit(tmp_path: Path, setting: str, resident: bool) -> None:
    def train(out: str, iterations: int, resume: bool = False) -> Path:
        settings = ["loss.alpha_snippet=0.2", "loss.alpha_video=0.1", "loss.um_weight=0.1", "loss.um_margin=2"]
        settings += ["loss.background_threshold=0.2", setting]
        recipe = make_recipe(iterations).override(settings)
        trainer = Trainer(make_dataset(), recipe, out=tmp_path / out, tensorboard=False, resident=resident)
        return trainer.run(resume=resume)

    whole = train("whole", 17)
    train("parts", 7)
    assert_same_checkpoint(whole, train("parts", 17, resume=True))
    queue = load_checkpoint(whole).group("video_queue")
    assert queue.keys() == ({"pooled", "labels", "counted"} if "queue" in setting else set())
    assert all((t > 0).any() for t in queue.values())


def test_the_result_is_the_average_of_the_weights(tmp_path: Path) -> None:
    """Of every step's, without the initial ones; it changes nothing else of the training."""
    decay = 0.8
    trainer = Trainer(make_dataset(), make_recipe(6, ema_decay=decay), out=tmp_path / "a", tensorboard=False)
    saved = load_checkpoint(trainer.run())
    steps = [load_checkpoint(make_trainer(tmp_path / f"plain-{n}", n).run()).group("model") for n in range(1, 7)]
    shares = [(1 - decay) / (1 - decay**6) * decay**back for back in range(5, -1, -1)]
    assert sum(shares) == pytest.approx(1)
    last = load_checkpoint(tmp_path / "plain-6")
    # x_ref is none of the weights: it is that of now.
    assert torch.equal(saved.tensors["model.x_ref"], last.tensors["model.x_ref"]) and saved.tensors["model.x_ref"].any()
    for key, t in ((key, t) for key, t in saved.group("model").items() if key != "x_ref"):
        torch.testing.assert_close(t, sum(share * step[key] for share, step in zip(shares, steps, strict=True)))
        assert torch.equal(saved.group("weights")[key], last.group("model")[key])
    torch.testing.assert_close(saved.tensors["average.size"], torch.tensor((1 - decay**6) / (1 - decay)))
    assert not last.group("weights")  # without an average there are no others
    x, lengths = torch.randn(2, 9, 12), torch.tensor([9, 4])
    model = load_model(trainer.path)
    assert torch.equal(model(x, lengths).tcam, trainer.result.eval()(x, lengths).tcam)


def test_a_run_with_an_average_resumes_to_the_bit(tmp_path: Path) -> None:
    def train(name: str, iterations: int, **options: bool) -> Path:
        recipe = make_recipe(iterations, ema_decay=0.9)
        return Trainer(make_dataset(), recipe, out=tmp_path / name, tensorboard=False).run(**options)

    whole = train("whole", 27)
    train("parts", 13)
    assert_same_checkpoint(whole, train("parts", 27, resume=True))


def test_an_average_of_one_step_is_that_step(tmp_path: Path) -> None:
    recipe = make_recipe(1, ema_decay=0.9999)
    saved = load_checkpoint(Trainer(make_dataset(), recipe, out=tmp_path, tensorboard=False).run())
    assert saved.group("weights").keys() == saved.group("model").keys() - {"x_ref"}
    for key, t in saved.group("weights").items():
        assert torch.equal(t, saved.group("model")[key])


def test_an_older_average_goes_on_as_it_was(tmp_path: Path) -> None:
    """It began with the initial weights and does not say how many steps it is worth."""
    decay = 0.8
    trainer = Trainer(make_dataset(), make_recipe(3, ema_decay=decay), out=tmp_path, tensorboard=False)
    old = load_checkpoint(trainer.run())
    tensors = {key: t for key, t in old.tensors.items() if not key.startswith("average.")}
    write_older(trainer.path, replace(old, tensors=tensors), 1)
    new = Trainer(make_dataset(), make_recipe(4, ema_decay=decay), out=tmp_path, tensorboard=False)
    with pytest.warns(UserWarning, match="does not say its precision and recordings"):
        saved = load_checkpoint(new.run(resume=True))
    for key, t in saved.group("weights").items():
        expected = decay * old.group("model")[key] + (1 - decay) * t
        torch.testing.assert_close(saved.group("model")[key], expected)


class Calls(TorchDispatchMode):
    """The operations that are done, and the numbers among their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[object]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        self.seen.append((str(function), [x for x in leaves if not isinstance(x, torch.Tensor)]))
        return function(*args, **(kwargs or {}))


def test_averaging_is_the_same_in_every_step(tmp_path: Path) -> None:
    """So that a CUDA graph can repeat it: no value is looked at, and no number changes from step to step."""
    trainer = Trainer(make_dataset(), make_recipe(2, ema_decay=0.9), out=tmp_path, tensorboard=False)
    steps = []
    for _ in range(2):
        with Calls() as calls:
            trainer.state.average()
        steps.append(calls.seen)
    assert steps[0] == steps[1] and not any("_local_scalar_dense" in name for name, _ in steps[0])


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_one_stream_trains_resumes_and_loads(tmp_path: Path, decay: float) -> None:
    def train(name: str, iterations: int, **options: bool) -> Path:
        recipe = make_recipe(iterations, ema_decay=decay)
        data = make_dataset(widths=(12,))
        return Trainer(data, recipe, out=tmp_path / name, tensorboard=False).run(**options)

    whole = train("whole", 27)
    train("parts", 13)
    assert_same_checkpoint(whole, train("parts", 27, resume=True))
    model = load_model(whole)
    assert model.stream_widths == (12,) and model.stream_b is None
    detections = localize(model, make_dataset(widths=(12,)))
    assert len(detections) > 0
    with pytest.raises(InputError, match="the widths 6, 6, expected 12; use data of the same kind"):
        make_trainer(tmp_path / "whole", 30).run(resume=True)


def test_one_stream_learns(tmp_path: Path) -> None:
    make_trainer(tmp_path, 150, dataset=make_dataset(widths=(12,))).run()
    totals = [line["total"] for line in log_of(tmp_path)]
    assert np.mean(totals[-3:]) < 0.8 * totals[0]


@pytest.mark.parametrize(
    "settings",
    [
        ["loss.alpha_snippet=0.3", "loss.alpha_video=0.2"],
        ["loss.alpha_snippet=0.3", "loss.alpha_video=0.2", "loss.um_weight=0.7", "loss.um_margin=2"],
        ["loss.alpha_snippet=0", "loss.alpha_video=0", "loss.um_weight=2"],
        ["loss.alpha_snippet=0.3", "loss.alpha_video=0.2", "training.denoising_every=2"],
        ["loss.classification=focal", "loss.denoising=bce", "loss.alpha_snippet=1", "loss.alpha_video=2"],
    ],
)
def test_the_logged_terms_add_up_to_the_loss(
    tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    # A low threshold on the background, so that there is one to compare.
    recipe = make_recipe(30, learning_rate=1e-2).override(["loss.background_threshold=0.2", *settings])
    Trainer(make_dataset(), recipe, out=tmp_path, tensorboard=False, save_every=1).run()
    lines, loss = log_of(tmp_path), recipe.loss
    assert len(lines) == 30
    weights = {
        "discriminative": 1,
        "snippet": loss.alpha_snippet,
        "video": loss.alpha_video,
        "uncertainty": loss.um_weight,
    }
    for line in lines:
        assert line.keys() == {"iteration", "total", *weights}
        assert line["total"] == pytest.approx(sum(w * line[term] for term, w in weights.items()), rel=1e-5)
    for term, weight in weights.items():
        assert any(line[term] != 0 for line in lines) == (weight != 0), term
    said = capsys.readouterr().err  # only terms that are part of the loss are shown
    names = {"discriminative": " dis ", "snippet": " snip ", "video": " vid ", "uncertainty": " um "}
    assert {term for term, name in names.items() if name in said} == {term for term, w in weights.items() if w}


@pytest.mark.parametrize("unlabelled", [[0, 2, 5], range(6)])
@pytest.mark.parametrize("recipe", ["thumos14-release", "activitynet12-release"])
def test_recordings_without_a_label_may_be_skipped(tmp_path: Path, unlabelled: list[int], recipe: str) -> None:
    """A batch with some, or with nothing else, trains on the rest: its loss and the weights stay finite."""
    settings = ["model.residual=false", "model.embedding_dim=8", "training.iterations=12", "training.batch_size=4"]
    settings += ["training.denoising_start=0", "training.denoising_every=1", "loss.um_weight=0.1"]
    settings += ["loss.background_threshold=0.2"]  # so that x_ref is made of something
    recipe = load_recipe(recipe).override(settings)
    assert recipe.loss.skip_unlabelled
    trainer = Trainer(make_dataset(), recipe, out=tmp_path, tensorboard=False, save_every=1)
    trainer.sampler.labels[list(unlabelled)] = 0
    trainer.run()
    totals = [line["total"] for line in log_of(tmp_path)]
    assert np.isfinite(totals).all() and (np.array(totals) == 0).all() == (len(unlabelled) == 6)
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert (trainer.loss.reference != 0).any() == (len(unlabelled) < 6)


def test_small_networks_train_in_one_thread_and_threads_are_given_back(tmp_path: Path) -> None:
    seen = []
    torch.set_num_threads(3)
    trainer = make_trainer(tmp_path, 1)
    trainer.loss.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    assert load_checkpoint(trainer.run()).threads == 1
    with threads(2):
        trainer = make_trainer(tmp_path, 1, overwrite=True)
        trainer.loss.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
        assert load_checkpoint(trainer.run()).threads == 2
    assert seen == [1, 2] and torch.get_num_threads() == 3


@pytest.mark.filterwarnings("error")
def test_a_resumed_run_has_the_threads_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(3)
    with threads(2):
        make_trainer(tmp_path, 3).run()
    assert load_checkpoint(make_trainer(tmp_path, 6).run(resume=True)).threads == 2
    torch.set_num_threads(1)
    with pytest.warns(UserWarning, match="was trained in 2 threads and goes on in 1; .* only up to rounding"):
        make_trainer(tmp_path, 7).run(resume=True)
    with threads(3), pytest.warns(UserWarning, match="in 1 threads and goes on in 3"):
        make_trainer(tmp_path, 8).run(resume=True)
    # An older file does not say; then the size of the work decides.
    old = load_checkpoint(tmp_path)
    save_checkpoint(tmp_path / "checkpoint.safetensors", replace(old, threads=0))
    torch.set_num_threads(4)
    assert load_checkpoint(make_trainer(tmp_path, 9).run(resume=True)).threads == 1


def test_the_seed_decides_the_result_and_the_callers_generator_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = make_trainer(tmp_path / "a", 5, seed=1).run()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    assert_same_checkpoint(first, make_trainer(tmp_path / "b", 5, seed=1).run())
    other = load_checkpoint(make_trainer(tmp_path / "c", 5, seed=2).run())
    assert not torch.equal(load_checkpoint(first).tensors["rng.cpu"], other.tensors["rng.cpu"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_can_go_on(tmp_path: Path, number: signal.Signals) -> None:
    reads = 0

    def interrupt(x: np.ndarray) -> np.ndarray:
        nonlocal reads
        reads += 1
        if reads == 25:  # iteration 7 of batches of 4
            os.kill(os.getpid(), number)
        return x

    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="stopped at iteration 7; saved"):
        make_trainer(tmp_path / "parts", dataset=make_dataset(read=interrupt)).run()
    assert signal.getsignal(number) is handler
    parts = make_trainer(tmp_path / "parts").run(resume=True)
    assert_same_checkpoint(make_trainer(tmp_path / "whole").run(), parts)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_iteration_is_no_failure(tmp_path: Path, number: signal.Signals) -> None:
    reads = 0

    def interrupt(x: np.ndarray) -> np.ndarray:
        nonlocal reads
        reads += 1
        if reads == 4 * 7 - 1:
            os.kill(os.getpid(), number)
        return x

    trainer = make_trainer(tmp_path, 7, dataset=make_dataset(read=interrupt))
    assert load_checkpoint(trainer.run()).iteration == 7 and trainer.interrupted
    trainer = make_trainer(tmp_path, 7)
    trainer.run(resume=True)
    assert not trainer.interrupted


@pytest.mark.parametrize("iterations", [7, 9])
def test_a_signal_right_after_a_save_says_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iterations: int
) -> None:
    """In the last iteration the run is done; before it one more iteration is done and saved."""

    def save(path: Path, checkpoint: Checkpoint) -> None:
        save_checkpoint(path, checkpoint)
        if checkpoint.iteration == 7:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("d2net.training.loop.save_checkpoint", save)
    trainer = make_trainer(tmp_path, iterations, save_every=7)
    if iterations == 7:
        assert trainer.run().exists() and trainer.interrupted
    else:
        with pytest.raises(KeyboardInterrupt, match="stopped at iteration 8; saved"):
            trainer.run()
        assert load_checkpoint(tmp_path).iteration == 8


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_signal_says_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool) -> None:
    """In the middle of a save: the file is whole, or the earlier one; no other run's is called this one's."""
    if overwrite:
        make_trainer(tmp_path, 3).run()
    saves = 0
    replaced = os.replace

    def twice(source: Path, target: Path) -> None:
        nonlocal saves
        saves += 1
        if saves == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        replaced(source, target)

    monkeypatch.setattr(os, "replace", twice)
    stop_at = 1
    with pytest.raises(KeyboardInterrupt) as first:
        make_trainer(tmp_path, 9, save_every=2, overwrite=overwrite).run()
    assert first.value.args == ()  # nothing of this run is saved
    assert (tmp_path / "checkpoint.safetensors").exists() == overwrite
    saves, stop_at = 0, 5  # two files a save
    with pytest.raises(KeyboardInterrupt, match=r"what was saved last is .*checkpoint\.safetensors"):
        make_trainer(tmp_path, 9, save_every=2, overwrite=overwrite).run()
    monkeypatch.undo()
    assert load_checkpoint(tmp_path).iteration == 4
    parts = make_trainer(tmp_path, 9).run(resume=True)
    assert_same_checkpoint(make_trainer(tmp_path / "whole", 9).run(), parts)


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    with locked(tmp_path), ThreadPoolExecutor(1) as other:
        trainer = make_trainer(tmp_path, 3)
        with pytest.raises(InputError, match="another d2net"):
            other.submit(trainer.run).result()
        assert not (tmp_path / "checkpoint.safetensors").exists()
    trainer.run()


def test_evaluates_periodically(tmp_path: Path) -> None:
    make_trainer(tmp_path, 20, eval_every=10, evaluation_dataset=make_dataset(3)).run()
    lines = [line for line in log_of(tmp_path) if "map" in line]
    assert [line["iteration"] for line in lines] == [10, 20]
    assert all(0 <= line["average"] <= 100 for line in lines)


def test_evaluation_does_not_change_the_training(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "plain").run()
    evaluated = make_trainer(tmp_path / "evaluated", eval_every=5, evaluation_dataset=make_dataset(2)).run()
    assert_same_checkpoint(plain, evaluated)


def test_writes_tensorboard_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    Trainer(make_dataset(), make_recipe(10), out=tmp_path, tensorboard=True).run()
    assert [p.name for p in (tmp_path / "tensorboard").iterdir()][0].startswith("events")


def test_the_model_can_be_loaded(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 5)
    model = load_model(trainer.run())
    assert not model.training
    assert torch.equal(model.x_ref, trainer.loss.reference) and model.x_ref.any()
    for network in (model, trainer.model, trainer.result):
        assert (network.classes, network.trained_on, network.recipe) == (CLASSES, "tiny", trainer.recipe)
    assert model.stream_widths == (6, 6)
    trainer.model.eval()
    x, lengths = torch.randn(2, 9, 12), torch.tensor([9, 4])
    assert torch.equal(model(x, lengths).tcam, trainer.model(x, lengths).tcam)


def test_fewer_recordings_than_a_batch(tmp_path: Path) -> None:
    for count in (1, 3):
        path = make_trainer(tmp_path / str(count), 5, dataset=make_dataset(count)).run()
        assert load_checkpoint(path).iteration == 5


def test_a_checkpoint_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    path = make_trainer(tmp_path, 5).run()
    before = path.read_bytes()
    with pytest.raises(InputError, match="--resume"):
        make_trainer(tmp_path, 6).run()
    assert path.read_bytes() == before
    make_trainer(tmp_path, 6, overwrite=True).run()
    assert load_checkpoint(path).iteration == 6


def test_resume_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to resume"):
        make_trainer(tmp_path, 5).run(resume=True)
    make_trainer(tmp_path, 5).run()
    other = make_recipe(5, weight_decay=0.1)
    with pytest.raises(InputError, match=r"training\.weight_decay was 0\.005 and is 0\.1"):
        Trainer(make_dataset(), other, out=tmp_path, tensorboard=False).run(resume=True)
    for change, message in (
        ({"classes": ("jump", "throw", "run")}, "jump, throw, run"),
        ({"stream_widths": (4, 8)}, "4, 8"),
        (
            {"recordings": make_dataset().recordings[:4]},
            r"trained on other recordings .6 then and 4 now; 2 of them are gone",
        ),
    ):
        with pytest.raises(InputError, match=message):
            make_trainer(tmp_path, 9, dataset=replace(make_dataset(), **change)).run(resume=True)
    with pytest.raises(InputError, match="iteration 5 already"):
        make_trainer(tmp_path, 4).run(resume=True)


def test_resume_knows_its_recordings(tmp_path: Path) -> None:
    make_trainer(tmp_path, 5, dataset=with_lengths(make_dataset())).run()
    first, *others = with_lengths(make_dataset()).recordings
    for recordings, message in (
        ((replace(first, name="new"), *others), "6 then and 6 now; 1 of them are gone; 'new' new"),
        ((replace(first, labels=("throw",)), *others), "'r0' of another length or with other labels"),
        ((replace(first, snippets=99), *others), "'r0' of another length"),
        ((*others, first), "in another order"),
        (others, "6 then and 5 now; 1 of them are gone"),
    ):
        other = replace(make_dataset(), recordings=tuple(recordings))
        with pytest.raises(InputError, match=f"trained on other recordings .*{message}.*choose another --out"):
            make_trainer(tmp_path, 9, dataset=other).run(resume=True)
    # What training does not look at may change: segments, and where the features lie.
    moved = tuple(replace(r, segments=(), source="elsewhere") for r in with_lengths(make_dataset()).recordings)
    make_trainer(tmp_path, 9, dataset=replace(make_dataset(), recordings=moved)).run(resume=True)


def with_lengths(dataset: Dataset) -> Dataset:
    return replace(dataset, recordings=tuple(replace(r, snippets=len(r.read())) for r in dataset.recordings))


def test_resume_knows_its_seed_and_precision(tmp_path: Path) -> None:
    path = make_trainer(tmp_path, 5, seed=3, precision="bf16").run()
    saved = load_checkpoint(path)
    assert (saved.seed, saved.precision) == (3, "bf16")
    for option, message in (({"seed": 4}, "seed 3, not 4"), ({"precision": "fp32"}, "precision bf16, not fp32")):
        with pytest.raises(InputError, match=f"was trained with {message}; leave --"):
            make_trainer(tmp_path, 9, **option).run(resume=True)
    make_trainer(tmp_path, 9, seed=3, precision="bf16").run(resume=True)
    make_trainer(tmp_path, 12).run(resume=True)  # those of the run
    saved = load_checkpoint(path)
    assert (saved.seed, saved.precision) == (3, "bf16")
    assert_same_checkpoint(path, make_trainer(tmp_path / "whole", 12, seed=3, precision="bf16").run())


def test_a_precision_that_there_is_not_here(tmp_path: Path) -> None:
    path = make_trainer(tmp_path, 5).run()
    save_checkpoint(path, replace(load_checkpoint(path), precision="tf32"))
    with pytest.warns(UserWarning, match="was trained in tf32, which cpu does not have, and goes on in fp32"):
        make_trainer(tmp_path, 9).run(resume=True)
    assert load_checkpoint(path).precision == "fp32"


@pytest.mark.parametrize(
    "missing",
    ["optimizer.3.exp_avg", "optimizer", "rng", "rng.pairing", "rng.cpu", "sampler.position", "sampler", "average"]
    + ["weights", "recordings", "model.x_ref", "model.stream_a.first.bias"],
)
def test_resume_needs_all_its_tensors(tmp_path: Path, missing: str) -> None:
    recipe = make_recipe(3, ema_decay=0.9)
    path = Trainer(make_dataset(), recipe, out=tmp_path, tensorboard=False).run()
    saved = load_checkpoint(path)
    kept = {key: t for key, t in saved.tensors.items() if key != missing and not key.startswith(f"{missing}.")}
    save_checkpoint(path, replace(saved, tensors=kept))
    before = path.read_bytes()
    trainer = Trainer(make_dataset(), make_recipe(5, ema_decay=0.9), out=tmp_path, tensorboard=False)
    with pytest.raises(InputError, match=rf"cannot go on, as it has no '{missing}[\w.]*'"):
        trainer.run(resume=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name, value", [("step", -5.0), ("step", 2.0), ("exp_avg_sq", -5.0)])
def test_resume_refuses_what_no_optimizer_has(tmp_path: Path, name: str, value: float) -> None:
    path = make_trainer(tmp_path, 3).run()
    saved = load_checkpoint(path)
    key = f"optimizer.0.{name}"
    spoiled = {**saved.tensors, key: torch.full_like(saved.tensors[key], value)}
    save_checkpoint(path, replace(saved, tensors=spoiled))
    with pytest.raises(InputError, match=f"{key} is none of an optimizer after 3 steps"):
        make_trainer(tmp_path, 5).run(resume=True)


@pytest.mark.parametrize(
    "name, value",
    [
        ("optimizer.0.exp_avg", torch.zeros(3)),
        ("optimizer.0.step", torch.tensor(3)),
        ("rng.cpu", torch.zeros(7, dtype=torch.uint8)),
        ("rng.cpu", torch.full((5056,), 255, dtype=torch.uint8)),
        ("rng.pairing", torch.full((5056,), 255, dtype=torch.uint8)),
        ("sampler.position", torch.tensor(99)),
        ("sampler.position", torch.tensor(-1)),
        ("sampler.order", torch.tensor([0, 0, 1, 2, 3, 4])),
        ("sampler.generator", torch.zeros(5056)),
        ("model.x_ref", torch.zeros(9)),
        ("model.x_ref", torch.zeros(8, dtype=torch.float64)),
        ("model.stream_a.first.bias", torch.zeros(9)),
    ],
)
def test_resume_refuses_tensors_that_do_not_fit(tmp_path: Path, name: str, value: torch.Tensor) -> None:
    path = make_trainer(tmp_path, 3).run()
    saved = load_checkpoint(path)
    save_checkpoint(path, replace(saved, tensors={**saved.tensors, name: value}))
    with pytest.raises(InputError, match="do not fit this recipe|order of recordings is damaged"):
        make_trainer(tmp_path, 5).run(resume=True)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_checkpoint_of_format_2_goes_on_and_localizes_to_the_bit(tmp_path: Path, decay: float) -> None:
    """In it x_ref is a tensor of the loss."""

    def make(name: str, iterations: int) -> Trainer:
        recipe = make_recipe(iterations, ema_decay=decay)
        return Trainer(make_dataset(), recipe, out=tmp_path / name, tensorboard=False)

    path = make("parts", 4).run()
    new, before = load_model(path), load_checkpoint(path)
    write_older(path, before, 2)
    assert "loss.reference" in load_file(path) and "model.x_ref" not in load_file(path)
    old = load_model(path)
    assert old.x_ref.any() and all(torch.equal(t, new.state_dict()[key]) for key, t in old.state_dict().items())
    assert load_checkpoint(path).tensors.keys() == before.tensors.keys()
    resumed = make("parts", 9)
    assert_same_checkpoint(make("whole", 9).run(), resumed.run(resume=True))
    assert load_checkpoint(path).format == 3 and "loss.reference" not in load_file(path)


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("resume", [False, True])
def test_x_ref_of_networks_and_loss_is_one_tensor(tmp_path: Path, decay: float, resume: bool) -> None:
    recipe = make_recipe(6, ema_decay=decay)
    if resume:
        first = make_recipe(3, ema_decay=decay)
        Trainer(make_dataset(), first, out=tmp_path, tensorboard=False).run()
    trainer = Trainer(make_dataset(), recipe, out=tmp_path, tensorboard=False)
    trainer.run(resume=resume)
    assert trainer.loss.reference is trainer.model.x_ref is trainer.result.x_ref and trainer.model.x_ref.any()
    assert (trainer.result is trainer.model) == (decay == 0)
    # All that the loss has to save: a checkpoint keeps no other tensor of it.
    assert set(trainer.loss.state_dict()) == {"reference"}


def test_an_older_checkpoint_resumes_with_a_warning(tmp_path: Path) -> None:
    path = make_trainer(tmp_path / "parts", 4).run()
    write_older(path, load_checkpoint(path), 1)
    with pytest.warns(UserWarning) as warned:
        make_trainer(tmp_path / "parts", 9).run(resume=True)
    assert [str(w.message).partition(": ")[2] for w in warned] == [
        "an older checkpoint, without a checksum: damage in it would not be seen",
        "is older and does not say its precision and recordings; see that they are the same now",
    ]
    assert_same_checkpoint(make_trainer(tmp_path / "whole", 9).run(), path)


@pytest.mark.parametrize("old", [None, 2, 1])
@pytest.mark.parametrize("setting", ["localization.nms_iou=0.25", "evaluation.tiou=[0.25]"])
def test_a_finished_run_takes_other_settings_and_stays_else(tmp_path: Path, setting: str, old: int | None) -> None:
    path = make_trainer(tmp_path / "parts", 4).run()
    saved = load_checkpoint(path)
    if old:
        write_older(path, saved, old)
    recipe = make_recipe(4).override([setting])
    trainer = Trainer(make_dataset(), recipe, out=tmp_path / "parts", tensorboard=False)
    trainer.run(resume=True)
    changed = load_checkpoint(path)
    assert (trainer.saved, trainer.trained) == (True, 0)
    assert changed.recipe == recipe != saved.recipe
    assert changed.precision == (None if old == 1 else saved.precision) and changed.threads == saved.threads
    # It goes on as if nothing had been.
    whole = make_trainer(tmp_path / "whole", 9).run()
    assert_same_checkpoint(make_trainer(tmp_path / "parts", 9).run(resume=True), whole)


def test_a_finished_run_with_the_same_settings_is_left_alone(tmp_path: Path) -> None:
    path = make_trainer(tmp_path, 4).run()
    before = path.stat()
    trainer = make_trainer(tmp_path, 4)
    trainer.run(resume=True)
    assert (trainer.saved, trainer.trained, path.stat()) == (False, 0, before)


@pytest.mark.parametrize("change", [{"classes": ("a", "a")}, {"classes": ("", "b")}, {"name": 3}])
def test_what_no_checkpoint_can_hold_is_said_before_training(tmp_path: Path, change: dict[str, object]) -> None:
    dataset = make_dataset()
    last = change.get("classes", dataset.classes)[-1]  # type: ignore[index]
    recordings = tuple(replace(r, labels=(last,)) for r in dataset.recordings)
    with pytest.raises(InputError, match=r"(classes|dataset) is .*; it must be"):
        Trainer(replace(dataset, recordings=recordings, **change), make_recipe(), out=tmp_path)


def test_without_any_label_there_is_nothing_to_learn(tmp_path: Path) -> None:
    dataset = make_dataset()
    recordings = tuple(replace(r, labels=()) for r in dataset.recordings)
    recipe = make_recipe().override(["loss.skip_unlabelled=true"])
    with pytest.raises(InputError, match="dataset 'tiny': no recording has a label"):
        Trainer(replace(dataset, recordings=recordings), recipe, out=tmp_path)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True])
def test_seeds(tmp_path: Path, seed: object) -> None:
    with pytest.raises(InputError, match="seed is .*; it must be"):
        make_trainer(tmp_path, seed=seed)


def test_a_probe_of_the_folder_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".writable").symlink_to(tmp_path / "mine")
    make_trainer(tmp_path / "run", 1).run()
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_reference_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    path = make_trainer(tmp_path, 5).run()
    before = path.read_bytes()
    trainer = make_trainer(tmp_path, 9)

    def spoil(loss: D2NetLoss, *_: object) -> None:
        loss.reference.fill_(float("nan"))

    trainer.loss.register_forward_hook(spoil)  # no term looks at x_ref here, so that the loss stays finite
    with pytest.raises(D2NetError, match="not saved at iteration 9, as 'model.x_ref' holds NaN or Inf"):
        trainer.run(resume=True)
    assert path.read_bytes() == before


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    path = make_trainer(tmp_path, 5).run()
    before = path.read_bytes()
    assert make_trainer(tmp_path, 5).run(resume=True) == path
    assert path.read_bytes() == before


def test_nan_features_are_named(tmp_path: Path) -> None:
    def spoil(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x[3, 2] = np.nan
        return x

    with pytest.raises(InputError, match=r"memory/r\d\.npy.*NaN.*snippet 3"):
        make_trainer(tmp_path, dataset=make_dataset(read=spoil)).run()


def test_a_loss_that_is_not_finite_stops_and_saves_nothing(tmp_path: Path) -> None:
    recipe = make_recipe(learning_rate=1e30)  # the first step overflows what the second computes
    with pytest.raises(D2NetError, match=r"not finite at iteration 2 .*training\.learning_rate"):
        Trainer(make_dataset(), recipe, out=tmp_path, tensorboard=False).run()
    assert not (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(("every", "seconds", "expected"), [(2, 0, [2, 4, 6, 7]), (2, 1e9, [7]), (3, 0, [3, 6, 7])])
def test_checkpoints_are_saved_by_default_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, seconds: float, expected: list[int]
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", every)
    monkeypatch.setattr(loop, "SAVE_SECONDS", seconds)
    saved = []
    monkeypatch.setattr(loop, "save_checkpoint", lambda path, checkpoint: saved.append(checkpoint.iteration))
    make_trainer(tmp_path, 7).run()
    assert saved == expected


def test_terms_are_read_later_and_are_those_of_then() -> None:
    model = torch.nn.Linear(1, 1)
    recent = RecentTerms(model, 3, 1e-3, torch.device("cpu"))
    for i in (3, 4):
        recent.add(i, torch.full((5,), float(i)))
    recent.ask(5)
    for i in range(5, 15):  # all places are overwritten
        recent.add(i, torch.full((5,), float(i)))
    assert recent.asked == 5 and recent.means() == dict.fromkeys(TERMS, 3.5) and recent.asked is None
    recent.add(12, torch.tensor([1.0, 1.0, float("nan"), 1.0, 1.0]))
    recent.ask(15)
    with pytest.raises(D2NetError, match=r"not finite at iteration 13 \(.*snippet nan"):
        recent.means()
    recent.check_weights(15)
    model.weight.data[0] = float("inf")
    with pytest.raises(D2NetError, match="not finite at iteration 15 .weights hold NaN or Inf, the loss does not yet"):
        recent.check_weights(15)


@pytest.mark.parametrize("settings", [[], ["training.denoising_agreement=0.51", "loss.alpha_snippet=0.2"]])
def test_the_log_is_the_same_where_terms_are_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str]
) -> None:
    """As on a GPU, where the log is ten iterations behind, but for checkpoints and evaluations."""
    seen: list[tuple[int, int]] = []

    class Later(RecentTerms):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            self.at_once = False

        def means(self) -> dict[str, float]:
            seen.append((self.asked, trainer.iteration))
            return super().means()

    recipe = make_recipe(36).override(settings)
    logs = []
    for name in ("usual", "later"):
        trainer = Trainer(make_dataset(), recipe, out=tmp_path / name, tensorboard=False, save_every=14)
        trainer.run()
        logs.append(log_of(tmp_path / name))
        monkeypatch.setattr(loop, "RecentTerms", Later)
    assert logs[0] == logs[1] and [line["iteration"] for line in logs[0]] == [10, 14, 20, 28, 30, 36]
    assert seen == [(10, 14), (14, 14), (20, 28), (28, 28), (30, 36), (36, 36)]


def test_what_is_not_finite_is_found_later_and_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(RecentTerms):
        at_once = property(lambda self: False, lambda self, value: None)

    monkeypatch.setattr(loop, "RecentTerms", Later)
    saved = []
    monkeypatch.setattr(loop, "save_checkpoint", lambda path, checkpoint: saved.append(checkpoint.iteration))
    trainer = make_trainer(tmp_path, 40, save_every=15)
    update = trainer.update

    def diverge(batch: Batch, denoise: bool) -> torch.Tensor:
        return update(batch, denoise) * (float("nan") if trainer.iteration == 16 else 1)

    monkeypatch.setattr(trainer, "update", diverge)
    with pytest.raises(D2NetError, match="not finite at iteration 17 "):
        trainer.run()
    assert saved == [15] and trainer.iteration == 30


def test_adam_is_pytorchs() -> None:
    generator = torch.Generator().manual_seed(0)
    # One lies in memory in another order, as the network's weights do.
    ours = [torch.randn(3, 4, generator=generator), torch.randn(2, 5, 3, generator=generator).mT]
    theirs = [x.clone() for x in ours]
    optimizer = Adam(ours, lr=1e-2, weight_decay=0.1)
    reference = torch.optim.Adam(theirs, lr=1e-2, weight_decay=0.1, fused=True)
    for _ in range(5):
        for first, second in zip(ours, theirs, strict=True):
            first.grad = torch.empty_like(first).copy_(torch.randn(first.shape, generator=generator))
            second.grad = first.grad.clone()
        optimizer.step()
        reference.step()
    state = {f"{i}.{key}": t for i, s in reference.state_dict()["state"].items() for key, t in s.items()}
    for first, second in zip(ours, theirs, strict=True):
        assert torch.equal(first, second)
    assert optimizer.tensors().keys() == state.keys()
    assert all(torch.equal(t, state[key]) for key, t in optimizer.tensors().items())
    optimizer.zero_grad()
    assert ours[0].grad is None


def test_training_imports_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    """torch._dynamo alone takes a second."""
    code = (
        f"import sys; from pathlib import Path; sys.path.append({str(Path(__file__).parent)!r})\n"
        "from test_training import make_trainer\n"
        f"make_trainer(Path({str(tmp_path)!r}), 2).run(); import d2net.report.facts\n"
        "print(sorted({'matplotlib', 'torch._dynamo', 'sympy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout == "[]\n", found.stdout + found.stderr


def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="--out"):
        make_trainer(tmp_path / "file" / "run")


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_trainer(tmp_path, 5).run()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="No space left"):
            make_trainer(tmp_path, 9).run(resume=True)
    assert load_checkpoint(path).iteration == 5
    make_trainer(tmp_path, 9).run(resume=True)
    assert load_checkpoint(path).iteration == 9


@pytest.mark.parametrize("key", ["iterations", "batch_size", "max_snippets", "learning_rate"])
def test_impossible_settings(tmp_path: Path, key: str) -> None:
    with pytest.raises(InputError, match=f"training.{key} is 0"):
        Trainer(make_dataset(), make_recipe(**{key: 0}), out=tmp_path)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_impossible_decay(tmp_path: Path, decay: float) -> None:
    with pytest.raises(InputError, match="ema_decay is .*; it must be at least 0 and below 1"):
        Trainer(make_dataset(), make_recipe(ema_decay=decay), out=tmp_path)


def test_an_unlabelled_recording_is_named(tmp_path: Path) -> None:
    dataset = make_dataset()
    bad = replace(dataset, recordings=(replace(dataset.recordings[0], labels=()), *dataset.recordings[1:]))
    with pytest.raises(InputError, match="'r0' has no label"):
        make_trainer(tmp_path, dataset=bad)


def recordings_of(batch: Batch) -> list[np.ndarray]:
    """The rows of each recording; everything else in the batch must be 0, and outside of the mask."""
    features, mask = torch.cat(batch.parts, 1), torch.zeros(len(batch.mask), dtype=torch.bool)
    found = []
    for first, length in zip(batch.offsets[:-1].tolist(), batch.lengths.tolist(), strict=True):
        mask[first : first + length] = True
        found.append(features[first : first + length].numpy())
    assert torch.equal(batch.mask, mask) and not features[~mask].any()
    return found


def test_batches_are_packed_cropped_and_without_replacement() -> None:
    dataset = make_dataset(7)
    sampler = BatchSampler(dataset, batch_size=3, max_snippets=15, layout=Gaps(4))
    for _ in range(20):
        seen = []
        for _ in range(2):  # an epoch of 7 is two batches of 3
            batch = sampler.next()
            assert [part.shape for part in batch.parts] == [(64, 6), (64, 6)] and batch.parts[0].dtype == torch.float32
            assert batch.lengths.dtype == batch.offsets.dtype == torch.int64
            assert batch.offsets.tolist() == [4, *(4 + np.cumsum(batch.lengths.numpy() + 4))]
            assert batch.max_length == batch.lengths.max() <= 15
            for x, label in zip(recordings_of(batch), batch.labels, strict=True):
                (found,) = (
                    i
                    for i in range(7)
                    for full in [dataset.features(i)]
                    for start in range(len(full) - len(x) + 1)
                    if np.array_equal(full[start : start + len(x)], x)
                )
                assert len(x) == min(15, len(dataset.features(found)))
                assert label.tolist() == dataset.label_matrix()[found].tolist()
                seen.append(found)
        assert len(set(seen)) == 6


def test_crops_reach_both_ends() -> None:
    dataset = make_dataset(1)
    x = dataset.features(0)
    sampler = BatchSampler(dataset, batch_size=1, max_snippets=len(x) - 1, layout=Gaps())
    starts = {int(not np.array_equal(recordings_of(sampler.next())[0], x[:-1])) for _ in range(30)}
    assert starts == {0, 1}


def test_a_seed_draws_what_it_always_drew() -> None:
    dataset = make_dataset(7)
    sampler = BatchSampler(dataset, batch_size=3, max_snippets=15, layout=Gaps(), seed=3)
    drawn = [tuple(w) for _ in range(2) for w in sampler.windows([len(dataset.features(i)) for i in range(7)])]
    assert drawn == [(5, 2, 15), (3, 5, 15), (4, 1, 15), (6, 9, 15), (0, 6, 15), (2, 0, 15)]


@pytest.mark.parametrize(
    ("recordings", "longest", "gap"), [(10, 750, 2), (10, 100, 1), (1, 1, 0), (20, 320, 3), (7, 5000, 8)]
)
def test_rows_are_rounded_up_to_few_numbers(recordings: int, longest: int, gap: int) -> None:
    most = gap + recordings * (longest + gap)
    found = [rounded_rows(rows, recordings, longest, Gaps(gap)) for rows in range(1, most + 1)]
    assert all(rows <= n and n % 64 == 0 for rows, n in enumerate(found, 1))
    assert len(set(found)) <= 32 and max(found) < most + max(64, most / 32 + 64)
    network = D2Net(2, (8,), ModelRecipe(kernel_size=5, embedding_dim=8))
    wanted = [rounded_rows(rows, recordings, longest, network) for rows in range(1, most + 1)]
    assert all(rows <= n == network.rows(n) for rows, n in enumerate(wanted, 1)) and len(set(wanted)) <= 32


def test_usual_sizes_of_a_batch() -> None:
    known = with_lengths(make_dataset(7))
    lengths = [r.snippets for r in known.recordings]
    for dataset, longest, mean in ((known, max(lengths), np.mean(lengths)), (make_dataset(7), 99, 99)):
        sampler = BatchSampler(dataset, batch_size=3, max_snippets=99, layout=Gaps(2))
        assert sampler.max_length == longest and sampler.usual_rows == round(3 * (mean + 2))
    assert BatchSampler(known, batch_size=3, max_snippets=12, layout=Gaps()).usual_rows == 36


def test_denoising_is_on_as_the_recipe_says(tmp_path):
    release = load_recipe("thumos14-release").training
    assert [i for i in range(998, 1008) if denoising_is_on(release, i)] == [1002, 1004, 1006]
    assert all(denoising_is_on(TrainingRecipe(), i) for i in range(5))
    recipe = make_recipe(6, denoising_start=3, denoising_every=2)
    trainer = Trainer(make_dataset(), recipe, out=tmp_path, tensorboard=False)
    seen = []
    trainer.loss.register_forward_pre_hook(
        lambda module, args, keywords: seen.append(keywords["denoise"]), with_kwargs=True
    )
    trainer.run()
    assert seen == [False, False, False, False, True, False]


def test_trains_with_the_release_recipe(tmp_path):
    settings = ["model.residual=false", "model.embedding_dim=8", "training.iterations=3", "training.batch_size=4"]
    recipe = load_recipe("thumos14-release").override(settings)
    trainer = Trainer(make_dataset(), recipe, out=tmp_path, tensorboard=False)
    assert trainer.run().exists()
    assert trainer.loss.reference.abs().sum() > 0


def load_resident(dataset: Dataset, **options: object) -> ResidentFeatures | None:
    return keep_features(
        dataset, torch.device("cpu"), **{"batch_size": 3, "max_snippets": 15, "layout": Gaps(), **options}
    )


def test_resident_features_give_the_same_batches() -> None:
    dataset = make_dataset(7)
    settings = {"batch_size": 3, "max_snippets": 15, "layout": Gaps(2)}
    usual, other = (BatchSampler(dataset, seed=3, **settings) for _ in range(2))
    resident = load_resident(dataset, layout=Gaps(2))
    for _ in range(9):
        expected = usual.next()
        batch = resident.gather(resident.rows(other.windows(resident.lengths)))
        for found, wanted in zip((*batch.parts, *batch[1:5]), (*expected.parts, *expected[1:5]), strict=True):
            assert torch.equal(found, wanted) and found.dtype == wanted.dtype
        assert batch.max_length == 15
    assert load_resident(dataset, max_snippets=99).max_length == max(resident.lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("known", [False, True])
def test_features_stay_out_where_they_take_too_much(dtype: torch.dtype, known: bool) -> None:
    seen = []
    dataset = make_dataset(7, read=lambda x: seen.append(1) or x)
    size = dtype.itemsize * 12 * sum(len(dataset.features(i)) for i in range(7))
    if known:
        dataset = with_lengths(dataset)
    assert load_resident(dataset, dtype=dtype, budget=size).streams[0].dtype == dtype
    seen.clear()
    assert load_resident(dataset, dtype=dtype, budget=size - 1) is None
    assert len(seen) == (0 if known else 7)  # with lengths, nothing is read


def test_resident_features_have_the_precision_of_the_network(tmp_path: Path) -> None:
    def dtypes(recipe: Recipe, **options: object) -> set[torch.dtype]:
        trainer = Trainer(make_dataset(), recipe, out=tmp_path, tensorboard=False, resident=True, **options)
        trainer.run(resume="precision" not in options)
        return {stream.dtype for stream in trainer.resident.streams}

    assert dtypes(make_recipe(2), precision="bf16") == {torch.bfloat16}
    assert dtypes(make_recipe(3)) == {torch.bfloat16}  # of the run that is resumed
    # Features are standardized in float32 first: bfloat16 has few digits for what lies far from 0.
    standardized = make_recipe(2).override(["model.standardize=true"])
    assert dtypes(standardized, precision="bf16", overwrite=True) == {torch.float32}


def test_resident_features_train_alike_and_resume_to_the_bit(tmp_path):
    usual = load_checkpoint(make_trainer(tmp_path / "usual", 9).run()).tensors
    whole = make_trainer(tmp_path / "whole", 9, resident=True).run()
    for key, tensor in load_checkpoint(whole).tensors.items():
        if key.startswith(("model", "loss")):
            assert torch.allclose(tensor, usual[key], atol=1e-5), key
        elif key.startswith(("sampler", "rng.pairing")):
            assert torch.equal(tensor, usual[key]), key
    make_trainer(tmp_path / "parts", 4, resident=True).run()
    assert_same_checkpoint(whole, make_trainer(tmp_path / "parts", 9, resident=True).run(resume=True))


class PaddedTrainer(Trainer):
    """Pads its batches before network and loss see them."""

    def update(self, batch: Batch, denoise: bool) -> torch.Tensor:
        offsets, lengths, most = batch.offsets, batch.lengths, batch.max_length
        x = padded(torch.cat(batch.parts, 1), offsets, lengths, most)
        output = self.model(x, lengths)
        logits = output.logits if self.loss.recipe.um_weight else None
        loss = self.loss(
            output.tcam,
            output.embeddings,
            lengths,
            batch.labels,
            generator=self.state.pairing,
            logits=logits,
            denoise=denoise,
        )
        if self.state.agreement is not None:
            x_ref = self.loss.reference
            self.state.agreement.add(output.tcam, output.embeddings, lengths, batch.labels, x_ref)
        self.state.optimizer.zero_grad()
        loss.total.backward()
        self.state.optimizer.step()
        self.state.average()
        return torch.stack([getattr(loss, term).detach() for term in TERMS])


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["model.standardize=true"],
        ["loss.um_weight=0.1", "loss.um_margin=2", "loss.video_queue=9", "loss.alpha_video=0.1"],
        ["training.denoising_agreement=0.51", "loss.alpha_snippet=0.2", "training.ema_decay=0.9"],
        ["loss.pairing=permutation", "loss.reference_update=lowest_attention", "training.denoising_every=2"],
        ["model.kernel_size=5", "model.dilation=2", "model.classifier_kernel_size=1"],
    ],
    ids=["plain", "standardize", "variants", "agreement", "release", "kernels"],
)
@pytest.mark.parametrize("resident", [False, True])
def test_packed_batches_train_as_padded_ones(tmp_path: Path, settings: list[str], resident: bool) -> None:
    recipe = make_recipe(12, max_snippets=17).override(["model.dropout=0", *settings])
    found = []
    for kind in (Trainer, PaddedTrainer):
        trainer = kind(make_dataset(7), recipe, out=tmp_path / kind.__name__, tensorboard=False, resident=resident)
        found.append(load_checkpoint(trainer.run()).tensors)
    for key, tensor in found[0].items():
        if key.startswith(("model.", "video_queue.", "denoising.")):
            torch.testing.assert_close(
                tensor, found[1][key], rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )
        elif key.startswith(("sampler.", "rng.")):
            assert torch.equal(tensor, found[1][key]), key


def test_bfloat16_trains_alike_and_resumes_to_the_bit(tmp_path):
    full = make_trainer(tmp_path / "full", 20).run()
    half = make_trainer(tmp_path / "half", 20, precision="bf16").run()
    assert not torch.equal(*(load_checkpoint(p).tensors["model.stream_a.first.weight"] for p in (full, half)))
    totals = [[line["total"] for line in log_of(tmp_path / name)] for name in ("full", "half")]
    assert np.allclose(*totals, rtol=0.05)
    assert load_checkpoint(half).tensors["model.stream_a.first.weight"].dtype == torch.float32
    make_trainer(tmp_path / "parts", 7, precision="bf16").run()
    parts = make_trainer(tmp_path / "parts", 20, precision="bf16").run(resume=True)
    assert_same_checkpoint(half, parts)


def test_class_activations_are_float32_under_autocast():
    model = load_recipe("watch").override(["model.embedding_dim=8"]).model
    network = D2Net.from_recipe(model, num_classes=2, stream_widths=(6, 6))
    with torch.autocast("cpu", torch.bfloat16):
        out = network(torch.randn(2, 9, 12))
    assert out.tcam.dtype == torch.float32 and out.embeddings.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options, message",
    [
        ({"precision": "tf32"}, "precision 'tf32' on cpu: expected one of fp32, bf16"),
        ({"precision": "fp8"}, "precision 'fp8'"),
        ({"graph": True}, "needs a GPU"),
    ],
)
def test_what_a_cpu_cannot_do(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, **options)


def test_the_precision_of_convolutions_is_the_callers_again(tmp_path):
    before = torch.backends.cudnn.allow_tf32
    seen = []
    trainer = make_trainer(tmp_path, 1)
    trainer.loss.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    trainer.run()
    assert seen == [False] and torch.backends.cudnn.allow_tf32 == before


def test_the_log_shows_terms_that_are_on_in_some_iterations_only(tmp_path):
    """Its numbers are means since the line before: those of the last iteration alone would be 0."""
    recipe = load_recipe("watch").override(
        ["training.iterations=40", "training.denoising_every=2", "loss.alpha_snippet=0.2", "loss.alpha_video=0.2"]
        + ["training.batch_size=4", "model.embedding_dim=4"]
    )
    Trainer(make_dataset(), recipe, out=tmp_path, tensorboard=False).run()
    for line in log_of(tmp_path):
        total = line["discriminative"] + 0.2 * line["snippet"] + 0.2 * line["video"]
        assert line["video"] > 0 and line["total"] == pytest.approx(total, rel=1e-5)


def scaled(dataset: Dataset, factor: np.ndarray, offset: np.ndarray) -> Dataset:
    """Every column in another unit."""
    recordings = [replace(r, read=lambda r=r: r.read() * factor + offset) for r in dataset.recordings]
    return replace(dataset, recordings=tuple(recordings))


def test_with_standardised_features_units_do_not_matter(tmp_path: Path) -> None:
    recipe = make_recipe(30).override(["model.standardize=true"])
    factor, offset = np.float32(10.0 ** np.linspace(-4, 4, 12)), np.float32(np.linspace(-50, 1000, 12))
    offset *= factor
    found = []
    for name, dataset in (("as", make_dataset()), ("scaled", scaled(make_dataset(), factor, offset))):
        path = Trainer(dataset, recipe, out=tmp_path / name, tensorboard=False).run()
        tensors = load_checkpoint(path).tensors
        all_features = np.concatenate([dataset.features(i) for i in range(len(dataset))]).astype(np.float64)
        np.testing.assert_allclose(tensors["model.feature_mean"], all_features.mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(tensors["model.feature_scale"], 1 / all_features.std(axis=0), rtol=1e-3)
        found.append([predict(load_model(path), dataset.features(i))[0] for i in range(len(dataset))])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0.01)  # x + 1000 has lost the last digits of x
    assert max(float(tcam.max() - tcam.min()) for tcam in found[0]) > 0.1


def test_a_column_that_never_varies_stays_finite(tmp_path: Path) -> None:
    factor = np.float32([0, *[1] * 11])
    dataset = scaled(make_dataset(), factor, np.float32([3.1e6, *[0] * 11]))
    path = Trainer(dataset, make_recipe(3).override(["model.standardize=true"]), out=tmp_path, tensorboard=False).run()
    assert load_checkpoint(path).tensors["model.feature_scale"][0] == 1


def test_a_run_of_standardised_features_resumes_to_the_bit(tmp_path: Path) -> None:
    def train(name: str, iterations: int, **options: bool) -> Path:
        recipe = make_recipe(iterations, ema_decay=0.9).override(["model.standardize=true"])
        return Trainer(make_dataset(), recipe, out=tmp_path / name, tensorboard=False).run(**options)

    whole = train("whole", 17)
    train("parts", 8)
    assert_same_checkpoint(whole, train("parts", 17, resume=True))


@pytest.mark.parametrize("widths", [(9, 9), (18,), (2048,)])
@pytest.mark.parametrize(("recordings", "classes"), [(1, 1), (5, 2), (30, 50)])
def test_the_generic_recipe_takes_any_size(
    tmp_path: Path, widths: tuple[int, ...], recordings: int, classes: int
) -> None:
    rng = np.random.default_rng(0)
    names = tuple(f"c{i}" for i in range(classes))
    arrays = [rng.normal(3, 9, (1 + 7 * (i % 4), sum(widths))) for i in range(recordings)]
    made = [
        Recording(
            name=f"r{i}",
            subset="train",
            labels=(names[i % classes],),
            segments=(),
            seconds_per_snippet=1.0,
            source=f"memory/r{i}.npy",
            read=lambda x=x: x,
        )
        for i, x in enumerate(arrays)
    ]
    dataset = Dataset("any", names, widths, tuple(made))
    recipe = load_recipe("generic").override(["training.iterations=2"])
    path = Trainer(dataset, recipe, out=tmp_path, tensorboard=False).run()
    assert np.isfinite(log_of(tmp_path)[-1]["total"])
    localize(load_model(path), dataset)
