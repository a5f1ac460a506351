"""Situations from public reports, as a user types them: the right number, or one line that names the way out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from d2net.checkpoint import Checkpoint, save_checkpoint
from d2net.cli import app
from d2net.detections import read_detections
from d2net.model import D2Net
from d2net.recipes import load_recipe

SECONDS, FPS = 40.0, 30.0
CLASSES = ("Jump", "Spin")
SMALL = [
    *("--recipe", "watch", "--device", "cpu", "--set", "training.iterations=60", "--set", "training.ema_decay=0"),
    *("--set", "model.kernel_size=1", "--set", "training.batch_size=4", "--set", "model.embedding_dim=8"),
    *("--set", "model.dropout=0", "--set", "training.learning_rate=0.01"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "D2NET_DEBUG": None})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def fails(*arguments: object) -> str:
    """The one line of stderr with which a command ends with code 2."""
    lines = [line for line in run(*arguments, code=2).stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def segments(index: int) -> list[dict]:
    """Two actions of one class, at other seconds in every recording."""
    label = CLASSES[index % 2]
    return [{"label": label, "segment": [s + index / 2, s + index / 2 + 6]} for s in (4.0, 20.0)]


def features(index: int, stride: int, window: int) -> np.ndarray:
    """(T, 4): a snippet shows a class by how much of its window the class covers."""
    rng = np.random.default_rng(index)
    begin = np.arange(0, SECONDS * FPS - window + 1, stride)
    x = rng.normal(0, 0.05, (len(begin), 4)).astype(np.float32)
    for row in segments(index):
        start, end = (t * FPS for t in row["segment"])
        covered = (np.minimum(begin + window, end) - np.maximum(begin, start)).clip(0) / window
        x[:, CLASSES.index(row["label"])] += covered > 0.5
        x[:, 2] += 1 - (covered > 0.5)
    return x


def entry(subset: str, index: int, **extra: object) -> dict:
    return {"subset": subset, "annotations": segments(index), "duration": SECONDS, "fps": FPS, **extra}


def layout_three(folder: Path, *, stride: int = 15, window: int = 15, top: dict | None = None, **extra: object) -> Path:
    (folder / "features").mkdir(parents=True)
    database = {}
    for i in range(8):
        name = f"video_{i}"
        database[name] = entry("validation" if i < 6 else "test", i, **extra)
        np.save(folder / "features" / f"{name}.npy", features(i, stride, window))
    top = {"feat_stride": stride, "num_frames": window} if top is None else top
    (folder / "annotations.json").write_text(json.dumps({**top, "database": database}))
    return folder


def layout_two(folder: Path, name: str = "video_{}") -> Path:
    """Snippets of 16 frames at 25 fps."""
    database, splits = {}, {"train": [], "test": []}
    for i in range(8):
        subset = "train" if i < 6 else "test"
        splits[subset].append(name.format(i))
        database[name.format(i)] = {"subset": subset, "annotations": segments(i), "duration": SECONDS}
        x = features(i, 16, 16)[: int(SECONDS * 25 / 16)]
        for stream in ("rgb", "flow"):
            path = folder / "features" / subset / stream / f"{name.format(i)}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, x)
    for subset, names in splits.items():
        (folder / f"split_{subset}.txt").write_text("".join(f"{n}\n" for n in names))
    (folder / "gt.json").write_text(json.dumps({"database": database}))
    return folder


def knowing_model(path: Path) -> Path:
    """A network that knows what the features here mean, so that a detection is as exact as a snippet is."""
    recipe = load_recipe("watch").override(
        ["model.kernel_size=1", "model.embedding_dim=4", "localization.attention=false"]
    )
    model = D2Net.from_recipe(recipe.model, num_classes=2, stream_widths=(4,))
    stream = model.stream_a
    with torch.no_grad():
        for layer, weight, bias in (
            (stream.first, torch.eye(4), 0.0),
            (stream.second, torch.eye(4), 0.0),
            (stream.classifier, 20 * torch.eye(4)[:2], -10.0),
        ):
            layer.weight.copy_(weight[:, :, None])
            layer.bias.fill_(bias)
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    save_checkpoint(path, Checkpoint(recipe, CLASSES, (4,), 0, "made", 0, "0", tensors))
    return path


def errors(detections: Path, annotations: Path) -> np.ndarray:
    """(n, 2) seconds by which the best detection of every annotation is off."""
    found = json.loads(detections.read_text())["results"]
    database = json.loads(annotations.read_text())["database"]
    off = []
    for name, rows in found.items():
        for truth in database[name]["annotations"]:
            start, end = truth["segment"]
            near = [
                r
                for r in rows
                if r["label"] == truth["label"] and min(end, r["segment"][1]) - max(start, r["segment"][0]) > 2
            ]
            best = max(near, key=lambda r: r["score"])["segment"]
            off.append((best[0] - start, best[1] - end))
    return np.array(off)


@pytest.mark.parametrize(
    ("top", "options"),
    [
        ({"feat_stride": 15, "num_frames": 45}, []),
        ({"feat_stride": 15, "offset_frames": 22.5}, []),
        ({}, ["--stride", 15, "--window", 45]),
        ({"fps": 1, "num_frames": 45}, ["--seconds-per-snippet", 0.5, "--fps", 30]),
    ],
)
def test_a_window_longer_than_the_stride(tmp_path, top, options):
    """A snippet's time is that of its window: no detection is early by half the difference, half a second here."""
    data = layout_three(tmp_path / "data", stride=15, window=45, top=top)
    out = tmp_path / "det.json"
    run("localize", knowing_model(tmp_path / "m.safetensors"), "--data", data, "--out", out, *options)
    off = errors(out, data / "annotations.json")
    assert len(off) == 4 and np.abs(off).max() < 0.26  # half a snippet


def test_a_json_without_a_stride(tmp_path):
    data = layout_three(tmp_path / "data", top={})
    train = ["train", "--data", data, "--out", tmp_path / "run", *SMALL]
    assert "the stride of the features is not known" in (text := fails(*train)) and "--stride N" in text
    assert "80 snippets of 0.1333 s" in (text := fails(*train, "--stride", 4)) and "0.5 s per snippet would fit" in text
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()
    text = run(*train, "--stride", 15).stdout
    assert "a snippet is 0.5 s" in text and "--stride 15" in text.splitlines()[-1]
    (data / "annotations.json").rename(tmp_path / "old.json")
    old = json.loads((tmp_path / "old.json").read_text())
    (data / "annotations.json").write_text(json.dumps({"feat_stride": 15, **old}))
    out = tmp_path / "det.json"
    run("localize", knowing_model(tmp_path / "m.safetensors"), "--data", data, "--out", out)
    assert np.abs(errors(out, data / "annotations.json")).max() < 0.26


@pytest.mark.parametrize("mark", ["Ambiguous", "ambiguous", "AMBIGUOUS "])
def test_ambiguous_is_a_mark_and_no_class(tmp_path, mark):
    doubtful = {"label": mark, "segment": [0.2, 1.2], "label_id": 20}
    data = layout_three(tmp_path / "data")
    annotations = data / "annotations.json"
    table = json.loads(annotations.read_text())
    for video in table["database"].values():
        video["annotations"].insert(0, doubtful)
    annotations.write_text(json.dumps(table))
    text = run("train", "--data", data, "--out", tmp_path / "run", *SMALL, "--set", "training.iterations=2").stdout
    assert "2 classes" in text and "6 marked as ambiguous" in text
    assert json.loads((tmp_path / "run" / "checkpoint.json").read_text())["classes"] == list(CLASSES)

    perfect = {
        name: [{**row, "score": 0.9} for row in video["annotations"] if row is not doubtful and row["label"] in CLASSES]
        for name, video in table["database"].items()
        if video["subset"] == "test"
    }
    found = tmp_path / "det.json"
    found.write_text(json.dumps({"results": perfect}))
    for protocol in ("activitynet", "wtalc"):
        text = run("evaluate", found, "--annotations", annotations, "--protocol", protocol, "--tiou", "0.5").stdout
        # mAP, its average and F1: the first line of numbers
        first = next(line for line in text.splitlines() if "100.0" in line)
        assert first.count("100.0") == 3 and "ambiguous segments: 2" in text


def wtalc(folder: Path) -> Path:
    """Six classes, of which two have segments; ambiguous segments; a test list of its own, in which one video lacks."""

    def objects(rows: list) -> np.ndarray:
        array = np.empty(len(rows), dtype=object)
        array[:] = rows
        return array

    notes = folder / "Toy-Annotations"
    notes.mkdir(parents=True)
    names = [f"video_{'validation' if i < 6 else 'test'}_{i:07d}" for i in range(10)]
    rows = [segments(i) for i in range(10)]
    np.save(folder / "Toy-I3D-JOINTFeatures.npy", objects([features(i, 16, 16)[:62] for i in range(10)]))
    np.save(notes / "videoname.npy", np.array(names, dtype="S"))
    np.save(notes / "subset.npy", np.array(["validation"] * 6 + ["test"] * 4, dtype="S"))
    np.save(notes / "classlist.npy", np.array(["Archery", "Jump", "Knit", "Spin", "Yoga", "Zip"], dtype="S"))
    np.save(notes / "duration.npy", np.full((10, 1), SECONDS))
    np.save(notes / "labels.npy", objects([[r["label"] for r in x] for x in rows]))
    np.save(notes / "labels_all.npy", objects([["Jump", "Knit"] if i < 2 else [CLASSES[i % 2]] for i in range(10)]))
    np.save(notes / "segments.npy", objects([[r["segment"] for r in x] for x in rows]))
    official = {c: [] for c in ("Archery", "Jump", "Knit", "Spin", "Yoga", "Zip")}
    for i in (6, 7, 8):  # not video 9
        for r in rows[i]:
            official[r["label"]].append([f"{i:07d}", r["segment"][0] / SECONDS, r["segment"][1] / SECONDS])
    np.save(notes / "test_gt_segments.npy", objects([np.array(x, object) for x in official.values()]))
    (notes / "Ambiguous_test.txt").write_text(f"{names[6]} 30.0 34.0\n{names[7]}  0.5 1.5\n")
    return folder


def test_one_number_on_every_path(tmp_path):
    """The annotation folder, the dataset folder, what convert wrote, its JSON, --eval-every: one ground truth."""
    data = wtalc(tmp_path / "data")
    plain = tmp_path / "plain"
    trust = "--trust-pickle"
    run("convert", data, plain, trust)
    settings = [*SMALL, "--set", "evaluation.protocol=wtalc", "--set", "evaluation.tiou=[0.3, 0.5]"]
    result = run("train", "--data", plain, "--out", tmp_path / "run", *settings, "--eval-every", 60)
    logged = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert f"iteration 60: mAP@0.3 {logged['map']['0.3']:.1f}, mAP@0.5" in result.stderr

    out = tmp_path / "det.json"
    text = run("localize", tmp_path / "run", "--data", plain, "--out", out).stdout
    assert "of 4 recordings (test)" in text
    results = json.loads(out.read_text())
    name = next(iter(results["results"]))
    results["results"][name].append({"label": "Spin", "score": 0.99, "segment": [31.0, 33.0]})  # touches a doubtful one
    spoiled = tmp_path / "spoiled.json"
    spoiled.write_text(json.dumps(results))

    numbers = {}
    for detections in (out, spoiled):
        for place in (data / "Toy-Annotations", data, plain, plain / "gt.json"):
            target = tmp_path / "numbers.json"
            options = [trust] if place in (data / "Toy-Annotations", data) else []
            command = ["evaluate", detections, "--annotations", place, "--protocol", "wtalc", "--tiou", "0.3,0.5"]
            text = run(*command, "--json", target, *options).stdout
            assert "ambiguous segments: 2" in text and "without ground truth, not in the mean: 4 classes" in text
            numbers[detections.name, str(place)] = json.loads(target.read_text())["map"]
    assert len({json.dumps(n) for n in numbers.values()}) == 1 and logged["map"] == numbers["det.json", str(plain)]
    assert json.loads((plain / "gt.json").read_text())["classes"] == ["Archery", "Jump", "Knit", "Spin", "Yoga", "Zip"]


@pytest.mark.parametrize("where", ["classlist and labels", "labels", "test segments"])
def test_ambiguous_in_the_pickles_is_a_mark_too(tmp_path, where):
    folder = wtalc(tmp_path / "data") / "Toy-Annotations"
    (folder / "Ambiguous_test.txt").unlink()

    def change(name: str, edit) -> None:
        array = np.load(folder / name, allow_pickle=True)
        np.save(folder / name, edit(array), allow_pickle=True)

    def with_row(index: int, value):
        def edit(array):
            array[index] = [*array[index], value]
            return array

        return edit

    if where != "labels":
        change("classlist.npy", lambda a: np.append(a, np.array(["Ambiguous"], dtype="S")))
        official = np.load(folder / "test_gt_segments.npy", allow_pickle=True)
        array = np.empty(7, dtype=object)
        array[:6] = official
        array[6] = np.array([["0000006", 0.75, 0.85]], object) if where == "test segments" else np.zeros((0, 3))
        np.save(folder / "test_gt_segments.npy", array, allow_pickle=True)
    if where != "test segments":
        (folder / "test_gt_segments.npy").unlink()
        change("labels.npy", with_row(6, "ambiguous"))
        change("segments.npy", with_row(6, [30.0, 34.0]))
    found = tmp_path / "det.json"
    results = {f"video_test_{i:07d}": [{**r, "score": 0.9} for r in segments(i)] for i in (6, 7, 8)}
    results["video_test_0000006"].append({"label": "Spin", "score": 0.99, "segment": [31.0, 33.0]})
    found.write_text(json.dumps({"results": results}))
    text = run(
        "evaluate", found, "--annotations", folder, "--protocol", "wtalc", "--trust-pickle", "--tiou", 0.5
    ).stdout
    assert "ambiguous segments: 1; 1 detection touching one dropped" in text


def test_titles_are_no_markup(tmp_path):
    data = layout_three(tmp_path / "data")
    found = tmp_path / "det[b].json"
    row = {"label": "Jump", "score": 0.9, "segment": [7, 13]}
    found.write_text(json.dumps({"results": {"video_6": [row]}}))
    assert "det[b].json" in run("evaluate", found, "--annotations", data).stdout
    assert "is a file that is read here" in fails("evaluate", found, "--annotations", data, "--json", found)


def test_missing_feature_files(tmp_path):
    data = layout_two(tmp_path / "data")
    for stream in ("rgb", "flow"):
        (data / "features" / "train" / stream / "video_2.npy").unlink()
    (data / "features" / "test" / "flow" / "video_7.npy").unlink()
    train = ["train", "--data", data, "--out", tmp_path / "run", *SMALL, "--set", "training.iterations=2"]
    result = run(*train)
    assert "left out: 1 of 6 recordings" in result.stderr and "video_2 (train): " in result.stderr
    assert "5 recordings" in result.stdout
    assert (
        "video_2.npy: no such feature file" in (text := fails(*train, "--strict", "--overwrite")) and "--strict" in text
    )

    # Only the test features were downloaded.
    import shutil

    shutil.rmtree(data / "features" / "train")
    out = tmp_path / "det.json"
    result = run("localize", tmp_path / "run", "--data", data, "--out", out)
    assert list(json.loads(out.read_text())["results"]) == ["video_6"] and "video_7 (test)" in result.stderr
    assert "not listed in the detections: 1 of 2" in run("evaluate", out, "--annotations", data).stdout
    assert "none of the 6 recordings of subset 'train' has usable features" in fails(*train, "--overwrite")


@pytest.mark.parametrize("name", ["Home 3 - 0 Away {}", "ключ {}", "  {} [x]", "50% {}"])
def test_names(tmp_path, name):
    data = layout_two(tmp_path / "data", name)
    run("train", "--data", data, "--out", tmp_path / "run", *SMALL, "--set", "training.iterations=2")
    run("convert", data, tmp_path / "plain")
    for place in (data, tmp_path / "plain"):
        out = tmp_path / "det.json"
        run("localize", tmp_path / "run", "--data", place, "--out", out, "--subset", "all")
        assert set(read_detections(out).videos) == {name.format(i) for i in range(8)}
        run("evaluate", out, "--annotations", place, "--subset", "train,test")


def test_out_is_checked_before_anything_is_computed(tmp_path):
    data = layout_two(tmp_path / "data")
    run("train", "--data", data, "--out", tmp_path / "run", *SMALL, "--set", "training.iterations=2")
    out = tmp_path / "results" / "first" / "det.json"
    run("localize", tmp_path / "run", "--data", data, "--out", out)
    assert out.exists()
    file = tmp_path / "file"
    file.write_text("")
    nowhere = (
        tmp_path / "no-such-data"
    )  # the data come second, so an error about --out says that it was looked at first
    for command in (
        ["train", "--data", nowhere, "--out", file, *SMALL],
        ["localize", tmp_path / "run", "--data", nowhere, "--out", file / "det.json"],
        ["localize", tmp_path / "run", "--data", nowhere, "--out", tmp_path],
        ["plot", tmp_path / "run", "--data", nowhere, "--out", file / "x.png"],
        ["convert", nowhere, file],
        ["evaluate", nowhere, "--annotations", nowhere, "--json", file / "x.json"],
        ["study", "ablation", "--data", nowhere, "--recipe", "watch", "--out", file],
        ["study", "condition-number", "--data", nowhere, "--out", file],
        ["demo", "--out", file],
    ):
        text = fails(*command)
        assert any(word in text for word in ("cannot be written", "not an ordinary file", "holds other files")), text


@pytest.mark.parametrize("subset", ["A,B", "all", "a, b"])
def test_several_subsets(tmp_path, subset):
    data = layout_three(tmp_path / "data")
    path = data / "annotations.json"
    table = json.loads(path.read_text())
    for i, video in enumerate(table["database"].values()):
        video["subset"] = "AB"[i % 2]
    path.write_text(json.dumps(table))
    train = ["train", "--data", data, "--out", tmp_path / "run", *SMALL, "--set", "training.iterations=2"]
    assert "has subsets A, B; choose one with --subset" in fails(*train)
    assert "there is no subset 'C'; there are A, B" in fails(*train, "--subset", "C")
    run(*train, "--subset", "A")
    text = run("localize", tmp_path / "run", "--data", data, "--out", tmp_path / "d.json", "--subset", subset).stdout
    assert "of 8 recordings (A, B)" in text


def test_activitynet_needs_no_flags(tmp_path):
    """It tests on validation: its testing has no annotations."""
    data = layout_three(tmp_path / "data")
    path = data / "annotations.json"
    table = json.loads(path.read_text())
    for i, video in enumerate(table["database"].values()):
        video["subset"] = "training" if i < 4 else "validation" if i < 6 else "testing"
        video["annotations"] = video["annotations"] if i < 6 else []
    path.write_text(json.dumps(table))
    run("train", "--data", data, "--out", tmp_path / "run", *SMALL, "--eval-every", 30)
    text = run("localize", tmp_path / "run", "--data", data, "--out", tmp_path / "d.json").stdout
    assert "of 2 recordings (validation)" in text
    assert "against 2 recordings" in run("evaluate", tmp_path / "d.json", "--annotations", path).stdout
    train = ["train", "--data", data, "--out", tmp_path / "run", *SMALL, "--overwrite", "--eval-every", 30]
    assert "testing" in (text := fails(*train, "--eval-subset", "testing")) and "no segment" in text


def test_background_alone_is_legal_where_the_recipe_says_so(tmp_path):
    data = layout_three(tmp_path / "data")
    path = data / "annotations.json"
    table = json.loads(path.read_text())
    for name in ("video_0", "video_3", "video_4"):
        table["database"][name]["annotations"] = []
    path.write_text(json.dumps(table))
    train = ["train", "--data", data, "--out", tmp_path / "run", *SMALL, "--set", "training.batch_size=2"]
    assert "3 of the 6 have none" in (text := fails(*train)) and "loss.skip_unlabelled=true" in text
    run(*train, "--set", "loss.skip_unlabelled=true")
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("High Jump", "HighJump"), "'High Jump' (4 recordings) and 'HighJump' (4 recordings) are probably one"),
        (("high_jump", "High Jump"), "are probably one"),
        (("Spin", "spin "), "are probably one"),
    ],
)
def test_labels_that_are_nearly_the_same(tmp_path, labels, message):
    data = layout_three(tmp_path / "data")
    path = data / "annotations.json"
    table = json.loads(path.read_text())
    for i, video in enumerate(table["database"].values()):
        for row in video["annotations"]:
            row["label"] = labels[i % 2]
    path.write_text(json.dumps(table))
    text = fails("train", "--data", data, "--out", tmp_path / "run", *SMALL)
    assert message in text and "everywhere" in text
    assert "are probably one" in run("inspect", data, code=1).stdout


def test_bmn_in_two_files(tmp_path):
    data = layout_three(tmp_path / "data")
    table = json.loads((data / "annotations.json").read_text())["database"]
    (data / "annotations.json").unlink()
    for subset, word in (("validation", "train"), ("test", "val")):
        videos = {
            f"v_{name}": {
                "duration_second": SECONDS,
                "duration_frame": SECONDS * FPS,
                "feature_frame": SECONDS * FPS,
                "annotations": video["annotations"],
            }
            for name, video in table.items()
            if video["subset"] == subset
        }
        (data / f"anet_anno_{word}.json").write_text(json.dumps(videos))
    run("train", "--data", data, "--out", tmp_path / "run", *SMALL)
    out = tmp_path / "det.json"
    text = run(
        "localize", tmp_path / "run", "--data", data, "--out", out, "--set", "localization.attention=false"
    ).stdout
    assert "of 2 recordings (validation)" in text
    assert "against 2 recordings" in run("evaluate", out, "--annotations", data).stdout
    (data / "anet_anno_val.json").rename(data / "mine.json")
    assert "end the name of the file in _train, _val or _test" in fails(
        "evaluate", out, "--annotations", data / "mine.json"
    )


def test_bmn_whose_videos_name_their_subsets(tmp_path):
    data = layout_three(tmp_path / "data")
    table = json.loads((data / "annotations.json").read_text())["database"]
    for i, video in enumerate(table.values()):
        video["subset"] = "training" if i < 5 else "validation"
        video |= {"duration_second": SECONDS, "duration_frame": SECONDS * FPS, "feature_frame": SECONDS * FPS}
    (data / "annotations.json").write_text(json.dumps(table))
    text = run("inspect", data).stdout
    assert "training: 5 recordings" in text and "validation: 3 recordings" in text


def test_durations_that_are_ignored_cut_no_detection(tmp_path):
    data = layout_three(tmp_path / "data", duration=4.0)
    model, out = knowing_model(tmp_path / "m.safetensors"), tmp_path / "det.json"
    assert "--ignore-durations" in fails("localize", model, "--data", data, "--out", out)
    result = run("localize", model, "--data", data, "--out", out, "--ignore-durations")
    assert "the durations of 2 recordings do not fit and are ignored" in result.stderr
    assert np.abs(errors(out, data / "annotations.json")).max() < 0.26
    run("convert", data, tmp_path / "plain", "--ignore-durations")
    run("localize", model, "--data", tmp_path / "plain", "--out", out)
    assert np.abs(errors(out, data / "annotations.json")).max() < 0.26
    assert "nothing suspicious" in run("inspect", data, "--ignore-durations").stdout


def test_detections_as_csv(tmp_path):
    data = layout_three(tmp_path / "data")
    run("train", "--data", data, "--out", tmp_path / "run", *SMALL)
    numbers = []
    for name in ("d.json", "d.csv"):
        run("localize", tmp_path / "run", "--data", data, "--out", tmp_path / name)
        run("evaluate", tmp_path / name, "--annotations", data, "--json", tmp_path / "n.json")
        numbers.append(json.loads((tmp_path / "n.json").read_text())["map"])
    assert numbers[0] == numbers[1]
    assert (tmp_path / "d.csv").read_text().splitlines()[0] == "recording,label,start,end,score"


# --- d2net inspect ---


def test_inspect_says_what_there_is(tmp_path):
    text = run("inspect", layout_three(tmp_path / "data")).stdout
    for part in (
        "8 recordings, one stream of 4",
        "validation: 6 recordings, 80 / 80 / 80 snippets (shortest / median / longest); 6 labelled, 12 segments",
        "a snippet is 0.5 s; 5.3 minutes in all",
        "2 classes and their recordings in test: Jump 1, Spin 1",
        "nothing suspicious",
    ):
        assert part in text, text


def spoil(data: Path, what: str) -> None:
    folder, path = data / "features", data / "annotations.json"
    table = json.loads(path.read_text())
    videos = table["database"]
    x = np.load(folder / "video_1.npy")
    if what == "missing":
        (folder / "video_1.npy").unlink()
    elif what == "nan":
        x[3, 1] = np.nan
    elif what == "constant":
        x[:] = 1
    elif what == "zero":
        x[:] = 0
    elif what == "repeated":
        x = np.load(folder / "video_3.npy")
    elif what == "short":
        x = x[:40]
    elif what == "width":
        x = x[:, :3]
    elif what == "truncated":
        content = (folder / "video_1.npy").read_bytes()
        (folder / "video_1.npy").write_bytes(content[:-9])
    elif what == "unused":
        np.save(folder / "video_99.npy", x)
    elif what == "class":
        videos["video_1"]["annotations"].append({"label": "Dive", "segment": [1, 2]})
    elif what == "listed":
        table["classes"] = [*CLASSES, "Never"]
    elif what == "late":
        videos["video_1"]["annotations"][0]["segment"] = [39, 47]
    elif what == "unlabelled":
        videos["video_1"]["annotations"] = []
    if what in ("nan", "constant", "zero", "repeated", "short", "width"):
        np.save(folder / "video_1.npy", x)
    path.write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "video_1 (validation): "),
        ("nan", "features of 'video_1' hold NaN or Inf (first at snippet 3)"),
        ("constant", "1 recordings have the same features in every snippet: 'video_1'"),
        ("zero", "every feature is 0"),
        ("repeated", "recordings with the very same features: 'video_1', 'video_3'"),
        ("short", "'video_1' has 40 snippets of 0.5 s, 20 s in all, but lasts 40 s"),
        ("width", "video_1.npy: has shape (80, 3), expected (T, 4)"),
        ("truncated", "video_1.npy: not a readable .npy file, truncated perhaps"),
        ("unused", "1 feature files belong to no recording: 'video_99.npy'"),
        ("class", "1 classes occur in validation and not in test: 'Dive'"),
        ("listed", "1 classes are listed and occur in no recording: 'Never'"),
        ("late", "1 segment past the end of the recording: one of 'video_1' ends at 47 s"),
        ("unlabelled", "1 of the recordings of validation have no label: 'video_1'"),
    ],
)
def test_inspect_finds_what_is_wrong(tmp_path, what, message):
    data = layout_three(tmp_path / "data")
    spoil(data, what)
    text = run("inspect", data, code=1).stdout
    assert message in text.partition("suspicious:")[2], text


def test_inspect_asks_once_for_a_time_that_is_not_known(tmp_path):
    data = layout_three(tmp_path / "data", top={})
    text = run("inspect", data, code=1).stdout
    assert text.count("--stride N") == 1 and "8 of 8 recordings have no known time" in text
    assert "nothing suspicious" in run("inspect", data, "--stride", 15).stdout


def test_what_d2net_made_knows_its_time(tmp_path):
    text = fails("train", "--data", "simulated", "--stride", 8, "--out", tmp_path / "run", *SMALL)
    assert "is made by d2net, which knows all about it; leave --stride out" in text
