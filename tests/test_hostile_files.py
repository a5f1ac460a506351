"""Damaged files of every kind: each is read, or ends in one line; no other exception, no waiting, no memory eaten."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2net.data import find_dataset, open_dataset, simulate
from d2net.data.describe import describe, inspect
from d2net.detections import Annotations, read_detections, read_features, write_detections
from d2net.errors import D2NetError, InputError
from d2net.evaluation import evaluate
from d2net.reading import number
from d2net.studies.ablation import LOSSES, Ablation, make_rows
from d2net.studies.ablation.table import measures

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
DEEP: list[Any] = []
for _ in range(300):
    DEEP = [DEEP]
ODD = [
    *(None, True, 0, -1, 1.5, 1e308, 5e-324, float("inf"), float("nan"), 10**400),
    *("", "x", "1_0", "\ud800", "x" * 5000, "Ambiguous"),
    *([], {}, [[]], [1, 2], {"0": 1, "1": 2}, DEEP),
]
WHOLE = [
    *(b"", b"\xef\xbb\xbf", b"\xff\xfe\0", b"\0" * 100, b"\n" * 1000),
    *(b"[", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"null", b"NaN", b"1e400"),
    *(b"{}", b"[]", b'""', b'{"database": {}}', b'{"results": {}}'),
]
X = np.random.default_rng(0).random((40, 4), np.float32) + 0.1
TRUTH = {
    "name": "n", "fps": 25, "stride": 16, "classes": ["a", "b"], "streams": [4],
    "database": {
        "v1": {
            "subset": "train", "duration": 25.6, "annotations": [{"segment": [1, "5"], "label": "a", "label_id": 0}],
            "ambiguous": [[1, 2]], "withdrawn": True,
        },
        "v2": {
            "subset": "test", "duration_second": 25.6, "duration_frame": 640, "feature_frame": 640, "num_frames": 16,
            "labels": ["b"], "annotations": [{"label": "b"}], "window": 16, "offset": 0, "first_snippet": 0,
        },
    },
}  # fmt: skip
FOUND = {
    "results": {"v1": [{"label": "a", "score": 0.5, "segment": [1.0, "5"]}], "v2": []},
    "external_data": {"used": True, "details": "I3D"},
}


def nodes(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from nodes(inner, (*path, key))


def with_odd_values(content: Any) -> Iterator[bytes]:
    """The JSON with every node replaced by every odd value, and without it."""
    for path in nodes(content):
        for odd in (*ODD, ...):
            whole = copy.deepcopy([content])
            place = whole
            *way, last = (0, *path)
            for key in way:
                place = place[key]
            if odd is ...:
                del place[last]
            else:
                place[last] = odd
            if whole:
                yield json.dumps(whole[0]).encode()


def flipped(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """The file with bytes changed, cut off, taken out or repeated."""
    rng = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(content)
        place, length = rng.randrange(len(content)), rng.randrange(1, 30)
        match rng.randrange(5):
            case 0 | 1:
                damaged[place] = rng.randrange(256)
            case 2:
                del damaged[place:]
            case 3:
                del damaged[place : place + length]
            case 4:
                damaged[place:place] = damaged[place : place + length]
        yield bytes(damaged)


def all_end(path: Path, damaged: Iterator[bytes] | list[bytes], use: Callable[[], object]) -> None:
    """Every damaged content is used, or ends in one line that names a file."""
    outcomes = {"used": 0, "refused": 0}
    for content in damaged:
        path.write_bytes(content)
        try:
            use()
            outcomes["used"] += 1
        except D2NetError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error) and len(str(error)) <= 2000
        except Exception as error:
            raise AssertionError(f"{path.name}: {content[:2000]!r}") from error
    assert outcomes["refused"] > 0, outcomes


def use_dataset(spec: Path, *, trust_pickle: bool = False) -> None:
    catalog = find_dataset(spec, trust_pickle=trust_pickle)
    found = inspect(catalog)
    if found.dataset is not None:
        describe(found.dataset)
    catalog.annotations()
    dataset = catalog.open()
    dataset.fingerprint()
    dataset.label_matrix(allow_unlabelled=True)
    for i in range(len(dataset)):
        dataset.features(i)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of layout 3."""
    (tmp_path / "data" / "features").mkdir(parents=True)
    (tmp_path / "data" / "gt.json").write_text(json.dumps(TRUTH))
    for i, name in enumerate(("v1", "v2")):
        np.save(tmp_path / "data" / "features" / f"{name}.npy", X + i)
    use_dataset(tmp_path / "data")
    return tmp_path / "data"


def test_annotations(folder: Path) -> None:
    text = json.dumps(TRUTH).encode()
    damaged = [*with_odd_values(TRUTH), *flipped(text, 100), *WHOLE]
    all_end(folder / "gt.json", damaged[::3], lambda: use_dataset(folder))

    def simulated() -> None:
        dataset = simulate(folder / "gt.json", stream_widths=(2, 2))
        for i in range(len(dataset)):
            dataset.features(i)

    all_end(folder / "gt.json", damaged[1::4], simulated)


def test_annotations_of_bmn(folder: Path) -> None:
    (folder / "gt.json").unlink()
    entry = {"duration_second": 25.6, "duration_frame": 640, "annotations": [{"segment": [0, 3], "label": "a"}]}
    content = {"v1": {**entry, "feature_frame": 640}}
    all_end(folder / "anet_anno_train.json", [*with_odd_values(content), *WHOLE], lambda: use_dataset(folder))


def test_splits_and_ambiguous_segments(folder: Path) -> None:
    os.rename(folder / "features", folder / "all")
    (folder / "features" / "train").mkdir(parents=True)
    os.rename(folder / "all", folder / "features" / "train" / "rgb")
    split, doubtful = folder / "split_train.txt", folder / "Ambiguous_test.txt"
    split.write_text("v1\r\nv2\n")
    doubtful.write_text("v1 1.0 2.0\n")
    use_dataset(folder)
    all_end(split, [*flipped(split.read_bytes(), 100), *WHOLE], lambda: use_dataset(folder))
    split.write_text("v1\nv2\n")
    odd = [b"v1 1_0 2_0", b"v1 nan 1", b"v1 1e999 2", b"v1 " + b"1" * 10**6 + b" 2"]
    all_end(doubtful, [*flipped(doubtful.read_bytes(), 100), *WHOLE, *odd], lambda: use_dataset(folder))
    for target in (folder / "absent", doubtful):  # a link that leads nowhere, and one to itself
        doubtful.unlink()
        doubtful.symlink_to(target)
        with pytest.raises(InputError, match="Ambiguous_test.txt"):
            use_dataset(folder)


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_detections(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"d{suffix}"
    segments = ((0, 1), (0, 1), (0.0, 1.0), (5.0, 6.0))
    truth = Annotations(("v1", "v2"), ("a", "b"), *map(np.array, segments), ambiguous=np.array([(0, 7.0, 8.0)]))

    def use() -> None:
        found = read_detections(path)
        read_features(path)
        write_detections(tmp_path / "again.json", found)
        again = read_detections(tmp_path / "again.json")
        assert (again.videos, again.classes) == (found.videos, found.classes)
        for protocol in ("activitynet", "wtalc"):
            result = evaluate(found, truth, protocol, unknown_videos="ignore")
            json.dumps(result.to_json(), allow_nan=False)

    if suffix == ".json":
        damaged = [*with_odd_values(FOUND), *flipped(json.dumps(FOUND).encode(), 150), *WHOLE]
    else:
        text = b'recording,label,start,end,score\r\nv1,a,1.0,5.0,0.9\r\n"v2","b",0,1,1e-3\r\n'
        damaged = [*flipped(text, 300), *WHOLE, text + b'"' + b"x" * 200_000, text.replace(b"5.0", b"5_0")]
    all_end(path, damaged, use)


def test_wtalc(tmp_path: Path) -> None:
    """What is in its pickles may be anything, once they are trusted."""

    def objects(values: list) -> np.ndarray:
        array = np.empty(len(values), object)
        array[:] = values
        return array

    folder, features = tmp_path / "T-Annotations", tmp_path / "T-I3D-JOINTFeatures.npy"
    folder.mkdir()
    files = {
        folder / "videoname.npy": [b"v_1", b"v_2"],
        folder / "subset.npy": [b"validation", b"test"],
        folder / "classlist.npy": [b"a", b"b"],
        folder / "duration.npy": [25.6, 25.6],
        folder / "segments.npy": [[[1.0, 5.0]], [[0.0, 3.0]]],
        folder / "labels.npy": [["a"], ["b"]],
        folder / "labels_all.npy": [["a"], ["b"]],
        folder / "test_gt_segments.npy": [[], [["2", 0.1, 0.3]]],
        features: [X, X + 1],
    }
    for path, values in files.items():
        np.save(path, objects(values), allow_pickle=True)
    use_dataset(features, trust_pickle=True)
    endless: list = []
    endless.append(endless)
    odd = [
        *ODD,
        10**5000,
        endless,
        object,
        {1},
        np.zeros((2, 2)),
        np.array(3),
        np.array(["a"]),
        b"\xff",
        2j,
        [[1, 2], [3]],
    ]
    for path, values in files.items():
        damaged = []
        for strange in odd:
            for changed in ([strange, strange], [strange, values[1]], [values[0], strange], [], [strange] * 3):
                content = io.BytesIO()
                np.save(content, objects(changed), allow_pickle=True)
                damaged.append(content.getvalue())
        whole = path.read_bytes()
        all_end(path, [*damaged[::4], *WHOLE[::3]], lambda: use_dataset(features, trust_pickle=True))
        path.write_bytes(whole)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".h5"])
def test_features(folder: Path, suffix: str) -> None:
    path = folder / "features" / f"v1{suffix}"
    (folder / "features" / "v1.npy").unlink()
    if suffix == ".npy":
        np.save(path, X)
    elif suffix == ".npz":
        np.savez_compressed(path, feats=X)
    elif suffix == ".pt":
        torch = pytest.importorskip("torch")
        torch.save(torch.from_numpy(X), path)
    else:
        with pytest.importorskip("h5py").File(path, "w") as file:
            file["feats"] = X
    whole = path.read_bytes()
    heads = [head + whole[300:] for head in flipped(whole[:300], 60)]
    all_end(path, [*flipped(whole, 80), *heads, *WHOLE], lambda: use_dataset(folder))


def test_features_of_strange_types(folder: Path) -> None:
    import torch

    features = folder / "features"
    (features / "v1.npy").unlink()

    def refused(path: Path) -> None:
        with pytest.raises(InputError, match=f"v1{path.suffix}"):
            use_dataset(folder)
        path.unlink()

    for shape in ((10**9, 2048), (10**30, 4), (2**63, 4), (-1, 4)):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        (features / "v1.npy").write_bytes(header.getvalue() + bytes(640))
        refused(features / "v1.npy")
        with zipfile.ZipFile(features / "v1.npz", "w") as archive:
            archive.writestr("feats.npy", header.getvalue())
        refused(features / "v1.npz")
    with zipfile.ZipFile(features / "v1.npz", "w") as archive:
        archive.writestr("feats", b"bytes")
    refused(features / "v1.npz")
    plain = torch.ones(40, 4)
    for tensor in (plain.to_sparse(), plain.to("meta"), plain.to(torch.complex64).conj(), plain > 0, torch.ones(())):
        torch.save(tensor, features / "v1.pt")
        refused(features / "v1.pt")
    h5py = pytest.importorskip("h5py")
    for content in (
        h5py.SoftLink("/nothing"),
        h5py.ExternalLink("/dev/zero", "/x"),
        h5py.Empty("f"),
        np.dtype("f4"),
        b"x",
    ):
        with h5py.File(features / "v1.h5", "w") as file:
            file["feats"] = content
        refused(features / "v1.h5")


def test_results_of_a_study(tmp_path: Path) -> None:
    from d2net.recipes import load_recipe

    small = ("training.iterations=1", "training.batch_size=2", "training.max_snippets=20", "model.embedding_dim=4")
    recipe, data = load_recipe("watch").override(list(small)), simulate(stream_widths=(2, 2))

    def use() -> None:
        study = Ablation(tmp_path / "out", recipe, [LOSSES["focal"]], seeds=1, data=data)
        rows = make_rows(study, study.execute())
        assert all(isinstance(rows[0].summary(measure)[0], float) for measure in measures(rows))

    use()
    for path in (tmp_path / "out" / "study.json", tmp_path / "out" / "focal" / "seed-0" / "result.json"):
        whole = path.read_bytes()
        content = json.loads(whole)
        content.pop("per_class", None)  # not read
        all_end(path, [*list(with_odd_values(content))[::80], *flipped(whole, 5), *WHOLE[::2]], use)
        path.write_bytes(whole)


@pytest.fixture
def in_time() -> Iterator[None]:
    """What waits is interrupted."""
    handler = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waited"))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)


@pytest.mark.parametrize("kind", ["pipe", "zero", "folder"])
def test_pipes_and_devices(folder: Path, kind: str, in_time: None) -> None:
    """A pipe would be waited for, a device never end: in place of every file that is read."""

    def instead(path: Path) -> Path:
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "zero":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        return path

    said = "Is a directory" if kind == "folder" else "is a pipe or a device"
    for name in ("d.json", "d.csv", "d.pkl"):
        with pytest.raises(InputError, match=said):
            read_detections(instead(folder.parent / name))
    for suffix in (".npz", ".pt", ".h5", ".npy"):
        (folder / "features" / "v1.npy").unlink(missing_ok=True)
        path = instead(folder / "features" / f"v1{suffix}")
        with pytest.raises(InputError, match=said):
            open_dataset(folder)
        path.rmdir() if kind == "folder" else path.unlink()
    path = instead(folder / "Ambiguous_test.txt")
    with pytest.raises(InputError, match=said):
        find_dataset(folder)
    path.rmdir() if kind == "folder" else path.unlink()
    with pytest.raises(InputError, match=said if kind != "folder" else "expected exactly one annotations JSON"):
        find_dataset(instead(folder / "gt.json"))


def test_what_a_shell_substitutes(in_time: None) -> None:
    """``<(command)`` is a pipe, which can be read once; ``< FILE`` is a file."""
    read, write = os.pipe()
    with pytest.raises(InputError, match="is a pipe or a device; write what comes from it to a file"):
        read_detections(f"/dev/fd/{read}")
    os.close(read)
    os.close(write)


def test_a_key_that_comes_twice_is_found_in_time(tmp_path: Path, in_time: None) -> None:
    keys = ", ".join(f'"v{i}": []' for i in range(50_000))
    (tmp_path / "d.json").write_text(f'{{"results": {{{keys}, "v49999": []}}}}')
    with pytest.raises(InputError, match="'v49999' comes twice"):
        read_detections(tmp_path / "d.json")


@pytest.mark.parametrize(
    "value", ["1_0", "0x1", "", " ", "1e999", 10**400, True, None, [1], {}, b"\xff", float("nan"), 2j]
)
def test_numbers(value: object) -> None:
    with pytest.raises(InputError, match='^"x" is .*, not a finite number$'):
        number(value, '"x"')


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_json_is_utf_8_alone(folder: Path, coding: str) -> None:
    path = folder / "gt.json"
    path.write_bytes(path.read_text().encode(coding))
    with pytest.raises(InputError, match=r"gt\.json: not valid JSON"):
        use_dataset(folder)


def test_numbers_in_strings() -> None:
    assert [number(x, "x") for x in (" 1.5 ", "1e3", 7, np.float32(0.5), -0.0)] == [1.5, 1000, 7, 0.5, 0]


def test_frames(tmp_path: Path, in_time: None) -> None:
    """Damaged images, a pipe, and a recording whose name leads out of the folder of frames."""
    from PIL import Image

    from d2net.report.plot import find_frames
    from d2net.report.timeline import TimelineRow, Track, draw_timeline

    (tmp_path / "frames" / "v").mkdir(parents=True)
    for name in ("..", "../frames", "/etc", "", "x" * 5000, "a\0b"):
        with pytest.raises(InputError, match="cannot be the name of a file"):
            find_frames(tmp_path / "frames", name)
    path = tmp_path / "frames" / "v" / "1.png"
    Image.effect_noise((40, 30), 50).save(path)

    def draw() -> None:
        frames = find_frames(tmp_path / "frames", "v")
        row = TimelineRow("v", 1.0, ["a"], [(0, 1, "a")], [Track("", [])], 2.0, frames)
        draw_timeline(tmp_path / "picture.png", [row], dpi=20)

    all_end(path, [*flipped(path.read_bytes(), 12), *WHOLE[:5]], draw)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="not a readable image"):
        draw()
