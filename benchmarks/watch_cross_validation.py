"""Compare settings of the `watch` recipe by cross-validation over training subjects only.

The seven training subjects are split into folds; each setting trains on the others and is judged on the fold, so
no test subject plays a part. A setting is one string of `section.key=value` pairs of the recipe, and of
`watch.train_recordings` and `watch.tilt`, which say how the training recordings are made. Example:

    python benchmarks/watch_cross_validation.py "" "watch.tilt=0" "loss.alpha_snippet=0 loss.alpha_video=0"
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from d2net.checkpoint import load_model
from d2net.data.watch import TILT, TRAIN_SUBJECTS, load_watch
from d2net.evaluation import evaluate
from d2net.localization import localize
from d2net.recipes import load_recipe
from d2net.training import Trainer


def held_out_score(fold: list[int], settings: list[str], seed: int) -> tuple[float, float]:
    """mAP@0.5 and the average over 0.1 to 0.7 on the subjects of ``fold``, trained on the other training subjects."""
    making = dict(s.removeprefix("watch.").split("=") for s in settings if s.startswith("watch."))
    recipe = load_recipe("watch").override([s for s in settings if not s.startswith("watch.")])
    dataset = load_watch(
        train_subjects=[s for s in TRAIN_SUBJECTS if s not in fold],
        test_subjects=fold,
        train_recordings=int(making.pop("train_recordings", 1000)),
        tilt=float(making.pop("tilt", TILT)),
    )
    if making:
        raise SystemExit(f"unknown setting watch.{next(iter(making))}; known: watch.train_recordings, watch.tilt")
    held_out = dataset.subset("test")
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(dataset.subset("train"), recipe, out=Path(out), seed=seed, save_every=0, tensorboard=False)
        model, reference, _ = load_model(trainer.run(), "cpu")
    detections = localize(model, reference, held_out, recipe.localization, device="cpu")
    result = evaluate(detections, held_out.annotations())
    return result.map[result.tiou.index(0.5)], result.average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help='each one string of key=value pairs; "" is the recipe')
    parser.add_argument("--folds", type=int, default=7, help="default 7: one subject left out at a time")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as the demo does
    for text in arguments.settings:
        scores = np.array(
            [
                held_out_score(list(TRAIN_SUBJECTS[i :: arguments.folds]), text.split(), seed)
                for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds)
                for i in range(arguments.folds)
            ]
        )
        print(
            f"mAP@0.5 {scores[:, 0].mean():5.1f} +- {scores[:, 0].std():4.1f}   average {scores[:, 1].mean():5.1f}   "
            f"{text or '(recipe)'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
