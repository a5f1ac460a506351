"""Trains and judges the runs of a study, in a folder that records the study and the runs that are done."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from d2net.checkpoint import CHECKPOINT_NAME, load_model
from d2net.data.dataset import Dataset
from d2net.data.watch import TRAIN_SUBJECTS, load_watch
from d2net.errors import D2NetError, InputError
from d2net.files import LOCK_NAME, inside, locked, one_component
from d2net.recipes import Recipe
from d2net.studies.ablation.judging import TCAMS, judge
from d2net.studies.ablation.plan import Run, Variant, resolve
from d2net.studies.ablation.results import difference, measures_of, read_table, write_json
from d2net.training import Trainer

STUDY_NAME, RESULT_NAME = "study.json", "result.json"
Progress = Callable[[str, int, int, dict[str, Any] | None], None]


class Ablation:
    """A study: its variants, seeds and data, checked before anything is trained.

    Args:
        out: Folder of the study; made where missing, gone on with where it is of the same study.
        recipe: What the variants change.
        variants: Rows of the table, in order.
        seeds: How many; they are 0, 1, …
        data: The dataset; None: the ``watch`` recordings, made as the variants say.
        train: Name of the subset of ``data`` to train on.
        test: Name of the subset of ``data`` to judge on.
        folds: Cross-validate with so many groups of the training subjects of ``watch`` (7: one subject each): each
            group in turn is left out of training and judged on. The test subjects are not used. None: train on the
            training subjects and judge on the test subjects.
        device: Where to train and to localize.

    Raises:
        InputError: no seed or variant, two of one name, one class, fewer recordings than a batch, nothing to judge on,
            a name that cannot be a folder's, a setting that is unknown or cannot be, a folder that is of another study,
            is being written by another d2net, or cannot be written.
    """

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        variants: Sequence[Variant],
        *,
        seeds: int,
        data: Dataset | None = None,
        train: Sequence[str] = ("train",),
        test: Sequence[str] = ("test",),
        folds: int | None = None,
        device: str = "cpu",
    ) -> None:
        if seeds < 1:
            raise InputError(f"--seeds {seeds}: no seeds to train with; give at least 1, better 3")
        if not variants:
            raise InputError("no variant to train; name some with --losses or --variant")
        names = [v.name for v in variants]
        for name in names:
            one_component(name, "variant")
            if names.count(name) > 1:
                raise InputError(f"two variants are called '{name}'; give each a name of its own")
        if data is not None and folds is not None:
            raise InputError(f"--cross-validate leaves out the people of 'watch'; '{data.name}' has none, leave it out")
        if folds is not None and not 2 <= folds <= len(TRAIN_SUBJECTS):
            people = len(TRAIN_SUBJECTS)
            raise InputError(f"--folds {folds}: the {people} training subjects make 2 to {people} groups")
        self.out, self.recipe, self.variants, self.device = Path(out), recipe, list(variants), device
        self.data, self.train, self.test, self.folds = data, train, test, folds
        settings = {v.name: resolve(recipe, v, watch=data is None) for v in variants}
        difficulties = {dict(making).get("difficulty", "easy") for _, making in settings.values()}
        if len(difficulties) > 1:
            raise InputError(
                "variants of different watch.difficulty have other recordings and classes, and cannot be compared; set "
                "it for all with --set, in a study of its own"
            )
        # Seeds outermost: a study that is stopped early has about as many runs of every variant.
        self.runs = [
            Run(v, *settings[v.name], seed, held_out)
            for seed in range(seeds)
            for held_out in ([TRAIN_SUBJECTS[i::folds] for i in range(folds)] if folds else [()])
            for v in variants
        ]
        for run in {r.variant.name: r for r in self.runs}.values():
            self._check(run)
        self.dataset = self._split(self.runs[0])[0]
        with locked(self.out):
            self._claim_folder()

    @property
    def over(self) -> str:
        """What the means are over, for titles."""
        seeds = len({r.seed for r in self.runs})
        text = f"{seeds} seed" + "s" * (seeds > 1)
        if self.folds is None:
            return text
        people = "held-out training subjects" if self.folds == len(TRAIN_SUBJECTS) else "groups of training subjects"
        return f"{text} x {self.folds} {people}"

    def duplicates(self) -> list[tuple[str, str]]:
        """Pairs of variants that are the same experiment, because a term's weight is 0 in the recipe."""
        first: dict[str, str] = {}
        pairs = []
        for run in self.runs[: len(self.variants)]:
            key = json.dumps(run.acting().settings, sort_keys=True)
            if key in first:
                pairs.append((run.variant.name, first[key]))
            first.setdefault(key, run.variant.name)
        return pairs

    def execute(self, progress: Progress | None = None) -> list[dict[str, Any]]:
        """Train and judge the runs that are not done yet.

        Args:
            progress: Called with (what is trained, iterations done by this call, all that it has to do, the result of
                a training that is finished or else None).

        Returns:
            The result of every run, in the order of ``runs``.

        Raises:
            InputError: a result of other settings in the folder, which another d2net writes, a file that cannot be
                written.
            D2NetError: a training that is not finite.
            KeyboardInterrupt: with what was reached; a training that was under way has saved itself.
        """
        with locked(self.out):
            return self._execute(progress)

    def _execute(self, progress: Progress | None) -> list[dict[str, Any]]:
        results = {run.folder: self._finished(run) for run in self.runs}
        left = [run for run in self.runs if results[run.folder] is None]
        total = sum(run.recipe.training.iterations for run in left)
        done = 0
        tell = progress or (lambda *_: None)
        for run in left:
            try:
                result = self._train(run, lambda i, _, run=run, done=done: tell(str(run), done + i, total, None))  # type: ignore[misc]
            except KeyboardInterrupt as error:
                finished = len(self.runs) - sum(r is None for r in results.values())
                raise KeyboardInterrupt(
                    f"{finished} of {len(self.runs)} trainings are done; the same command goes on from there"
                ) from error
            except InputError as error:
                raise InputError(f"{run}: {error}") from error
            except D2NetError as error:
                raise D2NetError(f"{run}: {error}; or leave this variant out") from error
            results[run.folder] = result
            done += run.recipe.training.iterations
            tell(str(run), done, total, result)
        return [r for r in results.values() if r is not None]

    def _train(self, run: Run, progress: Callable[[int, int], None]) -> dict[str, Any]:
        dataset, test = self._split(run)
        folder = inside(self.out, *run.folder.parts)
        checkpoint = self._trained_already(run)
        if checkpoint is None:
            trainer = Trainer(dataset, run.recipe, out=folder, seed=run.seed, device=self.device, progress=progress)
            checkpoint = trainer.run(resume=(folder / CHECKPOINT_NAME).exists())
            if trainer.interrupted:  # too late to stop this run, in time to stop before the next
                raise KeyboardInterrupt
        # The run's own settings: the checkpoint may be of a run that differs in localization or evaluation.
        result = {**self._identity(run), **judge(load_model(checkpoint, self.device), test, run.recipe)}
        write_json(folder / RESULT_NAME, result)
        return result

    def _trained_already(self, run: Run) -> Path | None:
        """The checkpoint of a finished run that differs only in localization or evaluation."""
        for other in self.runs:
            if other is not run and run.trained_like(other) and self._finished(other) is not None:
                path = inside(self.out, *other.folder.parts) / CHECKPOINT_NAME
                if path.exists():
                    return path
        return None

    def _identity(self, run: Run) -> dict[str, Any]:
        """The entries of a result file about the training."""
        return {
            "dataset": self.dataset.name,
            "variant": run.variant.name,
            "seed": run.seed,
            "held_out_subjects": list(run.held_out),
            "settings": run.settings,
        }

    def _finished(self, run: Run) -> dict[str, Any] | None:
        path = inside(self.out, *run.folder.parts) / RESULT_NAME
        if not path.exists():
            return None
        result = read_table(path)
        different = difference(result, self._identity(run))
        if different:
            raise InputError(
                f"{path}: variant '{run.variant.name}' was trained with other settings ({different}); rename the "
                "variant, choose another --out, or remove that folder"
            )
        if not all(tcam in result for tcam in TCAMS):  # judged by a d2net that measured less: judged again
            return None
        try:
            return result | {tcam: measures_of(result[tcam], run.recipe) for tcam in TCAMS}
        except InputError as error:
            raise InputError(f"{path}: {error}; remove it, and what it holds is computed again") from None

    def _split(self, run: Run) -> tuple[Dataset, Dataset]:
        """Recordings to train on and to judge on."""
        data = self.data
        if data is None:
            data = _watch(run.held_out, run.making)
        return data.subset(*self.train), data.subset(*self.test)

    def _check(self, run: Run) -> None:
        train, test = self._split(run)
        if len(train.classes) < 2:
            raise InputError(
                f"dataset '{train.name}' has one class only, {', '.join(train.classes)}; the losses tell classes "
                "apart, give data of at least 2"
            )
        if len(train) < run.recipe.training.batch_size:
            raise InputError(
                f"dataset '{train.name}' has {len(train)} recordings to train on, fewer than a batch of "
                f"{run.recipe.training.batch_size}; give more, or --set training.batch_size={len(train)}"
            )
        if len(test.annotations()) == 0:
            raise InputError(
                f"dataset '{test.name}': subset {', '.join(self.test)} has no segment to compare with; annotate it"
            )

    def _claim_folder(self) -> None:
        """Record the study in its folder. Raises InputError if the folder is of another study."""
        path = self.out / STUDY_NAME
        mine = {
            "study": "ablation",
            "dataset": self.dataset.name,
            "classes": list(self.dataset.classes),
            "stream_widths": list(self.dataset.stream_widths),
            "subsets": [list(self.train), list(self.test)],
            "recordings": None if self.data is None else [len(x) for x in self._split(self.runs[0])],
            "annotations": None if self.data is None else self.data.fingerprint(),
            "folds": self.folds,
            "recipe": self.recipe.to_dict(),
        }
        try:
            if path.exists():
                different = difference(read_table(path), mine)
                if different:
                    raise InputError(
                        f"{self.out}: holds another study ({different}); choose another --out, or repeat that one's "
                        "options"
                    )
            elif any(p.name != LOCK_NAME for p in self.out.iterdir()):
                raise InputError(f"{self.out}: holds other files, but no ablation study; choose another --out")
            write_json(path, mine)
        except OSError as error:
            raise InputError(f"{self.out}: cannot be written ({error.strerror}); choose another --out") from error


@lru_cache(maxsize=2)  # of 130 MB each; a study runs all variants before it leaves out the next people
def _watch(held_out: tuple[int, ...], making: tuple[tuple[str, float | str], ...]) -> Dataset:
    values: dict[str, Any] = dict(making)
    if not held_out:
        return load_watch(**values)
    others = [s for s in TRAIN_SUBJECTS if s not in held_out]
    return load_watch(train_subjects=others, test_subjects=held_out, **values)
