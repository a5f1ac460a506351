"""Checkpoint files: whole or not at all, and clear words about everything that is not one."""

from __future__ import annotations

import errno
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d2net.checkpoint import Checkpoint, load_checkpoint, load_model, save_checkpoint
from d2net.errors import InputError
from d2net.model import D2Net
from d2net.recipes import load_recipe


@pytest.fixture
def checkpoint() -> Checkpoint:
    return Checkpoint(
        recipe=load_recipe("watch"),
        classes=("jump", "Würfe"),
        stream_widths=(6, 4),
        iteration=7,
        dataset="tiny",
        seed=3,
        version="0.1.0",
        tensors={"model.weight": torch.randn(3, 2).T, "rng.cpu": torch.get_rng_state(), "loss.x": torch.tensor(2.5)},
    )


def test_round_trip(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, checkpoint)
    for place in (path, tmp_path):  # the file, or the folder of the run
        loaded = load_checkpoint(place)
        assert replace(loaded, tensors={}) == replace(checkpoint, tensors={})
        assert loaded.tensors.keys() == checkpoint.tensors.keys()
        assert all(torch.equal(loaded.tensors[k], t) for k, t in checkpoint.tensors.items())
    assert loaded.group("model").keys() == {"weight"}
    assert json.loads((tmp_path / "checkpoint.json").read_text(encoding="utf-8")) == checkpoint.metadata()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.json", "checkpoint.safetensors"]


def test_one_stream(tmp_path: Path, checkpoint: Checkpoint) -> None:
    model = D2Net.from_recipe(checkpoint.recipe.model, num_classes=2, stream_widths=(5,))
    tensors = {f"model.{key}": t for key, t in model.state_dict().items()} | {"loss.reference": torch.zeros(64)}
    save_checkpoint(tmp_path / "one.safetensors", replace(checkpoint, stream_widths=(5,), tensors=tensors))
    loaded, _, saved = load_model(tmp_path / "one.safetensors")
    x = torch.randn(2, 9, 5)
    assert saved.stream_widths == loaded.stream_widths == (5,)
    assert torch.equal(loaded(x).tcam, model.eval()(x).tcam)


@pytest.mark.parametrize("widths", [(), (1, 2, 3), (0, 4)])
def test_other_numbers_of_streams(tmp_path: Path, checkpoint: Checkpoint, widths: tuple[int, ...]) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_file({}, path, {"d2net": json.dumps({**checkpoint.metadata(), "format": 1, "stream_widths": widths})})
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: damaged header .stream_widths.* is .*; it must be"):
        load_checkpoint(path)


def test_missing(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(InputError, match="no such checkpoint"):
            load_checkpoint(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_truncated(tmp_path: Path, checkpoint: Checkpoint, share: float) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, checkpoint)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match="truncated"):
        load_checkpoint(path)


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Bomb(trace)))
    torch.save({"model": Bomb(trace)}, tmp_path / "model.pt")
    for name in ("plain.pkl", "model.pt"):
        with pytest.raises(InputError, match="never loaded"):
            load_checkpoint(tmp_path / name)
    assert not trace.exists()


def test_another_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="not a d2net checkpoint"):
        load_checkpoint(path)


def test_a_newer_format_and_a_damaged_header(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = tmp_path / "checkpoint.safetensors"
    metadata = {**checkpoint.metadata(), "format": 99, "version": "9.9"}
    save_file({}, path, {"d2net": json.dumps(metadata)})
    with pytest.raises(InputError, match=r"format 99, written by d2net '9\.9'.*upgrade"):
        load_checkpoint(path)
    for header in ("{", "[]", json.dumps({"format": 1})):
        save_file({}, path, {"d2net": header})
        with pytest.raises(InputError, match="damaged header"):
            load_checkpoint(path)


def test_tensors_of_another_network(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, checkpoint)
    with pytest.raises(InputError, match="do not fit its recipe"):
        load_model(path)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, checkpoint)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(InputError, match=r"checkpoint\.safetensors: cannot be written \(No space left"):
            save_checkpoint(path, replace(checkpoint, iteration=8))
    assert load_checkpoint(path).iteration == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.json", "checkpoint.safetensors"]


def test_an_interruption_while_writing_leaves_the_old_checkpoint(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, checkpoint)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(path, replace(checkpoint, iteration=8))
    assert load_checkpoint(path).iteration == 7
    assert len(list(tmp_path.iterdir())) == 2


def test_a_path_that_cannot_be_written(tmp_path: Path, checkpoint: Checkpoint) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "checkpoint.safetensors", checkpoint)
