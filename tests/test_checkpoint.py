"""Checkpoint files: whole or not at all, and clear words about everything that is not one."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2net import __version__
from d2net.checkpoint import Checkpoint, checksum, load_checkpoint, load_model, save_checkpoint, save_model
from d2net.errors import D2NetError, InputError
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


def test_a_network_of_a_loop_of_ones_own(tmp_path: Path) -> None:
    recipe = load_recipe("generic")
    model, path, x = D2Net(2, (6, 4), recipe.model), tmp_path / "mine.safetensors", torch.randn(2, 9, 10)
    with pytest.raises(InputError, match="set model.classes and model.recipe"):
        save_model(path, model)
    model.classes, model.recipe, model.trained_on = ("jump", "throw"), recipe, "tiny"
    model.x_ref.normal_()
    save_model(path, model, seed=3, iteration=7)
    loaded, saved = load_model(path), load_checkpoint(path)
    assert torch.equal(loaded(x).tcam, model.eval()(x).tcam) and torch.equal(loaded.x_ref, model.x_ref)
    assert (loaded.classes, loaded.recipe, loaded.trained_on) == (model.classes, recipe, "tiny")
    assert (saved.seed, saved.iteration, saved.version) == (3, 7, __version__)


@pytest.mark.parametrize(
    "other", [{"classes": ("jump",)}, {"recipe": load_recipe("watch")}, {"recipe": load_recipe("thumos14-paper")}]
)
def test_a_network_of_another_recipe_is_not_saved(tmp_path: Path, other: dict) -> None:
    model = D2Net(2, (6, 4), load_recipe("generic").override(["model.dilation=2"]).model)
    model.classes, model.recipe = ("jump", "throw"), load_recipe("generic").override(["model.dilation=2"])
    for name, value in other.items():
        setattr(model, name, value)
    with pytest.raises(InputError, match="describe another network"):
        save_model(tmp_path / "mine.safetensors", model)
    assert not list(tmp_path.iterdir())


def test_one_stream(tmp_path: Path, checkpoint: Checkpoint) -> None:
    model = D2Net.from_recipe(checkpoint.recipe.model, num_classes=2, stream_widths=(5,))
    tensors = {f"model.{key}": t for key, t in model.state_dict().items()}
    save_checkpoint(tmp_path / "one.safetensors", replace(checkpoint, stream_widths=(5,), tensors=tensors))
    loaded = load_model(tmp_path / "one.safetensors")
    x = torch.randn(2, 9, 5)
    assert loaded.stream_widths == (5,)
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


def test_every_flipped_bit_is_refused_or_harmless(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """Of header and tensors: an error in one line, or what was saved (1e-05 and 1E-05 are one bit apart)."""
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, checkpoint)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    places = [*range(8 * 8), *(rng.randrange(8 * header) for _ in range(700))]
    places += [rng.randrange(8 * header, 8 * len(whole)) for _ in range(300)]
    refused = 0
    for place in places:
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # taken for an older file, in which no bit is checked
                found = load_checkpoint(path)
        except D2NetError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        assert replace(found, tensors={}) == replace(checkpoint, tensors={}), place
        assert found.tensors.keys() == checkpoint.tensors.keys(), place
        assert all(torch.equal(t, checkpoint.tensors[k]) for k, t in found.tensors.items()), place
    assert refused > 0.98 * len(places)


def rewrite(path: Path, checkpoint: Checkpoint, **change: object) -> None:
    """A file of format 1, whose metadata no checksum keeps from being changed; None takes a key out."""
    metadata = {**checkpoint.metadata(), "format": 1, **change}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    save_file(dict(checkpoint.tensors), path, {"d2net": json.dumps(metadata)})


def test_an_older_file_is_read_with_a_warning(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = tmp_path / "checkpoint.safetensors"
    checkpoint = replace(checkpoint, tensors={"x": torch.zeros(2)})
    rewrite(path, checkpoint, threads=None)
    with pytest.warns(UserWarning, match="an older checkpoint, without a checksum") as warned:
        found = load_checkpoint(path)
    assert len(warned) == 1 and found.format == 1 and found.precision is None
    save_checkpoint(path, found)
    assert load_checkpoint(path).format == 3


def test_x_ref_is_found_in_files_of_any_format(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = tmp_path / "checkpoint.safetensors"
    x_ref = torch.randn(8)
    for version in (1, 2):
        old = replace(checkpoint, precision="fp32", tensors={"loss.reference": x_ref})
        metadata = {**old.metadata(), "format": version}
        rewrite(path, old, format=version, sha256=checksum(metadata, old.tensors))
        found = load_checkpoint(path)
        assert found.format == version and found.tensors.keys() == {"model.x_ref"}
        assert torch.equal(found.tensors["model.x_ref"], x_ref)
    # In the name of today it is a tensor that nobody knows.
    save_checkpoint(path, replace(checkpoint, tensors={"loss.reference": x_ref}))
    assert load_checkpoint(path).tensors.keys() == {"loss.reference"}


@pytest.mark.parametrize("x_ref", [None, torch.zeros(63), torch.zeros(64, 1)])
def test_a_network_without_its_x_ref_is_refused(
    tmp_path: Path, checkpoint: Checkpoint, x_ref: torch.Tensor | None
) -> None:
    model = D2Net.from_recipe(checkpoint.recipe.model, num_classes=2, stream_widths=(5,))
    tensors = {f"model.{key}": t for key, t in model.state_dict().items() if key != "x_ref"}
    if x_ref is not None:
        tensors["model.x_ref"] = x_ref
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, replace(checkpoint, stream_widths=(5,), tensors=tensors))
    with pytest.raises(InputError, match="do not fit its recipe .*x_ref"):
        load_model(path)


def test_a_checksum_cannot_be_left_out(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = tmp_path / "checkpoint.safetensors"
    checkpoint = replace(checkpoint, tensors={"x": torch.zeros(2)})
    rewrite(path, checkpoint, format=2)
    with pytest.raises(InputError, match="its checksum is missing"):
        load_checkpoint(path)
    # Nor does a file that calls itself old escape one that it has.
    rewrite(path, checkpoint, sha256="0" * 64)
    with pytest.raises(InputError, match="its checksum is wrong"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [
        {"iteration": -1},
        {"iteration": 2.5},
        {"iteration": True},
        {"iteration": 10**30},
        {"iteration": None},
        {"seed": -1},
        {"seed": "3"},
        {"seed": 2**64},
        {"threads": -1},
        {"precision": "fp8"},
        {"classes": []},
        {"classes": "ab"},
        {"classes": ["a", "a"]},
        {"classes": ["a", ""]},
        {"classes": ["a", 3]},
        {"stream_widths": [6, True]},
        {"stream_widths": [10**12]},
        {"stream_widths": 6},
        {"dataset": 3},
        {"version": ["0"]},
        {"format": True},
        {"format": "1"},
        {"format": 0},
        {"format": float("nan")},
        {"recipe": []},
        {"recipe": {"training": {"iterations": -1}}},
        {"recipe": {"model": {"dropout": float("nan")}}},
        {"recipe": {"loss": {"momentum": True}}},
        {"recipe": {"x" * 10**6: 1}},
    ],
    ids=lambda change: str(change)[:40],
)
def test_metadata_of_wrong_types_and_beyond_their_ranges(
    tmp_path: Path, checkpoint: Checkpoint, change: dict[str, object]
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    rewrite(path, replace(checkpoint, tensors={"x": torch.zeros(2)}), **change)
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: damaged header") as error:
        load_checkpoint(path)
    assert len(str(error.value)) < 500 + len(str(path)) and str(error.value).isprintable()


@pytest.mark.parametrize("section", ["name", "model", "loss", "training", "localization", "evaluation"])
def test_a_recipe_without_a_section_takes_no_defaults(tmp_path: Path, checkpoint: Checkpoint, section: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    recipe = checkpoint.recipe.to_dict()
    del recipe[section]
    rewrite(path, replace(checkpoint, tensors={"x": torch.zeros(2)}), recipe=recipe)
    with pytest.raises(InputError, match=f"damaged header .recipe has no {section}"):
        load_checkpoint(path)


@pytest.mark.parametrize("header", ["[" * 10**5, "9" * 10**4, '{"format": 1e999}', '"2"', "null", "[]", "\udcff{}"])
def test_metadata_that_are_none(tmp_path: Path, header: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_file({}, path, {"d2net": header.encode("utf-8", "replace").decode()})
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: (damaged|has checkpoint format inf)"):
        load_checkpoint(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_not_finite_is_neither_saved_nor_loaded(
    tmp_path: Path, checkpoint: Checkpoint, bad: float, dtype: torch.dtype
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, checkpoint)
    x = torch.zeros(3, 4, dtype=dtype)
    x[1, 2] = bad
    spoiled = replace(checkpoint, iteration=8, tensors={**checkpoint.tensors, "model.x_ref": x})
    with pytest.raises(D2NetError, match="not saved at iteration 8, as 'model.x_ref' holds NaN or Inf"):
        save_checkpoint(path, spoiled)
    assert load_checkpoint(path).iteration == 7
    rewrite(path, replace(spoiled, tensors={"model.x_ref": x}))
    with pytest.raises(InputError, match="damaged, 'model.x_ref' holds NaN or Inf"):
        load_checkpoint(path)


def test_types_that_no_checkpoint_has(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = tmp_path / "checkpoint.safetensors"
    for dtype in (torch.complex64, torch.float8_e5m2, torch.uint16):
        rewrite(path, replace(checkpoint, tensors={"x": torch.zeros(4, dtype=dtype)}))
        with pytest.raises(InputError, match=f"'x' is of type {dtype}"):
            load_checkpoint(path)


def test_sizes_that_a_file_only_claims_take_no_memory(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """A network of 2^16 x 2^16 x 1023 weights would be 17 TB."""
    path = tmp_path / "checkpoint.safetensors"
    recipe = checkpoint.recipe.override(["model.embedding_dim=65536", "model.kernel_size=1023"])
    save_checkpoint(path, replace(checkpoint, recipe=recipe, stream_widths=(65_536,)))
    with pytest.raises(InputError, match="do not fit its recipe"):
        load_model(path)


def test_names_that_are_no_characters(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """As a file system may give them."""
    path = tmp_path / "checkpoint.safetensors"
    named = replace(checkpoint, classes=("a\udcff", "b\n\x1b[2J"))
    save_checkpoint(path, named)
    assert load_checkpoint(path).classes == named.classes
    assert json.loads((tmp_path / "checkpoint.json").read_text(encoding="utf-8"))["classes"] == list(named.classes)


def test_a_loaded_model_does_not_depend_on_its_file(tmp_path: Path, checkpoint: Checkpoint) -> None:
    model = D2Net.from_recipe(checkpoint.recipe.model, num_classes=2, stream_widths=(5,))
    tensors = {f"model.{key}": t for key, t in model.state_dict().items()}
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, replace(checkpoint, stream_widths=(5,), tensors=tensors))
    before = torch.get_rng_state()
    loaded = load_model(path)
    assert torch.equal(before, torch.get_rng_state())
    path.write_bytes(b"")  # as a copy over it does, in place
    assert all(torch.equal(t, tensors[f"model.{key}"]) for key, t in loaded.state_dict().items())
    assert all(p.requires_grad for p in loaded.parameters())


def test_the_checksum_is_of_the_content(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """Whatever the order in which another program writes the same tensors."""
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, checkpoint)
    tensors = load_file(path)
    text = path.read_bytes()
    metadata = json.loads(text[8 : 8 + int.from_bytes(text[:8], "little")])["__metadata__"]
    save_file(dict(reversed(tensors.items())), path, metadata)
    assert load_checkpoint(path).iteration == 7
