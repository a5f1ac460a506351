"""Every layout on disk, in small, and every way in which one can be broken."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d2net.data import Times, convert, open_dataset, read_annotations, simulate, train_and_test
from d2net.errors import InputError

WIDTH = 4
SEGMENTS = {"v1": [(0.5, 3.0, "run")], "v2": [(1.0, 2.0, "jump"), (4.0, 5.0, "run")], "t1": [(0.0, 2.0, "jump")]}
SUBSETS = {"v1": "train", "v2": "train", "t1": "test"}
LENGTHS = {"v1": 9, "v2": 12, "t1": 5}


def features(name: str, width: int = WIDTH) -> np.ndarray:
    rng = np.random.default_rng(LENGTHS[name])
    return rng.random((LENGTHS[name], width), dtype=np.float32)


def database(**extra: object) -> dict:
    return {
        name: {
            "subset": SUBSETS[name],
            "annotations": [{"segment": [str(s), str(e)], "label": label} for s, e, label in rows],
            **extra,
        }
        for name, rows in SEGMENTS.items()
    }


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def write_json(path: Path, **top: object) -> None:
    path.write_text(json.dumps(top))


def objects(rows: list) -> np.ndarray:
    array = np.empty(len(rows), dtype=object)
    array[:] = rows
    return array


@pytest.fixture
def cola(tmp_path) -> Path:
    for name, subset in SUBSETS.items():
        rgb, flow = np.split(features(name), 2, axis=1)
        save(tmp_path / "features" / subset / "rgb" / f"{name}.npy", rgb)
        save(tmp_path / "features" / subset / "flow" / f"{name}.npy", flow)
    write_json(tmp_path / "gt.json", database=database())
    (tmp_path / "split_train.txt").write_text("v1\nv2\n")
    (tmp_path / "split_test.txt").write_text("t1\n")
    return tmp_path


@pytest.fixture
def actionformer(tmp_path) -> Path:
    for name in SUBSETS:
        save(tmp_path / "i3d" / f"{name}.npy", features(name))
    write_json(tmp_path / "tiny.json", stride=4, streams=[2, 2], database=database(fps=30.0))
    return tmp_path


@pytest.fixture
def wtalc(tmp_path) -> Path:
    names = list(SUBSETS)
    folder = tmp_path / "Tiny-Annotations"
    save(tmp_path / "Tiny-I3D-JOINTFeatures.npy", objects([features(n) for n in names]))
    save(folder / "videoname.npy", np.array(names, dtype="S"))
    save(folder / "subset.npy", np.array([{"train": b"validation", "test": b"test"}[SUBSETS[n]] for n in names]))
    save(folder / "classlist.npy", np.array([b"run", b"jump"]))
    save(folder / "duration.npy", np.array([[LENGTHS[n] * 0.64 + 0.5] for n in names]))
    save(folder / "extracted_fps.npy", np.array([10] * 3))
    save(folder / "labels.npy", objects([[label.encode() for *_, label in SEGMENTS[n]] for n in names]))
    save(folder / "labels_all.npy", objects([[label for *_, label in SEGMENTS[n]] for n in names]))
    save(folder / "segments.npy", objects([[[s, e] for s, e, _ in SEGMENTS[n]] for n in names]))
    return tmp_path


def fails(pattern: str, spec: str | Path, **options: object) -> None:
    """Opening must raise one line that matches."""
    with pytest.raises(InputError, match=pattern) as caught:
        open_dataset(spec, **options)
    assert "\n" not in str(caught.value)


def check_content(dataset, seconds: float) -> None:
    assert dataset.stream_widths == (2, 2)
    assert {r.name for r in dataset.recordings} == set(SUBSETS)
    for i, r in enumerate(dataset.recordings):
        np.testing.assert_array_equal(dataset.features(i), features(r.name))
        assert list(r.segments) == SEGMENTS[r.name]
        assert set(r.labels) == {label for *_, label in SEGMENTS[r.name]}
        assert r.seconds_per_snippet == seconds


# --- the layouts as they should be ---


def test_cola(cola):
    dataset = open_dataset(cola)
    check_content(dataset, 16 / 25)
    assert dataset.subsets == ("train", "test") and dataset.classes == ("jump", "run")
    assert len(open_dataset(cola / "gt.json")) == 3
    assert open_dataset(str(cola), subsets=["test"]).subsets == ("test",)


def test_cola_stride_and_other_annotations(cola, tmp_path):
    other = tmp_path / "other.json"
    write_json(other, fps=30, stride=8, database=database())
    assert open_dataset(cola, annotations=other).recordings[0].seconds_per_snippet == 8 / 30


def test_cola_test_video_without_annotation_stays(cola):
    rows = database()
    del rows["t1"]
    write_json(cola / "gt.json", database=rows)
    (recording,) = open_dataset(cola).subset("test").recordings
    assert recording.labels == () and recording.segments == ()


def test_cola_flow_may_be_one_snippet_shorter(cola):
    save(cola / "features/train/flow/v1.npy", features("v1")[:-1, 2:])
    assert open_dataset(cola).features(0).shape == (8, WIDTH)
    save(cola / "features/train/flow/v1.npy", features("v1")[:-2, 2:])
    fails(r"flow/v1\.npy: has 7 snippets but rgb/v1\.npy has 9; extract", cola)


def test_cola_half_precision_and_uneven_widths(cola):
    for name, subset in SUBSETS.items():
        save(cola / "features" / subset / "rgb" / f"{name}.npy", features(name, 6).astype(np.float16))
    dataset = open_dataset(cola)
    assert dataset.stream_widths == (6, 2) and dataset.features(0).dtype == np.float32


def test_actionformer(actionformer):
    for spec in (actionformer, actionformer / "tiny.json"):
        dataset = open_dataset(spec)
        check_content(dataset, 4 / 30)
    assert open_dataset(actionformer, times=Times(stride=16)).recordings[0].seconds_per_snippet == 16 / 30
    by_folder = open_dataset(actionformer / "i3d", annotations=actionformer / "tiny.json")
    check_content(by_folder, 4 / 30)


def test_actionformer_label_ids_order_the_classes(actionformer):
    rows = database(fps=30.0, feat_stride=8)
    for entry in rows.values():
        for row in entry["annotations"]:
            row["label_id"] = {"run": 0, "jump": 7}[row["label"]]
    write_json(actionformer / "tiny.json", database=rows)
    dataset = open_dataset(actionformer)
    assert dataset.classes == ("run", "jump") and dataset.recordings[0].seconds_per_snippet == 8 / 30


def test_actionformer_fps_from_frame_count(actionformer):
    write_json(actionformer / "tiny.json", stride=16, database=database(frame=150, duration=6.0))
    recording = open_dataset(actionformer, subsets=["train"]).recordings[0]
    assert (recording.seconds_per_snippet, recording.duration) == (16 / 25, 6.0)


def test_wtalc(wtalc):
    for spec in (wtalc, wtalc / "Tiny-I3D-JOINTFeatures.npy"):
        dataset = open_dataset(spec, trust_pickle=True)
        check_content(dataset, 16 / 25)
    assert dataset.name == "Tiny" and dataset.classes == ("run", "jump")
    assert dataset.subsets == ("validation", "test")
    assert train_and_test(dataset.subsets) == ("validation", "test")


def test_labels_are_labels_all_not_those_of_the_segments(wtalc):
    save(wtalc / "Tiny-Annotations/labels_all.npy", objects([["run"], ["jump"], []]))
    assert [r.labels for r in open_dataset(wtalc, trust_pickle=True).recordings] == [("run",), ("jump",), ()]


def test_watch_is_embedded():
    pytest.importorskip("d2net.data.watch")
    assert {"train", "test"} <= set(open_dataset("watch").subsets)


@pytest.mark.parametrize(
    ("subsets", "expected"),
    [
        (("test", "train"), ("train", "test")),
        (("Validation", "Test"), ("Validation", "Test")),
        (("training", "validation", "testing"), ("training", "testing")),  # of which nothing says that it has segments
        (("training", "validation"), ("training", "validation")),
        (("test",), (None, "test")),
        (("mine",), (None, "mine")),
        (("a", "b"), (None, None)),
    ],
)
def test_train_and_test(subsets, expected):
    assert train_and_test(subsets) == expected


def test_a_subset_with_segments_is_tested_on():
    """ActivityNet's ``testing`` has no annotations."""
    subsets = ("training", "validation", "testing")
    assert train_and_test(subsets, {"training", "validation"}) == ("training", "validation")
    assert train_and_test(subsets, set(subsets)) == ("training", "testing")


# --- conversion ---


def test_convert_keeps_everything(wtalc, tmp_path):
    calls = []
    result = convert(wtalc, tmp_path / "out", trust_pickle=True, progress=lambda *a: calls.append(a))
    check_content(result, 16 / 25)
    assert calls == [(1, 3), (2, 3), (3, 3)]
    source = open_dataset(wtalc, trust_pickle=True)
    assert (result.name, result.classes, result.subsets) == (source.name, source.classes, ("train", "test"))
    assert [r.duration for r in result.recordings] == [r.duration for r in source.recordings]
    assert json.loads((tmp_path / "out/gt.json").read_text())["database"]["v1"]["seconds_per_snippet"] == 0.64


def test_convert_keeps_labels_that_differ_from_the_segments(wtalc, tmp_path):
    save(wtalc / "Tiny-Annotations/labels_all.npy", objects([["jump"], ["jump"], []]))
    result = convert(wtalc, tmp_path / "out", trust_pickle=True)
    assert [r.labels for r in result.recordings] == [("jump",), ("jump",), ()]
    assert [list(r.segments) for r in result.recordings] == list(SEGMENTS.values())


def test_convert_keeps_the_time_of_a_snippet(actionformer, tmp_path):
    for fps in (30.0, 29.97002997002997, 23.976, 0.1 + 0.2):
        write_json(actionformer / "tiny.json", stride=4, streams=[2, 2], database=database(fps=fps))
        check_content(convert(actionformer, tmp_path / f"out{fps}"), 4 / fps)


def test_convert_simulated_says_so(tmp_path):
    source = simulate(stream_widths=(3, 2))
    result = convert(source, tmp_path / "out")
    assert "simulated" in result.name and result.stream_widths == (3, 2)
    np.testing.assert_array_equal(result.features(7), source.features(7))


def test_convert_appears_whole_or_not_at_all(cola, tmp_path):
    out = tmp_path / "made" / "out"

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(cola, out, progress=stop)
    assert not list(out.parent.iterdir())
    check_content(convert(cola, out), 16 / 25)
    with pytest.raises(KeyboardInterrupt):
        convert(cola, out, progress=stop)
    check_content(open_dataset(out), 16 / 25)


def test_convert_keeps_nothing_stale(cola, tmp_path):
    out = tmp_path / "out"
    convert(cola, out)
    save(cola / "features/train/rgb/v1.npy", features("v1")[:, :2] + 1)
    (cola / "split_train.txt").write_text("v1\n")
    result = convert(cola, out)
    assert [r.name for r in result.recordings] == ["v1", "t1"]
    np.testing.assert_array_equal(result.features(0)[:, :2], features("v1")[:, :2] + 1)
    assert not list(out.rglob("v2.npy")) and not list(out.rglob(".*"))


def test_convert_keeps_the_annotations_of_what_has_no_features(actionformer, tmp_path):
    """An evaluation on the converted data must miss the recording as one on the source does."""
    save(actionformer / "i3d" / "t2.npy", features("t1"))
    rows = database(fps=30.0)
    rows["t2"] = rows["t1"]
    write_json(actionformer / "tiny.json", stride=4, streams=[2, 2], database=rows)
    (actionformer / "i3d" / "t1.npy").unlink()
    with pytest.warns(UserWarning, match="'t1'"):
        source = open_dataset(actionformer)
    result = convert(source, tmp_path / "out")
    assert [r.name for r in result.left_out] == ["t1"] and len(result) == 3
    assert len(read_annotations(tmp_path / "out")) == len(read_annotations(actionformer)) == 5
    assert read_annotations(tmp_path / "out", subset="test").videos == ("t2", "t1")
    save(tmp_path / "out/features/test/rgb/t1.npy", features("t1")[:, :2])
    save(tmp_path / "out/features/test/flow/t1.npy", features("t1")[:, 2:])
    assert {r.seconds_per_snippet for r in open_dataset(tmp_path / "out").recordings} == {4 / 30}


def test_features_that_are_a_link_to_nowhere_are_called_so(actionformer):
    path = actionformer / "i3d" / "t1.npy"
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.warns(UserWarning, match=r"t1\.npy: a symbolic link that leads nowhere"):
        open_dataset(actionformer)


@pytest.mark.parametrize("digits", [20, 200, 300, 5000])
@pytest.mark.parametrize("where", ["duration", "segment"])
def test_times_of_many_digits_are_refused(actionformer, where, digits):
    text = (actionformer / "tiny.json").read_text()
    content = json.loads(text)
    entry = content["database"]["t1"]
    if where == "duration":
        entry["duration"] = "9" * digits
    else:
        entry["annotations"][0]["segment"][1] = "9" * digits
    write_json(actionformer / "tiny.json", **content)
    with pytest.raises(InputError, match=f"tiny.json: video 't1'.*{where}.* (which no recording lasts|not a finite)"):
        open_dataset(actionformer)


@pytest.mark.parametrize(
    "times", [Times(fps=1e200, stride=16), Times(fps=1e-200, stride=16), Times(stride=1e300, fps=1)]
)
def test_snippets_of_no_length_or_endless_are_refused(actionformer, times):
    with pytest.raises(InputError, match="a snippet would be .*; mend stride and fps"):
        open_dataset(actionformer, times=times, check_durations=False)


@pytest.mark.parametrize("dead", ["x", "v_x"])
def test_convert_keeps_what_is_left_out_beside_one_of_a_like_name(tmp_path, dead):
    (tmp_path / "in" / "features").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("x", "v_x"):
        x = rng.random((10, 4), np.float32) + 0.1
        np.save(tmp_path / "in" / "features" / f"{name}.npy", x * (name != dead))
    entry = {"subset": "test", "annotations": [{"segment": [0, 1], "label": "a"}]}
    database = {"x": entry, "v_x": entry}
    (tmp_path / "in" / "gt.json").write_text(json.dumps({"fps": 16, "stride": 16, "database": database}))
    result = convert(tmp_path / "in", tmp_path / "out")
    assert [r.name for r in result.left_out] == [dead] and {"x", "v_x"} == {dead, *(r.name for r in result.recordings)}


def test_convert_keeps_the_given_time_of_what_has_no_features(actionformer, tmp_path):
    write_json(actionformer / "tiny.json", streams=[2, 2], database=database())
    (actionformer / "i3d" / "v2.npy").unlink()
    with pytest.warns(UserWarning):
        convert(open_dataset(actionformer, times=Times(fps=30, stride=4, window=8)), tmp_path / "out")
    for stream in ("rgb", "flow"):
        save(tmp_path / f"out/features/train/{stream}/v2.npy", features("v2")[:, :2])
    found = open_dataset(tmp_path / "out").recordings
    assert {(round(r.seconds_per_snippet, 9), round(r.first_snippet, 9)) for r in found} == {
        (round(4 / 30, 9), round(2 / 30, 9))
    }


def test_another_time_for_a_converted_dataset_is_said(actionformer, tmp_path):
    write_json(actionformer / "tiny.json", stride=4, window=8, streams=[2, 2], database=database(fps=30))
    convert(actionformer, tmp_path / "out")
    dataset = open_dataset(tmp_path / "out", times=Times(fps=25, stride=4))
    assert any("the first snippet of 3 recordings begins, in seconds: not used" in note for note in dataset.notes)
    assert not open_dataset(tmp_path / "out").notes


def test_a_part_of_the_convention_is_said_alone(cola):
    assert "taken to have a stride of 16 frames and 25 fps" in open_dataset(cola).notes[0]
    assert "taken to have a stride of 16 frames, as" in open_dataset(cola, times=Times(fps=30)).notes[0]
    assert "taken to have 25 fps, as" in open_dataset(cola, times=Times(stride=8)).notes[0]
    assert not open_dataset(cola, times=Times(fps=30, stride=8)).notes


def test_convert_refuses_the_folder_of_another_dataset(actionformer, tmp_path):
    out = tmp_path / "out"
    check_content(convert(actionformer / "tiny.json", out), 4 / 30)
    check_content(convert(actionformer / "tiny.json", out), 4 / 30)
    with pytest.raises(InputError, match="out: already holds another dataset; give a new folder"):
        convert(simulate(stream_widths=(2, 2)), out)


def test_convert_never_makes_one_subset_of_two(actionformer, tmp_path):
    """ActivityNet tests on validation; its test has no annotations."""
    rows = database(fps=30.0)
    for name, subset in (("v1", "train"), ("v2", "validation"), ("t1", "test")):
        rows[name]["subset"] = subset
    rows["t1"]["annotations"] = []
    write_json(actionformer / "tiny.json", stride=4, streams=[2, 2], database=rows)
    result = convert(actionformer, tmp_path / "out")
    assert {r.name: r.subset for r in result.recordings} == {"v1": "train", "v2": "validation", "t1": "test"}


def test_convert_replaces_nothing_but_its_own(cola, actionformer, tmp_path):
    out = tmp_path / "out"
    convert(cola, out)
    other = tmp_path / "other" / cola.name  # of the same name
    other.parent.mkdir()
    shutil.copytree(cola, other, ignore=shutil.ignore_patterns("out", "other"))
    with pytest.raises(InputError, match="already holds another dataset"):
        convert(other, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files than a conversion"):
        convert(cola, out)
    assert (out / "notes.txt").read_text() == "mine"


def test_an_interrupted_replacement_leaves_the_earlier_conversion(cola, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert(cola, out)
    moves = []

    def replace(source, target):
        moves.append(target)
        if len(moves) == 2:
            raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        convert(cola, out)
    monkeypatch.undo()
    check_content(open_dataset(out), 16 / 25)


def test_what_killed_conversions_left_is_tidied_up(cola, tmp_path):
    out, part = tmp_path / "out", tmp_path / f".d2net-convert-out-{'0' * 16}"
    earlier = tmp_path / f".d2net-earlier-out-{'1' * 16}"
    convert(cola, out)
    (part / "features").mkdir(parents=True)
    others = [tmp_path / n for n in (f".d2net-convert-out-2-{'0' * 16}", f".d2net-earlier-o-{'0' * 16}")]
    for other in others:
        other.mkdir()
    out.rename(earlier)  # killed between the two moves
    with pytest.raises(InputError, match="no such file"):
        convert(tmp_path / "absent", out)  # whatever comes of it, the earlier one is back
    check_content(open_dataset(out), 16 / 25)
    shutil.copytree(out, earlier)  # killed after them
    part.mkdir()
    check_content(convert(cola, out), 16 / 25)
    assert {p for p in tmp_path.iterdir() if p.name.startswith(".")} == set(others)


def test_an_earlier_result_that_was_half_removed_goes_too(cola, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert(cola, out)

    def half(folder, **_):
        (folder / "gt.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(KeyboardInterrupt):
        convert(cola, out)
    monkeypatch.undo()
    assert list(tmp_path.glob(".d2net-*"))
    check_content(convert(cola, out), 16 / 25)
    assert not list(tmp_path.glob(".d2net-*"))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", ["checkpoint.safetensors", "features/notes.txt"])
def test_what_others_write_while_it_runs_stays(cola, tmp_path, again, name):
    out = tmp_path / "out"
    if again:
        convert(cola, out)

    def somebody_else(done: int, total: int) -> None:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")

    with pytest.raises(InputError, match="holds other files than a conversion"):
        convert(cola, out, progress=somebody_else)
    assert (out / name).read_text() == "mine" and (out / "gt.json").exists() == again
    assert not list(tmp_path.glob(".d2net-*"))


def test_a_planted_earlier_result_is_not_taken(cola, tmp_path):
    planted = tmp_path / f".d2net-earlier-out-{16 * '0'}"
    planted.mkdir()
    (planted / "gt.json").write_text("{}")
    (planted / "run.sh").write_text("")
    convert(cola, tmp_path / "out")
    assert (planted / "run.sh").exists() and not (tmp_path / "out" / "run.sh").exists()


def test_convert_follows_no_link(cola, tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match="out: a symbolic link, which is not followed"):
        convert(cola, tmp_path / "out")
    assert not list((tmp_path / "victim").iterdir())


def test_a_conversion_that_cannot_be_read_replaces_none(cola, tmp_path):
    out = tmp_path / "out"
    dataset = open_dataset(cola)
    convert(dataset, out)
    hidden = replace(dataset, recordings=tuple(replace(r, subset=f".{r.subset}") for r in dataset.recordings))
    with pytest.raises(InputError, match="/out/gt.json: none of the 2 recordings"):
        convert(hidden, out)
    check_content(open_dataset(out), 16 / 25)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_full_disk_leaves_the_earlier_conversion(cola, tmp_path):
    out = tmp_path / "out"
    convert(cola, out)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, before[1]))  # every file is cut off, as by a full disk
    try:
        with pytest.raises(InputError, match=r"out: cannot be written \(.*what was there is intact"):
            convert(cola, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    check_content(open_dataset(out), 16 / 25)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
from d2net.data import convert, open_dataset
from d2net.data.convert import writing
from d2net.data.dataset import Dataset, Recording

out = Path(sys.argv[1])

def source(number):
    read = lambda: np.full((6, 4), number, np.float32)
    segments = ((0.0, 1.0, "a"),)
    recordings = [Recording(f"v{i}", ("train", "test")[i % 2], ("a",), segments, 0.5, "", read) for i in range(40)]
    return Dataset("x", ("a",), (2, 2), tuple(recordings))

def found():
    dataset = open_dataset(out)
    (number,) = {float(x) for i in range(len(dataset)) for x in np.unique(dataset.features(i))}
    assert len(dataset) == 40
    return number

rng = random.Random(0)
begun = time.perf_counter()
convert(source(1), out)
took = time.perf_counter() - begun
last = 1
for number in range(2, 2 + int(sys.argv[2])):
    child = os.fork()
    if not child:
        convert(source(number), out)
        os._exit(0)
    time.sleep(rng.uniform(0, 1.2 * took))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if not out.exists():
        with writing(out):
            pass
    assert found() in (last, number)
    last = found()
convert(source(0.5), out)
assert found() == 0.5 and os.listdir(out.parent) == ["out"], os.listdir(out.parent)
"""


@pytest.mark.slow
def test_convert_is_killed_at_any_moment(tmp_path):
    subprocess.run([sys.executable, "-c", KILLS, tmp_path / "place" / "out", "10"], check=True)


def test_converted_times_take_options_as_the_source_does(actionformer, tmp_path):
    """Time is kept in seconds: frames that were never there must not be counted with."""
    write_json(actionformer / "tiny.json", stride=4, window=8, streams=[2, 2], database=database(fps=30))
    convert(actionformer, tmp_path / "out")
    for times, seconds in (
        (Times(), 4 / 30),
        (Times(fps=25, stride=8), 8 / 25),
        (Times(seconds_per_snippet=0.5), 0.5),
        (Times(fps=30, stride=4, window=16), 4 / 30),
    ):
        for place in (actionformer, tmp_path / "out"):
            recording = open_dataset(place, times=times).recordings[0]
            assert recording.seconds_per_snippet == pytest.approx(seconds)
            if times == Times() or times.window:
                first = 6 / 30 if times.window else 2 / 30
                assert recording.first_snippet == pytest.approx(first)
    with pytest.raises(InputError, match="the stride of the features is not known"):
        open_dataset(tmp_path / "out", times=Times(fps=25))
    write_json(actionformer / "tiny.json", stride=16, window=8, streams=[2, 2], database=database(fps=30))
    result = convert(actionformer, tmp_path / "short")  # a window shorter than the stride
    assert result.recordings[0].first_snippet == pytest.approx(-4 / 30)


def test_convert_refuses_names_that_leave_the_folder(cola, tmp_path):
    rows = database()
    rows["../v1"] = rows.pop("v1")
    write_json(tmp_path / "evil.json", database=rows)
    source = simulate(tmp_path / "evil.json", stream_widths=(2, 2))
    with pytest.raises(InputError, match=re.escape("'../v1' cannot be the name of a file")):
        convert(source, tmp_path / "out" / "inner")
    for subset in ("../../escaped", "/escaped", "..", "a\\b", "a\nb"):
        rows = {n: e | {"subset": subset if n == "v1" else e["subset"]} for n, e in database().items()}
        write_json(tmp_path / "evil.json", database=rows)
        with pytest.raises(InputError, match="cannot be the name of a file"):
            convert(simulate(tmp_path / "evil.json", stream_widths=(2, 2)), tmp_path / "out" / "inner")
    assert not list((tmp_path / "out").iterdir()) and not (tmp_path / "escaped").exists()


def test_cola_refuses_a_split_that_leads_elsewhere(cola):
    (cola / "split_...txt").write_text("v1\n")
    fails(r"split_\.\.\.txt: '\.\.' cannot be the name", cola)


# --- broken feature files ---


def test_missing_feature_file(cola):
    (cola / "features/test/flow/t1.npy").unlink()
    pattern = (
        r"none of the 1 recordings of subset 'test' has usable features; the first: .*flow/t1\.npy: no such feature"
    )
    fails(pattern, cola, subsets=["test"])
    with pytest.warns(UserWarning, match="1 of 3 recordings are left out"):
        assert open_dataset(cola).subsets == ("train",)  # nobody asked for the other by name
    assert len(open_dataset(cola, subsets=["train"])) == 2
    (cola / "features/train/flow/v1.npy").unlink()
    with pytest.warns(UserWarning, match="1 of 2 recordings are left out .'v1'.; the first: .*v1.npy: no such feature"):
        dataset = open_dataset(cola, subsets=["train"])
    assert [r.name for r in dataset.recordings] == ["v2"] and [r.name for r in dataset.left_out] == ["v1"]
    fails(r"v1\.npy: no such feature file.*--strict", cola, subsets=["train"], strict=True)


def test_truncated_feature_file(actionformer):
    path = actionformer / "i3d/v2.npy"
    path.write_bytes(path.read_bytes()[:-8])
    fails(r"v2\.npy: not a readable \.npy file, truncated perhaps .*; extract or download", actionformer)
    path.write_bytes(path.read_bytes()[:30])
    fails(r"v2\.npy: not a readable \.npy file", actionformer)


def test_empty_feature_file(actionformer):
    (actionformer / "i3d/v2.npy").write_bytes(b"")
    fails(r"v2\.npy: the file is empty \(0 bytes\); extract", actionformer)


@pytest.mark.parametrize(
    ("array", "pattern"),
    [
        (objects([1, 2]), r"holds pickled Python objects; save"),
        (np.zeros((3, WIDTH), complex), r"has dtype complex128; .* float32"),
        (np.ones((3, WIDTH + 1)), r"has shape \(3, 5\), expected \(T, 4\)"),
        (np.ones((WIDTH, 7)), r"has shape \(4, 7\), expected \(T, 4\) .* save the transpose"),
        (np.ones(WIDTH), r"has shape \(4,\), expected \(T, width\)"),
        (np.ones((3, 0)), r"has shape \(3, 0\), rows without numbers"),
        (np.ones((3, 7, WIDTH)), r"has shape \(3, 7, 4\), expected \(T, width\); of crops only"),
        (np.ones((10, 10, WIDTH)), r"has shape \(10, 10, 4\), both of its first axes could be crops"),
    ],
)
def test_unusable_array(actionformer, array, pattern):
    save(actionformer / "i3d/v2.npy", array)
    fails(rf"v2\.npy: {pattern}", actionformer)


def test_other_file_types(actionformer):
    path = actionformer / "i3d/v2.npy"
    path.unlink()
    path.mkdir()
    fails(r"v2\.npy: cannot be read \(Is a directory\)", actionformer)
    path.rmdir()
    path.write_text("not an array")
    fails(r"v2\.npy: not a readable", actionformer)
    with path.open("wb") as file:
        np.savez(file, features("v2"))
    fails(r"v2\.npy: is an \.npz archive; name it \.npz", actionformer)


def test_nan_is_found_on_reading(actionformer):
    array = features("v2")
    array[3, 1] = np.nan
    save(actionformer / "i3d/v2.npy", array)
    dataset = open_dataset(actionformer)
    with pytest.raises(InputError, match=r"'v2' hold NaN or Inf \(first at snippet 3\)"):
        dataset.features([r.name for r in dataset.recordings].index("v2"))


def test_odd_joint_width(actionformer):
    """One array of which nothing says how to divide it is one stream; W-TALC's always holds two."""
    for name in SUBSETS:
        save(actionformer / "i3d" / f"{name}.npy", features(name, 5))
    fails(r"v1\.npy: is 5 wide, not 2 \+ 2 as", actionformer)
    dataset = open_dataset(actionformer, streams=(3, 2))
    assert dataset.stream_widths == (3, 2)
    write_json(actionformer / "tiny.json", stride=4, database=database(fps=30.0))
    dataset = open_dataset(actionformer)
    assert dataset.stream_widths == (5,) and "one stream of 5" in dataset.notes[0]


def test_odd_joint_width_of_wtalc(wtalc):
    save(wtalc / "Tiny-I3D-JOINTFeatures.npy", objects([features(n, 5) for n in SUBSETS]))
    fails("width 5 is odd", wtalc, trust_pickle=True)


# --- broken annotations ---


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("{", r"gt\.json: not valid JSON \(.*line 1 column 2.*\); truncated perhaps"),
        ("[]", r"gt\.json: holds a JSON list"),
        ("{}", r'gt\.json: has no "database" object'),
        ('{"database": {"v1": []}}', r"gt\.json: video 'v1': malformed entry"),
        ('{"database": {"v1": {"subset": "train"}}}', r"'v1': .*no .annotations.; give an empty list"),
        ('{"database": {"v1": {"subset": "train", "annotations": null}}}', r"'v1': .*annotations"),
        ('{"database": {"v1": {"subset": 3, "annotations": []}}}', r"'v1': .*subset. is 3, expected a name"),
        ('{"database": {"v1": {"annotations": []}}}', r"'v1': malformed entry \(no \"subset\"; add it"),
        ('{"database": {"v1": {"subset": "train", "duration": -1, "annotations": []}}}', r"'v1': .*\"duration\" is -1"),
        (
            '{"database": {"v1": {"subset": "train", "labels": "run", "annotations": []}}}',
            r"'v1': .*labels. is not",
        ),
        ('{"database": {}, "fps": 0}', r"gt\.json: fps is 0"),
        ('{"database": {}, "classes": "run"}', r'gt\.json: "classes" must be a list'),
    ],
)
def test_bad_json(cola, text, pattern):
    (cola / "gt.json").write_text(text)
    fails(pattern, cola)


@pytest.mark.parametrize("segment", [[3, 1], [-1, 2], [0, float("nan")], ["a", "b"], [1]])
def test_bad_segment(cola, segment):
    rows = database()
    rows["v2"]["annotations"][0]["segment"] = segment
    write_json(cola / "gt.json", database=rows)
    fails("video 'v2': malformed entry", cola)


def test_missing_annotations(cola):
    (cola / "gt.json").unlink()
    fails(r"gt\.json: cannot be read \(No such file", cola)


def test_label_outside_of_the_listed_classes(cola):
    write_json(cola / "gt.json", database=database(), classes=["run"])
    fails("label 'jump' is not in \"classes\"", cola)


def test_no_fps(actionformer):
    write_json(actionformer / "tiny.json", database=database())
    fails(r"'v1': the stride and fps of the features are not known.*--stride N --fps N", actionformer)
    write_json(actionformer / "tiny.json", database=database(), fps=30)
    fails(r"'v1': the stride of the features is not known.*; give --stride N", actionformer)


def test_empty_and_unknown_splits(cola):
    fails("there is no subset 'dev'; there are train, test", cola, subsets=["dev"])
    (cola / "split_test.txt").write_text("\n")
    fails(r"split_test\.txt: the split is empty; write one", cola)
    for path in cola.glob("split_*.txt"):
        path.unlink()
    fails(r"no split_train\.txt", cola)


def test_unlabelled_training_video(cola, actionformer):
    rows = database(fps=30.0)
    rows["v2"]["annotations"] = []
    write_json(actionformer / "tiny.json", stride=4, database=rows)
    dataset = open_dataset(actionformer / "i3d", annotations=actionformer / "tiny.json").subset("train")
    with pytest.raises(
        InputError, match=r"v2\.npy: recording 'v2' has no label .1 of the 2 .*loss.skip_unlabelled=true"
    ):
        dataset.label_matrix()
    assert dataset.label_matrix(allow_unlabelled=True).tolist() == [[0, 1], [0, 0]]


def test_training_video_without_annotations_is_left_out(cola):
    rows = database()
    del rows["v1"]
    write_json(cola / "gt.json", database=rows)
    with pytest.warns(UserWarning, match=r"gt\.json: has no labels? for 'v1' of split_train\.txt; annotate it"):
        dataset = open_dataset(cola)
    assert [r.name for r in dataset.left_out] == ["v1"]
    fails("has no labels for 'v1'", cola, strict=True)


def test_placeholders_are_left_out(actionformer):
    """Some collections put zeros, or nothing, in place of a video that could not be had."""
    for array, why in ((np.zeros((1, WIDTH)), "every feature is 0"), (np.zeros((0, WIDTH)), "has no snippet")):
        save(actionformer / "i3d/v2.npy", array)
        with pytest.warns(UserWarning, match=rf"'v2'.*v2\.npy: {why}"):
            dataset = open_dataset(actionformer)
        assert [r.name for r in dataset.recordings] == ["v1", "t1"]
        fails(rf"v2\.npy: {why}.*--strict", actionformer, strict=True)


def test_two_jsons(actionformer):
    write_json(actionformer / "second.json", database={})
    fails("expected exactly one annotations JSON, found second.json, tiny.json", actionformer)


def test_no_folder_of_features(tmp_path):
    write_json(tmp_path / "tiny.json", database=database(fps=30.0))
    fails("expected one folder of .npy features, found none; name yours 'features'", tmp_path)


def test_unknown_layout(tmp_path):
    fails(r"nowhere: no such file or folder", tmp_path / "nowhere")
    fails(r"unknown layout; looked for .*W-TALC.*CoLA.*ActionFormer.*found nothing", tmp_path)
    for i in range(8):
        (tmp_path / f"{i}.txt").touch()
    fails(r"found '0\.txt', .*'5\.txt' and 2 more", tmp_path)


# --- broken W-TALC files ---


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_wtalc_durations(wtalc, value):
    path = wtalc / "Tiny-Annotations/duration.npy"
    durations = np.load(path)
    durations[1] = value
    np.save(path, durations)
    fails(r"duration\.npy: video 'v2' lasts .* s; give its length", wtalc, trust_pickle=True)


def test_wtalc_test_segments(wtalc):
    save(wtalc / "Tiny-Annotations/test_gt_segments.npy", objects([np.array([["t1"]], object), np.zeros((0, 3))]))
    fails(r"test_gt_segments\.npy: class 'run': .* is not a video number, a start and an end", wtalc, trust_pickle=True)
    save(wtalc / "Tiny-Annotations/subset.npy", np.array([b"test"] * 3))
    save(wtalc / "Tiny-Annotations/videoname.npy", np.array([b"a_1", b"b_1", b"t1"]))
    fails("names videos by the number that they end in, which two", wtalc, trust_pickle=True)


def test_wtalc_annotations_are_read_without_the_features(wtalc):
    (wtalc / "Tiny-I3D-JOINTFeatures.npy").write_bytes(b"cut")
    assert len(read_annotations(wtalc, trust_pickle=True)) == 4
    fails("Tiny-I3D-JOINTFeatures.npy: cannot be loaded", wtalc, trust_pickle=True)


def test_a_class_is_listed_once(cola):
    write_json(cola / "gt.json", database=database(), classes=["run", "jump", "run"])
    fails("class 'run' is listed twice; list it once", cola)


def test_a_class_of_wtalc_is_listed_once(wtalc):
    save(wtalc / "Tiny-Annotations/classlist.npy", np.array([b"run", b"jump", b"jump"]))
    fails("class 'jump' is listed twice", wtalc, trust_pickle=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, '"label" is None, expected a name'),
        ({"label": True}, '"label" is True'),
        ({"label": ""}, "\"label\" is '', expected a name"),
        ({"label": ["run"]}, '"label" is '),
    ],
)
def test_labels_are_names(cola, change, message):
    rows = database()
    rows["v2"]["annotations"][0].update(change)
    write_json(cola / "gt.json", database=rows)
    fails(message, cola)


def test_subsets_are_names(actionformer):
    for value, message in ((["a"], "expected a name"), ("", "expected a name"), (None, 'no "subset"')):
        rows = database(fps=30)
        rows["v2"]["subset"] = value
        write_json(actionformer / "tiny.json", stride=4, database=rows)
        fails(message, actionformer)
    rows["v2"]["subset"], rows["t1"]["subset"] = "train ", "Train"
    write_json(actionformer / "tiny.json", stride=4, database=rows)
    fails("the subsets 'train' .2 recordings. and 'Train' .1 recordings. are probably one", actionformer)


def test_accents_in_two_codings_are_one_label(cola):
    rows = database()
    rows["v1"]["annotations"][0]["label"] = "Caf\u00e9"
    rows["v2"]["annotations"][0]["label"] = "Cafe\u0301"
    write_json(cola / "gt.json", database=rows)
    fails("are probably one", cola)


def test_split_and_annotations_in_two_codings_name_one_video(cola):
    rows = database()
    rows["m\u00fcller"] = rows.pop("v1")
    write_json(cola / "gt.json", database=rows)
    (cola / "split_train.txt").write_text("mu\u0308ller\nv2\n")
    for stream in ("rgb", "flow"):
        (cola / f"features/train/{stream}/v1.npy").rename(cola / f"features/train/{stream}/mu\u0308ller.npy")
    dataset = open_dataset(cola, subsets=["train"])
    assert [r.name for r in dataset.recordings] == ["m\u00fcller", "v2"] and dataset.recordings[0].labels == ("run",)


def test_what_split_and_annotations_do_not_share_is_said(cola):
    rows = database()
    rows["extra"] = rows.pop("t1")
    write_json(cola / "gt.json", database=rows)
    notes = " ".join(open_dataset(cola).notes)
    assert "1 recordings are not in gt.json, and so without segments: 't1'" in notes
    assert "1 recordings of gt.json are in no split, and not used: 'extra'" in notes


def test_annotations_without_a_segment_beside_others_are_said(cola):
    rows = database()
    rows["v2"]["annotations"].append({"label": "run", "segments": [5, 6]})
    write_json(cola / "gt.json", database=rows)
    assert "1 annotations of 1 recordings have no segment beside others" in " ".join(open_dataset(cola).notes)


def test_wtalc_needs_trust(wtalc):
    fails("Tiny-I3D-JOINTFeatures.npy: is a Python pickle.*--trust-pickle.*d2net convert", wtalc)


def test_wtalc_several(wtalc):
    save(wtalc / "Other-I3D-JOINTFeatures.npy", np.zeros(1))
    fails("holds Other-I3D-JOINTFeatures.npy, Tiny-.*; give the path of one", wtalc, trust_pickle=True)


@pytest.mark.parametrize("name", ["segments.npy", "labels_all.npy", "videoname.npy"])
def test_wtalc_missing_and_truncated_files(wtalc, name):
    path = wtalc / "Tiny-Annotations" / name
    path.write_bytes(path.read_bytes()[:-3])
    fails(rf"{name}: cannot be loaded, damaged perhaps", wtalc, trust_pickle=True)
    path.unlink()
    fails(rf"{name}: no such file; .* download", wtalc, trust_pickle=True)


@pytest.mark.parametrize(
    ("file", "array", "pattern"),
    [
        ("Tiny-I3D-JOINTFeatures.npy", objects([features("v1")] * 2), r"has shape \(2,\), expected 3 entries"),
        (
            "Tiny-I3D-JOINTFeatures.npy",
            objects([features("v1"), features("v1")[:, :2], features("t1")]),
            r"'v2': has shape \(9, 2\), expected \(T, 4\)",
        ),
        ("Tiny-I3D-JOINTFeatures.npy", objects([np.array(["x"])] * 3), r"'v1': has dtype <U1"),
        (
            "Tiny-Annotations/labels.npy",
            objects([["run"], ["run"], ["jump"]]),
            "video 'v2' has 2 segments but 1 labels",
        ),
    ],
)
def test_wtalc_inconsistent_files(wtalc, file, array, pattern):
    save(wtalc / file, array)
    fails(pattern, wtalc, trust_pickle=True)


# --- the real annotations of THUMOS14, with generated features ---


def test_real_thumos14_annotations(shared, tmp_path):
    real = shared / "data" / "thumos14"
    if not real.is_dir():
        pytest.skip(f"no {real}")
    names = [n.decode() for n in np.load(real / "wtalc" / "videoname.npy")]
    rng = np.random.default_rng(0)
    durations = np.load(real / "wtalc" / "duration.npy")[:, 0]
    arrays = {n: rng.random((int(d / 0.64), 8), dtype=np.float32) for n, d in zip(names, durations, strict=True)}

    save(tmp_path / "Thumos14-I3D-JOINTFeatures.npy", objects(list(arrays.values())))
    first = open_dataset(tmp_path, trust_pickle=True, annotations=real / "wtalc")
    assert (len(first.subset("validation")), len(first.subset("test")), len(first.classes)) == (200, 212, 20)

    folder = tmp_path / "cola"
    for subset in ("train", "test"):
        text = (real / "json" / f"split_{subset}.txt").read_text()
        folder.mkdir(exist_ok=True)
        (folder / f"split_{subset}.txt").write_text(text)
        for name in text.split():
            rgb, flow = np.split(arrays[name], 2, axis=1)
            save(folder / "features" / subset / "rgb" / f"{name}.npy", rgb)
            save(folder / "features" / subset / "flow" / f"{name}.npy", flow)
    second = open_dataset(folder, annotations=real / "json" / "gt.json")
    assert (len(second.subset("train")), len(second.subset("test")), len(second.classes)) == (200, 210, 20)

    by_name = {r.name: r for r in first.recordings}
    train = second.subset("train")
    # The JSON has no durations, and nothing contradicts the layout's 16 frames at 25 fps.
    assert any("a stride of 16 frames and 25 fps" in note for note in second.notes)
    for i, r in enumerate(train.recordings):
        assert sorted(r.segments) == sorted(by_name[r.name].segments)
        np.testing.assert_array_equal(train.features(i), arrays[r.name])
    # The two published sources really disagree: labels_all.npy is not derived from the segments.
    assert sum(set(r.labels) != set(by_name[r.name].labels) for r in train.recordings) == 8
