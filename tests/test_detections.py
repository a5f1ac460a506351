"""Reading and writing of detections and annotations."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from d2net.data import read_annotations
from d2net.detections import Detections, read_detections, read_features, write_detections
from d2net.errors import InputError

TRUTH = {
    "database": {
        "v_1": {"subset": "train", "annotations": [{"segment": ["1.5", "2"], "label": "run"}]},
        "v_2": {"subset": "test", "annotations": [{"segment": [3, 4.25], "label": "jump"}], "duration": 9.0},
        "v_3": {"subset": "test", "annotations": []},
    }
}


ENTRY = {"label": "x", "score": 1, "segment": [0, 1]}


def example() -> Detections:
    return Detections(
        videos=("v_1", "v_2", "v_3"),
        classes=("run", "jump"),
        video=np.array([2, 0, 2]),
        label=np.array([1, 0, 0]),
        start=np.array([0.1, 1 / 3, 7.0]),
        end=np.array([0.7, 2 / 3, 7.0]),
        score=np.array([0.9, 1e-9, -3.0]),
    )


def write(path: Path, data) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def named(found: Detections) -> list[tuple]:
    """Rows (video, class, start, end, score)."""
    names = ([found.videos[v] for v in found.video], [found.classes[c] for c in found.label])
    return list(zip(*names, found.start.tolist(), found.end.tolist(), found.score.tolist(), strict=True))


@pytest.mark.parametrize("name", ["d.json", "d.csv", "d.CSV"])
def test_round_trip_is_exact(tmp_path, name):
    found = example()
    write_detections(tmp_path / name, found, "I3D")
    again = read_detections(tmp_path / name)
    rows = named(found)
    assert named(again) == [rows[1], rows[0], rows[2]]  # the file is by video
    assert again.classes == ("jump", "run")
    # A CSV cannot keep the video without a detection.
    assert again.videos == (found.videos if name == "d.json" else ("v_1", "v_3"))
    assert read_features(tmp_path / name) == ("I3D" if name == "d.json" else None)
    assert os.listdir(tmp_path) == [name]


def test_what_is_written(tmp_path):
    write_detections(tmp_path / "d.json", example())
    assert json.loads((tmp_path / "d.json").read_text()).keys() == {"version", "results", "external_data"}
    write_detections(tmp_path / "d.csv", example())
    assert (tmp_path / "d.csv").read_text().splitlines()[:2] == [
        "recording,label,start,end,score",
        "v_1,run,0.3333333333333333,0.6666666666666666,1e-09",
    ]


@pytest.mark.parametrize("suffix", ["json", "csv"])
@pytest.mark.parametrize(
    "odd", ["a, b", 'say "x"', " blanks ", "two\nlines", "return\rhere", "Ünï·动作", "x;y\tz", "0"]
)
def test_odd_names_survive(tmp_path, suffix, odd):
    one = np.ones(1)
    found = Detections((odd,), (odd + "!",), 0 * one.astype(int), 0 * one.astype(int), one, one, score=one)
    path = tmp_path / f"d.{suffix}"
    write_detections(path, found)
    assert named(read_detections(path)) == [(odd, odd + "!", 1, 1, 1)]


def test_name_that_is_no_unicode(tmp_path):
    """As a file's name may be: JSON keeps it, CSV cannot."""
    one = np.ones(1)
    found = Detections(("\udcff",), ("x",), 0 * one.astype(int), 0 * one.astype(int), one, one, score=one)
    write_detections(tmp_path / "d.json", found)
    assert read_detections(tmp_path / "d.json").videos == ("\udcff",)
    with pytest.raises(InputError, match=r"d\.csv: a name.*write a \.json"):
        write_detections(tmp_path / "d.csv", found)


def test_videos_are_those_of_the_file(tmp_path):
    data = {"results": {"z": None, "b": [], "a": [{"label": "x", "score": 1, "segment": [0, 1]}]}}
    assert read_detections(write(tmp_path / "d.json", data)).videos == ("z", "b", "a")


def test_numbers_in_strings(tmp_path):
    data = {"results": {"v": [{"label": "x", "score": "0.5", "segment": ["1", "2.5"], "extra": {"any": 1}}]}}
    assert named(read_detections(write(tmp_path / "d.json", data))) == [("v", "x", 1, 2.5, 0.5)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_of_a_spreadsheet(tmp_path, encoding, end):
    """Columns in another order, one more of them, blank lines and empty rows at the end."""
    lines = ["score, label ,end,recording,start,note", '1,ü,2,"a,b",1,x', "", ".5,ü,3,c,2,", ",,,,,"]
    (tmp_path / "d.csv").write_bytes((end.join(lines) + end).encode(encoding))
    assert named(read_detections(tmp_path / "d.csv")) == [("a,b", "ü", 1, 2, 1), ("c", "ü", 2, 3, 0.5)]


@pytest.mark.parametrize(("first", "sign"), [("", ";"), ("sep=;\r\n", ";"), ("", "\t")])
def test_csv_of_a_spreadsheet_in_another_language(tmp_path, first, sign):
    """Semicolons or tabs between the cells, since commas are in the numbers."""
    lines = [f"Recording{sign}Label{sign}start{sign}end{sign}score", f'a{sign}"x{sign}y"{sign}0{sign}1,25{sign}0,5']
    (tmp_path / "d.csv").write_bytes((first + "\r\n".join(lines)).encode("utf-8-sig"))
    assert named(read_detections(tmp_path / "d.csv")) == [("a", f"x{sign}y", 0, 1.25, 0.5)]


@pytest.mark.parametrize("odd", ["=1+1", "+a", "-Xy_", "@sum", "'=1", "''-", "'quoted'", "\t=1", "a=b", "'"])
def test_no_name_is_a_formula(tmp_path, odd):
    one = np.ones(1)
    found = Detections((odd,), (odd + "!",), 0 * one.astype(int), 0 * one.astype(int), one, one, score=-one)
    write_detections(tmp_path / "d.csv", found)
    line = (tmp_path / "d.csv").read_text().splitlines()[1]
    assert not line.startswith(("=", "+", "-", "@", "\t")) and line.endswith(",-1.0")  # a number may be negative
    assert named(read_detections(tmp_path / "d.csv")) == [(odd, odd + "!", 1, 1, -1)]
    (tmp_path / "theirs.csv").write_text(f"recording,label,start,end,score\n{odd},x,0,1,1\n")
    if not odd.startswith("'"):  # as programs write it that do not care
        assert read_detections(tmp_path / "theirs.csv").videos == (odd,)


def test_json_of_an_editor(tmp_path):
    (tmp_path / "d.json").write_bytes(json.dumps({"results": {"v": [ENTRY]}}).encode("utf-8-sig"))
    assert len(read_detections(tmp_path / "d.json")) == 1


HEADER = "recording,label,start,end,score\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: no column 'recording' in \\[\\]; the first line is recording,label,start,end,score"),
        ("recording label start end score\n", "line 1: no column 'recording'.*separated by commas"),
        ("recording;label;start;end\n", "line 1: no column 'score'"),
        (
            "recording;label;start;end;score\na;b;x;0;1;1",
            "line 2: 6 cells in 5 columns; quote names that hold semicolons",
        ),
        ("recording;label;start;end;score\nv;x;0;1,2,3;1", "line 2: end is '1,2,3', not a finite number"),
        (HEADER + 'v,x,0,"1,5",1\n', "line 2: end is '1,5', not a finite number"),
        ("recording,label,start,end\n", "line 1: no column 'score'"),
        ("recording,label,start,end,end,score\n", "line 1: 2 columns 'end'"),
        (HEADER + "v,x,0,1\n", "line 2: 4 cells in 5 columns; quote"),
        (HEADER + "\nv,x,0,1,1\na,b,x,0,1,1\n", "line 4: 6 cells in 5 columns; quote"),
        (HEADER + ",x,0,1,1\n", "line 2: no recording"),
        (HEADER + "v,,0,1,1\n", "line 2: no label"),
        (HEADER + "v,x,0,1,high\n", "line 2: score is 'high', not a finite number"),
        (HEADER + "v,x,,1,1\n", "line 2: start is '', not a finite number"),
        (HEADER + "v,x,2,1,1\n", "line 2: segment ends at 1 before it starts at 2"),
        (HEADER + 'v,"x"y,2,1,1\n', "line 2: not valid CSV"),
        (HEADER + 'v,"x,2,1,1\n', "line 2: not valid CSV"),
    ],
)
def test_damaged_csv(tmp_path, text, message):
    path = write(tmp_path / "d.csv", text)
    with pytest.raises(InputError, match=message) as error:
        read_detections(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_csv_that_is_not_utf8(tmp_path):
    (tmp_path / "d.csv").write_bytes(HEADER.encode() + "v,Stoß,0,1,1\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"d\.csv: not UTF-8.*save it as CSV in UTF-8"):
        read_detections(tmp_path / "d.csv")


@pytest.mark.parametrize("name", ["eval_results.pkl", "renamed.json"])
def test_a_pickle_is_not_opened(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({"video-id": ["v"], "t-start": [0.0]}))
    with pytest.raises(InputError, match="is a Python pickle.*recording,label,start,end,score"):
        read_detections(tmp_path / name)


def test_reads_a_published_file(shared):
    found = read_detections(shared / "data" / "activitynet" / "sample_detection_prediction.json")
    assert len(found) > 0
    assert (found.end >= found.start).all()


def test_not_finite_is_not_written(tmp_path):
    found = example()
    found.score[1] = np.nan
    with pytest.raises(InputError, match="'v_1'.*score nan.*drop"):
        write_detections(tmp_path / "d.json", found)
    assert os.listdir(tmp_path) == []


def test_folder_that_cannot_hold_the_file(tmp_path):
    file = write(tmp_path / "file", "")
    for path in (file / "d.json", tmp_path):
        with pytest.raises(InputError, match="d.json: cannot be written|not an ordinary file"):
            write_detections(path, example())
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write into any folder")
def test_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="cannot be written.*Permission denied"):
            write_detections(tmp_path / "d.json", example())
    finally:
        tmp_path.chmod(0o700)


def test_file_that_cannot_grow_leaves_the_old_one(tmp_path):
    """A real failure halfway through writing: the process may not write more than 4 KiB to a file."""
    resource = pytest.importorskip("resource", reason="limits of file size are a matter of POSIX")
    path = write(tmp_path / "d.json", "old")
    n = 1000
    ones = np.ones(n)
    found = Detections(("v",), ("c",), np.zeros(n, int), np.zeros(n, int), ones, ones, score=ones)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(InputError, match="d.json: cannot be written .*make space"):
            write_detections(path, found)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["d.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_device_is_not_replaced():
    with pytest.raises(InputError, match="not an ordinary file"):
        write_detections("/dev/full", example())
    assert Path("/dev/full").is_char_device()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"results": {"v": [', "not valid JSON.*truncated"),
        ([], "no object under the key 'results'"),
        (TRUTH, "holds annotations \\('database'\\), expected detections"),
        ('{"results": {"v": [], "w": [], "v": []}}', "'v' comes twice"),
        ('{"results": {"v": [{"label": "x", "score": 1, "score": 2, "segment": [0, 1]}]}}', "'score' comes twice"),
        ({"results": {"v": [{"segment": [0, 1], "score": 1}]}}, "detection 0: no 'label'; proposals without a class"),
        ({"results": {"v": [{**ENTRY, "label": 3}]}}, "label is 3, not a string; write the name"),
        ({"results": []}, "no object under the key 'results'"),
        ({"results": {"v": {}}}, "'v'.*expected a list"),
        ({"results": {"v": [[0, 1]]}}, "detection 0.*'label'"),
        ({"results": {"v": [{"label": "x", "segment": [0, 1]}]}}, "no 'score'"),
        ({"results": {"v": [ENTRY, {**ENTRY, "segment": [0]}]}}, "detection 1.*pair"),
        ({"results": {"v": [{**ENTRY, "segment": [2, 1]}]}}, "ends at 1 before it starts at 2"),
        ({"results": {"v": [{**ENTRY, "segment": [0, "late"]}]}}, "end is 'late', not a finite number"),
        ({"results": {"v": [{**ENTRY, "segment": [0, None]}]}}, "end is None, not a finite number"),
        ({"results": {"v": [{**ENTRY, "score": float("nan")}]}}, "score is nan, not a finite number"),
        ({"results": {"v": [{**ENTRY, "score": True}]}}, "score is True, not a finite number"),
    ],
)
def test_damaged_detections(tmp_path, data, message):
    path = write(tmp_path / "d.json", data)
    with pytest.raises(InputError, match=message) as error:
        read_detections(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("read", [read_detections, read_annotations])
def test_file_that_cannot_be_read(tmp_path, read):
    with pytest.raises(InputError, match="no.json: no such file"):
        read(tmp_path / "no.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not valid JSON"):
        read(tmp_path / "binary.json")


def test_annotations_json(tmp_path):
    path = write(tmp_path / "gt.json", TRUTH)
    test = read_annotations(path, subset="test")
    assert (test.videos, test.classes) == (("v_2", "v_3"), ("jump", "run"))
    assert (test.video.tolist(), test.label.tolist()) == ([0], [0])
    assert (test.start.tolist(), test.end.tolist()) == ([3], [4.25])
    assert test.ambiguous.shape == (0, 3)
    assert read_annotations(path).start.tolist() == [1.5, 3]


def test_ambiguous_segments_beside_the_json(tmp_path):
    path = write(tmp_path / "gt.json", TRUTH)
    write(tmp_path / "Ambiguous_test.txt", "v_3  0.5 1.5\nv_other 1 2\n\n")
    assert read_annotations(path, subset="test").ambiguous.tolist() == [[1, 0.5, 1.5]]
    write(tmp_path / "Ambiguous_test.txt", "v_3 0.5\n")
    with pytest.raises(InputError, match="Ambiguous_test.txt: line 1: 'v_3 0.5' is not VIDEO START END"):
        read_annotations(path)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ({"annotations": []}, "'v'.*no .subset.; add it"),
        ({"subset": "test", "annotations": [{"segment": [1, 2]}]}, "'v'.*'label'"),
        ({"subset": "test", "annotations": [{"label": "x", "segment": [1]}]}, "not a pair"),
        ({"subset": "test", "annotations": [{"label": "x", "segment": ["nan", 1]}]}, "'nan', not a finite number"),
        ({"subset": "test", "annotations": [{"label": "x", "segment": [1, 0]}]}, "not 0 <= start <= end"),
    ],
)
def test_damaged_annotations(tmp_path, video, message):
    path = write(tmp_path / "gt.json", {"database": {"v": video}})
    with pytest.raises(InputError, match=message):
        read_annotations(path)


def test_unknown_subset(tmp_path):
    with pytest.raises(InputError, match="there is no subset 'validation'; there are train, test"):
        read_annotations(write(tmp_path / "gt.json", TRUTH), subset="validation")


def objects(values) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


@pytest.fixture
def wtalc(tmp_path) -> Path:
    """A W-TALC folder with bytes, as Python 2 wrote them, and a list of ambiguous segments."""
    for name, array in {
        "videoname": np.array([b"video_validation_01", b"video_test_01", b"video_test_02"]),
        "subset": np.array([b"validation", b"test", b"test"]),
        "classlist": np.array([b"run", b"jump"]),
        "duration": np.array([[100.0], [50.0], [20.0]]),
        "segments": objects([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]], []]),
        "labels": objects([["jump", "run"], [b"run"], []]),
        "test_gt_segments": objects([[], np.array([["02", 0.5, 0.75], ["01", 0.1, 0.2]], object)]),
    }.items():
        np.save(tmp_path / f"{name}.npy", array)
    write(tmp_path / "Ambiguous_test.txt", "video_test_02 1 2\n")
    return tmp_path


def test_wtalc_folder(wtalc):
    test = read_annotations(wtalc, subset="test", trust_pickle=True)
    assert (test.videos, test.classes) == (("video_test_01", "video_test_02"), ("run", "jump"))
    assert (test.video.tolist(), test.label.tolist()) == ([0, 1], [1, 1])
    assert (test.start.tolist(), test.end.tolist()) == ([5, 10], [10, 15])
    assert test.ambiguous.tolist() == [[1, 1, 2]]

    validation = read_annotations(wtalc, subset="validation", trust_pickle=True)
    assert (validation.label.tolist(), validation.start.tolist()) == ([1, 0], [1, 3])
    assert len(read_annotations(wtalc, trust_pickle=True)) == 4

    (wtalc / "test_gt_segments.npy").unlink()
    assert read_annotations(wtalc, subset="test", trust_pickle=True).start.tolist() == [5]


def test_pickles_need_trust(wtalc):
    with pytest.raises(InputError, match="--trust-pickle"):
        read_annotations(wtalc)


def test_damaged_wtalc_folder(wtalc):
    def error() -> str:
        with pytest.raises(InputError) as caught:
            read_annotations(wtalc, trust_pickle=True)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    np.save(wtalc / "test_gt_segments.npy", objects([[], [["03", 0.5, 0.75]]]))
    assert "no such test video" in error()
    np.save(wtalc / "test_gt_segments.npy", objects([[], [["02", 0.75, 0.5]]]))
    assert "class 'jump', video number '02': segment [0.75, 0.5] is not" in error()
    (wtalc / "test_gt_segments.npy").unlink()
    np.save(wtalc / "labels.npy", objects([["jump"], ["run"], []]))
    assert "'video_validation_01' has 2 segments" in error()
    np.save(wtalc / "labels.npy", objects([["jump", "fly"], ["run"], []]))
    assert "label 'fly' is not in classlist.npy" in error()
    np.save(wtalc / "labels.npy", objects([["jump"]]))
    assert "labels.npy: has shape (1,), expected 3 entries" in error()
    (wtalc / "segments.npy").write_bytes((wtalc / "segments.npy").read_bytes()[:-9])
    assert "segments.npy: cannot be loaded" in error()
    (wtalc / "segments.npy").unlink()
    assert "segments.npy: no such file" in error()


def test_real_annotations(shared):
    """Both files of THUMOS14 tell of the same test videos; the JSON lacks two of them."""
    folder = read_annotations(shared / "data" / "thumos14" / "wtalc", subset="test", trust_pickle=True)
    file = read_annotations(shared / "data" / "thumos14" / "json" / "gt.json", subset="test")
    assert (len(folder.videos), len(file.videos)) == (212, 210)
    assert folder.classes == file.classes
    assert set(folder.videos) - set(file.videos) == {"video_test_0000270", "video_test_0001496"}
    assert set(folder.withdrawn) == set(folder.videos) - set(file.videos) and file.withdrawn == ()
    assert len(folder.ambiguous) > 0
