"""Any dataset to plain .npy files and a JSON (layout 2), or two CSVs (layout 4)."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2net.data.dataset import Dataset
from d2net.data.layouts import find_dataset
from d2net.data.locate import STREAMS
from d2net.data.plain import FEATURES, LABELS, SEGMENTS
from d2net.data.writers import WRITERS, check_plain, origin
from d2net.errors import InputError
from d2net.files import TEMPORARY, locked, one_component, sync
from d2net.reading import read_json
from d2net.words import quoted

_PART, _EARLIER = f"{TEMPORARY}convert-", f"{TEMPORARY}earlier-"  # folders beside OUT: being built, being replaced


def convert(
    source: Dataset | str | Path,
    out: Path,
    *,
    trust_pickle: bool = False,
    layout: str = "cola",
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Writes ``source`` as layout 2, or 4, and opens the result.

    The folder appears whole or not at all: it is built beside ``out``, brought to the disk, and moved there at the end,
    so that nothing of an earlier conversion stays in it. Where a conversion was killed, the next one to the same place
    removes what it left, and puts an earlier result back that was just being replaced. In layout 2 the training subset
    becomes ``train`` and the test subset ``test``, as its readers expect, unless another has that name; others keep
    theirs. Ambiguous segments are kept.

    Args:
        source: An open dataset, or what :func:`d2net.data.find_dataset` takes.
        out: Folder to write to; made, or replaced where it is an earlier conversion of the same dataset.
        trust_pickle: As for :func:`d2net.data.find_dataset`.
        layout: "cola", or "plain": one's own (``labels.csv``, ``segments.csv``), which people can edit.
        progress: Called as ``progress(done, total)`` after every recording.

    Raises:
        InputError: as opening and reading the source; ``out`` holds anything else, is being written, or cannot be; a
            name that is no file name; what layout 4 cannot hold. What was there is as it was.
    """
    if layout not in WRITERS:
        raise InputError(f"layout {quoted(layout)} is not written; there are {', '.join(WRITERS)}")
    out = Path(out)
    with writing(out):
        dataset = source if isinstance(source, Dataset) else find_dataset(source, trust_pickle=trust_pickle).open()
        _check_content(out, dataset)
        names = [r.name for r in dataset.recordings] + [x.name for x in dataset.left_out]
        for name in (*names, *dataset.subsets, *(x.subset for x in dataset.left_out)):  # before hours of writing
            one_component(name, dataset.source or dataset.name)
        if layout == "plain":
            check_plain(dataset)
        part, earlier = (_beside(out, f"{kind}{out.name}-{secrets.token_hex(8)}") for kind in (_PART, _EARLIER))
        try:
            part.mkdir()
            WRITERS[layout](dataset, part, progress)
            _sync_all(part)
            _check_readable(part, out)
            if os.path.lexists(out):
                _move_away(out, earlier, dataset)
            os.replace(part, out)  # after a kill before this line the next conversion restores the earlier one
            sync(part.parent)
        except OSError as error:
            raise InputError(
                f"{out}: cannot be written ({error.strerror}); make space, or give another folder; what was there is "
                "intact"
            ) from error
        finally:
            _tidy(out)
        return find_dataset(out).open()


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Within the block no other conversion writes to ``out``. Cleans up after killed ones, and makes the parent folder.

    Raises:
        InputError: another does; something else is there already; nothing can be written there.
    """
    with locked(out, _beside(out, f".d2net.{out.name}.lock")):
        _tidy(out)
        _check_place(out)
        yield


def _beside(out: Path, name: str) -> Path:
    return out.absolute().parent / name


def _tidy(out: Path) -> None:
    """Remove what conversions to ``out`` that have ended left; the earlier result goes back where it is missing.

    Only what is a conversion goes back, and an earlier one is removed only where there is one in its place.
    """
    ours = re.compile(f"({re.escape(_PART)}|{re.escape(_EARLIER)}){re.escape(out.name)}-[0-9a-f]{{16}}")
    for path in sorted(out.absolute().parent.iterdir()):
        if ours.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            if path.name.startswith(_PART):
                shutil.rmtree(path, ignore_errors=True)
            elif _is_conversion(path) and not os.path.lexists(out):
                os.replace(path, out)
            elif _is_conversion(path) and _is_conversion(out):
                # Under the name of what is removed whatever it holds: a kill while it is may leave half a conversion.
                part = _beside(out, path.name.replace(_EARLIER, _PART, 1))
                os.replace(path, part)
                shutil.rmtree(part, ignore_errors=True)


def _is_conversion(folder: Path) -> bool:
    """Whether the folder holds a conversion and nothing else."""
    streams = f"({'|'.join(STREAMS)})"
    if (folder / "gt.json").is_file():
        ours = re.compile(rf"gt\.json|split_[^/]+\.txt|features/[^/]+/{streams}/[^/]+\.npy")
    elif _is_plain_conversion(folder):
        ours = re.compile(rf"({LABELS}|{SEGMENTS}|{FEATURES})|({streams}/)?[^/]+\.npy")
    else:
        return False
    return all(
        ours.fullmatch(Path(place, name).relative_to(folder).as_posix())
        for place, _, names in os.walk(folder)
        for name in names
    )


def _is_plain_conversion(folder: Path) -> bool:
    try:
        return "converted_from" in _said_of(folder)
    except InputError:  # somebody's own, or damaged: not to be replaced
        return False


def _said_of(folder: Path) -> dict[str, Any]:
    """What a conversion says of itself; nothing where there is none."""
    for name in ("gt.json", FEATURES):
        if (folder / name).is_file():
            return read_json(folder / name)
    return {}


def _move_away(out: Path, earlier: Path, dataset: Dataset) -> None:
    """Move the earlier conversion to ``earlier``, but nothing that another program has put in its place.

    It is checked before the move, and again after it, when no other program can change it by its name.
    """
    _check_place(out)
    _check_content(out, dataset)
    os.replace(out, earlier)
    try:
        _check_place(earlier)
        _check_content(earlier, dataset)
    except InputError as error:
        os.replace(earlier, out)
        raise InputError(str(error).replace(str(earlier), str(out))) from None


def _sync_all(folder: Path) -> None:
    """Sync all files at the end, which is several times as fast as file by file."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def _check_readable(part: Path, out: Path) -> None:
    """Require that the result opens, before it replaces an earlier one."""
    try:
        find_dataset(part).open()
    except InputError as error:
        raise InputError(str(error).replace(str(part), str(out))) from None


def _check_place(out: Path) -> None:
    """Check that a conversion can be written to ``out``.

    Raises:
        InputError: something else is there already, or nothing can be written there.
    """
    if out.is_symlink():
        raise InputError(f"{out}: a symbolic link, which is not followed; give the folder that it leads to")
    try:
        with tempfile.TemporaryFile(dir=out.absolute().parent):
            pass
        there = list(out.iterdir()) if out.is_dir() else [out] if out.exists() else []
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); give another folder") from error
    if there and not (out.is_dir() and _is_conversion(out)):
        raise InputError(f"{out}: holds other files than a conversion; give a new folder")


def _check_content(out: Path, dataset: Dataset) -> None:
    """Raises InputError where ``out`` is the conversion of another dataset."""
    written = _said_of(out)
    if written and (written.get("name"), written.get("converted_from")) != (dataset.name, origin(dataset)):
        raise InputError(f"{out}: already holds another dataset; give a new folder")
