"""A folder of one's own: features, labels.csv, segments.csv; and every way in which a CSV can be wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d2net.data import Dataset, Times, convert, find_dataset, open_dataset, read_annotations, simulate, train_and_test
from d2net.data.describe import inspect
from d2net.errors import InputError

LENGTHS = {"a": 20, "b": 30, "c": 25, "d": 15}
LABELS = "recording,labels,subset\na,run,train\nb,run;jump,train\nc,jump,test\nd,,test\n"
SEGMENTS = "recording,label,start,end\nb,jump,6,7.5\na,run,0.5,3\nb,run,1,2\nc,jump,2,4\n"
STREAM = "features of 4 columns are taken as one stream of 4; --streams says otherwise"
SECONDS = Times(seconds_per_snippet=0.5)


def write(folder: Path, labels: str | bytes = LABELS, segments: str | bytes | None = SEGMENTS, width: int = 4) -> Path:
    for name, length in LENGTHS.items():
        np.save(folder / f"{name}.npy", np.random.default_rng(length).random((length, width), np.float32))
    for file, text in (("labels.csv", labels), ("segments.csv", segments)):
        if text is not None:
            (folder / file).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def settings(folder: Path, **content: object) -> None:
    (folder / "features.json").write_text(json.dumps(content))


def fails(pattern: str, spec: Path, **options: object) -> None:
    options = {"times": SECONDS, **options}
    with pytest.raises(InputError, match=pattern) as caught:
        open_dataset(spec, **options)
    assert "\n" not in str(caught.value)


def test_a_folder(tmp_path):
    dataset = open_dataset(write(tmp_path), times=SECONDS)
    assert (dataset.name, dataset.classes, dataset.stream_widths) == (tmp_path.name, ("jump", "run"), (4,))
    assert dataset.subsets == ("train", "test") and dataset.notes == (STREAM,)
    found = {r.name: (r.subset, r.labels, r.segments) for r in dataset.recordings}
    assert found == {
        "a": ("train", ("run",), ((0.5, 3.0, "run"),)),
        "b": ("train", ("run", "jump"), ((1.0, 2.0, "run"), (6.0, 7.5, "jump"))),
        "c": ("test", ("jump",), ((2.0, 4.0, "jump"),)),
        "d": ("test", (), ()),
    }
    np.testing.assert_array_equal(dataset.features(3), np.load(tmp_path / "d.npy"))
    alone, everywhere = inspect(find_dataset(tmp_path), times=SECONDS).problems
    assert alone == "1 classes occur in train and not in test: 'run'"
    assert everywhere.startswith("every recording to train on has the label 'run', so nothing shows what it is like")
    assert len(open_dataset(tmp_path / "labels.csv", times=SECONDS)) == 4
    truth = read_annotations(tmp_path, subset="test")
    assert (truth.videos, len(truth)) == (("c", "d"), 1)


def test_time_must_be_known(tmp_path):
    fails(
        r"a\.npy: 'a': the stride and fps of the features are not known.*--seconds-per-snippet",
        write(tmp_path),
        times=None,
    )


def test_features_json_says_the_time(tmp_path):
    write(tmp_path)
    recordings = {"a": {"duration": 12.9, "source": "a.mp4"}, "b": {"duration": 19.4, "fps": 25}}
    settings(tmp_path, extractor="i3d", fps=25, stride=16, window=32, offset=0, recordings=recordings, name="mine")
    dataset = open_dataset(tmp_path)
    assert dataset.name == "mine" and [r.duration for r in dataset.recordings] == [12.9, 19.4, None, None]
    assert {(r.seconds_per_snippet, r.first_snippet) for r in dataset.recordings} == {(0.64, 0.32)}
    assert open_dataset(tmp_path, times=SECONDS, check_durations=False).recordings[0].seconds_per_snippet == 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fps": "fast", "stride": 16}, r'features\.json: "fps" is \'fast\''),
        ({"fps": 25, "stride": 16, "recordings": []}, None),
        ({"fps": 25, "stride": 16, "recordings": [1]}, r'features\.json: \'a\': "recordings" is not an object'),
        ({"fps": 25, "stride": 16, "recordings": {"a": 3}}, r"features\.json: 'a': .*not an object, but 3"),
        (
            {"fps": 25, "stride": 16, "recordings": {"a": {"duration": -1}}},
            r"'a': \"duration\" is -1, expected a positive",
        ),
        (
            {"fps": 25, "stride": 16, "recordings": {"a": {"duration": 60}}},
            "a.npy: 'a' has 20 snippets of 0.64 s.*60 s",
        ),
        ({"fps": 25, "stride": 16, "streams": [3, 2]}, r"a\.npy: is 4 wide, not 3 \+ 2"),
    ],
)
def test_features_json_that_is_wrong(tmp_path, content, message):
    settings(write(tmp_path), **content)
    if message:
        fails(message, tmp_path, times=None)
    else:
        assert len(open_dataset(tmp_path)) == 4


@pytest.mark.parametrize("place", ["features", "i3d", ""])
def test_features_may_lie_in_a_folder_of_their_own(tmp_path, place):
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    settings(write(folder, segments=None), fps=25, stride=16)
    (folder / "labels.csv").rename(tmp_path / "labels.csv")
    assert open_dataset(tmp_path).recordings[0].seconds_per_snippet == 0.64


def test_two_streams(tmp_path):
    for stream, width in (("rgb", 3), ("flow", 2)):
        (tmp_path / stream).mkdir()
        write(tmp_path / stream, labels=None, segments=None, width=width)  # type: ignore[arg-type]
    (tmp_path / "labels.csv").write_text(LABELS)
    np.save(tmp_path / "rgb" / "z.npy", np.ones((4, 3)))
    dataset = open_dataset(tmp_path, times=SECONDS)
    assert dataset.stream_widths == (3, 2) and dataset.features(1).shape == (30, 5)
    assert "1 feature file without a line in labels.csv, not used: 'z'" in dataset.notes[0]
    settings(tmp_path, seconds_per_snippet=0.5)
    assert len(open_dataset(tmp_path)) == 4


def test_one_array_of_two_streams(tmp_path):
    write(tmp_path)
    assert open_dataset(tmp_path, times=SECONDS, streams=(1, 3)).stream_widths == (1, 3)
    settings(tmp_path, streams=[2, 2], seconds_per_snippet=0.5)
    assert open_dataset(tmp_path).stream_widths == (2, 2)


def test_without_subsets_all_that_is_labelled_is_trained_on(tmp_path):
    write(tmp_path, "labels,recording\nrun,a\n run ; jump;,b\njump,c\n ,d\n")
    dataset = open_dataset(tmp_path, times=SECONDS)
    assert [r.subset for r in dataset.recordings] == ["train", "train", "train", "unlabelled"]
    assert dataset.recordings[1].labels == ("run", "jump")
    assert "labels.csv has no column subset" in dataset.notes[0]
    assert "1 recording of labels.csv without a label ('d') are 'unlabelled'" in dataset.notes[1]
    assert train_and_test(dataset.subsets) == ("train", "train")
    assert inspect(find_dataset(tmp_path), times=SECONDS).problems == []  # taken for granted, and nothing wrong


def test_what_is_not_used_is_counted(tmp_path):
    text = LABELS.replace("subset\n", "subset,note\n").replace("train\n", "train,x\n").replace("test\n", "test,\n")
    write(tmp_path, text)
    np.save(tmp_path / "z.npy", np.ones((4, 4)))
    (tmp_path / "c.npy").unlink()
    with pytest.warns(
        UserWarning, match=r"1 of 4 recordings are left out \('c'\).*labels.csv: line 4: .*c.npy: no such"
    ):
        dataset = open_dataset(tmp_path, times=SECONDS)
    assert dataset.notes == (
        "labels.csv: the columns 'note' are not read",
        "1 feature file without a line in labels.csv, not used: 'z'; a line may have no label",
        STREAM,
    )
    assert [x.name for x in dataset.left_out] == ["c"] and len(dataset.annotations()) == 4
    fails(r"line 4: .*c\.npy: no such feature file.*--strict", tmp_path, strict=True)
    assert len(inspect(find_dataset(tmp_path), times=SECONDS).problems) == 5


def test_labels_without_segments_beside_others_are_said(tmp_path):
    write(tmp_path, segments="recording,label,start,end\na,run,0,1\n")
    note, _ = open_dataset(tmp_path, times=SECONDS).notes
    assert note.startswith("1 recording with a label of which segments.csv has no segment, beside others in the same")
    assert "('b')" in note  # c is of another subset, of which nothing is annotated


def test_ambiguous_is_no_class(tmp_path):
    write(tmp_path, LABELS.replace("a,run", "a,run;Ambiguous"), SEGMENTS + "a,ambiguous,4,5\n")
    dataset = open_dataset(tmp_path, times=SECONDS)
    assert dataset.classes == ("jump", "run") and dataset.recordings[0].ambiguous == ((4.0, 5.0),)


@pytest.mark.parametrize("text", [LABELS.encode("utf-8-sig"), LABELS.replace("\n", "\r\n").encode() + b"\r\n,,\r\n"])
def test_what_spreadsheets_write(tmp_path, text):
    assert len(open_dataset(write(tmp_path, text), times=SECONDS)) == 4


def test_a_spreadsheet_in_another_language(tmp_path):
    labels = 'sep=;\r\nRecording;Labels\r\na;run\r\nb;"run;jump"\r\n'
    segments = "recording;label;start;end\r\na;run;0,5;3,25\r\n"
    dataset = open_dataset(write(tmp_path, labels, segments.encode("utf-8-sig")), times=SECONDS)
    assert dataset.recordings[0].segments == ((0.5, 3.25, "run"),)
    assert dataset.recordings[1].labels == ("run", "jump")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("", "labels.csv: line 1: no column 'recording'.*the first line is recording,labels"),
        ("a,run\nb,jump\n", "line 1: no column 'recording' in \\['a', 'run'\\]"),
        ("recording,label\na,run\n", "line 1: no column 'labels'.*did you mean 'label'"),
        (
            "recording,labels,subsets\na,run,train\n",
            "line 1: no column 'subset'.*did you mean 'subsets'.*call it 'subset'",
        ),
        ("recording,labels,labels\na,run,run\n", "line 1: 2 columns 'labels'"),
        ("recording,labels\n", "labels.csv: has no line but the first; write one for every recording"),
        ("recording,labels\na,run,jump\n", "line 2: 3 cells in 2 columns; quote names that hold commas"),
        ("recording;labels\na;run;jump\n", 'line 2: 3 cells in 2 columns; quote .*semicolons, as "a;b"'),
        ("recording,labels\n,run\n", "line 2: no recording; fill it in or drop the line"),
        (
            "recording,labels\na,run\n\nb,jump\na,jump\n",
            "line 5: 'a' is in line 2 already; write all its labels into one",
        ),
        ("recording,labels\na,run\nb,Run\n", "line 3: label 'Run' and 'run' in line 2 are probably one"),
        ("recording,labels\na,high jump\nb,high_jump\n", "line 3: label 'high_jump' and 'high jump' in line 2"),
        ("recording,labels,subset\na,run,train\nb,run,Train\n", "line 3: subset 'Train' and 'train' in line 2"),
        ("recording,labels,subset\na,run,train\nb,run,\n", "line 3: no subset; write train or test"),
        (
            "recording,labels\na.npy,run\nb.npy,run\n",
            "line 2: recording 'a.npy' has no features, and 'a' has; leave '.npy'",
        ),
        ("recording,labels\na.mp4,run\n", "line 2: recording 'a.mp4' has no features, and 'a' has; leave '.mp4' out"),
        (
            "recording,labels\nx,run\ny,jump\n",
            "none of the 2 recordings of subset 'train'.*line 2: .*x.npy: no such feature",
        ),
        ('recording,labels\n"a"b,run\n', "line 2: not valid CSV"),
        (LABELS.encode("utf-16"), "labels.csv: not UTF-8.*save it as CSV in UTF-8"),
    ],
)
def test_labels_that_are_wrong(tmp_path, labels, message):
    fails(message, write(tmp_path, labels, None))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("e,run,1,2", r"segments.csv: line 6: recording 'e' is not in labels.csv; add it there, or drop the line"),
        ("A,run,1,2", "line 6: recording 'A' is not in labels.csv"),
        ("a,jump,1,2", r"line 6: label 'jump' is not among those of 'a' in line 2 of labels.csv \('run'\); make them"),
        ("a,Run,1,2", "line 6: label 'Run' is not among those of 'a'.*did you mean 'run'"),
        ("d,run,1,2", r"line 6: label 'run' is not among those of 'd' in line 5 of labels.csv \(none\)"),
        (",run,1,2", "line 6: no recording"),
        ("a,,1,2", "line 6: no label"),
        ("a,run,,2", "line 6: start is '', not a finite number; write seconds"),
        ("a,run,1,nan", "line 6: end is 'nan', not a finite number; write seconds"),
        ("a,run,1,0:02", "line 6: end is '0:02', not a finite number; write seconds"),
        ("a,run,2,2", "line 6: segment from 2 to 2 s; expected 0 <= start < end"),
        ("a,run,3,2", "line 6: segment from 3 to 2 s; expected"),
        ("a,run,-1,2", "line 6: segment from -1 to 2 s; expected"),
        ("a,run,1,1e12", r"line 6: segment from 1 to 1e\+12 s"),
        ("a,run,0.5,3.0", "line 6: is the same segment as line 3; drop one"),
        ("a,run,1", "line 6: 3 cells in 4 columns"),
        (
            "a,run,14,14.5",
            r"line 6: segment ends at 14.5 s, and recording 'a' at 10 s \(20 snippets of 0.5 s\); mend the line",
        ),
        ("a,run,100,110", "line 6: segment ends at 110 s.*probably in frames or milliseconds: write seconds"),
        ("a,run,3000,5000", "line 6: segment ends at 5000 s.*probably in milliseconds: divide them by 1000"),
        ("a,run,3000,50000000", r"line 6: segment ends at 5e\+07 s.*; mend the line"),
    ],
)
def test_segments_that_are_wrong(tmp_path, line, message):
    fails(message, write(tmp_path, segments=SEGMENTS + line + "\n"))


@pytest.mark.parametrize("header", ["recording,label,start", "recording,label,begin,end", "a,run,0,1"])
def test_a_missing_column_of_segments(tmp_path, header):
    fails(
        "segments.csv: line 1: no column .*the first line is recording,label,start,end",
        write(tmp_path, segments=header),
    )


def test_detections_are_no_segments(tmp_path):
    """Which would be judged by themselves."""
    fails(
        "segments.csv: line 1: a column 'score', as of detections",
        write(tmp_path, segments="recording,label,start,end,score\n"),
    )


def test_a_clock_in_milliseconds_is_found_without_features(tmp_path):
    """An evaluation reads no features: durations in features.json are enough."""
    write(tmp_path, segments="recording,label,start,end\na,run,1000,3000\nb,jump,2000,12000\n")
    settings(tmp_path, fps=25, stride=16, recordings={n: {"duration": 0.64 * t} for n, t in LENGTHS.items()})
    with pytest.raises(
        InputError, match=r"line 3: segment ends at 12000 s.*19.2 s \(its duration\).*milliseconds.*\(2 rec"
    ):
        read_annotations(tmp_path)
    problems = inspect(find_dataset(tmp_path)).problems
    assert any("milliseconds" in p for p in problems)


def test_a_segment_may_end_a_little_late(tmp_path):
    """Features end with the last whole window: 4 snippets and 1 %."""
    write(tmp_path, segments=SEGMENTS + "a,run,9,12\n")
    assert open_dataset(tmp_path, times=SECONDS).recordings[0].segments[-1] == (9, 12, "run")


@pytest.mark.parametrize("array", [np.ones(7), np.ones((7, 4, 2)), np.ones((0, 4)), np.ones((7, 5)), np.array(["x"])])
def test_arrays_that_are_no_features(tmp_path, array):
    np.save(write(tmp_path) / "b.npy", array)
    fails("b.npy", tmp_path, strict=True)


def test_a_label_of_another_file_is_found(tmp_path):
    """By the composed form of its name."""
    write(tmp_path, "recording,labels\nu\u0308,run\na,run\n", "recording,label,start,end\n\u00fc,run,1,2\n")
    np.save(tmp_path / "\u00fc.npy", np.ones((9, 4)))
    assert open_dataset(tmp_path, times=SECONDS).recordings[0].segments == ((1, 2, "run"),)


def test_which_annotations_count(tmp_path):
    write(tmp_path)
    (tmp_path / "detections.json").write_text('{"results": {}}')
    assert len(open_dataset(tmp_path, times=SECONDS)) == 4
    database = {"a": {"subset": "train", "annotations": []}}
    (tmp_path / "gt.json").write_text(json.dumps({"database": database}))
    fails("holds gt.json and labels.csv; give the path of the one that is to count", tmp_path)
    assert len(open_dataset(tmp_path / "labels.csv", times=SECONDS)) == 4
    assert len(open_dataset(tmp_path / "gt.json", times=SECONDS)) == 1


def test_features_alone(tmp_path):
    (write(tmp_path) / "labels.csv").rename(tmp_path / "mine.csv")
    settings(tmp_path, fps=25, stride=16)
    fails(r"labels.csv: no such file \(there is 'mine.csv', 'segments.csv'\); write one.*recording,labels", tmp_path)


@pytest.mark.parametrize("name", ["labels.csv", "segments.csv", "features.json"])
def test_a_link_that_leads_nowhere(tmp_path, name):
    path = write(tmp_path) / name
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "gone")
    fails(name, tmp_path)


def said(dataset: Dataset) -> list[tuple]:
    """All that a reader can tell of the recordings, features apart."""
    fields = ("name", "subset", "labels", "segments", "ambiguous", "seconds_per_snippet", "first_snippet", "duration")
    return [tuple(getattr(r, f) for f in fields) for r in dataset.recordings]


@pytest.mark.parametrize("widths", [(3,), (2, 2), (2048,)])
def test_there_and_back(tmp_path, widths):
    """From layout 4 to 2 and from there to 4 again, and once more over that: nothing is lost."""
    source = tmp_path / "in"
    source.mkdir()
    write(source, width=sum(widths))
    with open(source / "segments.csv", "a") as file:
        file.write("a,Ambiguous,5,6\n")
    (source / "labels.csv").write_text(LABELS.replace("d,,", '"=d, 1",,'))
    (source / "d.npy").rename(source / "=d, 1.npy")
    recordings = {"a": {"duration": 10.6, "fps": 30, "stride": 15}}
    settings(source, fps=25, stride=16, window=32, streams=list(widths), recordings=recordings, name="mine")
    first = open_dataset(source)
    assert first.recordings[0].seconds_per_snippet == 0.5 and first.recordings[1].first_snippet == 0.32
    for layout, out in (("cola", "cola"), ("plain", "plain"), ("plain", "plain")):
        again = convert(first if out == "cola" else tmp_path / "cola", tmp_path / out, layout=layout)
        assert (again.name, again.classes, again.stream_widths) == ("mine", first.classes, widths)
        assert sorted(said(again)) == sorted(said(first))
        for r in again.recordings:
            np.testing.assert_array_equal(r.read(), np.load(source / f"{r.name}.npy"))
    names = {p.name for p in (tmp_path / "plain").iterdir()}
    assert {"labels.csv", "segments.csv", "features.json"} < names and ("rgb" in names) == (len(widths) == 2)
    assert "\n'=d" not in (tmp_path / "plain" / "labels.csv").read_text()  # quoted, and no formula
    assert '"\'=d, 1"' in (tmp_path / "plain" / "labels.csv").read_text()


def test_what_has_no_features_keeps_its_lines(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    settings(write(source), seconds_per_snippet=0.5)
    (source / "c.npy").unlink()
    with pytest.warns(UserWarning, match="left out"):
        convert(open_dataset(source), tmp_path / "out", layout="plain")
    with pytest.warns(UserWarning, match="left out"):
        again = open_dataset(tmp_path / "out")
    assert [x.name for x in again.left_out] == ["c"] and len(again.annotations()) == 4


def test_what_layout_plain_cannot_hold_is_said(tmp_path):
    dataset = open_dataset(write(tmp_path), times=SECONDS)
    first, *others = dataset.recordings

    def with_first(**values: object) -> Dataset:
        return replace(dataset, classes=("jump", "run", "a;b"), recordings=(replace(first, **values), *others))

    for values, message in (
        ({"labels": ("a;b",), "segments": ()}, "label 'a;b' begins or ends with a blank, holds a ';'"),
        ({"name": "a "}, "recording 'a ' begins or ends"),
        ({"labels": ("\udcff",), "segments": ()}, "label .* is no text"),
        ({"segments": ((1, 1, "run"),)}, "segment 1 to 1 s, 'run', of 'a' is empty"),
        ({"segments": ((1, 2, "jump"),)}, "of none of its labels"),
        ({"segments": 2 * ((1, 2, "run"),)}, "stands twice"),
    ):
        with pytest.raises(InputError, match=message):
            convert(with_first(**values), tmp_path / "out", layout="plain")
        assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="no recording has the classes 'a;b'"):
        convert(with_first(), tmp_path / "out", layout="plain")
    with pytest.warns(UserWarning, match="cannot say that segments are withdrawn: 'a'"):
        convert(replace(with_first(withdrawn=True), classes=dataset.classes), tmp_path / "out", layout="plain")
    with pytest.raises(InputError, match="layout 'csv' is not written; there are cola, plain"):
        convert(dataset, tmp_path / "out", layout="csv")


def test_a_folder_of_ones_own_is_never_replaced(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    settings(write(mine), seconds_per_snippet=0.5)
    other = simulate(stream_widths=(2, 2))
    before = {p.name: p.read_bytes() for p in mine.iterdir()}
    for layout in ("cola", "plain"):
        with pytest.raises(InputError, match="holds other files than a conversion"):
            convert(other, mine, layout=layout)
    (mine / "features.json").write_text("{")
    with pytest.raises(InputError, match="holds other files than a conversion"):
        convert(other, mine, layout="plain")
    (mine / "features.json").write_bytes(before["features.json"])
    assert {p.name: p.read_bytes() for p in mine.iterdir()} == before
    convert(other, tmp_path / "out", layout="plain")
    with pytest.raises(InputError, match="already holds another dataset"):
        convert(mine, tmp_path / "out", layout="plain")


@pytest.mark.parametrize(("seconds", "said"), [(0.5, False), (500.0, True)])
def test_a_snippet_in_milliseconds_is_said(tmp_path, seconds, said):
    problems = inspect(find_dataset(write(tmp_path)), times=Times(seconds_per_snippet=seconds)).problems
    assert any(p.startswith("all segments lie in the first 0.05 % of their recordings") for p in problems) == said
