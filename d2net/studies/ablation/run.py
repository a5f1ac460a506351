"""Trains and judges the runs of a study, in a folder that records the study and the runs that are done."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from d2net.checkpoint import CHECKPOINT_NAME
from d2net.data.dataset import Dataset
from d2net.data.watch import TRAIN_SUBJECTS
from d2net.errors import D2NetError, InputError
from d2net.files import LOCK_NAME, inside, locked, one_component
from d2net.recipes import Recipe
from d2net.studies.ablation.job import RESULT_NAME, Job, Opened, environment, split, threads_of, train_and_judge
from d2net.studies.ablation.judging import TCAMS
from d2net.studies.ablation.plan import Run, Variant, check_recordings, resolve
from d2net.studies.ablation.results import difference, measures_of, read_table, write_json
from d2net.studies.ablation.schedule import Submits, train_in
from d2net.training_log import last_iteration
from d2net.words import counted, reason

STUDY_NAME = "study.json"
Progress = Callable[[str, int, int, dict[str, Any] | None], None]
_Results = dict[Path, dict[str, Any] | None]  # by the run's folder; None: not there yet


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
        reopen: Opens ``data`` again, in the workers of an executor: a function that can be pickled, such as
            ``functools.partial(open_dataset, "/data/features", subsets=["train", "test"])``. Not needed for ``watch``.

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
        reopen: Callable[[], Dataset] | None = None,
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
        self.data, self.train, self.test, self.folds = data, tuple(train), tuple(test), folds
        self.reopen = reopen
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
        networks: dict[tuple[Any, ...], list[Run]] = {}
        for run in self.runs:
            networks.setdefault(run.network(), []).append(run)
        self._alike = {run: alike for alike in networks.values() for run in alike}  # one training is enough for those
        for run in {r.variant.name: r for r in self.runs}.values():
            check_recordings(run, *self._split(run))
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

    def threads(self) -> int:
        """Threads of the CPU that its largest training takes, in a worker too; 0 on another device."""
        if self.device != "cpu":
            return 0
        runs = {run.variant.name: run for run in self.runs}.values()
        return max(threads_of(run, self._split(run)[0]) for run in runs)

    def execute(self, progress: Progress | None = None, executor: Submits | None = None) -> list[dict[str, Any]]:
        """Train and judge the runs that are not done yet.

        Args:
            progress: Called with (what is trained, iterations done by this call, all that it has to do, the result of
                a training that is finished or else None).
            executor: Where to train; None: here, one after another. Its workers see the study's folder and its data
                under the same paths, and need the same d2net and PyTorch. A run whose worker is lost goes on in
                another, three in all. Results are the same whatever it is: each training takes as many threads of the
                CPU as it would here.

        Returns:
            The result of every run, in the order of ``runs``.

        Raises:
            InputError: a result of other settings in the folder, which another d2net writes, a file that cannot be
                written; an executor for data that cannot be opened again, or that is other data there.
            D2NetError: a training that is not finite, or whose workers are lost; an executor that is broken.
            KeyboardInterrupt: with what was reached; a training that was under way has saved itself.
        """
        with locked(self.out):
            results = {run.folder: self._finished(run) for run in self.runs}
            try:
                if executor is None:
                    self._train_here(results, progress or (lambda *_: None))
                else:
                    self._train_in(executor, results, progress or (lambda *_: None))
            except KeyboardInterrupt as error:
                finished = len(self.runs) - sum(r is None for r in results.values())
                raise KeyboardInterrupt(
                    f"{finished} of {len(self.runs)} trainings are done; the same command goes on from there"
                ) from error
        return [r for r in results.values() if r is not None]

    def _train_here(self, results: _Results, tell: Progress) -> None:
        left = [run for run in self.runs if results[run.folder] is None]
        total = sum(run.recipe.training.iterations for run in left)
        done = 0
        for run in left:
            job = self._job(run, self.out, results)
            try:
                result = train_and_judge(job, *self._split(run), partial(_tell_iteration, tell, run, done, total))
            except InputError as error:
                raise InputError(f"{run}: {error}") from error
            except D2NetError as error:
                raise D2NetError(f"{run}: {error}; or leave this variant out") from error
            results[run.folder] = result
            done += run.recipe.training.iterations
            tell(str(run), done, total, result)

    def _train_in(self, executor: Submits, results: _Results, tell: Progress) -> None:
        left = [run for run in self.runs if results[run.folder] is None]
        total = sum(run.recipe.training.iterations for run in left)
        where, data = environment(), self._reopening() if left else None

        def job_of(run: Run, flying: Collection[Run]) -> Job | None:
            job = self._job(run, self.out.absolute(), results, data=data, **where)
            waits = job.checkpoint is None and any(other in flying for other in self._alike[run])
            return None if waits else job

        def reached(flying: Collection[Run]) -> int:
            ended = sum(run.recipe.training.iterations for run in left if results[run.folder] is not None)
            return ended + sum(
                min(last_iteration(self.out / run.folder), run.recipe.training.iterations) for run in flying
            )

        def finished(run: Run, result: dict[str, Any], flying: Collection[Run]) -> None:
            results[run.folder] = result
            tell(str(run), reached(flying), total, result)

        def look(flying: Collection[Run]) -> None:
            tell(f"{counted(len(flying), 'training')} in workers", reached(flying), total, None)

        train_in(executor, left, job_of, finished, look)

    def _job(self, run: Run, out: Path, results: _Results, **where: Any) -> Job:
        return Job(
            run=run,
            folder=inside(out, *run.folder.parts),
            identity=self._identity(run),
            subsets=(self.train, self.test),
            device=self.device,
            checkpoint=self._trained_already(run, out, results),
            **where,
        )

    def _trained_already(self, run: Run, out: Path, results: _Results) -> Path | None:
        """The checkpoint of a finished run that differs only in localization or evaluation."""
        for other in self._alike[run]:
            if other is not run and results[other.folder] is not None:
                path = inside(out, *other.folder.parts) / CHECKPOINT_NAME
                if path.exists():
                    return path
        return None

    def _reopening(self) -> Opened | None:
        """How workers open the data; None where it is ``watch``."""
        if self.data is None:
            return None
        if self.reopen is None:
            raise InputError(
                f"dataset '{self.data.name}': workers open the data themselves; give Ablation reopen, a function that "
                "does so, as functools.partial(open_dataset, PATH)"
            )
        try:
            return Opened(pickle.dumps(self.reopen), Opened.of(self.data))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(
                f"reopen cannot be sent to a worker ({reason(error)}); give a function of a module, or a "
                "functools.partial of one"
            ) from error

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
        return split(run, self.data, self.train, self.test)

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


def _tell_iteration(tell: Progress, run: Run, before: int, total: int, iteration: int, _: int) -> None:
    tell(str(run), before + iteration, total, None)
