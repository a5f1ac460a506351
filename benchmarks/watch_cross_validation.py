"""Compare settings of the `watch` recipe by cross-validation over training subjects only.

The seven training subjects are split into folds; each setting trains on the others and is judged on the fold, so
no test subject plays a part. Example:

    python benchmarks/watch_cross_validation.py "" "loss.alpha_snippet=0 loss.alpha_video=0" --folds 3
"""

from __future__ import annotations

import argparse
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from d2net.checkpoint import load_model
from d2net.data.dataset import Dataset
from d2net.data.watch import load_watch
from d2net.evaluation import evaluate
from d2net.localization import localize
from d2net.recipes import load_recipe
from d2net.training import Trainer


def subject(name: str) -> int:
    """The person in a recording's name, such as 3 in watch_train_s03_0007."""
    return int(re.search(r"_s(\d+)_", name)[1])


def held_out_score(dataset: Dataset, fold: set[int], settings: list[str], seed: int) -> tuple[float, float]:
    """mAP@0.5 and the average over 0.1 to 0.7 on the subjects of ``fold``, trained on all others."""
    recipe = load_recipe("watch").override(settings)
    inside = [subject(r.name) in fold for r in dataset.recordings]
    rest = replace(dataset, recordings=tuple(r for r, i in zip(dataset.recordings, inside, strict=True) if not i))
    held = replace(dataset, recordings=tuple(r for r, i in zip(dataset.recordings, inside, strict=True) if i))
    with tempfile.TemporaryDirectory() as out:
        checkpoint = Trainer(rest, recipe, out=Path(out), seed=seed, save_every=0, tensorboard=False).run()
        model, reference, _ = load_model(checkpoint, "cpu")
    result = evaluate(localize(model, reference, held, recipe.localization, device="cpu"), held.annotations())
    return result.map[result.tiou.index(0.5)], result.average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help='each one string of section.key=value pairs; "" is the recipe')
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    dataset = load_watch().subset("train")
    people = sorted({subject(r.name) for r in dataset.recordings})
    for text in arguments.settings:
        scores = np.array(
            [
                held_out_score(dataset, set(people[i :: arguments.folds]), text.split(), seed)
                for seed in range(arguments.seeds)
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
