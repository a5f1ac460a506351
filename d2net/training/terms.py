"""The loss and its terms: their names, and their means over the last iterations."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from d2net.errors import D2NetError
from d2net.recipes import LossRecipe

# The loss and its terms before their weights (D2NetLossResult says how they add up), and their names in the bar.
TERMS = {"total": "loss", "discriminative": "dis", "snippet": "snip", "video": "vid", "uncertainty": "um"}
CHECK_EVERY = 10  # iterations between two reads of the loss, each of which waits for the device


class RecentTerms:
    """The terms of the last iterations, which stay on the device until they are read.

    Args:
        model: The network that is trained.
        start: Iterations done before.
        device: Of the terms.
    """

    def __init__(self, model: nn.Module, start: int, device: torch.device) -> None:
        self._model = model
        self._looked = start
        self._terms = torch.zeros(CHECK_EVERY, len(TERMS), device=device)

    def add(self, iteration: int, terms: Tensor) -> None:
        """Store the terms (len(TERMS),) of an iteration, counted from 0. The last ``CHECK_EVERY`` are stored."""
        self._terms[iteration % CHECK_EVERY] = terms

    def means(self, iteration: int, learning_rate: float) -> dict[str, float]:
        """Means of the terms since the last read, so that L_D is seen also where it is on in some iterations only.

        Args:
            iteration: Iterations done.
            learning_rate: For the message.

        Raises:
            D2NetError: a term or a weight is NaN or Inf, so that no such checkpoint is ever saved.
        """
        rows = self._terms.tolist()
        since = range(self._looked, iteration)
        for i in since:
            terms = dict(zip(TERMS, rows[i % CHECK_EVERY], strict=True))
            if not all(map(math.isfinite, terms.values())):
                raise _diverged(i + 1, ", ".join(f"{k} {v:.4g}" for k, v in terms.items()), learning_rate)
        self._looked = iteration
        # A gradient can be NaN where the loss is finite. The next loss would show it, but a checkpoint may come first.
        if not torch.stack([p.isfinite().all() for p in self._model.parameters()]).all():
            raise _diverged(iteration, "weights hold NaN or Inf, the loss does not yet", learning_rate)
        return {k: sum(rows[i % CHECK_EVERY][n] for i in since) / len(since) for n, k in enumerate(TERMS)}


def _diverged(iteration: int, what: str, learning_rate: float) -> D2NetError:
    return D2NetError(
        f"the training is not finite at iteration {iteration} ({what}); lower training.learning_rate "
        f"(now {learning_rate:g}) or look at the features"
    )


def shown_terms(loss: LossRecipe) -> dict[str, str]:
    """The terms whose weight is not 0 in the recipe, and their names in the bar."""
    weights = {"snippet": loss.alpha_snippet, "video": loss.alpha_video, "uncertainty": loss.um_weight}
    return {term: name for term, name in TERMS.items() if weights.get(term, 1) != 0}
