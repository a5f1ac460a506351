"""``d2net plot``: pictures of any dataset's recordings, from checkpoints and files of detections."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from d2net.cli import app
from d2net.data import open_dataset
from d2net.recipes import load_recipe
from d2net.report.plot import checkpoint_tracks, choose_recordings, default_label, find_frames
from d2net.training import Trainer

CLASSES = ("Fall", "Jump", "Spin")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120", "D2NET_DEBUG": None})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def fails(*arguments: object) -> str:
    lines = run(*arguments, code=2).stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def dataset_folder(folder: Path, classes: tuple[str, ...] = CLASSES, width: int = 8) -> Path:
    """Eight recordings of 40 snippets of half a second, in ActionFormer's layout."""
    rng = np.random.default_rng(0)
    (folder / "features").mkdir(parents=True)
    database = {}
    for i in range(8):
        label = classes[i % len(classes)]
        subset = "train" if i < 4 else "test"
        database[f"clip_{i}"] = {"subset": subset, "annotations": [{"label": label, "segment": [4.0, 10.0]}]}
        np.save(folder / "features" / f"clip_{i}.npy", rng.standard_normal((40, width)).astype(np.float32))
    (folder / "gt.json").write_text(
        json.dumps({"name": "tiny", "classes": list(classes), "fps": 30, "stride": 15, "database": database})
    )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset_folder(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, of two iterations."""
    small = ["training.iterations=2", "training.batch_size=2", "model.embedding_dim=4"]
    out = tmp_path_factory.mktemp("run") / "ours"
    Trainer(open_dataset(data).subset("train"), load_recipe("watch").override(small), out=out, tensorboard=False).run()
    return out


@pytest.fixture
def detections(tmp_path: Path) -> Path:
    entries = [{"label": "Spin", "score": 0.9, "segment": [1.0, 5.0]}]
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps({"results": {"clip_4": entries, "clip_5": []}}))
    return path


def words(svg: Path) -> str:
    """Texts of an SVG stand in its comments."""
    return "\n".join(line for line in svg.read_text().splitlines() if line.strip().startswith("<!--"))


def test_checkpoint(data: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.svg"
    text = run("plot", trained, "--data", data, "--out", out).stdout
    # The first test recordings that show all three classes.
    assert text == f"wrote {out}: clip_4, clip_5, clip_6\n"
    for word in ("clip_4 (Jump)", "ground truth", "detection (height: score)", "bottom-up attention", "TCAM"):
        assert f"<!-- {word} -->" in words(out)


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_formats(data: Path, detections: Path, tmp_path: Path, suffix: str, magic: bytes) -> None:
    out = tmp_path / f"p.{suffix}"
    run("plot", "--detections", detections, "--data", data, "--out", out)
    assert out.read_bytes().startswith(magic)


def test_several_checkpoints_and_detections_are_labelled(
    data: Path, trained: Path, detections: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.svg"
    checkpoint = trained / "checkpoint.safetensors"
    command = ["plot", trained, checkpoint, "--detections", detections, "--data", data, "--out", out]
    names = ["--label", "baseline", "--label", "D2-Net", "--label", "theirs"]
    assert "are called 'ours'" in fails(*command)
    run(*command, *names)
    text = words(out)
    assert "clip_6" not in text  # two recordings leave room for three tracks
    # Below each lane the three tracks; curves of those with a model only.
    assert text.count("<!-- baseline -->") - text.count("<!-- theirs -->") == 2 and text.count("<!-- TCAM -->") == 4
    for name in ("baseline", "D2-Net", "theirs"):
        assert f"<!-- {name} (height: score) -->" in text


def test_detections_alone_have_no_curves(data: Path, detections: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.svg"
    run("plot", "--detections", detections, "--data", data, "--video", "clip_4", "--out", out)
    assert "TCAM" not in words(out) and "attention" not in words(out) and "clip_4 (Jump)" in words(out)


def test_videos_of_any_subset_in_the_order_given(data: Path, trained: Path, tmp_path: Path) -> None:
    videos = ["--video", "clip_7", "--video", "clip_0", "--video", "clip_7"]
    assert run("plot", trained, "--data", data, *videos, "--out", tmp_path / "p.png").stdout.endswith(
        "clip_7, clip_0\n"
    )


def test_frames(data: Path, trained: Path, tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    (frames / "clip_4").mkdir(parents=True)
    for i in (10, 9, 1):
        Image.new("RGB", (32, 24), (200, 0, 0)).save(frames / "clip_4" / f"{i}.jpg")
    (frames / "clip_4" / "notes.txt").write_text("")
    assert [p.name for p in find_frames(frames, "clip_4")] == ["1.jpg", "9.jpg", "10.jpg"]
    command = ["plot", trained, "--data", data, "--video", "clip_4", "--out"]
    run(*command, tmp_path / "with.png", "--frames", frames)
    run(*command, tmp_path / "without.png")
    red = [
        (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int) @ [1, -1, -1] > 150).sum()
        for name in ("with", "without")
    ]
    assert red[0] > red[1] + 10_000


def test_classes_in_another_order_are_matched_by_name(data: Path, trained: Path, tmp_path: Path) -> None:
    turned = dataset_folder(tmp_path / "turned")
    content = json.loads((turned / "gt.json").read_text())
    (turned / "gt.json").write_text(json.dumps({**content, "classes": list(CLASSES[::-1])}))
    one = checkpoint_tracks(trained, "", open_dataset(data).subset("test"))[0]
    other = checkpoint_tracks(trained, "", open_dataset(turned).subset("test"))[0]
    assert one.tcam is not None and other.tcam is not None
    np.testing.assert_array_equal(one.tcam, other.tcam[:, ::-1])
    assert list(one.detections) == list(other.detections)


def test_choice_shows_many_classes_whatever_was_found(data: Path) -> None:
    chosen = choose_recordings(open_dataset(data), 4)
    assert [r.name for r in chosen.recordings] == ["clip_0", "clip_1", "clip_2", "clip_3"]
    assert len(choose_recordings(open_dataset(data), 100)) == 8


def test_simulated_recordings_say_so(detections: Path, tmp_path: Path) -> None:
    detections.write_text(json.dumps({"results": {r.name: [] for r in open_dataset("simulated").recordings}}))
    run("plot", "--detections", detections, "--data", "simulated", "--out", tmp_path / "p.svg")
    assert words(tmp_path / "p.svg").count("simulated") == 3


def test_default_labels(tmp_path: Path) -> None:
    (tmp_path / "v1.5").mkdir()
    assert default_label(tmp_path / "v1.5") == "v1.5"
    assert default_label(Path("runs/a/checkpoint.safetensors")) == default_label(Path("runs/a/detections.json")) == "a"
    assert default_label(Path("x/theirs.json")) == "theirs"


def test_errors_are_one_line(data: Path, trained: Path, detections: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "p.png"]
    plot = ["plot", trained, "--data", data, *out]
    missing = tmp_path / "missing"
    assert "did you mean 'clip_4'" in fails(*plot, "--video", "clip4")
    assert "no recording 'clip_0'" in fails(*plot, "--video", "clip_0", "--subset", "test")
    assert "subset 'val' is empty" in fails(*plot, "--subset", "val")
    assert f"{missing}: no such folder" in fails(*plot, "--frames", missing)
    (tmp_path / "frames" / "clip_4").mkdir(parents=True)
    assert "holds no .jpg" in fails(*plot, "--frames", tmp_path / "frames")
    assert "clip_5: no such folder" in fails(*plot, "--frames", tmp_path / "frames", "--video", "clip_5")
    (tmp_path / "frames" / "clip_4" / "1.jpg").write_text("no image")
    assert "1.jpg: not a readable image" in fails(*plot, "--frames", tmp_path / "frames", "--video", "clip_4")
    assert "name it .png" in fails("plot", trained, "--data", data, "--out", tmp_path / "p.gif")
    assert "cannot be written" in fails("plot", trained, "--data", data, "--out", missing / "p.png")
    assert "nothing to draw" in fails("plot", "--data", data, *out)
    assert "--label is given 2 times for 1" in fails(*plot, "--label", "a", "--label", "b")
    assert str(missing) in fails("plot", missing, "--data", data, *out)
    assert str(missing) in fails("plot", trained, "--data", missing, *out)
    assert str(missing) in fails("plot", "--detections", missing, "--data", data, *out)
    assert "none of the recordings" in fails("plot", "--detections", detections, "--data", "simulated", *out)
    detections.write_text(detections.read_text().replace("Spin", "Swim"))
    assert "class 'Swim'" in fails("plot", "--detections", detections, "--data", data, *out)
    other = dataset_folder(tmp_path / "other", ("Fall", "Jump", "Swim"))
    assert "'Spin' is in one of them only" in fails("plot", trained, "--data", other, *out)
    wide = dataset_folder(tmp_path / "wide", width=10)
    assert "widths (4, 4)" in fails("plot", trained, "--data", wide, *out)
    assert not (tmp_path / "p.png").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(data: Path, detections: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    out = tmp_path / "locked" / "p.png"
    assert "cannot be written" in fails("plot", "--detections", detections, "--data", data, "--out", out)
