"""Pickled arrays: as NumPy reads them, or an error; nothing that a file names is run, no damage ends the process."""

from __future__ import annotations

import io
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2net.data.pickled import load_pickled


def objects(*values: Any) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


ARRAYS = {
    "features": objects(np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3))),
    "lists and texts": objects([[1, 2.5]], ["a", "é"], b"\xff", (), {}),
    "scalars": objects(np.float32(3), np.int64(4), np.str_("xy"), np.bool_(True)),
    "arrays of texts": objects(np.array(["a", "bcd"]), np.array([b"x"])),
    "two axes": np.array([["a", b"b"], [None, 1]], object),
    "by columns": np.array([["a", b"b", 2], [None, 1, 3]], object).T,
    "nested and empty": objects(objects(1, 2), [np.zeros((0, 3))]),
    "no objects": np.array(["abc", "d"]),
}


def content(array: np.ndarray, protocol: int) -> bytes:
    stream = io.BytesIO()
    if not array.dtype.hasobject:
        np.save(stream, array)
    else:
        facts = {"descr": "|O", "fortran_order": array.flags.fnc, "shape": array.shape}
        np.lib.format.write_array_header_1_0(stream, facts)
        pickle.dump(array, stream, protocol=protocol)
    return stream.getvalue()


def said(value: Any) -> Any:
    """All of it, in what can be compared."""
    if isinstance(value, np.ndarray):
        inner = [said(v) for v in value.reshape(-1).tolist()] if value.dtype.hasobject else value.tobytes()
        return value.shape, str(value.dtype), inner
    return [said(v) for v in value] if isinstance(value, (list, tuple)) else (type(value).__name__, repr(value))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_as_numpy_reads_them(tmp_path: Path, name: str, protocol: int) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(content(ARRAYS[name], protocol))
    expected = np.load(path, allow_pickle=True, encoding="latin1")
    assert said(load_pickled(path)) == said(expected)
    path.write_bytes(pickle.dumps(ARRAYS[name], protocol))  # without the header of a .npy
    assert said(load_pickled(path)) == said(np.load(path, allow_pickle=True, encoding="latin1"))


def test_the_published_annotations_are_as_numpy_reads_them(shared: Path) -> None:
    paths = sorted((shared / "data" / "thumos14" / "wtalc").glob("*.npy"))
    assert paths
    for path in paths:
        assert said(load_pickled(path)) == said(np.load(path, allow_pickle=True, encoding="latin1")), path.name


class Reduced:
    """Pickles as a call of a function, and a state for what it gives."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple:
        return self.reduced


reconstruct = np.zeros(1).__reduce__()[0]
NEW = (reconstruct, (np.ndarray, (0,), b"b"))
PLAIN, OBJECT = np.dtype("f4"), np.dtype(object)


@pytest.mark.parametrize(
    "value",
    [
        Reduced(os.system, ("touch ran",)),
        Reduced(eval, ("open('ran', 'w')",)),
        Reduced(*NEW, (1, (1000,), OBJECT, False, [1])),  # fewer items than it says
        Reduced(*NEW, (1, (2**62,), OBJECT, False, [])),
        Reduced(*NEW, (1, (1000,), PLAIN, False, b"1234")),
        Reduced(*NEW, (1, (-1,), PLAIN, False, b"")),
        Reduced(*NEW, (1, (True,), PLAIN, False, b"1234")),
        Reduced(*NEW, (1, (1,) * 33, PLAIN, False, b"1234")),
        Reduced(*NEW, (1, (1,), OBJECT, False, b"\1" * 8)),  # an address
        Reduced(*NEW, (1, (1,), PLAIN, False, [1.0])),
        Reduced(*NEW, (1, (1,), "f4", False, b"1234")),
        Reduced(reconstruct, (dict, (0,), b"b")),
        Reduced(np.dtype, ("V8", False, True), (3, "|", None, ("a",), {"a": (OBJECT, 10**9)}, 8, 1, 16)),
        Reduced(np.dtype, ("f4", False, True), (3, "<", (OBJECT, (3,)), None, None, -1, -1, 0)),
        Reduced(np.float32(1).__reduce__()[0], (PLAIN, b"1")),
        Reduced(np.float32(1).__reduce__()[0], (np.dtype("f8"), b"1234")),
        Reduced(bytes, (10**15,)),
    ],
)  # fmt: skip
def test_what_is_no_array_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.npy"
    path.write_bytes(content(objects(value), 2))
    with pytest.raises((pickle.UnpicklingError, ValueError, TypeError)):
        load_pickled(path)
    assert not (tmp_path / "ran").exists()


def test_damaged_files_end_in_an_exception(tmp_path: Path) -> None:
    """In another process: NumPy's own reader ends it, by a signal, within some thousand of these."""
    rng = random.Random(0)
    wholes = [content(array, protocol) for array in ARRAYS.values() for protocol in (2, 4, 5)]
    for i in range(1500):
        damaged = bytearray(rng.choice(wholes))
        for _ in range(rng.randrange(1, 5)):
            place = rng.randrange(len(damaged))
            if rng.random() < 0.7:
                damaged[place] = rng.randrange(256)
            else:
                del damaged[place : place + rng.randrange(1, 8)]
        (tmp_path / f"{i}.npy").write_bytes(damaged)
    code = (
        "import glob, resource, warnings; warnings.simplefilter('ignore')\n"
        "from pathlib import Path\n"
        "from d2net.data.pickled import load_pickled\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "for path in glob.glob('*.npy'):\n"
        "    try: str(load_pickled(Path(path)))\n"
        "    except Exception: pass\n"
        "print('whole')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "whole\n", "")


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", ["array", "scalar", "<U2", ">U2"])
def test_letters_that_there_are_not(tmp_path: Path, kind: str, protocol: int) -> None:
    """NumPy makes an array of them, and a SystemError of whoever looks at one."""
    texts = np.array(["ab", "cd"], kind if kind.endswith("U2") else "=U2")
    array = texts if kind.endswith("U2") else objects(texts if kind == "array" else texts[0])
    right = content(array, protocol)
    assert said(load_pickled(written(tmp_path, right))) == said(array)
    order = "big" if kind == ">U2" else "little" if kind == "<U2" else sys.byteorder
    letter, none = ord("b").to_bytes(4, order), (0x08000062).to_bytes(4, order)
    assert right.count(letter) == 1
    with pytest.raises(ValueError, match="a letter that there is not"):
        load_pickled(written(tmp_path, right.replace(letter, none)))


def written(folder: Path, data: bytes) -> Path:
    path = folder / "x.npy"
    path.write_bytes(data)
    return path
