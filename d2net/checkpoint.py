"""Checkpoints: one safetensors file, written atomically; its header says what it is. Never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from d2net.errors import InputError
from d2net.files import write_whole
from d2net.model import D2Net, check_stream_widths
from d2net.recipes import Recipe

CHECKPOINT_NAME = "checkpoint.safetensors"
FORMAT = 1  # raise when an older d2net could not read a new file
_KEY = "d2net"  # of the header's one entry


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to be used or to go on.

    Attributes:
        recipe: The experiment's settings.
        classes: Names, in the order of the network's outputs.
        stream_widths: Widths of the input streams, one or two.
        iteration: Iterations trained so far.
        dataset: Name of the dataset.
        seed: Of the run.
        version: Of the d2net that wrote it.
        tensors: On the CPU, by dotted name: ``model.*`` (the result), ``loss.*``, ``optimizer.*``, ``sampler.*``,
            ``rng.*``; where the result is an average also ``weights.*``, the network that is trained on, and
            ``average.size``, the steps that it is worth.
        threads: Of the CPU that it was trained in, which decide the last bits; 0: of a GPU, or not known.
    """

    recipe: Recipe
    classes: tuple[str, ...]
    stream_widths: tuple[int, ...]
    iteration: int
    dataset: str
    seed: int
    version: str
    tensors: Mapping[str, Tensor]
    threads: int = 0

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors below ``name``, without that prefix."""
        return {key[len(name) + 1 :]: t for key, t in self.tensors.items() if key.startswith(f"{name}.")}

    def metadata(self) -> dict[str, Any]:
        """All but the tensors, as plain values."""
        return {
            "format": FORMAT,
            "version": self.version,
            "dataset": self.dataset,
            "classes": list(self.classes),
            "stream_widths": list(self.stream_widths),
            "iteration": self.iteration,
            "seed": self.seed,
            "threads": self.threads,
            "recipe": self.recipe.to_dict(),
        }


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``path`` and, for people, the same metadata as ``.json`` beside it.

    Atomic: an interruption or a full disk leaves an earlier checkpoint as it was.

    Raises:
        InputError: the file cannot be written.
    """
    metadata = checkpoint.metadata()
    tensors = {key: t.detach().cpu().contiguous() for key, t in checkpoint.tensors.items()}
    write_whole(path, save(tensors, {_KEY: json.dumps(metadata)}))
    text = json.dumps(metadata, indent=2, ensure_ascii=False) + "\n"
    write_whole(path.with_suffix(".json"), text)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, or the one in the folder of a run, to the CPU.

    Raises:
        InputError: missing, unreadable, truncated, not a d2net checkpoint, or of a newer format.
    """
    path = Path(path)
    if path.is_dir():
        path = path / CHECKPOINT_NAME
    if not path.is_file():
        raise InputError(f"{path}: there is no such checkpoint; train one or correct the path")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    except SafetensorError as error:
        raise InputError(
            f"{path}: truncated or not a d2net checkpoint ({error}); a d2net checkpoint is a safetensors file, "
            "pickles (.pt, .pth, .pkl) are never loaded; use another copy or train again"
        ) from error
    if _KEY not in header:
        raise InputError(f"{path}: a safetensors file, but not a d2net checkpoint; give one that d2net wrote")
    try:
        metadata = json.loads(header[_KEY])
        if metadata["format"] > FORMAT:
            raise InputError(
                f"{path}: has checkpoint format {metadata['format']}, written by d2net {metadata['version']}; "
                f"this d2net reads up to {FORMAT}: upgrade it"
            )
        return Checkpoint(
            recipe=Recipe.from_dict(metadata["recipe"], source=str(path)),
            classes=tuple(metadata["classes"]),
            stream_widths=check_stream_widths(str(path), metadata["stream_widths"]),
            iteration=metadata["iteration"],
            dataset=metadata["dataset"],
            seed=metadata["seed"],
            version=metadata["version"],
            tensors=tensors,
            threads=metadata.get("threads", 0),  # not in older files
        )
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged header ({error!r}); use another copy or train again") from error


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[D2Net, Tensor, Checkpoint]:
    """The trained network in eval mode, the background reference x_ref (D,), and the checkpoint they are from.

    Raises:
        InputError: as :func:`load_checkpoint`, or when the tensors do not fit the recipe.
    """
    checkpoint = load_checkpoint(path)
    model = D2Net.from_recipe(
        checkpoint.recipe.model, num_classes=len(checkpoint.classes), stream_widths=checkpoint.stream_widths
    )
    try:
        model.load_state_dict(checkpoint.group("model"))
        reference = checkpoint.tensors["loss.reference"]
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: its tensors do not fit its recipe ({reason}); train again") from error
    return model.to(device).eval(), reference.to(device), checkpoint
