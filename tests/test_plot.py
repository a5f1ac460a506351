"""``d2net plot``: pictures of any dataset's recordings, from checkpoints and files of detections."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from d2net.cli import app
from d2net.data import open_dataset
from d2net.recipes import load_recipe
from d2net.report.plot import (
    checkpoint_tracks,
    choose_recordings,
    default_label,
    find_frames,
    find_recordings,
    timeline_rows,
)
from d2net.report.timeline import MIN_SCORE
from d2net.training import Trainer

CLASSES = ("Fall", "Jump", "Spin")


pytestmark = pytest.mark.usefixtures("one_thread")


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
        json.dumps(
            {
                "name": "tiny",
                "classes": list(classes),
                "fps": 30,
                "stride": 15,
                "streams": [width // 2, width // 2],
                "database": database,
            }
        )
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
    assert text.endswith(f"wrote {out}: clip_4, clip_5, clip_6\n")
    share = "detections from 25 % of the best score"
    for word in ("clip_4 (Jump)", "ground truth", "detection (height: score)", "bottom-up attention", "TCAM", share):
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
    with pytest.raises(ValueError, match="cannot be the name of a file"):
        find_frames(frames / "clip_4", "../clip_4")
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
    dataset = open_dataset(turned).subset("test")
    tracks = checkpoint_tracks(trained, "", dataset)
    assert one.tcam is not None and tracks[0].tcam is not None
    np.testing.assert_array_equal(one.tcam, tracks[0].tcam)
    assert tracks[0].classes == CLASSES and list(one.detections) == list(tracks[0].detections)
    assert timeline_rows(dataset, [tracks])[0].classes == list(CLASSES)  # the checkpoint's order


def own_recordings(folder: Path, labels: dict[str, list[str]], **top: object) -> Path:
    """Recordings of these names and labels, each a segment from 2 to 5 s, in one subset."""
    rng = np.random.default_rng(1)
    (folder / "features").mkdir(parents=True)
    database = {}
    for name, its in labels.items():
        database[name] = {"subset": "test", "annotations": [{"label": c, "segment": [2.0, 5.0]} for c in its]}
        np.save(folder / "features" / f"{name}.npy", rng.standard_normal((40, 8)).astype(np.float32))
    (folder / "mine.json").write_text(
        json.dumps({"fps": 30, "stride": 15, "streams": [4, 4], "database": database, **top})
    )
    return folder


@pytest.mark.parametrize("source", ["checkpoint", "detections"])
@pytest.mark.parametrize(
    ("labels", "top"),
    [
        ({"a": [], "b": []}, {}),
        ({"a": [], "b": ["Spin"]}, {}),
        ({"a": ["Spin"], "b": ["Fall"]}, {"classes": ["Spin", "Fall"]}),
    ],
    ids=["no labels", "one labelled", "classes in another order"],
)
def test_own_recordings_need_no_labels(
    trained: Path, tmp_path: Path, source: str, labels: dict[str, list[str]], top: dict[str, list[str]]
) -> None:
    mine, out, found = own_recordings(tmp_path / "mine", labels, **top), tmp_path / "p.svg", tmp_path / "d.json"
    arguments: list[object] = [trained]
    if source == "detections":
        run("localize", trained, "--data", mine, "--out", found)
        arguments = ["--detections", found]
    run("plot", *arguments, "--data", mine, "--min-score", 0, "--out", out)
    text = words(out)
    labelled = [c for its in labels.values() for c in its]
    assert ("<!-- ground truth -->" in text) == bool(labelled)
    assert text.count("(no ground-truth segment)") == (1 if labelled and [] in labels.values() else 0)
    dataset = open_dataset(mine)
    tracks = checkpoint_tracks(trained, "", dataset)
    detected = {d[2] for t in tracks for d in t.detections}
    assert detected and all(f"<!-- {c} -->" in text for c in detected)
    assert timeline_rows(dataset, [tracks])[0].classes == list(CLASSES)


def test_an_unknown_label_is_an_error_that_names_it(trained: Path, tmp_path: Path) -> None:
    mine = own_recordings(tmp_path / "mine", {"a": ["Fall"], "b": ["Swim"], "c": []})
    out = tmp_path / "p.svg"
    message = fails("plot", trained, "--data", mine, "--out", out)
    assert "'b' is labelled 'Swim'" in message and "'ours' was not trained on" in message
    assert "Fall, Jump, Spin" in message and not out.exists()
    run("plot", trained, "--data", mine, "--video", "a", "--video", "c", "--out", out)  # nothing unknown is pictured
    theirs = tmp_path / "theirs.json"
    entries = [{"label": "Swim", "score": 0.9, "segment": [1.0, 5.0]}]
    theirs.write_text(json.dumps({"results": {name: entries for name in "abc"}}))
    result = run("plot", trained, "--detections", theirs, "--data", mine, "--video", "b", "--out", out)
    assert result.stderr == "note: 'ours' was not trained on Swim and is drawn without\n"
    assert "<!-- not trained on this class -->" in words(out)


def test_checkpoints_of_different_classes_are_each_drawn_in_their_own(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    other = dataset_folder(tmp_path / "other", ("Jump", "Swim"))
    small = ["training.iterations=2", "training.batch_size=2", "model.embedding_dim=4"]
    swim = tmp_path / "swim"
    recipe = load_recipe("watch").override(small)
    Trainer(open_dataset(other).subset("train"), recipe, out=swim, tensorboard=False).run()
    out = tmp_path / "p.svg"
    command = ["plot", trained, swim, "--data", other, "--video", "clip_4", "--video", "clip_5", "--out", out]
    assert run(*command).stderr.splitlines() == [
        "note: 'ours' was not trained on Swim and is drawn without",
        "note: 'swim' was not trained on Fall, Spin and is drawn without",
    ]
    chosen = find_recordings(open_dataset(other), ["clip_4", "clip_5"])
    tracks = [checkpoint_tracks(path, path.name, chosen) for path in (trained, swim)]
    with pytest.warns(UserWarning, match="not trained on"):
        rows = timeline_rows(chosen, tracks)
    assert rows[0].classes == ["Fall", "Jump", "Spin", "Swim"]
    assert [t.classes for t in rows[0].tracks] == [CLASSES, ("Jump", "Swim")]
    assert [t.tcam.shape[1] for t in rows[0].tracks if t.tcam is not None] == [3, 2]


def test_the_file_and_the_dataset_together_make_the_classes(data: Path, detections: Path, tmp_path: Path) -> None:
    detections.write_text(detections.read_text().replace("Spin", "Swim"))
    result = run("plot", "--detections", detections, "--data", data, "--out", tmp_path / "p.svg")
    assert result.stderr.splitlines() == [
        f"note: {detections}: does not name clip_6, so nothing of it is drawn there",
        "note: 'theirs' has detections of Swim, which neither the dataset nor a checkpoint has",
    ]
    assert "<!-- Swim -->" in words(tmp_path / "p.svg")
    assert words(tmp_path / "p.svg").count("no detection drawn") == 2


def test_low_scores_are_left_out_and_counted(data: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "d.json", tmp_path / "p.svg"
    scores = {"clip_4": [0.8, 0.2, 0.19], "clip_5": [0.1]}
    found = {name: [{"label": "Spin", "score": s, "segment": [1.0, 2.0]} for s in its] for name, its in scores.items()}
    path.write_text(json.dumps({"results": found}))
    command = ["plot", "--detections", path, "--data", data, "--video", "clip_4", "--video", "clip_5", "--out", out]
    assert "note: 2 of 4 detections are below 25 % of the best score" in run(*command).stdout
    assert "detections from 25 % of the best score" in words(out) and "clip_5 (Spin)   (no detection drawn)" in words(
        out
    )
    assert "note: 3 of 4 detections are below 50 %" in run(*command, "--min-score", 0.5).stdout
    assert run(*command, "--min-score", 0).stdout == f"wrote {out}: clip_4, clip_5\n"
    assert "best score" not in words(out) and "<!-- detection (height: score) -->" in words(out)
    assert run(*command, "--min-score", 1.5, code=2)
    assert f"{MIN_SCORE}" in run("plot", "--help").stdout


def test_title_and_lanes_have_one_order(data: Path) -> None:
    dataset = open_dataset(data).subset("test")
    first = replace(
        dataset.recordings[0],
        labels=("Spin", "Fall"),
        segments=((1.0, 2.0, "Spin"), (3.0, 4.0, "Fall")),
    )
    row = timeline_rows(replace(dataset, recordings=(first,)), [])[0]
    assert row.name == "clip_4 (Fall, Spin)" and row.shown_classes() == (["Fall", "Spin"], 0)
    many = tuple(f"c{i:02}" for i in range(20))
    first = replace(first, labels=many[::-1], segments=tuple((0.0, 1.0, c) for c in many[::-1]))
    row = timeline_rows(replace(dataset, classes=many, recordings=(first,)), [])[0]
    assert row.name == "clip_4 (c00, c01, c02, c03, c04 and 15 more)" and row.shown_classes() == (list(many[:5]), 15)


def test_rows_begin_where_the_first_snippet_begins(data: Path, trained: Path) -> None:
    dataset = open_dataset(data).subset("test")
    late = replace(dataset, recordings=(replace(dataset.recordings[0], first_snippet=0.25),))
    row = timeline_rows(late, [checkpoint_tracks(trained, "", late)])[0]
    assert row.first_snippet == 0.25 and row.duration == row.end() == 0.25 + 40 * 0.5


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
    assert "there is no subset 'val'" in fails(*plot, "--subset", "val")
    assert f"{missing}: no such folder" in fails(*plot, "--frames", missing)
    (tmp_path / "frames" / "clip_4").mkdir(parents=True)
    assert "holds no .jpg" in fails(*plot, "--frames", tmp_path / "frames")
    assert "clip_5: no such folder" in fails(*plot, "--frames", tmp_path / "frames", "--video", "clip_5")
    (tmp_path / "frames" / "clip_4" / "1.jpg").write_text("no image")
    assert "1.jpg: not a readable image" in fails(*plot, "--frames", tmp_path / "frames", "--video", "clip_4")
    assert "name it .png" in fails("plot", trained, "--data", data, "--out", tmp_path / "p.gif")
    run("plot", trained, "--data", data, "--out", missing / "p.png")  # the folder is made
    assert "cannot be written" in fails("plot", trained, "--data", data, "--out", missing / "p.png" / "q.png")
    missing = tmp_path / "nowhere"
    assert "nothing to draw" in fails("plot", "--data", data, *out)
    assert "--label is given 2 times for 1" in fails(*plot, "--label", "a", "--label", "b")
    assert str(missing) in fails("plot", missing, "--data", data, *out)
    assert str(missing) in fails("plot", trained, "--data", missing, *out)
    assert str(missing) in fails("plot", "--detections", missing, "--data", data, *out)
    assert "none of the recordings" in fails("plot", "--detections", detections, "--data", "simulated", *out)
    other = dataset_folder(tmp_path / "other", ("Fall", "Jump", "Swim"))
    assert "labelled 'Swim'" in fails("plot", trained, "--data", other, *out)
    wide = dataset_folder(tmp_path / "wide", width=10)
    assert "widths (4, 4)" in fails("plot", trained, "--data", wide, *out)
    assert not (tmp_path / "p.png").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(data: Path, detections: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    out = tmp_path / "locked" / "p.png"
    assert "cannot be written" in fails("plot", "--detections", detections, "--data", data, "--out", out)
