"""The variants of a recipe that a study compares, and the trainings that they need."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d2net.data.dataset import Dataset
from d2net.data.watch import JOININGS, TEMPO, TILT
from d2net.errors import InputError
from d2net.recipes import Recipe
from d2net.words import did_you_mean, is_number

NO_DENOISING = ("loss.alpha_snippet=0", "loss.alpha_video=0")
RECORDINGS = 1000  # training recordings of ``watch`` if a variant sets no other number


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: For options and folders.
        label: For the table and the figure.
        settings: ``section.key=value`` over the study's recipe, and ``watch.difficulty``, ``watch.tilt``,
            ``watch.tempo`` and ``watch.train_recordings``.
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
    """One training of a variant, with everything that decides its result.

    Attributes:
        recipe: With the variant's settings.
        making: Arguments of :func:`d2net.data.watch.load_watch` that the variant changes.
        held_out: The people left out in cross-validation, else none.
    """

    variant: Variant
    recipe: Recipe
    making: tuple[tuple[str, float | str], ...]
    seed: int
    held_out: tuple[int, ...]

    @property
    def folder(self) -> Path:
        people = "".join(f"-{s}" for s in self.held_out)
        return Path(self.variant.name, f"seed-{self.seed}" + (f"-without{people}" if people else ""))

    @property
    def settings(self) -> dict[str, Any]:
        """All of them, as a result file keeps them."""
        sections = {k: v for k, v in self.recipe.to_dict().items() if k not in ("name", "description")}
        return {**sections, "watch": dict(self.making)}

    def acting(self) -> Run:
        """The experiment in canonical form: without the settings that have no effect in it."""
        return replace(self, recipe=_acting(self.recipe))

    def network(self) -> tuple[Any, ...]:
        """What decides the trained network: equal for runs that need one training only."""
        acting = _acting(self.recipe)
        return self.seed, self.held_out, self.making, acting.model, acting.loss, acting.training

    def __str__(self) -> str:
        people = ", ".join(map(str, self.held_out))
        return f"{self.variant.name}, seed {self.seed}" + (f", without {people}" if people else "")


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


def resolve(recipe: Recipe, variant: Variant, *, watch: bool) -> tuple[Recipe, tuple[tuple[str, float | str], ...]]:
    """The variant's recipe, and its changes to the making of ``watch``."""
    making: dict[str, float | str] = {}
    for setting in variant.settings:
        if not setting.startswith("watch."):
            continue
        key, _, text = setting.removeprefix("watch.").partition("=")
        if not watch:
            raise InputError(f"variant '{variant.name}': {setting} is only for --data watch")
        if key == "difficulty":
            if text not in JOININGS:
                raise InputError(f"variant '{variant.name}': {setting}: give {' or '.join(JOININGS)}")
            making[key] = text
            continue
        try:
            if not is_number(text):
                raise ValueError(text)
            making[key] = {"tilt": float, "tempo": float, "train_recordings": int}[key](text)
        except KeyError:
            raise InputError(
                f"variant '{variant.name}': unknown setting watch.{key}; there are watch.difficulty, watch.tilt, "
                "watch.tempo, watch.train_recordings"
            ) from None
        except ValueError:
            raise InputError(f"variant '{variant.name}': {setting} is not a number") from None
    try:
        changed = recipe.override([s for s in variant.settings if not s.startswith("watch.")])
    except InputError as error:
        raise InputError(f"variant '{variant.name}': {error}") from error
    # Default values, written out or not, are the same experiment.
    usual = {"difficulty": "easy", "tilt": TILT, "tempo": TEMPO, "train_recordings": RECORDINGS}
    return changed, tuple(sorted((k, v) for k, v in making.items() if v != usual[k]))


def check_recordings(run: Run, train: Dataset, test: Dataset) -> None:
    """Raise InputError where a run cannot be trained on ``train`` or judged on ``test``."""
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
            f"dataset '{test.name}': subset {', '.join(test.subsets)} has no segment to compare with; annotate it"
        )


def _acting(recipe: Recipe) -> Recipe:
    """The settings that have an effect: without L_D, by its weights or because it never begins, its own have none."""
    loss, training = recipe.loss, recipe.training
    if loss.alpha_snippet == loss.alpha_video == 0 or training.denoising_start >= training.iterations:
        loss = replace(loss, denoising="pdmi", alpha_snippet=0.0, alpha_video=0.0)
        training = replace(training, denoising_start=0, denoising_every=1, denoising_agreement=None)
    return replace(recipe, loss=loss, training=training)
