"""What each loss term is worth (the paper's Tables 3 and 4): variants of a recipe, trained with several seeds.

A variant is a recipe with some settings changed. Every training of a variant has a folder of its own, with its
checkpoint and, once it is finished and evaluated, ``result.json``; a study that finds one there does not train again.
Variants that differ in localization and evaluation alone share one training: the checkpoint is with one of them.
"""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from d2net.checkpoint import CHECKPOINT_NAME, load_model
from d2net.data.dataset import Dataset
from d2net.data.watch import TEMPO, TILT, TRAIN_SUBJECTS, load_watch
from d2net.errors import D2NetError, InputError
from d2net.evaluation import evaluate
from d2net.files import LOCK_NAME, inside, locked, one_component, write_whole
from d2net.localization import localize
from d2net.reading import load_json, number, typed
from d2net.recipes import LossRecipe, Recipe
from d2net.report.names import fit, fonts_for
from d2net.report.timeline import save_figure
from d2net.training import Trainer
from d2net.words import did_you_mean

STUDY_NAME, RESULT_NAME = "study.json", "result.json"
NO_DENOISING = ("loss.alpha_snippet=0", "loss.alpha_video=0")
RECORDINGS = 1000  # training recordings of ``watch`` where a variant does not say
COLOUR = "#2f6db5"


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: For options and folders.
        label: For the table and the figure.
        settings: ``section.key=value`` over the study's recipe, and ``watch.tilt``, ``watch.tempo`` and
            ``watch.train_recordings``.
    """

    name: str
    label: str
    settings: tuple[str, ...] = ()


LOSSES = {
    v.name: v
    for v in (
        Variant("cross-entropy", "L_CE", ("loss.classification=cross_entropy", *NO_DENOISING)),
        Variant("focal", "L_F (baseline)", ("loss.classification=focal", *NO_DENOISING)),
        Variant("dis", "L_Dis", NO_DENOISING),
        Variant("d2net", "D2-Net: L_Dis + L_D (pDMI)", ("loss.denoising=pdmi",)),
        Variant("l1", "L1 in L_D", ("loss.denoising=l1",)),
        Variant("bce", "BCE in L_D", ("loss.denoising=bce",)),
        Variant("dmi", "DMI in L_D (Eq. 5)", ("loss.denoising=dmi",)),
    )
}
COMPLEMENTS = {"um": Variant("d2net+um", "D2-Net + UM", ("loss.denoising=pdmi", "loss.um_weight=1"))}


@dataclass(frozen=True)
class Run:
    """One training of a variant; all that decides its result.

    Attributes:
        recipe: With the variant's settings.
        making: Arguments of :func:`d2net.data.watch.load_watch` that the variant changes.
        held_out: The people left out in cross-validation, else none.
    """

    variant: Variant
    recipe: Recipe
    making: tuple[tuple[str, float], ...]
    seed: int
    held_out: tuple[int, ...]

    @property
    def folder(self) -> Path:
        people = "".join(f"-{s}" for s in self.held_out)
        return Path(self.variant.name, f"seed-{self.seed}" + (f"-without{people}" if people else ""))

    def trained_like(self, other: Run) -> bool:
        """Whether both trainings give the same network."""
        mine, its = self.recipe, other.recipe
        return (self.seed, self.held_out, self.making) == (other.seed, other.held_out, other.making) and (
            (mine.model, _acting(mine.loss), mine.training) == (its.model, _acting(its.loss), its.training)
        )

    def __str__(self) -> str:
        people = ", ".join(map(str, self.held_out))
        return f"{self.variant.name}, seed {self.seed}" + (f", without {people}" if people else "")


Progress = Callable[[str, int, int, dict[str, Any] | None], None]


def choose_losses(names: str) -> list[Variant]:
    """The variants of a list as ``focal,dis``. Raises InputError for an unknown name or none."""
    wanted = [n.strip() for n in names.split(",") if n.strip()]
    if not wanted:
        raise InputError(f"--losses '{names}' names none; there are {', '.join(LOSSES)}")
    for name in wanted:
        if name not in LOSSES:
            hint = did_you_mean(name, LOSSES)
            raise InputError(f"--losses: unknown variant '{name}'{hint}; there are {', '.join(LOSSES)}")
    return [LOSSES[name] for name in dict.fromkeys(wanted)]


def parse_variant(text: str) -> Variant:
    """A variant written as ``NAME: key=value key=value``. Raises InputError when it is not."""
    name, colon, settings = text.partition(":")
    name = name.strip()
    if not colon or not re.fullmatch(r"\w[\w.+-]*", name):
        raise InputError(
            f"--variant '{text}' is not of the form \"NAME: key=value key=value\", NAME being one word of letters, "
            "digits and . _ + -"
        )
    return Variant(name, name, tuple(settings.split()))


class Ablation:
    """A study: its variants, seeds and data, checked before anything is trained.

    Args:
        out: Folder of the study; made where missing, gone on with where it is of the same study.
        recipe: What the variants change.
        variants: Rows of the table, in order.
        seeds: How many; they are 0, 1, …
        data: The dataset; None: the ``watch`` recordings, made as the variants say.
        train, test: Names of the subsets of ``data``.
        folds: Cross-validate: so many groups of the training subjects of ``watch`` (7: each on its own) are left out
            and judged on, one at a time; the test subjects play no part. None: train and test as they are.
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
            raise InputError(f"--folds {folds}: the {len(TRAIN_SUBJECTS)} training subjects make 2 to 7 groups")
        self.out, self.recipe, self.variants, self.device = Path(out), recipe, list(variants), device
        self.data, self.train, self.test, self.folds = data, train, test, folds
        settings = {v.name: _resolve(recipe, v, watch=data is None) for v in variants}
        # Seeds outermost: stopped early, the study has as much of every variant.
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
        """What the numbers are over, for titles."""
        seeds = len({r.seed for r in self.runs})
        text = f"{seeds} seed" + "s" * (seeds > 1)
        if self.folds is None:
            return text
        people = "held-out training subjects" if self.folds == len(TRAIN_SUBJECTS) else "groups of training subjects"
        return f"{text} x {self.folds} {people}"

    def duplicates(self) -> list[tuple[str, str]]:
        """Pairs of variants that are the same experiment, as the recipe has a term's weight at 0."""
        first: dict[str, str] = {}
        pairs = []
        for run in self.runs[: len(self.variants)]:
            acting = replace(run, recipe=replace(run.recipe, loss=_acting(run.recipe.loss)))
            key = json.dumps(_settings(acting), sort_keys=True)
            if key in first:
                pairs.append((run.variant.name, first[key]))
            first.setdefault(key, run.variant.name)
        return pairs

    def execute(self, progress: Progress | None = None) -> list[dict[str, Any]]:
        """Train and judge what is not done yet.

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
            if trainer.interrupted:  # too late to stop it, and in time for the next
                raise KeyboardInterrupt
        model, reference, _ = load_model(checkpoint, self.device)
        detections = localize(model, reference, test, run.recipe.localization, device=self.device)
        settings = run.recipe.evaluation
        result = {**self._identity(run), "detections": len(detections)}
        try:
            found = evaluate(detections, test.annotations(), protocol=settings.protocol, tiou=settings.tiou)
            result |= {**found.to_json(), "said": found.coverage.lines()}
        except InputError as error:  # none of its detections is where the protocol looks: all are wrong
            nothing = {f"{t:g}": 0.0 for t in settings.tiou}
            result |= {"protocol": settings.protocol, "map": nothing, "average": 0.0, "f1": 0.0, "per_class": {}}
            result["said"] = [f"every number is 0: {error}"]
        _write_json(folder / RESULT_NAME, result)
        return result

    def _trained_already(self, run: Run) -> Path | None:
        """The checkpoint of a finished run that differs in localization or evaluation alone."""
        for other in self.runs:
            if other is not run and run.trained_like(other) and self._finished(other) is not None:
                path = inside(self.out, *other.folder.parts) / CHECKPOINT_NAME
                if path.exists():
                    return path
        return None

    def _identity(self, run: Run) -> dict[str, Any]:
        """What a result file says of the training it is from."""
        return {
            "dataset": self.dataset.name,
            "variant": run.variant.name,
            "seed": run.seed,
            "held_out_subjects": list(run.held_out),
            "settings": _settings(run),
        }

    def _finished(self, run: Run) -> dict[str, Any] | None:
        path = inside(self.out, *run.folder.parts) / RESULT_NAME
        if not path.exists():
            return None
        result = _read(path)
        different = _difference(result, self._identity(run))
        if different:
            raise InputError(
                f"{path}: variant '{run.variant.name}' was trained with other settings ({different}); rename the "
                "variant, choose another --out, or remove that folder"
            )
        try:
            return result | _numbers(result, [f"{t:g}" for t in run.recipe.evaluation.tiou])
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
        """Say in the folder whose it is, or find out that it is another's."""
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
                different = _difference(_read(path), mine)
                if different:
                    raise InputError(
                        f"{self.out}: holds another study ({different}); choose another --out, or repeat that one's "
                        "options"
                    )
            elif any(p.name != LOCK_NAME for p in self.out.iterdir()):
                raise InputError(f"{self.out}: holds other files, but no ablation study; choose another --out")
            _write_json(path, mine)
        except OSError as error:
            raise InputError(f"{self.out}: cannot be written ({error.strerror}); choose another --out") from error


@dataclass(frozen=True)
class Row:
    """A variant's results: mean and deviation over its runs, in percent."""

    variant: Variant
    results: tuple[dict[str, Any], ...]

    def values(self, measure: str) -> list[float]:
        """Of every run: ``f1``, ``average``, or mAP at an IoU as ``0.5``."""
        return [r[measure] if measure in ("f1", "average") else r["map"][measure] for r in self.results]

    def summary(self, measure: str) -> tuple[float, float | None]:
        """Mean and sample standard deviation (None for a single run)."""
        values = self.values(measure)
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def make_rows(study: Ablation, results: Sequence[dict[str, Any]]) -> list[Row]:
    """The results by variant."""
    return [Row(v, tuple(r for r in results if r["variant"] == v.name)) for v in study.variants]


def measures(rows: Sequence[Row]) -> list[str]:
    """What every run was measured by: its IoUs, their average, F1."""
    return [*rows[0].results[0]["map"], "average", "f1"]


def gain(row: Row, first: Row, measure: str) -> tuple[float, float | None]:
    """By how much a variant is above the first one: mean and deviation of the differences of paired runs, which are
    alike in all but the variant (seed, and who is held out)."""
    differences = [a - b for a, b in zip(row.values(measure), first.values(measure), strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) if len(differences) > 1 else None


def plus_minus(value: tuple[float, float | None], sign: str = "") -> str:
    mean, deviation = value
    return f"{mean:{sign}.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def write_tables(study: Ablation, rows: Sequence[Row]) -> list[Path]:
    """Write ``ablation.csv``, ``ablation.json`` and ``ablation.png``; returns their paths.

    Raises:
        InputError: a file cannot be written.
    """
    columns = measures(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [c if c in ("average", "f1") else f"map@{c}" for c in columns]
    writer.writerow(
        ["dataset", "variant", "settings", "runs", *(f"{n}_{s}" for n in names for s in ("mean", "deviation"))]
    )
    for row in rows:
        numbers = [x for c in columns for x in row.summary(c)]
        cells = ["" if x is None else f"{x:.4f}" for x in numbers]
        writer.writerow(
            [study.dataset.name, row.variant.name, " ".join(row.variant.settings), len(row.results), *cells]
        )
    table = {
        "dataset": study.dataset.name,
        "over": study.over,
        "recipe": study.recipe.to_dict(),
        "variants": [
            {
                "name": row.variant.name,
                "label": row.variant.label,
                "settings": list(row.variant.settings),
                "mean_and_deviation": {n: row.summary(c) for n, c in zip(names, columns, strict=True)},
                "gain_over_first_map@0.5": gain(row, rows[0], "0.5") if "0.5" in columns else None,
                "runs": [{k: v for k, v in r.items() if k not in ("dataset", "settings")} for r in row.results],
            }
            for row in rows
        ],
    }
    paths = [study.out / f"ablation.{suffix}" for suffix in ("csv", "json", "png")]
    with locked(study.out), fonts_for([study.dataset.name, *(row.variant.label for row in rows)]):
        write_whole(paths[0], text.getvalue())
        _write_json(paths[1], table)
        save_figure(paths[2], draw(rows, study.dataset.name, study.over), 200)
    return paths


def draw(rows: Sequence[Row], name: str, over: str) -> Figure:
    """Every variant's mAP and F1: each run a dot, their mean a bar's end, the deviation a line, which is said."""
    shown = [m for m in ("0.5", "f1") if m in measures(rows)]
    several = any(len(row.results) > 1 for row in rows)
    figure = Figure(figsize=(7.0, 1.1 + 0.2 * several + 0.34 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for ax, measure in zip(panels, shown, strict=True):
        for y, row in enumerate(rows):
            mean, deviation = row.summary(measure)
            ax.barh(y, mean, height=0.62, color=(COLOUR, 0.3), zorder=2)
            if deviation is not None:
                ax.errorbar(mean, y, xerr=deviation, color=COLOUR, lw=1.2, capsize=2.5, zorder=3)
                values = row.values(measure)
                ax.plot(values, [y] * len(values), "o", ms=2.6, color="#222222", alpha=0.55, mew=0, zorder=4)
            # Beyond the axes, where neither bar nor line can run through it.
            beside = plus_minus((mean, deviation))
            ax.text(1.01, y, beside, va="center", fontsize=7.5, transform=ax.get_yaxis_transform())
        ax.set_xlabel("F1 at IoU 0.5, percent" if measure == "f1" else "mAP at IoU 0.5, percent", fontsize=8.5)
        ax.set_xlim(left=0)
        ax.tick_params(labelsize=7.5, length=2.5, width=0.6)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", color="#e4e4e4", lw=0.5)
        ax.set_axisbelow(True)
        ax.spines[["top", "right", "left"]].set_visible(False)
    labels = [fit(row.variant.label, 2.2, 8, lines=2) for row in rows]
    panels[0].set_yticks(range(len(rows)), labels, fontsize=8)
    panels[0].invert_yaxis()
    for text in panels[0].get_yticklabels():
        text.set(parse_math=False, linespacing=1.0)
    # Beside the longest of the rest, "Ablation on …; 3 seeds x 7 held-out training subjects".
    title = f"Ablation on {fit(name, 2.2, 9, bold=True)}; {over}"
    figure.suptitle(title, fontsize=9, fontweight="bold").set_parse_math(False)
    if several:
        figure.supxlabel(
            "bars and numbers: mean ± sample deviation over the trainings; dots: each training", fontsize=7.5
        )
    return figure


@lru_cache(maxsize=2)  # of 130 MB each; a study goes through all variants before it leaves out the next people
def _watch(held_out: tuple[int, ...], making: tuple[tuple[str, float], ...]) -> Dataset:
    values: dict[str, Any] = dict(making)
    if not held_out:
        return load_watch(**values)
    others = [s for s in TRAIN_SUBJECTS if s not in held_out]
    return load_watch(train_subjects=others, test_subjects=held_out, **values)


def _resolve(recipe: Recipe, variant: Variant, *, watch: bool) -> tuple[Recipe, tuple[tuple[str, float], ...]]:
    """The variant's recipe, and what it changes of how ``watch`` is made."""
    making: dict[str, float] = {}
    for setting in variant.settings:
        if not setting.startswith("watch."):
            continue
        key, _, text = setting.removeprefix("watch.").partition("=")
        if not watch:
            raise InputError(f"variant '{variant.name}': {setting} is only for --data watch")
        try:
            making[key] = {"tilt": float, "tempo": float, "train_recordings": int}[key](text)
        except KeyError:
            raise InputError(
                f"variant '{variant.name}': unknown setting watch.{key}; there are watch.tilt, watch.tempo, "
                "watch.train_recordings"
            ) from None
        except ValueError:
            raise InputError(f"variant '{variant.name}': {setting} is not a number") from None
    try:
        changed = recipe.override([s for s in variant.settings if not s.startswith("watch.")])
    except InputError as error:
        raise InputError(f"variant '{variant.name}': {error}") from error
    # Said or not, the usual values are the same experiment.
    usual = {"tilt": TILT, "tempo": TEMPO, "train_recordings": RECORDINGS}
    return changed, tuple(sorted((k, v) for k, v in making.items() if v != usual[k]))


def _acting(loss: LossRecipe) -> LossRecipe:
    """The settings that act: where L_D has no weight, which loss it is says nothing."""
    return replace(loss, denoising="pdmi") if loss.alpha_snippet == loss.alpha_video == 0 else loss


def _settings(run: Run) -> dict[str, Any]:
    sections = {k: v for k, v in run.recipe.to_dict().items() if k not in ("name", "description")}
    return {**sections, "watch": dict(run.making)}


def _difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    """The first value of ``new`` that ``old`` does not have, in words; empty where there is none."""
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            # An empty table and one with values differ in keys of either.
            inner = _difference(before, value, f"{prefix}{key}.") or _difference(
                {k: value.get(k) for k in before}, before, f"{prefix}{key}."
            )
            if inner:
                return inner
        elif before != value:
            return f"{prefix}{key} was {before} and is {value}"
    return ""


def _read(path: Path) -> dict[str, Any]:
    return typed(load_json(path), dict, f"{path}: not a file of this study: its content")


def _numbers(result: dict[str, Any], levels: Sequence[str]) -> dict[str, Any]:
    """What the tables need of a result file, checked."""
    maps = typed(result.get("map"), dict, '"map"')
    lines = typed(result.get("said", []), list, '"said"')
    return {
        "protocol": typed(result.get("protocol"), str, '"protocol"'),
        "map": {level: number(maps.get(level), f'"map" at IoU {level}') for level in levels},
        **{key: number(result.get(key), f'"{key}"') for key in ("average", "f1")},
        "said": [typed(line, str, 'a line of "said"') for line in lines],
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
