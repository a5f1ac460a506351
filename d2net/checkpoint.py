"""Checkpoints: a safetensors file, written atomically, with metadata in its header. Never a pickle.

A file contains the SHA-256 of its contents, so a file in which a bit has changed is refused. The sum is no signature:
whoever can write the file can write the sum.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from d2net import __version__
from d2net.errors import D2NetError, InputError
from d2net.fields import LARGEST_COUNT, Range, check_fields
from d2net.files import write_whole
from d2net.model import D2Net
from d2net.reading import missing, parse_json, read_bytes
from d2net.recipes import Recipe, Width
from d2net.words import quoted, reason

__all__ = [
    "CHECKPOINT_NAME", "FORMAT", "Checkpoint", "Precision", "load_checkpoint", "load_model", "model_file",
    "parse_checkpoint", "save_checkpoint", "save_model",
]  # fmt: skip

CHECKPOINT_NAME = "checkpoint.safetensors"
FORMAT = 3  # raise when an older d2net could not read a new file
KEY = "d2net"  # the header's one key; its value is the metadata in JSON
CHECKSUM = "sha256"  # the checksum's key in the metadata; files of format 1 have none
X_REF, X_REF_BEFORE_3 = "model.x_ref", "loss.reference"  # the name of x_ref among the tensors, now and before format 3
_TYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)

Seed = Annotated[int, Range(0, 2**64 - 1)]  # as torch takes it
Precision = Literal["fp32", "tf32", "bf16"]


@dataclass(frozen=True)
class Checkpoint:
    """Everything that is needed to use the result of a run, or to resume it.

    Attributes:
        recipe: The experiment's settings.
        classes: Names, in the order of the network's outputs.
        stream_widths: Widths of the input streams, one or two.
        iteration: Iterations trained so far.
        dataset: Name of the dataset.
        seed: Of the run.
        version: Of the d2net that wrote it.
        tensors: On the CPU, by dotted name: ``model.*`` (the result, with x_ref), ``optimizer.*``, ``sampler.*``,
            ``rng.*``, and ``recordings.digests``, hashes of what it was trained on (:mod:`d2net.training.resume`).
            Where the result is an average of the weights also ``weights.*``, the weights that training continues from
            (x_ref is the same), and ``average.size``, the divisor of the average. With ``training.denoising_agreement``
            also ``denoising.agreement`` and ``denoising.began`` (:class:`d2net.training.agreement.Agreement`),
            with ``loss.video_queue`` also ``video_queue.*`` (:class:`d2net.losses.video_queue.VideoQueue`).
        threads: The number of CPU threads that it was trained in, which decides the last bits; 0: trained on a GPU, or
            not known.
        ranks: The number of processes that trained it together, which decides the last bits too.
        precision: Of the network in training; None: not known.
        extraction: How the features were made (:class:`d2net.data.dataset.Dataset`); None: not known.
        format: Of the file. Format 1 has no checksum, ``precision`` and ``recordings``. In files of formats 1 and 2
            x_ref is called ``loss.reference``; here it is always ``model.x_ref``.

    Raises:
        InputError: a field of a wrong type or out of range, or two classes of the same name.
    """

    recipe: Recipe
    classes: tuple[str, ...]
    stream_widths: tuple[Width, ...]
    iteration: Annotated[int, Range(0, LARGEST_COUNT)]
    dataset: str
    seed: Seed
    version: str
    tensors: Mapping[str, Tensor]
    threads: Annotated[int, Range(0, 65_536)] = 0
    ranks: Annotated[int, Range(1, 1_000_000)] = 1
    precision: Precision | None = None
    extraction: Mapping[str, Any] | None = None
    format: Annotated[int, Range(1, FORMAT)] = FORMAT

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.stream_widths) > 2:
            raise InputError(f"stream_widths is {quoted(self.stream_widths)}; it must be one width or two")
        if "" in self.classes or len(set(self.classes)) < len(self.classes):
            raise InputError(f"classes is {quoted(self.classes)}; it must be names that differ, none of them empty")

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors below ``name``, without that prefix."""
        return {key[len(name) + 1 :]: t for key, t in self.tensors.items() if key.startswith(f"{name}.")}

    def metadata(self) -> dict[str, Any]:
        """Everything except the tensors, as plain values."""
        return {
            "format": FORMAT,
            "version": self.version,
            "dataset": self.dataset,
            "classes": list(self.classes),
            "stream_widths": list(self.stream_widths),
            "iteration": self.iteration,
            "seed": self.seed,
            "threads": self.threads,
            **({} if self.ranks == 1 else {"ranks": self.ranks}),
            "precision": self.precision,
            "recipe": self.recipe.to_dict(),
            **({} if self.extraction is None else {"extraction": dict(self.extraction)}),
        }


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``path``, and the metadata as ``.json`` beside it, for people to read.

    Atomic: after an interruption, or with a full disk, an earlier checkpoint is still there.

    Raises:
        D2NetError: a tensor holds NaN or Inf, or is of a type that no file holds.
        InputError: the file cannot be written.
    """
    tensors = {key: t.detach().cpu().contiguous() for key, t in checkpoint.tensors.items()}
    why = _unusable(tensors)
    if why:
        raise D2NetError(
            f"{path}: not saved at iteration {checkpoint.iteration}, as {why}; an earlier checkpoint is as it was; "
            "lower training.learning_rate or look at the features"
        )
    metadata = checkpoint.metadata()
    header = json.dumps({**metadata, CHECKSUM: checksum(metadata, tensors)})
    write_whole(path, save(tensors, {KEY: header}))
    # A lone surrogate in a name is written as an escape, which JSON has too.
    readable = json.dumps(metadata, indent=2, ensure_ascii=False) + "\n"
    write_whole(path.with_suffix(".json"), readable.encode("utf-8", "backslashreplace"))


def save_model(path: Path | str, model: D2Net, *, seed: int = 0, iteration: int = 0) -> None:
    """Write a network that was trained in a loop of one's own, for :func:`load_model` and all but ``--resume``.

    Args:
        path: The file; the metadata is written beside it.
        model: With ``classes`` and ``recipe``, and ``trained_on`` and ``extraction`` where they are known.
        seed: Of the training, where there was one.
        iteration: Iterations trained.

    Raises:
        D2NetError: a weight is NaN or Inf.
        InputError: ``classes`` or ``recipe`` are missing or of another network; or the file cannot be written.
    """
    classes, recipe = model.classes, model.recipe
    if classes is None or recipe is None:
        raise InputError(f"{path}: not saved, as the network does not say both; set model.classes and model.recipe")
    like = _blank(recipe, classes, model.stream_widths)
    shapes = [{name: t.shape for name, t in net.state_dict().items()} for net in (like, model)]
    if like.settings != model.settings or shapes[0] != shapes[1]:
        raise InputError(f"{path}: not saved, as model.recipe and model.classes describe another network than this")
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    known: dict[str, Any] = {"dataset": model.trained_on or "", "extraction": model.extraction, "version": __version__}
    of_run = Checkpoint(recipe, tuple(classes), model.stream_widths, iteration, seed=seed, tensors=tensors, **known)
    save_checkpoint(Path(path), of_run)


def model_file(path: Path | str) -> Path:
    """The path of a checkpoint; of a run's folder, the checkpoint in it."""
    path = Path(path)
    return path / CHECKPOINT_NAME if path.is_dir() else path


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint, or the one in the folder of a run, to the CPU.

    A file of format 1, which has no checksum, is read with a warning.

    Raises:
        InputError: missing, unreadable, truncated, not a d2net checkpoint, of a newer format, not what was written
            (the checksum says so), with a field of a wrong type or range, or with NaN or Inf.
    """
    path = model_file(path)
    if not path.exists():
        what = missing(path) if path.is_symlink() else "there is no such checkpoint"
        raise InputError(f"{path}: {what}; train one or correct the path")
    # Not memory-mapped, so that a later change of the file does not change the tensors.
    return parse_checkpoint(read_bytes(path), path)


def parse_checkpoint(content: bytes, path: Path) -> Checkpoint:
    """The checkpoint with the bytes of a file; ``path`` is for messages. Errors: as :func:`load_checkpoint`."""
    try:
        tensors = load(content)
    # Besides SafetensorError: dtypes that torch does not have, or sizes that it cannot have.
    except (SafetensorError, KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise InputError(
            f"{path}: truncated or not a d2net checkpoint ({reason(error)}); a d2net checkpoint is a safetensors file, "
            "pickles (.pt, .pth, .pkl) are never loaded; use another copy or train again"
        ) from error
    try:
        header = _header(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged header ({quoted(error)}); use another copy or train again") from error
    if KEY not in header:
        raise InputError(f"{path}: a safetensors file, but not a d2net checkpoint; give one that d2net wrote")
    why = _unusable(tensors)
    if why:
        raise InputError(f"{path}: damaged, {why}; use another copy or train again")
    try:
        metadata = parse_json(header[KEY])
        digest = metadata.pop(CHECKSUM, None)
        # A sum that is there must be right, whatever format the file claims: no changed bit switches this check off.
        wrong = digest is not None and digest != checksum(metadata, tensors)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: damaged header ({quoted(error)}); use another copy or train again") from error
    if wrong:
        raise InputError(f"{path}: damaged, its checksum is wrong; use another copy or train again")
    checkpoint = _from_metadata(metadata, tensors, path)
    if digest is None:
        if checkpoint.format > 1:
            raise InputError(f"{path}: damaged, its checksum is missing; use another copy or train again")
        warnings.warn(f"{path}: an older checkpoint, without a checksum: damage in it would not be seen", stacklevel=2)
    return checkpoint


def _from_metadata(metadata: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> Checkpoint:
    try:
        if not metadata["format"] > FORMAT:
            known = {f.name: metadata[f.name] for f in fields(Checkpoint) if f.name in metadata}
            recipe = _recipe(metadata["recipe"])
            if metadata["format"] < 3 and X_REF_BEFORE_3 in tensors:
                tensors = {X_REF if key == X_REF_BEFORE_3 else key: t for key, t in tensors.items()}
            return Checkpoint(**{**known, "recipe": recipe, "tensors": tensors})
        newer = f"{quoted(metadata['format'])}, written by d2net {quoted(metadata['version'])}"
    except (ValueError, KeyError, TypeError) as error:
        why = error if isinstance(error, InputError) else quoted(error)
        raise InputError(f"{path}: damaged header ({why}); use another copy or train again") from error
    raise InputError(f"{path}: has checkpoint format {newer}; this d2net reads up to {FORMAT}: upgrade it")


def _recipe(table: Any) -> Recipe:
    """The recipe of a file. Every section must be there: today's defaults may differ from those of the run."""
    for f in fields(Recipe):
        if isinstance(table, dict) and f.name not in table:
            raise InputError(f"recipe has no {f.name}")
    return Recipe.from_dict(table, source="recipe")


def _header(content: bytes) -> dict[str, str]:
    """The ``__metadata__`` of a safetensors file: in the JSON that follows the 8 bytes of its length."""
    length = int.from_bytes(content[:8], "little")
    return parse_json(content[8 : 8 + length]).get("__metadata__") or {}


def checksum(metadata: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the metadata, and of the names, types, shapes and bytes of the tensors."""
    total = hashlib.sha256(f"{json.dumps(metadata)}\n".encode())
    for name, t in sorted(tensors.items()):
        total.update(f"{name!r} {t.dtype} {tuple(t.shape)}\n".encode())
        total.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _unusable(tensors: Mapping[str, Tensor]) -> str | None:
    """A sentence about the first tensor that holds NaN or Inf or has an unknown dtype; None if there is none."""
    for name, t in tensors.items():
        if t.dtype not in _TYPES:
            return f"{quoted(name)} is of type {t.dtype}"
        if t.is_floating_point() and t.numel():
            # The minimum and maximum show NaN and Inf, fifty times as fast as isfinite.
            extremes = torch.stack((t if t.itemsize >= 4 else t.float()).aminmax())
            if not extremes.isfinite().all():
                return f"{quoted(name)} holds NaN or Inf"
    return None


def load_model(path: Path | str, device: torch.device | str = "cpu") -> D2Net:
    """The trained network of a checkpoint, or of the one in the folder of a run, in eval mode.

    It has all that :func:`d2net.localization.localize` needs: x_ref, the names of its classes and its recipe.
    :func:`load_checkpoint` gives everything else in the file.

    Example::

        model = d2net.load_model("runs/mine")
        detections = d2net.localize(model, dataset)

    Raises:
        InputError: as :func:`load_checkpoint`, or when the tensors do not fit the recipe.
    """
    checkpoint = load_checkpoint(path)
    try:
        model = _blank(checkpoint.recipe, checkpoint.classes, checkpoint.stream_widths)
        model.load_state_dict({key: t.float() for key, t in checkpoint.group("model").items()}, assign=True)
    except (RuntimeError, InputError) as error:
        # The first line of load_state_dict's message only says that there are errors; the next ones name them.
        details = RuntimeError(str(error).partition("\n")[2] or str(error))
        why = error if isinstance(error, InputError) else reason(details)
        raise InputError(f"{path}: its tensors do not fit its recipe ({why}); train again") from error
    model.classes, model.recipe, model.trained_on = checkpoint.classes, checkpoint.recipe, checkpoint.dataset
    model.extraction = checkpoint.extraction
    return model.to(device).order_weights().eval()


def _blank(recipe: Recipe, classes: Sequence[str], stream_widths: Sequence[int]) -> D2Net:
    """The network without memory: it allocates nothing, whatever sizes a file claims."""
    with torch.device("meta"):
        return D2Net.from_recipe(recipe.model, num_classes=len(classes), stream_widths=stream_widths)
