"""Feature files as people have them."""

from __future__ import annotations

import io
import json
import os
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from d2net.data import convert, open_dataset
from d2net.data.batches import BatchSampler
from d2net.data.containers import open_file, open_npy
from d2net.data.keeping import keep_features
from d2net.errors import InputError
from d2net.model import D2Net

X = np.random.default_rng(0).random((9, 4), dtype=np.float32)

LAYOUT = D2Net(2, (4,))  # gaps of one row


def annotations(folder: Path, names=("a",), **top) -> Path:
    video = {"subset": "test", "annotations": [{"label": "x", "segment": [1, 2]}]}
    top = {"fps": 30, "stride": 16, **top}
    (folder / "gt.json").write_text(json.dumps({**top, "database": dict.fromkeys(names, video)}), encoding="utf-8")
    (folder / "features").mkdir(exist_ok=True)
    return folder / "features"


def write_npz(path: Path, **arrays) -> None:
    np.savez(path.with_suffix(".npz"), **arrays)


@pytest.mark.parametrize(
    "write",
    [
        lambda p: np.save(p.with_suffix(".npy"), X),
        lambda p: np.save(p.with_suffix(".npy"), X.astype(np.float64)),
        lambda p: np.save(p.with_suffix(".npy"), X[:, :, None, None]),
        lambda p: np.save(p.with_suffix(".npy"), X[:, None]),
        lambda p: np.save(p.with_suffix(".npy"), X[None]),
        lambda p: np.save(p.with_suffix(".npy"), np.stack([X - 1, X + 1] * 5, axis=1)),
        lambda p: np.save(p.with_suffix(".npy"), np.stack([X - 1, X + 1] * 5, axis=0)),
        lambda p: write_npz(p, feats=X),
        lambda p: write_npz(p, anything=X),
        lambda p: write_npz(p, feats=X, times=np.arange(3)),
        lambda p: write_npz(p, rgb=X[:, :2], flow=X[:, 2:]),
        lambda p: torch.save(torch.from_numpy(X), p.with_suffix(".pt")),
        lambda p: torch.save({"features": torch.from_numpy(X)}, p.with_suffix(".pth")),
        lambda p: torch.save(
            {"RGB": torch.from_numpy(X[:, :2]), "Flow": torch.from_numpy(X[:, 2:])}, p.with_suffix(".pt")
        ),
        lambda p: [np.save(p.with_name(f"a_{s}.npy"), x) for s, x in (("rgb", X[:, :2]), ("flow", X[:, 2:]))],
        lambda p: [np.save(p.with_name(f"a-{s}.npy"), x) for s, x in (("RGB", X[:, :2]), ("FLOW", X[:, 2:]))],
        lambda p: np.save(p.with_name("v_a.npy"), X),
        lambda p: np.save(p.with_name("a_rgb.npy"), X),  # of one stream alone
        lambda p: np.save(p.with_name("v_a-flow.npy"), X),
        lambda p: torch.save(torch.from_numpy(X), p.with_suffix(".pt"), _use_new_zipfile_serialization=False),
        lambda p: [np.save(p.with_name(f"v_a_{s}.npy"), x) for s, x in (("rgb", X[:, :2]), ("flow", X[:, 2:]))],
    ],
)
def test_the_same_features(tmp_path, write):
    write(annotations(tmp_path) / "a")
    dataset = open_dataset(tmp_path)
    np.testing.assert_allclose(dataset.features(0), X, rtol=1e-6, atol=2e-7)
    assert dataset.recordings[0].snippets == 9 and dataset.features(0).dtype == np.float32


@pytest.mark.parametrize("many", [False, True])
def test_hdf5(tmp_path, many):
    h5py = pytest.importorskip("h5py")
    folder = annotations(tmp_path, ("a", "v_b"))
    if many:  # one file of all recordings, as ActivityNet's C3D features
        with h5py.File(folder / "all.h5", "w") as file:
            file["v_a/c3d_features"] = X
            file["v_b"] = X + 1
    else:
        for name, x in (("a", X), ("v_b", X + 1)):
            with h5py.File(folder / f"{name}.hdf5", "w") as file:
                file["feats"] = x
    dataset = open_dataset(tmp_path)
    np.testing.assert_array_equal(dataset.features(0), X)
    np.testing.assert_array_equal(dataset.features(1), X + 1)


def test_hdf5_without_h5py(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "h5py", None)
    (annotations(tmp_path) / "a.h5").write_bytes(b"x")
    with pytest.raises(InputError, match=r"a\.h5: reading HDF5 needs the package h5py: pip install 'd2net\[h5\]'"):
        open_dataset(tmp_path)


def test_the_mean_of_crops_is_said(tmp_path):
    np.save(annotations(tmp_path) / "a.npy", np.stack([X] * 10, axis=1))
    assert "the features of 1 recordings are the mean over their crops" in open_dataset(tmp_path).notes


@pytest.mark.parametrize(("name", "widths"), [("rgb", (4,)), ("flow", (4,)), ("both", (4, 3))])
def test_folders_of_streams(tmp_path, name, widths):
    folder = annotations(tmp_path)
    for stream, width in (("rgb", 4), ("flow", widths[-1])):
        if name in (stream, "both"):
            (folder / stream).mkdir()
            np.save(folder / stream / "a.npy", X[:, :width])
    assert open_dataset(tmp_path).stream_widths == widths


@pytest.mark.parametrize("streams", [("rgb",), ("flow",), ("rgb", "flow")])
def test_one_stream_in_layout_two(tmp_path, streams):
    annotations(tmp_path)
    (tmp_path / "split_test.txt").write_text("a\n")
    for stream in streams:
        (tmp_path / "features/test" / stream).mkdir(parents=True)
        np.save(tmp_path / "features/test" / stream / "a.npy", X)
    dataset = open_dataset(tmp_path)
    assert dataset.stream_widths == (4,) * len(streams) and not any("streams" in note for note in dataset.notes)
    result = convert(dataset, tmp_path / "out")
    assert result.stream_widths == dataset.stream_widths
    np.testing.assert_array_equal(result.features(0), dataset.features(0))


def test_i3d_in_one_array_is_two_streams(tmp_path):
    np.save(annotations(tmp_path) / "a.npy", np.ones((3, 2048), np.float32))
    dataset = open_dataset(tmp_path)
    assert dataset.stream_widths == (1024, 1024) and "--streams says otherwise" in dataset.notes[0]
    assert open_dataset(tmp_path, streams=(2048,)).stream_widths == (2048,)
    annotations(tmp_path, streams=[2000, 48])
    assert open_dataset(tmp_path).stream_widths == (2000, 48) and not open_dataset(tmp_path).notes
    annotations(tmp_path, streams=[1, 2, 3])
    with pytest.raises(InputError, match='"streams" is .*; give the width of each stream'):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: write_npz(p, a=X, b=X), r"a\.npz: expected one array, or rgb and flow, found a, b"),
        (lambda p: p.with_suffix(".npz").write_bytes(b"PK\x03\x04 cut"), r"a\.npz: not a readable \.npz file"),
        (lambda p: p.with_suffix(".npz").write_bytes(b""), r"a\.npz: the file is empty"),
        (lambda p: write_npz(p, a=np.array([{}], object)), r"a\.npz: holds pickled Python objects"),
        (lambda p: torch.save([X], p.with_suffix(".pt")), r"a\.pt: (holds a list|holds more than tensors)"),
        (
            lambda p: torch.save(Path("x"), p.with_suffix(".pt")),
            r"a\.pt: holds more than tensors, which could run code",
        ),
        (lambda p: p.with_suffix(".pt").write_bytes(b"no"), r"a\.pt: (not a readable PyTorch file|holds more)"),
        (lambda p: torch.save({"x": 1}, p.with_suffix(".pt")), r"a\.pt: expected one array.*found nothing"),
        (
            lambda p: [np.save(p.with_suffix(".npy"), X), write_npz(p, feats=X)],
            r"features: a\.npy and a\.npz could both be the features of 'a'",
        ),
        (
            lambda p: [np.save(p.with_name(n), X) for n in ("a_rgb.npy", "b_flow.npy")],
            r"'a' has rgb features but no flow",
        ),
        (lambda p: p.with_suffix(".csv").write_text("1,2"), r"no such feature file \(there is 'a\.csv', of which none"),
        (
            lambda p: p.with_suffix(".npy").write_text("<!DOCTYPE html>"),
            r"a\.npy: .*a web page or a pointer of git-lfs",
        ),
        (lambda p: p.with_suffix(".npy").write_text("version https://git-lfs"), r"a web page or a pointer of git-lfs"),
        (lambda p: np.save(p.with_suffix(".npy"), np.float32(3)), r"a\.npy: has shape \(\), expected \(T, width\)"),
        (lambda p: write_npz(p, feats=np.float32(3)), r"a\.npz: has shape \(\), expected"),
        (lambda p: torch.save(torch.tensor(3.0), p.with_suffix(".pt")), r"a\.pt: has shape \(\), expected"),
        (lambda p: np.save(p.with_name("A.npy"), X), r"a\.npy: no such feature file"),
    ],
)
def test_what_cannot_be_used(tmp_path, write, message):
    write(annotations(tmp_path) / "a")
    with pytest.raises(InputError, match=message) as caught:
        open_dataset(tmp_path)
    assert "\n" not in str(caught.value)


# --- names ---

NAMES = [
    "Home 3 - 0 Away",
    " blanks at the ends ",
    "Müller, Grün & Söhne",
    "跳远 1",
    "a.b.c",
    ".hidden",
    "v_v_x",
    "50% [off] 'quoted' \"twice\"",
    "#hash ~tilde~",
    "$HOME",
    "-dash",
    "x" * 200,
]


def layout_two(folder: Path, names: list[str], ending: str = "\n") -> Path:
    video = {"subset": "train", "annotations": [{"label": "x", "segment": [1, 2]}]}
    (folder / "gt.json").write_text(json.dumps({"database": dict.fromkeys(names, video)}), encoding="utf-8")
    (folder / "split_train.txt").write_bytes("".join(f"{n}{ending}" for n in names).encode())
    for i, name in enumerate(names):
        path = folder / "features/train/rgb" / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, X + i)
    return folder


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n"])
def test_names_may_be_anything_a_file_name_may(tmp_path, ending):
    dataset = open_dataset(layout_two(tmp_path, NAMES, ending))
    assert [r.name for r in dataset.recordings] == NAMES
    for i in range(len(NAMES)):
        np.testing.assert_array_equal(dataset.features(i), X + i)
    result = convert(dataset, tmp_path / "out")
    assert [r.name for r in result.recordings] == NAMES
    np.testing.assert_array_equal(result.features(3), X + 3)


def test_names_in_layout_three(tmp_path):
    folder = annotations(tmp_path, NAMES)
    for i, name in enumerate(NAMES):
        np.save(folder / f"{name}.npy", X + i)
    dataset = open_dataset(tmp_path)
    assert [r.name for r in dataset.recordings] == NAMES
    assert [r.name for r in convert(dataset, tmp_path / "out").recordings] == NAMES


def test_decomposed_names_of_files_are_the_same_names(tmp_path):
    """Archives made on a Mac hold 'u' and two dots where the annotations hold 'ü'."""
    folder = annotations(tmp_path, ("Müller",))
    np.save(folder / f"{unicodedata.normalize('NFD', 'Müller')}.npy", X)
    assert len(open_dataset(tmp_path)) == 1


def test_a_mark_at_the_beginning_of_a_text_file_is_not_part_of_a_name(tmp_path):
    layout_two(tmp_path, ["a"])
    for name in ("split_train.txt", "gt.json"):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [r.name for r in open_dataset(tmp_path).recordings] == ["a"]


def test_what_editors_and_archives_leave_behind_is_no_data(tmp_path):
    folder = annotations(tmp_path)
    np.save(folder / "a.npy", X)
    np.save(folder / "a.npy~", X)
    for place in (tmp_path, folder):
        for name in (
            ".DS_Store",
            "._gt.json",
            "._a.npy",
            "Thumbs.db",
            "desktop.ini",
            ".gt.json.swp",
            "gt.json~",
            "#gt.json#",
        ):
            (place / name).write_bytes(b"\x00\x05\x16\x07")
        (place / "__MACOSX").mkdir()
        (place / "__MACOSX" / "b.npy").write_bytes(b"\x00")
        (place / ".ipynb_checkpoints").mkdir()
    (tmp_path / "detections.json").write_text('{"results": {}}')
    (tmp_path / "settings.json").write_text("{}")
    assert [r.name for r in open_dataset(tmp_path).recordings] == ["a"]


def test_what_editors_leave_behind_is_no_split(tmp_path):
    layout_two(tmp_path, ["a", "b"])
    for name in (
        ".split_test.txt.swp",
        "._split_test.txt",
        "split_test.txt~",
        "split_test.txt.bak",
        "#split_test.txt#",
    ):
        (tmp_path / name).write_bytes(b"\x00\xff")
    assert open_dataset(tmp_path).subsets == ("train",)
    (tmp_path / "split_train copy.txt").write_text("a\n")
    with pytest.raises(InputError, match=r"'a' is in split_train.* and split_train.*; keep it in one"):
        open_dataset(tmp_path)


def test_more_recordings_than_files_that_may_be_open(tmp_path):
    resource = pytest.importorskip("resource")
    folder = annotations(tmp_path, [str(i) for i in range(120)])
    for i in range(120):
        np.save(folder / f"{i}.npy", X + i)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, before[1]))
    try:
        dataset = open_dataset(tmp_path)
        for i in range(120):
            np.testing.assert_array_equal(dataset.features(i), X + i)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(("own", "other"), [("a", "v_a"), ("v_a", "a"), ("a_rgb", "a"), ("\u00e9", "e\u0301")])
@pytest.mark.parametrize("kind", ["npy", "npz", "h5"])
def test_two_recordings_never_share_their_features(tmp_path, kind, own, other):
    """What is called exactly as a recording is its own; another whose name can be spelt like that has none."""
    folder = annotations(tmp_path, (own, other))
    if kind == "npy":
        np.save(folder / f"{own}.npy", X)
    elif kind == "npz":
        write_npz(folder / own, feats=X)
    else:
        with pytest.importorskip("h5py").File(folder / "all.h5", "w") as file:
            file[own] = X
    with pytest.warns(UserWarning, match="1 of 2 recordings are left out"):
        dataset = open_dataset(tmp_path)
    assert [r.name for r in dataset.recordings] == [own]
    assert [r.name for r in dataset.left_out] == [other]


def test_a_file_that_could_be_of_two_recordings_is_refused(tmp_path):
    """Neither is called as the file, which some file systems store decomposed."""
    folder = annotations(tmp_path, ("v_\u00e9", "\u00e9"))
    np.save(folder / "e\u0301.npy", X)
    with pytest.raises(InputError, match="are the features of .* and of .*; give each its own"):
        open_dataset(tmp_path)


def test_nothing_beside_the_data_is_in_the_way(tmp_path):
    """Other JSONs, an array of nothing, a link to nowhere, a stray .npy beside the one HDF5 file."""
    h5py = pytest.importorskip("h5py")
    folder = annotations(tmp_path, ("a", "b", "c"))
    with h5py.File(folder / "all.h5", "w") as file:
        file["a"] = X
    np.save(folder / "b.npy", np.array([]))
    (folder / "c.npy").symlink_to(tmp_path / "nowhere.npy")
    for name, text in (("classes.json", '["x"]'), ("empty.json", ""), ("comments.json", "// no\n{}")):
        (tmp_path / name).write_text(text)
    (folder / "__MACOSX" / "rgb").mkdir(parents=True)
    with pytest.warns(UserWarning, match="2 of 3 recordings are left out"):
        assert [r.name for r in open_dataset(tmp_path).recordings] == ["a"]


@pytest.mark.parametrize("kind", [".pt", ".npz"])
def test_every_flipped_bit_of_an_array_with_a_checksum_is_found(tmp_path, kind):
    path = tmp_path / f"a{kind}"
    if kind == ".pt":
        torch.save(torch.from_numpy(X), path)
    else:
        np.savez(path, feats=X)
    whole = path.read_bytes()
    begin, step = whole.index(X.tobytes()), max(1, 8 * X.nbytes // 300)
    for bit in range(0, 8 * X.nbytes, step):
        damaged = bytearray(whole)
        damaged[begin + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"a\{kind}: damaged"):
            open_file(path)
    path.write_bytes(whole)
    np.testing.assert_array_equal(open_file(path)[""].read(), X)


def test_a_header_in_an_archive_that_claims_fewer_rows(tmp_path):
    np.savez(tmp_path / "a.npz", feats=np.ones((9000, 4), np.float32))
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole.replace(b"(9000, 4)", b"(1000, 4)"))  # a flipped bit
    with pytest.raises(InputError, match="damaged"):
        open_file(tmp_path / "a.npz")


def test_torch_files_without_checksums(tmp_path):
    from torch.serialization import set_crc32_options

    try:
        set_crc32_options(False)
        torch.save(torch.from_numpy(X), tmp_path / "a.pt")
    finally:
        set_crc32_options(True)
    np.testing.assert_array_equal(open_file(tmp_path / "a.pt")[""].read(), X)


def test_messages_show_no_object_of_a_librarys_own(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("feats", b"bytes")
    with pytest.raises(InputError, match="'feats' in it is no .npy array"):
        open_file(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        content = io.BytesIO()
        np.save(content, X)
        archive.writestr("feats.npy", content.getvalue() + b"x")
    with pytest.raises(InputError, match="'feats.npy' in it is longer than its header says"):
        open_file(tmp_path / "b.npz")
    np.save(tmp_path / "a.npy", X)
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole.replace(b"(9, 4)", b"(9*4,)"))
    with pytest.raises(InputError, match="a.npy") as error:
        open_file(tmp_path / "a.npy")
    assert "object at" not in str(error.value) and "malformed node" in str(error.value)
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["feats"] = h5py.Empty("f")
    with pytest.raises(InputError, match="is a null dataset, without numbers"):
        open_file(tmp_path / "a.h5")


def test_reading_opens_one_key_of_an_archive(tmp_path):
    write_npz(annotations(tmp_path) / "a", rgb=X, flow=X + 1)
    dataset = open_dataset(tmp_path)
    np.testing.assert_array_equal(dataset.features(0), np.concatenate([X, X + 1], axis=1))


@pytest.mark.parametrize(
    "array",
    [
        X,
        np.asfortranarray(X),
        X.astype(">f4"),
        X.astype(np.float16),
        (100 * X).astype(np.uint8),
        np.zeros((0, 4), np.float32),
        np.asfortranarray(X[:, None]),
    ],
)
def test_a_file_of_numpy_is_read_as_numpy_reads_it(tmp_path, array):
    path = tmp_path / "a.npy"
    for version in ((1, 0), (2, 0)):
        with open(path, "wb") as file:
            np.lib.format.write_array(file, array, version)
        opened = open_npy(path)
        assert (opened.shape, opened.dtype) == (array.shape, array.dtype)
        for found, expected in ((opened.read(), array), (opened[:1], array[:1]), (opened[:], array)):
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)


def test_a_file_of_numpy_of_another_length_than_its_header_says(tmp_path):
    path = annotations(tmp_path) / "a.npy"
    np.save(path, X)
    whole = path.read_bytes()
    for content, why in ((whole[:-1], "truncated perhaps"), (whole + b"\0", "longer than its header says")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"{why} .expected {len(whole)} bytes, found {len(content)}"):
            open_dataset(tmp_path)
    path.write_bytes(whole.replace(b"(9, 4)", b"(-9, 4)").replace(b" \n", b"\n"))
    with pytest.raises(InputError, match=r"not a readable \.npy file, truncated perhaps \(shape"):
        open_dataset(tmp_path)


WRITERS = {
    "npy": lambda p, x: np.save(p.with_suffix(".npy"), x),
    "streams": lambda p, x: [np.save(p.with_name(f"a_{s}.npy"), x[:, i : i + 2]) for s, i in (("rgb", 0), ("flow", 2))],
    "npz": lambda p, x: np.savez(p.with_suffix(".npz"), x),
    "pt": lambda p, x: torch.save(torch.from_numpy(x), p.with_suffix(".pt")),
    "old pt": lambda p, x: torch.save(torch.from_numpy(x), p.with_suffix(".pt"), _use_new_zipfile_serialization=False),
    "h5": lambda p, x: write_h5(p.with_suffix(".h5"), x),
}


def write_h5(path: Path, array: np.ndarray) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file["feats"] = array


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_changes_while_it_is_in_use(tmp_path, kind):
    """A memory map of it would end the process with SIGBUS, or give what another file holds."""
    x = np.random.default_rng(1).random((9000, 4), dtype=np.float32)
    folder = annotations(tmp_path)
    WRITERS[kind](folder / "a", x)
    dataset = open_dataset(tmp_path)
    path = next(folder.iterdir())
    read = dataset.recordings[0].read()
    assert str(path) not in Path("/proc/self/maps").read_text()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    np.testing.assert_array_equal(read, x)
    shrunk = (
        r"shrank while it was read \(expected 144128 bytes, found 72064\); write it again" if kind == "npy" else "a"
    )
    sampler = BatchSampler(dataset, batch_size=1, max_snippets=5, layout=LAYOUT)
    for use in (
        lambda: dataset.features(0),
        sampler.next,
        lambda: keep_features(dataset, torch.device("cpu"), batch_size=1, max_snippets=5, layout=LAYOUT),
    ):
        with pytest.raises(InputError, match=rf"{path.name}.*{shrunk}") as error:
            use()
        assert "\n" not in str(error.value)
    for other in (x[:100], x[:0], x[:, :3], x.T):
        WRITERS[kind](folder / "a", other)
        with pytest.raises(InputError, match=r"a.*(changed|expected|opened|no snippet)"):
            dataset.features(0)
    WRITERS[kind](folder / "a", x)
    np.testing.assert_array_equal(dataset.features(0), read)
    assert sampler.next().lengths.tolist() == [5]


def test_a_long_recording_is_not_kept_for_a_short_window(tmp_path):
    np.save(annotations(tmp_path) / "a.npy", X)
    dataset = open_dataset(tmp_path)
    batch = BatchSampler(dataset, batch_size=1, max_snippets=2, layout=LAYOUT).next()
    assert any(np.array_equal(batch.parts[0][1:3], X[i : i + 2]) for i in range(8))


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "..", "a/../secret", "sub\\x", "x\0", "\ud800"])
def test_a_name_that_leads_elsewhere_is_left_out(tmp_path, name):
    """It is looked for among the files of the folder alone."""
    folder = annotations(tmp_path, ("a", name))
    np.save(folder / "a.npy", X)
    np.save(tmp_path / "secret.npy", X + 1)
    (folder / "sub").mkdir()
    with pytest.warns(UserWarning, match="1 of 2 recordings are left out"):
        dataset = open_dataset(tmp_path)
    assert [r.name for r in dataset.recordings] == ["a"]
    assert "cannot be the name of a file; rename it" in dataset.left_out[0].why
    with pytest.raises(InputError, match="cannot be the name of a file"):
        convert(dataset, tmp_path / "out")


NO_SHAPES = ["(0, 4611686018427387904)", f"(0, {10**30})", "(True, 8)", f"({70 * '1, '})"]


@pytest.mark.parametrize("shape", NO_SHAPES, ids=range(4))
def test_headers_that_no_array_can_have(tmp_path, shape):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    path = tmp_path / "v.npy"
    path.write_bytes(
        b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(32 if "True" in shape else 0)
    )
    with pytest.raises(InputError, match="v.npy"):
        open_file(path)


def test_a_tensor_that_repeats_a_few_numbers_is_not_unfolded(tmp_path):
    torch.save(torch.zeros(1).expand(10**10, 8), tmp_path / "v.pt")
    with pytest.raises(InputError, match="repeats fewer numbers"):
        open_file(tmp_path / "v.pt")


@pytest.mark.parametrize("way", ["link", "external", "virtual"])
def test_hdf5_leads_to_no_other_file(tmp_path, way):
    h5py = pytest.importorskip("h5py")
    os.mkfifo(tmp_path / "other")  # would be waited for
    with h5py.File(tmp_path / "v.h5", "w") as file:
        if way == "link":
            file["rgb"] = h5py.ExternalLink(str(tmp_path / "other"), "/rgb")
        elif way == "external":
            file.create_dataset("rgb", (4, 8), "f4", external=[(str(tmp_path / "other"), 0, 128)])
        else:
            layout = h5py.VirtualLayout((4, 8), "f4")
            layout[:] = h5py.VirtualSource(str(tmp_path / "other"), "rgb", (4, 8))
            file.create_virtual_dataset("rgb", layout)
    with pytest.raises(InputError, match="in (an)?other file"):
        open_file(tmp_path / "v.h5")
