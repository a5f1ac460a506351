"""Layout 4, your own: one file of features per recording, ``labels.csv``, and, where there are any, ``segments.csv``.

``features.json``, which ``d2net features`` writes, says when a snippet is; docs/data.md has every column and key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from d2net.data.actionformer import I3D
from d2net.data.catalog import UNLABELLED, Catalog, Listing
from d2net.data.containers import FeatureArray
from d2net.data.ends import LastSegments
from d2net.data.labels import near_duplicates
from d2net.data.locate import STREAMS, FeatureFinder, MissingFeatures, feature_files, features_folder, spelt
from d2net.data.timeline import Entry, is_ambiguous, positive, stream_widths
from d2net.data.times import Times
from d2net.errors import InputError
from d2net.reading import LONGEST, read_json, typed
from d2net.tables import Row, read_table
from d2net.words import NAME, counted, did_you_mean, escaped, listed, quoted

LABELS, SEGMENTS, FEATURES = "labels.csv", "segments.csv", "features.json"
LABEL_COLUMNS, SEGMENT_COLUMNS = ("recording", "labels"), ("recording", "label", "start", "end")
BETWEEN_LABELS = ";"


@dataclass
class _Labelled:
    """A line of labels.csv."""

    row: Row
    labels: tuple[str, ...]
    subset: str
    segments: list[tuple[float, float, str]] = field(default_factory=list)
    ambiguous: list[tuple[float, float]] = field(default_factory=list)
    last: tuple[float, Row] | None = None  # the latest end of a segment, and its line


def list_plain(spec: Path) -> Catalog:
    """Layout 4.

    Args:
        spec: A folder with ``labels.csv``, or that file under any name. ``segments.csv`` and ``features.json`` lie
            beside it (the latter beside the features, too); features as :func:`d2net.data.locate.features_folder` says.

    Raises:
        InputError: a missing or broken file, naming the line: a column that is not there, a recording or a segment that
            stands twice, a label or recording that labels.csv does not have, times that are none.
    """
    path = spec / LABELS if spec.is_dir() else spec
    folder = path.parent
    labelled, remarks, assumed = _read_labels(path)
    segments = folder / SEGMENTS
    if segments.exists() or segments.is_symlink():
        remarks += _read_segments(segments, labelled, path.name)
    settings, where = _read_features(folder)
    finder = FeatureFinder(folder, labelled.keys())
    remarks += _without_row(folder, labelled, path.name)
    usual = _times(settings, where)
    listings = []
    for name, x in labelled.items():
        entry = Entry(x.subset, x.labels, tuple(sorted(x.segments)), tuple(x.ambiguous), times=usual)
        listings.append(Listing(name, _timed(entry, name, settings, where), _Open(finder, name, x.row)))
    title = settings.get("name")
    return Catalog(
        name=title if isinstance(title, str) and title.strip() else folder.resolve().name,
        source=path,
        classes=tuple(sorted({label for x in labelled.values() for label in x.labels})),
        listings=tuple(listings),
        streams=None if settings.get("streams") is None else stream_widths(where, settings["streams"]),
        divide=lambda width, source: (width // 2, width // 2) if width == I3D else (width,),
        remarks=tuple(remarks),
        assumed=tuple(assumed),
        check=LastSegments({name: x.last for name, x in labelled.items() if x.last}).problems,
        no_segments=_no_segments(segments),
        extraction={key: value for key, value in settings.items() if key != "recordings"} or None,
    )


def _no_segments(path: Path) -> str:
    if path.exists():
        return f"{path}: has no segment of these recordings, and so there is nothing to evaluate on; add some"
    return (
        f"{path}: no such file, and so there is nothing to evaluate on; write one: first {','.join(SEGMENT_COLUMNS)}, "
        "then a line for every segment, with its times in seconds"
    )


@dataclass(frozen=True)
class _Open:
    """Finds the features of a recording of labels.csv."""

    finder: FeatureFinder
    name: str
    row: Row

    def __call__(self) -> tuple[FeatureArray, ...]:
        try:
            return self.finder.open(self.name)
        except MissingFeatures as error:
            stem, dot, ending = self.name.rpartition(".")
            if stem and self._is_there(stem):
                raise InputError(
                    f"{self.row.where}: recording '{escaped(self.name, NAME)}' has no features, and '{stem}' has; "
                    f"leave '{dot}{ending}' out"
                ) from None
            raise MissingFeatures(f"{self.row.where}: {error}") from None

    def _is_there(self, name: str) -> bool:
        try:
            return bool(self.finder.open(name))
        except InputError:
            return False


def _read_labels(path: Path) -> tuple[dict[str, _Labelled], list[str], list[str]]:
    """The recordings by name, what should be mended, and what is taken for granted."""
    table = read_table(path, LABEL_COLUMNS, ("subset",))
    found: dict[str, _Labelled] = {}
    first: dict[str, Row] = {}  # row in which a name is met first, by label
    subsets: dict[str, Row] = {}
    with_subset = any("subset" in row.cells for row in table.rows)
    for row in table.rows:
        name = _recording(row)
        if name in found:
            raise InputError(
                f"{row.where}: '{escaped(name, NAME)}' is in line {found[name].row.line} already; write all its labels "
                f"into one line, as run{BETWEEN_LABELS}jump"
            )
        said = dict.fromkeys(label.strip() for label in row.cells["labels"].split(BETWEEN_LABELS) if label.strip())
        labels = tuple(label for label in said if not is_ambiguous(label))
        for label in labels:
            first.setdefault(label, row)
        subset = row.text("subset") if with_subset else "train" if labels else UNLABELLED
        if not subset:
            raise InputError(f"{row.where}: no subset; write train or test, as the other lines do")
        subsets.setdefault(subset, row)
        found[name] = _Labelled(row, labels, subset)
    if not found:
        raise InputError(f"{path}: has no line but the first; write one for every recording, as video1,run;jump")
    _check_spelling("label", first)
    _check_spelling("subset", subsets)
    remarks = [f"{path.name}: the columns {listed(table.ignored)} are not read"] if table.ignored else []
    assumed = []
    if not with_subset:
        assumed.append(
            f"{path.name} has no column subset, so all labelled recordings are '{'train'}': they are trained on, and "
            "localized and evaluated where --subset does not say otherwise"
        )
    if UNLABELLED in subsets and not with_subset:
        without = [name for name, x in found.items() if not x.labels]
        assumed.append(
            f"{counted(len(without), 'recording')} of {path.name} without a label ({listed(without)}) are "
            f"'{UNLABELLED}': not trained on; --subset {UNLABELLED} or --subset all localizes them"
        )
    return found, remarks, assumed


def _read_segments(path: Path, labelled: dict[str, _Labelled], labels_name: str) -> list[str]:
    """Adds the segments to their recordings; returns what should be mended."""
    table = read_table(path, SEGMENT_COLUMNS)
    if "score" in table.ignored:
        raise InputError(
            f"{path}: line 1: a column 'score', as of detections; segments are what people saw: write them without one"
        )
    seen: dict[tuple[str, str, float, float], Row] = {}
    names = {spelt(name): name for name in labelled}
    for row in table.rows:
        said, label = _recording(row), row.text("label")
        name = names.get(spelt(said))
        if name is None:
            raise InputError(
                f"{row.where}: recording '{escaped(said, NAME)}' is not in {labels_name}"
                f"{did_you_mean(said, labelled)}; add it there, or drop the line"
            )
        if not label:
            raise InputError(f"{row.where}: no label; fill it in or drop the line")
        x = labelled[name]
        start, end = (row.number(column, "write seconds") for column in ("start", "end"))
        if not 0 <= start < end <= LONGEST:
            raise InputError(
                f"{row.where}: segment from {start:g} to {end:g} s; expected 0 <= start < end in seconds; mend or drop "
                "the line"
            )
        if (earlier := seen.setdefault((name, label, start, end), row)) is not row:
            raise InputError(f"{row.where}: is the same segment as line {earlier.line}; drop one of them")
        if is_ambiguous(label):
            x.ambiguous.append((start, end))
        elif label in x.labels:
            x.segments.append((start, end, label))
        else:
            known = ", ".join(f"'{escaped(c, NAME)}'" for c in x.labels) or "none"
            raise InputError(
                f"{row.where}: label '{escaped(label, NAME)}' is not among those of '{escaped(name, NAME)}' in line "
                f"{x.row.line} of {labels_name} ({known}){did_you_mean(label, x.labels)}; make them the same"
            )
        if x.last is None or end > x.last[0]:
            x.last = end, row
    remarks = [f"{path.name}: the columns {listed(table.ignored)} are not read"] if table.ignored else []
    annotated = {x.subset for x in labelled.values() if x.segments}
    bare = [n for n, x in labelled.items() if x.subset in annotated and set(x.labels) - {c for *_, c in x.segments}]
    if bare:
        remarks.append(
            f"{counted(len(bare), 'recording')} with a label of which {path.name} has no segment, beside others in the "
            f"same subset ({listed(bare)}): in an evaluation every detection of it there is false"
        )
    return remarks


def _recording(row: Row) -> str:
    name = row.text("recording")
    if not name:
        raise InputError(f"{row.where}: no recording; fill it in or drop the line")
    return name


def _check_spelling(what: str, first: Mapping[str, Row]) -> None:
    """Raises InputError for names that are probably one."""
    for group in near_duplicates(first):
        one, other = sorted(group, key=lambda name: first[name].line)[:2]
        raise InputError(
            f"{first[other].where}: {what} {quoted(other)} and {quoted(one)} in line {first[one].line} are probably "
            "one; write it in one way everywhere"
        )


def _read_features(folder: Path) -> tuple[dict[str, Any], Path]:
    """What features.json says, nothing where there is none, and its place: beside the features, or the labels."""
    places = [folder]
    try:
        places.insert(0, features_folder(folder))
    except InputError:  # said when the features are wanted
        pass
    for place in places:
        path = place / FEATURES
        if path.exists() or path.is_symlink():
            return read_json(path), path
    return {}, folder / FEATURES


def _times(table: Mapping[str, Any], where: Path) -> Times:
    try:
        return Times.read(table)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _timed(entry: Entry, name: str, settings: dict[str, Any], where: Path) -> Entry:
    """With what features.json says of the recording alone."""
    try:
        recordings = typed(settings.get("recordings") or {}, dict, '"recordings"')
        own = recordings.get(name)
        if own is None:
            return entry
        own = typed(own, dict, f"recording '{escaped(name, NAME)}'")
        return replace(entry, duration=positive(own, "duration"), times=Times.read(own).over(entry.times))
    except InputError as error:
        raise InputError(f"{where}: '{escaped(name, NAME)}': {error}") from None


def _without_row(folder: Path, labelled: Mapping[str, _Labelled], labels_name: str) -> list[str]:
    """Says of feature files that labels.csv does not have."""
    try:
        features = features_folder(folder)
        places = [features / s for s in STREAMS if (features / s).is_dir()] or [features]
        files = [path for place in places for path in feature_files(place)]
    except InputError:  # said when the features are wanted
        return []
    known = {f"{prefix}{spelt(name)}".removeprefix(less) for name in labelled for prefix, less in _PREFIXES}
    ends = tuple(f"{sign}{s}" for sign in "_-." for s in (*STREAMS, *map(str.upper, STREAMS)))
    stems = dict.fromkeys(spelt(path.stem) for path in files if path.suffix.lower() not in (".h5", ".hdf5"))
    strange = [stem for stem in stems if stem not in known and not any(stem.removesuffix(end) in known for end in ends)]
    if not strange:
        return []
    return [
        f"{counted(len(strange), 'feature file')} without a line in {labels_name}, not used: {listed(strange)}; a line "
        "may have no label"
    ]


_PREFIXES = (("", ""), ("v_", ""), ("", "v_"))


def is_plain(path: Path) -> bool:
    """Whether layout 4 lies here: a folder with labels.csv, or a CSV itself."""
    return (path / LABELS).is_file() or (path.is_file() and path.suffix.lower() == ".csv")


def looks_plain(path: Path) -> bool:
    """Whether a folder holds features, so that what it lacks may be labels.csv."""
    try:
        return path.is_dir() and features_folder(path).is_dir()
    except InputError:
        return False
