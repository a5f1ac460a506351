"""Opens datasets of every layout; recognises the layout by the files that are there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from d2net.data.actionformer import list_actionformer
from d2net.data.catalog import Catalog
from d2net.data.cola import list_cola
from d2net.data.dataset import Dataset
from d2net.data.locate import JOINT, STREAMS, visible
from d2net.data.plain import FEATURES, LABEL_COLUMNS, LABELS, is_plain, list_plain, looks_plain
from d2net.data.simulated import open_simulated
from d2net.data.timeline import is_annotations
from d2net.data.times import Times
from d2net.data.wtalc import list_wtalc, list_wtalc_annotations
from d2net.detections import Annotations
from d2net.errors import InputError
from d2net.reading import check_ordinary, load_json, missing
from d2net.spec import is_simulated, is_watch, settings_of
from d2net.words import listed


def open_dataset(
    spec: str | Path,
    *,
    trust_pickle: bool = False,
    annotations: Path | None = None,
    subsets: str | Sequence[str] | None = None,
    times: Times | None = None,
    streams: tuple[int, ...] | None = None,
    strict: bool = False,
    check_durations: bool = True,
) -> Dataset:
    """Opens a dataset of any layout and checks that its files are there and whole.

    Recordings without usable features are left out, with a warning; ``Dataset.left_out`` lists them.

    Args:
        spec: As for :func:`find_dataset`.
        trust_pickle: As there.
        annotations: As there.
        subsets: Open only these subsets; None: all. The features of other subsets need not be there.
        times: As for :meth:`d2net.data.catalog.Catalog.open`.
        streams: As there.
        strict: As there.
        check_durations: As there.

    Raises:
        InputError: unknown layout, a broken file, an empty subset, time that is not known.
    """
    catalog = find_dataset(spec, trust_pickle=trust_pickle, annotations=annotations)
    subsets = [subsets] if isinstance(subsets, str) else subsets
    dataset = catalog.open(subsets, times=times, streams=streams, strict=strict, check_durations=check_durations)
    if dataset.left_out:
        names = [r.name for r in dataset.left_out]
        warnings.warn(
            f"{catalog.source}: {len(names)} of {len(names) + len(dataset)} recordings are left out ({listed(names)}); "
            f"the first: {dataset.left_out[0].why}",
            stacklevel=2,
        )
    return dataset


def find_dataset(spec: str | Path, *, trust_pickle: bool = False, annotations: Path | None = None) -> Catalog:
    """The catalog of a dataset of any layout; no features are read.

    Args:
        spec: ``"watch"`` (embedded), ``"simulated"``, ``"simulated:ANNOTATIONS.json"``, each with settings as in
            ``"watch,difficulty=hard"`` (see :func:`d2net.data.simulated.open_simulated`), or the path of a folder,
            annotations JSON, CSV of labels, W-TALC feature file or W-TALC folder of annotations.
        trust_pickle: Allow the pickles of the W-TALC layout.
        annotations: Annotations that do not lie where the layout has them: a JSON, or W-TALC's folder.

    Raises:
        InputError: unknown layout, missing or broken annotations.
    """
    if is_watch(spec):
        from d2net.data.watch import load_watch  # only for those who want it

        return Catalog.of(load_watch(difficulty=settings_of(str(spec), {"difficulty": "easy"})["difficulty"]))
    if is_simulated(spec):
        return Catalog.of(open_simulated(str(spec), annotations))

    path = Path(spec)
    if not path.exists():
        what = missing(path) if path.is_symlink() else "no such file or folder"
        raise InputError(f"{path}: {what}; give a dataset's path, 'watch' or 'simulated'")
    if not path.is_dir():
        check_ordinary(path)
    if (path / "classlist.npy").is_file():
        return list_wtalc_annotations(path, trust_pickle=trust_pickle)
    inside = visible(path) if path.is_dir() else []
    joint = [path] if path.name.endswith(JOINT) else [p for p in inside if p.name.endswith(JOINT)]
    if len(joint) > 1:
        raise InputError(f"{path}: holds {', '.join(p.name for p in joint)}; give the path of one of them")
    if joint:
        return list_wtalc(joint[0], trust_pickle=trust_pickle, annotations=annotations)
    folder = path if path.is_dir() else path.parent
    if _is_cola(path, folder):
        return list_cola(folder, annotations=annotations or (None if path.is_dir() else path))
    if not annotations and is_plain(path):
        if other := next((p for p in inside if _is_annotations(p)), None):
            raise InputError(f"{path}: holds {other.name} and {LABELS}; give the path of the one that is to count")
        return list_plain(path)
    jsons = [p for p in inside if p.suffix.lower() == ".json" and p.name != FEATURES]
    if path.suffix.lower() == ".json" or annotations or jsons:
        return list_actionformer(path, annotations=annotations)
    if looks_plain(path):
        tables = [p.name for p in inside if p.suffix.lower() == ".csv"]
        raise InputError(
            f"{path / LABELS}: no such file{f' (there is {listed(tables)})' if tables else ''}; write one beside the "
            f"features: first {','.join(LABEL_COLUMNS)}, then a line for every recording, as video1,run;jump"
        )

    listing = listed([p.name for p in visible(folder)], 6)
    raise InputError(
        f"{path}: unknown layout; looked for *{JOINT} (W-TALC), features/*/rgb with gt.json (CoLA) and one *.json "
        f"with a folder of .npy (ActionFormer), {LABELS} with .npy (your own), found {listing or 'nothing'}"
    )


def read_annotations(
    spec: str | Path, *, subset: str | Sequence[str] | None = None, trust_pickle: bool = False
) -> Annotations:
    """Ground truth of a dataset, or of a file or folder of annotations; features need not be there.

    Args:
        spec: As of :func:`find_dataset`.
        subset: Name of the subset, or several; None takes all.
        trust_pickle: Allow the pickles of the W-TALC layout.

    Raises:
        InputError: as :func:`find_dataset`, or a subset that is not there.
    """
    catalog = find_dataset(spec, trust_pickle=trust_pickle)
    return catalog.annotations([subset] if isinstance(subset, str) else subset)


def _is_annotations(path: Path) -> bool:
    if path.suffix.lower() != ".json" or path.name == FEATURES:
        return False
    try:
        return is_annotations(load_json(path))
    except InputError:  # a broken one: of nothing that is known here
        return False


def _is_cola(path: Path, folder: Path) -> bool:
    """Whether layout 2 lies here; its annotations without features are enough for an evaluation."""
    features = folder / "features"
    if features.is_dir():
        return any((subset / stream).is_dir() for subset in visible(features) for stream in STREAMS)
    here = path.is_dir() or path.name == "gt.json"
    return here and (folder / "gt.json").is_file() and any(folder.glob("split_*.txt"))
