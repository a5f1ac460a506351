"""Videos, sensors' files and features as recordings that a network can look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from d2net.data.containers import SUFFIXES, FeatureArray, open_file
from d2net.data.dataset import Dataset, Recording
from d2net.data.locate import STREAMS, FeatureFolder
from d2net.data.opening import joined
from d2net.data.times import Times, UnknownTime
from d2net.distributed import ALONE, Ranks
from d2net.errors import InputError
from d2net.features import Method, Written, find_recordings, write_features
from d2net.features.folder import ANNOTATIONS
from d2net.features.log import NAME
from d2net.features.sensor import SUFFIXES as TABLES
from d2net.features.video import SUFFIXES as VIDEOS
from d2net.prediction.predictor import Predictor
from d2net.reading import missing, read_json, typed
from d2net.words import counted, quoted

# Other features under one of these would be other numbers.
_MAKES = ("extractor", "weights", "flow", "columns", "streams", "precision")
_WHEN = ("fps", "stride", "window", "offset")


@dataclass(frozen=True)
class Inputs:
    """What there is to look at.

    Attributes:
        dataset: The recordings, with the classes of the network.
        sources: The video or the sensor's file of each recording that has one, by name.
        failed: Of which no features could be made, and why.
        notes: What was left out or taken for granted, in sentences.
    """

    dataset: Dataset
    sources: Mapping[str, Path]
    failed: Mapping[str, str]
    notes: tuple[str, ...]


def open_inputs(
    predictor: Predictor,
    inputs: Sequence[Path],
    *,
    method: Callable[[], Method],
    store: Path,
    times: Times,
    progress: Callable[[float, int], None] | None = None,
    tell: Callable[[str], None] | None = None,
    ranks: Ranks = ALONE,
) -> Inputs:
    """The recordings that ``inputs`` are.

    Args:
        predictor: Who is to look at them.
        inputs: Files of features, and folders with ``features.json``; all others are what features are made of: files,
            or folders of them.
        method: How those are made, asked for where there are any.
        store: Folder that they are kept in: what is there already is not made anew.
        times: What is known better than the data says.
        progress: As :func:`d2net.features.write_features` takes it.
        tell: As :func:`d2net.features.write_features` takes it.
        ranks: As :func:`d2net.features.write_features` takes them.

    Raises:
        InputError: an input that is missing or of another kind, features of other numbers than the network's, two
            recordings of one name, a time that is not known, or no recording left.
    """
    recordings: dict[str, Recording] = {}
    sources: dict[str, Path] = {}
    notes: list[str] = []
    raw = []
    for place in inputs:
        if place.suffix.lower() in SUFFIXES and not place.is_dir():
            arrays = open_file(place)
            found = {place.stem: tuple(arrays[s] for s in STREAMS if s in arrays) or tuple(arrays.values())}
            _add_features(predictor, found, place.parent, times, recordings, sources, notes)
        elif place.is_dir() and (names := _feature_names(place)):
            others = [p for p in place.iterdir() if p.suffix.lower() in VIDEOS | TABLES and p.name not in ANNOTATIONS]
            if others:
                left = counted(len(others), "video or table", "videos or tables")
                notes.append(f"{place}: only the features in it are looked at, and {left} left out")
            folder = FeatureFolder(place, names)
            found = {name: folder.open(name) for name in names}
            _add_features(predictor, found, place, times, recordings, sources, notes)
        elif (place / NAME).is_file():
            raise InputError(f"{place}: holds {NAME} and no features; give a folder that d2net features wrote")
        elif place.is_dir() and not any(place.iterdir()):
            raise InputError(f"{place}: is empty; give videos, sensors' CSV files or features")
        else:
            raw.append(place)
    result = Written()
    if raw:
        for place in raw:
            if not place.exists():
                raise InputError(f"{place}: {missing(place)}; give a file or a folder")
        how = method()
        for place in raw:
            if place.suffix.lower() in (VIDEOS | TABLES) - how.suffixes and place.is_file():
                other, own = ("video", "sensors' CSV files") if how.suffixes == TABLES else ("table", "videos")
                raise InputError(f"{place}: is a {other} by its name, and {predictor.name} looks at {own}")
        paths, ignored = find_recordings(raw, how.suffixes)
        if ignored:
            notes.append(f"{counted(ignored, 'other file')} in the folders left out, by the names")
        result = write_features(paths, how, store, progress=progress, tell=tell, ranks=ranks)
        made = {n: tuple(open_file(store / f"{n}.npy").values()) for n in paths if n not in result.failed}
        if made:
            _add_features(predictor, made, store, times, recordings, sources, notes)
    if not recordings:
        raise InputError(next(iter(result.failed.values()), "there is no recording; give files or folders"))
    source = ", ".join(map(str, inputs))
    dataset = predictor.dataset(list(recordings.values()), name=inputs[0].name or "features", source=source)
    return Inputs(dataset, sources, result.failed, tuple(dict.fromkeys(notes)))


def _feature_names(folder: Path) -> list[str]:
    """Of the recordings whose features lie in a folder: in it, or in its folders ``rgb`` and ``flow``."""
    streams = [folder / stream for stream in STREAMS if (folder / stream).is_dir()]
    files = [p for place in streams or [folder] for p in place.iterdir() if p.suffix.lower() in SUFFIXES]
    return sorted({p.stem for p in files})


def _add_features(
    predictor: Predictor,
    found: Mapping[str, tuple[FeatureArray, ...]],
    folder: Path,
    given: Times,
    recordings: dict[str, Recording],
    sources: dict[str, Path],
    notes: list[str],
) -> None:
    """Features by name, an array or one of each stream, as recordings; ``folder`` may have a features.json of them."""
    about = read_json(folder / NAME) if (folder / NAME).is_file() else {}
    known = typed(about.pop("recordings", None) or {}, dict, f'{folder / NAME}: "recordings"')
    notes += _compared(predictor, about, folder / NAME)
    times = given.instead_of(Times.read(about).over(predictor.times))
    try:
        seconds, first = times.resolve()
    except UnknownTime as error:
        raise InputError(
            f"{next(iter(found.values()))[0].source}: nothing says when a snippet is; give --seconds-per-snippet, or "
            "the folder of d2net features"
        ) from error
    width = sum(predictor.model.stream_widths)
    for name, arrays in found.items():
        of = typed(known.get(name) or {}, dict, f"{folder / NAME}: {quoted(name)}")
        source = arrays[0].source
        if (there := sum(a.width for a in arrays)) != width:
            raise InputError(
                f"{source}: is {there} wide, and {predictor.name} looks at {width} numbers a snippet; give features of "
                "the same extractor" + (", with both streams" if 2 * there == width else "")
            )
        if name in recordings:
            raise InputError(f"{recordings[name].source} and {source} are both recording {quoted(name)}; rename one")
        snippets = min(a.snippets for a in arrays)
        recordings[name] = Recording(
            name=name,
            subset="",
            labels=(),
            segments=(),
            seconds_per_snippet=seconds,
            source=source,
            read=arrays[0].read if len(arrays) == 1 else partial(joined, arrays, snippets),
            duration=of.get("duration"),
            first_snippet=first,
            snippets=snippets,
        )
        if isinstance(of.get("source"), str):
            sources[name] = folder / of["source"]


def _compared(predictor: Predictor, about: Mapping[str, Any], where: Path) -> list[str]:
    """What is to be said of features beside those that the network was trained on.

    Raises:
        InputError: they are other numbers.
    """
    trained = predictor.model.extraction
    if not trained:
        if "extractor" not in about:
            return []
        kind = quoted(about["extractor"])
        return [
            f"{where}: made by extractor {kind}; {predictor.name} does not say of its own, so see that they are alike"
        ]
    if "extractor" not in about:
        return [f"{where.parent}: nothing says how the features were made; taken to be as those of the training"]
    for key in _MAKES:
        if key in trained and trained[key] != about.get(key):
            raise InputError(
                f"{where}: the features were made with {key} {quoted(about.get(key))}, and {predictor.name} was "
                f"trained on those with {quoted(trained[key])}; make them as these were"
            )
    other = [
        f"{key} {about.get(key)} for {trained[key]}"
        for key in _WHEN
        if key in trained and trained[key] != about.get(key)
    ]
    if other:
        return [f"{where}: snippets are other stretches of time than in the training: {', '.join(other)}"]
    return []
