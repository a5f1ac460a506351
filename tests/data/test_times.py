"""When a snippet is: frames, fps, stride, window, under every name that the field has for them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from d2net.data import Catalog, Times, convert, open_dataset
from d2net.errors import InputError


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"fps": 25, "stride": 16}, (0.64, 0.0)),
        ({"fps": "25", "feat_stride": "16"}, (0.64, 0.0)),
        ({"fps": 30, "feat_stride": 16, "num_frames": 16}, (16 / 30, 0.0)),
        # the middle of snippet t is frame 16 t + 16: it runs from frame 8 to 24
        ({"fps": 30, "feat_stride": 16, "num_frames": 32}, (16 / 30, 8 / 30)),
        ({"fps": 30, "snippet_stride": 16, "offset_frames": 16}, (16 / 30, 8 / 30)),
        ({"fps": 30, "stride": 16, "window": 32, "offset": 0}, (16 / 30, 8 / 30)),
        ({"fps": 30, "stride": 16, "window": 32, "offset": 4}, (16 / 30, 12 / 30)),
        ({"fps": 30, "stride": 16, "offset": 4}, (16 / 30, 4 / 30)),
        ({"fps": 30, "stride": 16, "window": 32, "offset": -8}, (16 / 30, 0)),  # padded on both sides
        # OpenTAD's THUMOS14: features every 4 frames from windows of 16, offset_frames 8
        ({"fps": 30, "feature_stride": 4, "offset_frames": 8, "num_frames": 16}, (4 / 30, 6 / 30)),
        ({"fps": 30, "stride": 16, "window": 8}, (16 / 30, -4 / 30)),
        ({"seconds_per_snippet": 0.5}, (0.5, 0.0)),
        ({"seconds_per_snippet": 0.5, "first_snippet": 0.25}, (0.5, 0.25)),
        ({"seconds_per_snippet": 0.5, "fps": 30, "window": 30}, (0.5, 0.25)),
        ({"seconds_per_snippet": 0.5, "stride": 15, "window": 30}, (0.5, 0.25)),
        ({"seconds_per_snippet": 0.64, "stride": 16, "fps": 25}, (0.64, 0.0)),
    ],
)
def test_resolve(table, expected):
    assert Times.read(table).resolve() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "the stride and fps of the features are not known.*--stride N --fps N"),
        ({"fps": 30}, "the stride of the features is not known.*--stride N"),
        ({"stride": 16}, "the fps of the features is not known.*--fps N"),
        ({"seconds_per_snippet": 1, "window": 32}, "the fps is not known; give --fps"),
        ({"seconds_per_snippet": 1, "stride": 16, "fps": 30}, "contradict a stride of 16 frames at 30 fps"),
        ({"stride": 16, "fps": 30, "num_frames": 32, "offset_frames": 0}, "has its middle at 16; keep the one"),
        ({"stride": 16, "feat_stride": 8, "fps": 30}, '"feat_stride": 8 and "stride": 16 are two names'),
        ({"fps": 0, "stride": 1}, "fps is 0; it must be a number above 0"),
        ({"fps": float("nan")}, '"fps" is nan, not a finite number'),
        ({"stride": "often"}, "\"stride\" is 'often', not a finite number"),
        ({"stride": True}, '"stride" is True'),
        ({"offset_frames": -1}, "offset_frames is -1; it must be a number at least 0"),
        ({"stride": 16, "fps": 30, "first_snippet": "later"}, "\"first_snippet\" is 'later'"),
    ],
)
def test_what_is_not_known_is_asked_for(table, message):
    with pytest.raises(InputError, match=message):
        Times.read(table).resolve()


@pytest.mark.parametrize(
    ("mine", "other", "expected"),
    [
        ({"stride": 8}, {"fps": 30, "stride": 16, "window": 32}, (8 / 30, 12 / 30)),
        ({"fps": 25}, {"fps": 30, "stride": 16}, (0.64, 0.0)),
        ({"seconds_per_snippet": 0.2}, {"fps": 30, "stride": 16}, (0.2, 0.0)),
        ({"seconds_per_snippet": 0.2}, {"fps": 30, "stride": 16, "window": 12}, (0.2, 0.1)),
        ({"stride": 15, "fps": 30}, {"seconds_per_snippet": 0.2}, (0.5, 0.0)),
        ({"stride": 6}, {"fps": 30, "seconds_per_snippet": 0.2}, (0.2, 0.0)),
        ({"window": 16}, {"fps": 30, "stride": 16, "middle": 16}, (16 / 30, 0.0)),
        ({}, {"fps": 30, "stride": 16, "first_snippet": 1}, (16 / 30, 1)),
    ],
)
def test_what_is_given_wins(mine, other, expected):
    assert Times(**mine).over(Times(**other)).resolve() == pytest.approx(expected)


def dataset(tmp_path, entry: dict, top: dict, snippets: int = 60):
    (tmp_path / "features").mkdir(exist_ok=True)
    np.save(tmp_path / "features" / "a.npy", np.random.default_rng(0).random((snippets, 4), dtype=np.float32))
    video = {"subset": "test", "annotations": [{"label": "x", "segment": [1, 2]}], **entry}
    (tmp_path / "gt.json").write_text(json.dumps({**top, "database": {"a": video}}))
    return tmp_path


@pytest.mark.parametrize(
    ("entry", "top", "expected"),
    [
        ({"fps": 30}, {"feat_stride": 16, "num_frames": 32}, (16 / 30, 8 / 30)),
        ({"fps": 30, "feat_stride": 8}, {"feat_stride": 16}, (8 / 30, 0)),
        ({}, {"fps": 30, "stride": 16, "offset_frames": 16}, (16 / 30, 8 / 30)),
        # a video's own num_frames that fits its duration counts its frames
        ({"duration": 32.0, "num_frames": 960}, {"feat_stride": 16}, (16 / 30, 0)),
        ({"duration": 32.0, "fps": 30, "num_frames": 960}, {"feat_stride": 16}, (16 / 30, 0)),
        ({"duration": 32.0, "fps": 30, "num_frames": 32}, {"feat_stride": 16}, (16 / 30, 8 / 30)),
        ({"duration": 32.0, "frame": 960}, {"feat_stride": 16}, (16 / 30, 0)),
        # what is said of fps wins over what frames and duration give
        ({"duration": 38.4, "frame": 1152}, {"fps": 25, "feat_stride": 16}, (0.64, 0)),
        # extracted at 25 fps from a video of 30
        ({"duration": 38.4, "fps": 25, "num_frames": 1152}, {"feat_stride": 16}, (0.64, 0)),
        ({"num_frames": 960}, {"fps": 30, "feat_stride": 16}, (16 / 30, 0)),
        ({"fps": 30}, {"seconds_per_snippet": 0.5}, (0.5, 0)),
        ({"duration": 30.0, "frame": 900}, {"seconds_per_snippet": 0.5}, (0.5, 0)),
        ({"stride": 15, "num_frames": 45}, {"fps": 30}, (0.5, 0.5)),
        # a video's window wins over the top's, under whatever name
        ({"num_frames": 32}, {"fps": 30, "feat_stride": 16, "num_frames": 16}, (16 / 30, 8 / 30)),
        ({"num_frames": 16}, {"fps": 30, "feat_stride": 16, "num_frames": 32}, (16 / 30, 0)),
        ({"num_frames": 32}, {"fps": 30, "feat_stride": 16, "offset_frames": 8}, (16 / 30, 8 / 30)),
        ({"offset_frames": 16}, {"fps": 30, "feat_stride": 16, "num_frames": 16}, (16 / 30, 8 / 30)),
        ({"num_frames": 32}, {"fps": 30, "seconds_per_snippet": 16 / 30}, (16 / 30, 8 / 30)),
        ({"frame": 638, "duration": 21.34}, {"seconds_per_snippet": 0.35, "feat_stride": 10.5}, (0.35, 0)),
    ],
)
def test_times_of_a_json(tmp_path, entry, top, expected):
    recording = open_dataset(dataset(tmp_path, entry, top)).recordings[0]
    assert (recording.seconds_per_snippet, recording.first_snippet) == pytest.approx(expected)


@pytest.mark.parametrize("snippets", [1, 2, 3, 4, 5])
def test_num_frames_of_very_short_videos_are_their_frames(tmp_path, snippets):
    frames = 16 * snippets + 5
    entry = {"fps": 30, "num_frames": frames, "duration": frames / 30}
    recording = open_dataset(dataset(tmp_path, entry, {"stride": 16}, snippets)).recordings[0]
    assert (recording.seconds_per_snippet, recording.first_snippet) == (16 / 30, 0)


def test_no_fps_comes_from_a_window(tmp_path):
    """16 frames in 2 s would be 8 fps."""
    with pytest.raises(InputError, match='the fps of the features is not known|"num_frames" is'):
        open_dataset(dataset(tmp_path, {"num_frames": 16, "duration": 2.0}, {"feat_stride": 16}, 3))


def test_num_frames_that_could_be_either_is_asked_for(tmp_path):
    for snippets, value in ((4, 64), (4, 48), (60, 10_000)):
        with pytest.raises(InputError, match='"num_frames" is .*: call it "window" where'):
            open_dataset(dataset(tmp_path, {"fps": 30, "num_frames": value}, {"stride": 16}, snippets))


def test_convert_keeps_when_the_first_snippet_is(tmp_path):
    source = open_dataset(dataset(tmp_path, {"fps": 29.97}, {"feat_stride": 16, "num_frames": 32}))
    result = convert(source, tmp_path / "out")
    assert result.recordings[0].first_snippet == source.recordings[0].first_snippet == pytest.approx(8 / 29.97)
    assert result.recordings[0].seconds_per_snippet == source.recordings[0].seconds_per_snippet


@pytest.mark.parametrize(
    ("duration", "stride", "snippets", "window"),
    [
        (32.0, 16, 60, 16),  # as it should be
        (32.0, 16, 57, 16),  # an end that is cut
        (32.0, 16, 56, 80),  # whole windows of 80 frames alone
        (3200.0, 16, 5995, 16),
        (3203.2, 16, 6000, 16),  # 29.97 fps called 30
    ],
)
def test_durations_that_fit(tmp_path, duration, stride, snippets, window):
    top = {"fps": 30, "stride": stride, "window": window}
    assert len(open_dataset(dataset(tmp_path, {"duration": duration}, top, snippets))) == 1


@pytest.mark.parametrize(
    ("duration", "stride", "snippets", "cause"),
    [
        (32.0, 8, 60, "has 60 snippets of 0.2667 s, 16 s in all, but lasts 32 s.*stride or fps.*0.5333 s per snippet"),
        (32.0, 32, 60, "60 snippets of 1.067 s, 64 s in all, but lasts 32 s"),
        (640.0, 19.2, 960, "has 960 snippets of 0.64 s, 614.4 s in all, but lasts 640 s"),  # 25 fps called 24
        (32000.0, 16, 60, "the duration may be in milliseconds"),
        (2.133, 16, 60, "the array's axes may be swapped"),  # it is 60 x 4
        (32.0, 16, 6, "6 snippets"),
    ],
)
def test_durations_that_do_not(tmp_path, duration, stride, snippets, cause):
    folder = dataset(tmp_path, {"duration": duration}, {"fps": 30, "stride": stride}, snippets)
    with pytest.raises(InputError, match=cause) as caught:
        open_dataset(folder)
    assert "--ignore-durations" in str(caught.value) and "\n" not in str(caught.value)
    assert len(open_dataset(folder, check_durations=False)) == 1


@pytest.mark.parametrize("top", [{"offset": 1000}, {"window": 3000}])
def test_a_first_snippet_past_what_the_durations_allow(tmp_path, top):
    with pytest.raises(InputError, match="the first from .* s on.*window or offset"):
        open_dataset(dataset(tmp_path, {"duration": 32.0}, {"fps": 30, "stride": 16, **top}))


def test_short_recordings_that_are_all_off_the_same_way(tmp_path):
    """Each is within the snippets that are allowed; together they are half as many as their durations ask for."""
    folder = dataset(tmp_path, {}, {"fps": 30, "stride": 8}, 4)
    table = json.loads((folder / "gt.json").read_text())
    video = {**table["database"]["a"], "duration": 64 / 30}
    for i in range(10):
        table["database"][f"a{i}"] = video
        np.save(folder / "features" / f"a{i}.npy", np.ones((4, 4), np.float32) * i + 1)
    (folder / "gt.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match="10 recordings have 40 snippets together, and by their durations 80 to 80"):
        open_dataset(folder)
    assert len(open_dataset(folder, times=Times(stride=16))) == 11


@pytest.mark.parametrize("rounded", [np.floor, np.ceil])
@pytest.mark.parametrize("window", [16, 64])
def test_short_recordings_that_are_only_rounded(tmp_path, rounded, window):
    folder = dataset(tmp_path, {"duration": 2.0}, {"fps": 30, "stride": 16, "window": window}, 3)
    table = json.loads((folder / "gt.json").read_text())
    video = table["database"].pop("a")
    for i in range(40):
        frames = window + 7 * i % 97 + 1
        snippets = max(1, int(rounded((frames - window) / 16 + 1))) if window > 16 else int(rounded(frames / 16))
        table["database"][f"a{i}"] = {**video, "duration": frames / 30}
        np.save(folder / "features" / f"a{i}.npy", np.ones((snippets, 4), np.float32) * i + 1)
    (folder / "gt.json").write_text(json.dumps(table))
    assert len(open_dataset(folder)) == 40


def test_durations_are_checked_in_every_layout(tmp_path):
    for stream in ("rgb", "flow"):
        (tmp_path / "features" / "test" / stream).mkdir(parents=True)
        np.save(tmp_path / "features" / "test" / stream / "a.npy", np.ones((60, 4), np.float32))
    (tmp_path / "split_test.txt").write_text("a\n")
    for fps, duration in ((25, 38.4), (30, 32.0)):
        entry = {"subset": "test", "annotations": [], "duration": duration}
        (tmp_path / "gt.json").write_text(json.dumps({"database": {"a": entry}}))
        if fps == 25:
            assert len(open_dataset(tmp_path)) == 1
        else:
            with pytest.raises(InputError, match="60 snippets of 0.64 s"):
                open_dataset(tmp_path)
            assert open_dataset(tmp_path, times=Times(fps=30)).recordings[0].seconds_per_snippet == 16 / 30
    # fps without a stride: the layout's 16 frames may not be those of this fps
    (tmp_path / "gt.json").write_text(json.dumps({"fps": 30, "database": {"a": {"subset": "test", "annotations": []}}}))
    with pytest.raises(InputError, match="the stride of the features is not known"):
        open_dataset(tmp_path)


def test_a_catalog_of_an_open_dataset_is_that_dataset(tmp_path):
    source = open_dataset(dataset(tmp_path, {"fps": 30}, {"feat_stride": 16, "num_frames": 32}))
    again = Catalog.of(source).open()
    assert again.recordings[0].first_snippet == source.recordings[0].first_snippet
    np.testing.assert_array_equal(again.features(0), source.features(0))
