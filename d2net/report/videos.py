"""The video of a recording, where one lies beside its features or in a folder that is named."""

from __future__ import annotations

import os
from pathlib import Path

from d2net.data.dataset import Dataset
from d2net.errors import InputError
from d2net.reading import read_json

SUFFIXES = (".mp4", ".m4v", ".webm", ".mov", ".mkv", ".avi", ".ogv", ".mpg", ".mpeg")
FEATURES_NAME = "features.json"


def find_videos(dataset: Dataset, folder: Path | None = None) -> dict[str, Path]:
    """Files of the recordings that have one, by the recording's name.

    Args:
        dataset: Its features may lie in a folder with a ``features.json``, which says of each recording what it was
            extracted from: ``{"recordings": {NAME: {"source": PATH}}}``, paths from that folder on. Files that are no
            longer there count as none.
        folder: In place of that: of videos called as the recordings, with or without ``v_`` before their names.

    Raises:
        InputError: no such folder, or no recording's video in it.
    """
    names = [r.name for r in dataset.recordings]
    if folder is not None:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; --videos takes one that holds the recordings' videos")
        stems = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in SUFFIXES}
        found = {n: stems.get(n) or stems.get(f"v_{n}") or stems.get(n.removeprefix("v_")) for n in names}
        videos = {name: path for name, path in found.items() if path is not None}
        if not videos and names:
            raise InputError(
                f"{folder}: holds no video of the {len(names)} recordings, such as {names[0]}.mp4; name the videos as "
                "the recordings are"
            )
        return videos
    videos = {}
    sources: dict[Path, dict[str, Path]] = {}
    for recording in dataset.recordings:
        place = Path(recording.source)
        for beside in (place, *place.parents[:2]):  # a file of one stream lies a folder deeper
            if beside not in sources:
                sources[beside] = _sources(beside)
            if (path := sources[beside].get(recording.name)) is not None and os.path.isfile(path):
                videos[recording.name] = path
                break
    return videos


def _sources(folder: Path) -> dict[str, Path]:
    """What the recordings of a folder were extracted from, as far as it says that."""
    path = folder / FEATURES_NAME
    if not path.is_file():
        return {}
    recordings = read_json(path).get("recordings")
    entries = recordings.items() if isinstance(recordings, dict) else ()
    said = {name: entry.get("source") for name, entry in entries if isinstance(entry, dict)}
    return {
        name: folder / text
        for name, text in said.items()
        if isinstance(text, str) and Path(text).suffix.lower() in SUFFIXES
    }
