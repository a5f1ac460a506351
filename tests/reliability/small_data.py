"""Small datasets of every layout, made on the spot, always the same: what the attackers of this folder attack."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

CLASSES = ("Jump", "Spin")
WIDTH = 8  # of a stream
FPS, STRIDE = 25, 16
SECONDS = STRIDE / FPS
# name: (subset, class, snippets)
VIDEOS = {
    f"v{i:02}": ("train" if i < 6 else "test", CLASSES[i % 2], 40 + 3 * i) for i in range(10)
}  # fmt: skip
RECIPE = [
    *("--recipe", "thumos14-paper", "--device", "cpu", "--set", "training.batch_size=4"),
    *("--set", "training.max_snippets=50", "--set", "model.embedding_dim=8", "--set", "model.kernel_size=3"),
    *("--set", "localization.thresholds=[0.1, 0.3, 0.5]"),
]


def features(name: str, width: int = 2 * WIDTH, scale: float = 1.0) -> np.ndarray:
    """(T, width) float32; a class shows in the columns of its number."""
    _, label, length = VIDEOS[name]
    x = np.random.default_rng(int(name[1:])).normal(0, 0.3, (length, width)).astype(np.float32)
    for start, end, _ in segments(name):
        x[int(start / SECONDS) : int(end / SECONDS), CLASSES.index(label) :: 2] += 1
    return scale * x


def segments(name: str) -> list[tuple[float, float, str]]:
    _, label, length = VIDEOS[name]
    return [(s, s + 6.4, label) for s in (3.2, 0.5 * length * SECONDS)]


def duration(name: str) -> float:
    return round(VIDEOS[name][2] * SECONDS, 2)


def database() -> dict[str, dict]:
    return {
        name: {
            "subset": subset,
            "duration": duration(name),
            "annotations": [{"segment": [s, e], "label": c} for s, e, c in segments(name)],
        }
        for name, (subset, _, _) in VIDEOS.items()
    }


def cola(folder: Path, scale: float = 1.0) -> Path:
    """Layout 2."""
    for name, (subset, _, _) in VIDEOS.items():
        for stream, x in zip(("rgb", "flow"), np.split(features(name, scale=scale), 2, axis=1), strict=True):
            place = folder / "features" / subset / stream
            place.mkdir(parents=True, exist_ok=True)
            np.save(place / f"{name}.npy", np.ascontiguousarray(x))
    for subset in ("train", "test"):
        names = [f"{name}\n" for name, (s, _, _) in VIDEOS.items() if s == subset]
        (folder / f"split_{subset}.txt").write_text("".join(names))
    (folder / "gt.json").write_text(json.dumps({"classes": list(CLASSES), "database": database()}))
    return folder


def actionformer(folder: Path, suffix: str = ".npy") -> Path:
    """Layout 3, with features in one kind of container; ``.h5`` is one file of all recordings."""
    (folder / "features").mkdir(parents=True)
    top = {"fps": FPS, "feat_stride": STRIDE, "classes": list(CLASSES), "streams": [WIDTH, WIDTH], "name": "mine"}
    (folder / "annotations.json").write_text(json.dumps({**top, "database": database()}))
    if suffix == ".h5":
        import h5py

        with h5py.File(folder / "features" / "all.h5", "w") as file:
            for name in VIDEOS:
                file[name] = features(name)
        return folder
    for name in VIDEOS:
        path, x = folder / "features" / f"{name}{suffix}", features(name)
        if suffix == ".npy":
            np.save(path, x)
        elif suffix == ".npz":
            np.savez(path, feats=x)
        else:
            import torch

            torch.save(torch.from_numpy(x), path)
    return folder


def bmn(folder: Path) -> Path:
    """Annotations as BMN and mmaction2 have them: a JSON a subset, without "database"."""
    folder.mkdir(parents=True)
    for subset, file in (("train", "anno_train.json"), ("test", "anno_test.json")):
        videos = {
            name: {"duration_second": row["duration"], "annotations": row["annotations"]}
            for name, row in database().items()
            if row["subset"] == subset
        }
        (folder / file).write_text(json.dumps(videos))
    return folder


def _objects(rows: list) -> np.ndarray:
    array = np.empty(len(rows), dtype=object)
    array[:] = rows
    return array


def wtalc(folder: Path) -> Path:
    """Layout 1."""
    notes = folder / "Mine-Annotations"
    notes.mkdir(parents=True)
    rows = [segments(name) for name in VIDEOS]
    np.save(folder / "Mine-I3D-JOINTFeatures.npy", _objects([features(name) for name in VIDEOS]))
    np.save(notes / "videoname.npy", np.array(list(VIDEOS)))
    np.save(notes / "subset.npy", np.array(["validation" if s == "train" else s for s, _, _ in VIDEOS.values()]))
    np.save(notes / "classlist.npy", np.array(CLASSES))
    np.save(notes / "duration.npy", np.array([[duration(name)] for name in VIDEOS]))
    np.save(notes / "segments.npy", _objects([[[s, e] for s, e, _ in each] for each in rows]))
    np.save(notes / "labels.npy", _objects([[c for _, _, c in each] for each in rows]))
    np.save(notes / "labels_all.npy", _objects([[label] for _, label, _ in VIDEOS.values()]))
    tests = [(name, label) for name, (subset, label, _) in VIDEOS.items() if subset == "test"]
    truth = [
        [
            [name, s / duration(name), e / duration(name)]
            for name, c in tests
            if c == label
            for s, e, _ in segments(name)
        ]
        for label in CLASSES
    ]
    np.save(notes / "test_gt_segments.npy", _objects(truth))
    (notes / "Ambiguous_test.txt").write_text(f"{tests[0][0]} 12.0 13.5\n{tests[1][0]} 1.0 2.0\n")
    return folder


def detections(path: Path) -> Path:
    """Detections of the test recordings: right, shifted, and of the other class."""
    rows = []
    for i, (name, (subset, label, _)) in enumerate(VIDEOS.items()):
        if subset == "test":
            for j, (s, e, _) in enumerate(segments(name)):
                rows.append((name, label, s + 0.4 * j, e + 0.3 * i, 0.9 - 0.05 * i - 0.02 * j))
                rows.append((name, CLASSES[j], s + 2, e + 1, 0.3 + 0.01 * i))
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("recording", "label", "start", "end", "score"), *rows])
        return path
    results: dict[str, list] = {}
    for name, label, s, e, score in rows:
        results.setdefault(name, []).append({"label": label, "score": score, "segment": [s, e]})
    path.write_text(json.dumps({"version": "VERSION 1.3", "results": results, "external_data": {}}))
    return path
