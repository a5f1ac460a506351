"""Resumes a run, after checks that today's settings fit; errors say what differs, and the way out."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2net import __version__
from d2net.checkpoint import FORMAT, Checkpoint, parse_checkpoint, save_checkpoint
from d2net.data.dataset import Dataset, Recording
from d2net.errors import InputError
from d2net.reading import read_bytes
from d2net.recipes import Recipe
from d2net.words import counted, listed, reason

if TYPE_CHECKING:
    from d2net.training.trainer import Trainer

OTHERWISE = "resume with the same or choose another --out"


def check_same_run(
    saved: Checkpoint, dataset: Dataset, recipe: Recipe, asked: tuple[int | None, str | None], path: Path
) -> None:
    """Require that a run can be resumed from ``saved``; a warning names what an older checkpoint does not record.

    Args:
        saved: The checkpoint.
        dataset: To train on now.
        recipe: To train with now.
        asked: Seed and precision; None: those of the run.
        path: Of the checkpoint, for the warning.

    Raises:
        InputError: a setting that is not as it was.
    """
    check_same("classes", saved.classes, dataset.classes, "the dataset to resume with")
    check_same("widths", saved.stream_widths, dataset.stream_widths, "the dataset to resume with")
    check_same_recipe(saved.recipe, recipe)
    for name, wanted, was in zip(("seed", "precision"), asked, (saved.seed, saved.precision), strict=True):
        if None not in (wanted, was) and wanted != was:
            raise InputError(f"was trained with {name} {was}, not {wanted}; leave --{name} out, or {OTHERWISE}")
    if saved.iteration > recipe.training.iterations:
        raise InputError(
            f"is at iteration {saved.iteration} already, beyond training.iterations = {recipe.training.iterations}; "
            "raise that or leave --resume out"
        )
    unknown = ["precision"] if saved.precision is None else []
    if "recordings.digests" in saved.tensors:
        check_same_recordings(saved.tensors["recordings.digests"], dataset)
    elif saved.format == 1:
        unknown.append("recordings")
    if unknown:
        warnings.warn(
            f"{path}: is older and does not say its {' and '.join(unknown)}; see that they are the same now",
            stacklevel=5,
        )


def check_same(what: str, expected: tuple[object, ...], found: tuple[object, ...], where: str) -> None:
    """Raises InputError where ``found``, in ``where``, is not as expected."""
    if expected != found:
        first, second = (", ".join(map(str, x)) for x in (expected, found))
        raise InputError(f"{where} has the {what} {second}, expected {first}; use data of the same kind")


def check_same_recipe(saved: Recipe, wanted: Recipe) -> None:
    """Require that all settings that decide the weights are the same, except the number of iterations.

    The recipe's name and its settings of localization and evaluation may differ.

    Raises:
        InputError: naming the settings that differ.
    """
    old, new = saved.to_dict(), wanted.to_dict()
    differences = [
        f"{section}.{key} was {old[section][key]} and is {new[section][key]}"
        for section in ("model", "loss", "training")
        for key in new[section]
        if old[section][key] != new[section][key] and (section, key) != ("training", "iterations")
    ]
    if differences:
        raise InputError(f"was trained with another recipe ({'; '.join(differences)}); {OTHERWISE}")


def run_name(recipe: Recipe, seed: int, precision: str, recordings: Tensor) -> str:
    """A name that identifies a run: the same when it is resumed, also with more iterations; else another."""
    settings = recipe.to_dict()
    decides = {key: settings[key] for key in ("model", "loss", "training")}
    decides["training"] = {**decides["training"], "iterations": None}
    return hashed(repr((decides, seed, precision, recordings.tolist())))


def hashed(text: str) -> str:
    """16 digits that tell one text from another."""
    return f"{_hash(text) % 2**64:016x}"


def digests(dataset: Dataset) -> Tensor:
    """(N, 2) int64 hashes of each recording: of its name, and of its name, length and labels.

    A checkpoint keeps these instead of names: 16 bytes a recording.
    """
    rows = [[_hash(r.name), _hash(_identity(r))] for r in dataset.recordings]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)


def _identity(recording: Recording) -> str:
    return repr((recording.name, recording.snippets, sorted(set(recording.labels))))


def _hash(text: str) -> int:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def check_same_recordings(saved: Tensor, dataset: Dataset) -> None:
    """Require the same recordings: names, lengths and labels, and their order, in which batches are drawn.

    Args:
        saved: :func:`digests` of the recordings trained on.
        dataset: To train on now.

    Raises:
        InputError: naming the recordings that are new or have changed, and how many are gone.
    """
    now = digests(dataset)
    if torch.equal(saved, now):
        return
    old, new = dict(saved.tolist()), dict(now.tolist())
    names = {_hash(r.name): r.name for r in dataset.recordings}
    gone = len(old.keys() - new.keys())
    added = [names[key] for key in new if key not in old]
    changed = [names[key] for key in new if key in old and old[key] != new[key]]
    differences = [f"{len(saved)} then and {len(now)} now"]
    if gone:
        differences.append(f"{gone} of them are gone")
    if added:
        differences.append(f"{listed(added)} new")
    if changed:
        differences.append(f"{listed(changed)} of another length or with other labels")
    if not (gone or added or changed):
        differences.append("in another order")
    raise InputError(f"was trained on other recordings ({'; '.join(differences)}); {OTHERWISE}")


def check_tensors(found: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> None:
    """Require that ``found`` has every tensor of ``needed``, with its shape and dtype.

    Raises:
        InputError: naming the tensors that are missing, or the first of another shape or dtype.
    """
    missing = [name for name in needed if name not in found]
    if missing:
        raise InputError(
            f"cannot go on, as it has no {listed(missing)}; it can still be localized with: train anew, or use "
            "another copy"
        )
    for name, like in needed.items():
        t = found[name]
        if t.shape != like.shape or t.dtype != like.dtype:
            raise InputError(
                f"its tensors do not fit this recipe ('{name}' is {t.dtype} {tuple(t.shape)}, expected {like.dtype} "
                f"{tuple(like.shape)}); train anew"
            )


def save_settings(run: Trainer, saved: Checkpoint) -> None:
    """Put the new settings into the checkpoint of a run that had ended; only such that decide no weight differ."""
    if (saved.recipe, saved.dataset) == (run.recipe, run.dataset.name):
        return
    tensors = saved.tensors
    if saved.format == 1:  # adds the tensors that such a file lacks
        with run.state.generators():
            tensors = {**run.state.tensors(), **tensors}
    changed = replace(
        saved, recipe=run.recipe, dataset=run.dataset.name, version=__version__, tensors=tensors, format=FORMAT
    )
    if run.ranks.leads:
        save_checkpoint(run.path, changed)
        run.saved = True
    run.ranks.wait()


def restored(run: Trainer) -> Checkpoint:
    """The checkpoint in the folder of a run, which goes on from there. Raises InputError where it cannot."""
    content = None
    if run.ranks.leads:  # the only one that needs to have the file
        if not run.path.exists():
            raise InputError(f"{run.path}: there is nothing to resume; leave --resume out or correct --out")
        content = read_bytes(run.path)
    saved = parse_checkpoint(run.ranks.from_first(content), run.path)
    try:
        check_same_run(saved, run.dataset, run.recipe, run.asked, run.path)
        run.state.restore(saved)
    except InputError as error:
        raise InputError(f"{run.path}: {error}") from error
    except (RuntimeError, KeyError, ValueError) as error:
        why = reason(error)
        raise InputError(f"{run.path}: its tensors do not fit this recipe ({why}); train anew") from error
    run.seed = saved.seed
    run.iteration = saved.iteration
    run.threads_before = saved.threads
    if saved.ranks != run.ranks.size:
        warnings.warn(
            f"{run.path}: was trained by {counted(saved.ranks, 'process', 'processes')} and goes on in "
            f"{run.ranks.size}; the result is then the same only up to rounding",
            stacklevel=4,
        )
    if run.asked[1] is None and saved.precision is not None:
        if saved.precision in run.precisions:
            run.precision = saved.precision
            if run.resident is not None:
                run.resident.convert(run.resident_dtype())
        else:
            warnings.warn(
                f"{run.path}: was trained in {saved.precision}, which {run.device} does not have, and goes on in "
                f"{run.precision}",
                stacklevel=4,
            )
    return saved
