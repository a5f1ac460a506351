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

    A read has two parts: :meth:`ask` lets the device copy them, and :meth:`means` waits for that copy. Between the two
    more steps can be given to the device, so that it never waits for the host.

    Args:
        model: The network that is trained.
        start: Iterations done before.
        learning_rate: For messages.
        device: Of the terms.

    Attributes:
        asked: The iterations done at the last :meth:`ask` whose means are not read yet, or None.
    """

    def __init__(self, model: nn.Module, start: int, learning_rate: float, device: torch.device) -> None:
        self.asked: int | None = None
        self._model = model
        self._looked = start
        self._learning_rate = learning_rate
        on_gpu = device.type == "cuda"
        self._terms = torch.zeros(CHECK_EVERY, len(TERMS), device=device)
        self._places = self._terms.unbind()
        self._copy = torch.zeros(CHECK_EVERY, len(TERMS), pin_memory=on_gpu)
        self._stream = torch.cuda.current_stream(device) if on_gpu else None
        self._copied = torch.cuda.Event() if on_gpu else None

    def add(self, iteration: int, terms: Tensor) -> None:
        """Store the terms (len(TERMS),) of an iteration, counted from 0. The last ``CHECK_EVERY`` are stored."""
        self._places[iteration % CHECK_EVERY].copy_(terms)

    def ask(self, iteration: int) -> None:
        """Begin to read the terms since the last read; those asked for before must have been read.

        Args:
            iteration: Iterations done.
        """
        assert self.asked is None
        self.asked = iteration
        self._copy.copy_(self._terms, non_blocking=True)
        if self._copied is not None:
            self._copied.record(self._stream)

    def means(self) -> dict[str, float]:
        """Means of the terms between two reads, so that L_D is seen also where it is on in some iterations only.

        Raises:
            D2NetError: a term is NaN or Inf.
        """
        assert self.asked is not None
        if self._copied is not None:
            self._copied.synchronize()
        rows, since = self._copy.tolist(), range(self._looked, self.asked)
        for i in since:
            terms = dict(zip(TERMS, rows[i % CHECK_EVERY], strict=True))
            if not all(map(math.isfinite, terms.values())):
                raise self._diverged(i + 1, ", ".join(f"{k} {v:.4g}" for k, v in terms.items()))
        self._looked, self.asked = self.asked, None
        return {k: sum(rows[i % CHECK_EVERY][n] for i in since) / len(since) for n, k in enumerate(TERMS)}

    def check_weights(self, iteration: int) -> None:
        """Require finite weights: a gradient can be NaN where the loss is finite, and no such checkpoint is saved.

        The next loss shows it anyway, so this is only for what comes before that. Waits for the device.

        Raises:
            D2NetError: a weight is NaN or Inf.
        """
        if not torch.stack([p.isfinite().all() for p in self._model.parameters()]).all():
            raise self._diverged(iteration, "weights hold NaN or Inf, the loss does not yet")

    def _diverged(self, iteration: int, what: str) -> D2NetError:
        return D2NetError(
            f"the training is not finite at iteration {iteration} ({what}); lower training.learning_rate "
            f"(now {self._learning_rate:g}) or look at the features"
        )


def shown_terms(loss: LossRecipe) -> dict[str, str]:
    """The terms whose weight is not 0 in the recipe, and their names in the bar."""
    weights = {"snippet": loss.alpha_snippet, "video": loss.alpha_video, "uncertainty": loss.um_weight}
    return {term: name for term, name in TERMS.items() if weights.get(term, 1) != 0}
