"""What the ranks that localize together compare before, and give each other after."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from d2net.data.dataset import Dataset
from d2net.distributed import Ranks
from d2net.ops.proposals import Proposals
from d2net.recipes import LocalizationRecipe
from d2net.words import counted


def check_same_everywhere(ranks: Ranks, model: nn.Module, dataset: Dataset, recipe: LocalizationRecipe) -> None:
    """Require that all ranks localize the same recordings, known by their names, lengths and labels, with one network.

    Raises:
        InputError: on rank 0; RankEnded on the others.
    """
    known = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        known.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        known.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    known.update(repr(recipe).encode())
    ranks.check_same(
        "a network with its settings of hash", known.hexdigest()[:16], "give all machines the same checkpoint"
    )
    recordings = f"{counted(len(dataset), 'recording')} of hash {dataset.fingerprint()}"
    ranks.check_same("data of", recordings, "give all machines the same data")


def gathered(found: Sequence[Proposals], ranks: Ranks) -> Sequence[Proposals]:
    """The proposals that all ranks found, by recording, each of which is of one rank; on all ranks."""
    if ranks.size == 1:
        return found
    content = io.BytesIO()
    np.savez(content, **{name: x.cpu().numpy() for name, x in concatenated(found)._asdict().items()})
    told = [np.load(io.BytesIO(each), allow_pickle=False) for each in ranks.from_each(content.getvalue())]
    columns = {name: np.concatenate([each[name] for each in told]) for name in Proposals._fields}
    order = np.argsort(columns["recording"], kind="stable")
    return [Proposals(**{name: torch.from_numpy(x[order]) for name, x in columns.items()})]


def concatenated(found: Sequence[Proposals]) -> Proposals:
    """One after another."""
    if not found:
        none = torch.empty(0, dtype=torch.int64)
        return Proposals(none, none, none, none, torch.empty(0))
    return Proposals(*(torch.cat(column) for column in zip(*found, strict=True)))
