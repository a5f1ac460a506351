"""The loss and its terms: which there are, and their means since somebody looked last."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from d2net.errors import D2NetError
from d2net.recipes import LossRecipe

# The loss and its terms, each before its weight (D2NetLossResult says how they add up), and their names in the bar.
TERMS = {"total": "loss", "discriminative": "dis", "snippet": "snip", "video": "vid", "uncertainty": "um"}
CHECK_EVERY = 10  # iterations between looks at the loss, each of which waits for the device


class RecentTerms:
    """The terms of the last iterations, which stay on the device until they are looked at.

    Args:
        model: The network that is trained.
        start: Iterations done before.
        device: Where it is trained.
    """

    def __init__(self, model: nn.Module, start: int, device: torch.device) -> None:
        self._model = model
        self._looked = start
        self._terms = torch.zeros(CHECK_EVERY, len(TERMS), device=device)

    def add(self, iteration: int, terms: Tensor) -> None:
        """Keep the terms (len(TERMS),) of an iteration, counted from 0; those of ``CHECK_EVERY`` are kept."""
        self._terms[iteration % CHECK_EVERY] = terms

    def means(self, iteration: int, learning_rate: float) -> dict[str, float]:
        """Means of the terms since the last look, so that L_D shows where it is on in some iterations only.

        Args:
            iteration: How many are done.
            learning_rate: For the message.

        Raises:
            D2NetError: for the first of these iterations that is not finite, so that no bad checkpoint is ever saved.
        """
        rows = self._terms.tolist()
        since = range(self._looked, iteration)
        for i in since:
            terms = dict(zip(TERMS, rows[i % CHECK_EVERY], strict=True))
            if not all(map(math.isfinite, terms.values())):
                raise _diverged(i + 1, ", ".join(f"{k} {v:.4g}" for k, v in terms.items()), learning_rate)
        self._looked = iteration
        # A gradient can be NaN where its loss is not; the next loss would tell, but too late for a checkpoint.
        if not torch.stack([p.isfinite().all() for p in self._model.parameters()]).all():
            raise _diverged(iteration, "weights hold NaN or Inf, the loss does not yet", learning_rate)
        return {k: sum(rows[i % CHECK_EVERY][n] for i in since) / len(since) for n, k in enumerate(TERMS)}


def _diverged(iteration: int, what: str, learning_rate: float) -> D2NetError:
    return D2NetError(
        f"the training is not finite at iteration {iteration} ({what}); lower training.learning_rate "
        f"(now {learning_rate:g}) or look at the features"
    )


def shown_terms(loss: LossRecipe) -> dict[str, str]:
    """Those that the recipe gives a weight, and their names in the bar."""
    weights = {"snippet": loss.alpha_snippet, "video": loss.alpha_video, "uncertainty": loss.um_weight}
    return {term: name for term, name in TERMS.items() if weights.get(term, 1) != 0}
