"""One door to every dataset layout, recognised by looking."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from d2net.data.actionformer import open_actionformer
from d2net.data.cola import open_cola
from d2net.data.dataset import Dataset
from d2net.data.simulated import simulate
from d2net.data.wtalc import SUFFIX, open_wtalc
from d2net.errors import InputError


def open_dataset(
    spec: str | Path,
    *,
    trust_pickle: bool = False,
    annotations: Path | None = None,
    subsets: Sequence[str] | None = None,
    snippet_stride: float = 4,
) -> Dataset:
    """Opens a dataset of any layout and checks that its files are there and whole.

    Args:
        spec: ``"watch"`` (embedded), ``"simulated"``, ``"simulated:ANNOTATIONS.json"``, or the path of a folder,
            annotations JSON or W-TALC feature file.
        trust_pickle: Allow the pickles of the W-TALC layout.
        annotations: Annotations that do not lie where the layout has them: a JSON, or W-TALC's folder.
        subsets: Open only these subsets (all by default).
        snippet_stride: Frames between snippets for ActionFormer's layout where its JSON does not say.

    Raises:
        InputError: unknown layout, a missing or broken file, an empty subset, an unlabelled training recording.
    """
    dataset = _open(spec, trust_pickle, annotations, subsets, snippet_stride)
    if subsets is not None:
        for name in subsets:
            dataset.subset(name)
    train, _ = train_and_test(dataset.subsets)
    for r in dataset.recordings:
        if r.subset == train and not r.labels:
            raise InputError(f"{r.source}: training recording '{r.name}' has no label; annotate it or leave it out")
    return dataset


def train_and_test(subsets: Sequence[str]) -> tuple[str | None, str | None]:
    """Which subset a collection trains on and which it tests on, None where there is none.

    THUMOS14 trains on ``validation`` and tests on ``test``; ActivityNet trains on ``training`` and tests on
    ``validation``.
    """
    lower = {s.lower(): s for s in subsets}
    train = next((lower[s] for s in ("train", "training", "validation") if s in lower), None)
    test = next((lower[s] for s in ("test", "testing", "validation") if s in lower and lower[s] != train), None)
    return train, test


def _open(
    spec: str | Path,
    trust_pickle: bool,
    annotations: Path | None,
    subsets: Sequence[str] | None,
    snippet_stride: float,
) -> Dataset:
    kind, _, timeline = str(spec).partition(":")
    if spec == "watch":
        from d2net.data.watch import load_watch  # windows are computed on loading: only for those who want it

        return load_watch()
    if kind == "simulated":
        return simulate(Path(timeline) if timeline else annotations, subsets=subsets)

    path = Path(spec)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give a dataset's path, 'watch' or 'simulated'")
    folder = path if path.is_dir() else path.parent
    joint = [path] if path.name.endswith(SUFFIX) else sorted(path.glob(f"*{SUFFIX}"))
    if len(joint) > 1:
        raise InputError(f"{path}: holds {', '.join(p.name for p in joint)}; give the path of one of them")
    if joint:
        return open_wtalc(joint[0], trust_pickle=trust_pickle, annotations=annotations, subsets=subsets)
    if any(folder.glob("features/*/rgb")):
        return open_cola(folder, annotations=annotations or (None if path.is_dir() else path), subsets=subsets)
    if path.suffix == ".json" or annotations or any(path.glob("*.json")):
        return open_actionformer(path, annotations=annotations, subsets=subsets, snippet_stride=snippet_stride)

    found = sorted(p.name for p in folder.iterdir())
    listing = ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
    raise InputError(
        f"{path}: unknown layout; looked for *{SUFFIX} (W-TALC), features/*/rgb with gt.json (CoLA) and one *.json "
        f"with a folder of .npy (ActionFormer), found {listing or 'nothing'}"
    )
