"""What is needed to find actions in features: ``d2net.load(path).predict(x)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2net.checkpoint import load_model
from d2net.data.dataset import Dataset, Recording
from d2net.data.times import Times, UnknownTime
from d2net.detections import Detections
from d2net.errors import InputError
from d2net.localization import localize
from d2net.model import D2Net
from d2net.prediction.kinetics import KINETICS400, Kinetics400
from d2net.recipes import LocalizationRecipe

Array = np.ndarray | Tensor


@dataclass(frozen=True)
class Predictor:
    """A network, its classes and settings.

    Attributes:
        model: The network, on its device.
        name: What it is called in messages and results: where it is from.
    """

    model: D2Net | Kinetics400
    name: str

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that it finds."""
        assert self.model.classes is not None
        return self.model.classes

    @property
    def recipe(self) -> LocalizationRecipe:
        """The settings of Sec. 3.3 that it was trained with."""
        assert self.model.recipe is not None
        return self.model.recipe.localization

    @property
    def times(self) -> Times:
        """When the snippets of its features are, as far as they were made by ``d2net features``."""
        return Times.read(self.model.extraction or {})

    def predict(
        self,
        features: Array | Sequence[Array] | Mapping[str, Array],
        *,
        seconds_per_snippet: float | None = None,
        recipe: LocalizationRecipe | None = None,
    ) -> Detections:
        """Which action is when in recordings (Sec. 3.3).

        Args:
            features: (T, D) of one recording, of the kind that the network was trained on; several, in a list; or by
                the names of the recordings. Without names they are ``0``, ``1``, ...
            seconds_per_snippet: From one snippet to the next, where snippet 0 begins at second 0; None: as the features
                that the network was trained on, if ``d2net features`` made them.
            recipe: Settings of Sec. 3.3; None: those that it was trained with.

        Raises:
            InputError: features of another width, NaN or Inf in them, or a time that is not known.
        """
        times = self.times if seconds_per_snippet is None else Times(seconds_per_snippet=seconds_per_snippet)
        try:
            seconds, first = times.resolve()
        except UnknownTime as error:
            raise InputError(
                f"{self.name} does not say when a snippet of its features is; give seconds_per_snippet, such as "
                "16 / 25 of windows of 16 frames at 25 a second"
            ) from error
        recordings = [
            Recording(name, "", (), (), seconds, f"features of '{name}'", x.copy, first_snippet=first, snippets=len(x))
            for name, x in _named(features).items()
        ]
        return localize(self.model, self.dataset(recordings), recipe)

    def dataset(self, recordings: Sequence[Recording], name: str = "features", source: str = "") -> Dataset:
        """Recordings with the classes and the stream widths of the network."""
        return Dataset(
            name=name,
            classes=self.classes,
            stream_widths=self.model.stream_widths,
            recordings=tuple(recordings),
            source=source,
            extraction=self.model.extraction,
        )


def _named(features: Any) -> dict[str, np.ndarray]:
    """Arrays by name; each (T, D)."""
    if isinstance(features, Mapping):
        named = {str(name): _array(x) for name, x in features.items()}
    elif isinstance(features, (np.ndarray, Tensor)) and features.ndim == 2:
        named = {"0": _array(features)}
    elif isinstance(features, (Sequence, np.ndarray, Tensor)) and not isinstance(features, (str, bytes)):
        named = {str(i): _array(x) for i, x in enumerate(features)}
    else:
        raise InputError(
            f"features is a {type(features).__name__}; expected an array (T, D), a list of such, or a dict"
        )
    return named


def _array(x: Any) -> np.ndarray:
    array = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise InputError(f"features have shape {array.shape} and type {array.dtype}; expected numbers (T, D)")
    return array


def load(model: str | Path, device: torch.device | str = "cpu") -> Predictor:
    """A trained network, ready to predict.

    Example::

        import d2net, numpy as np

        detections = d2net.load("runs/mine").predict(np.load("video1.npy"))

    Args:
        model: The folder of a run, or a checkpoint; or ``kinetics400``, the published I3D's own classifier, which takes
            the scores that ``d2net features --extractor kinetics400`` makes.
        device: Where to compute.

    Raises:
        InputError: as :func:`d2net.load_model`.
    """
    if str(model) == KINETICS400:
        return Predictor(Kinetics400().to(device), KINETICS400)
    return Predictor(load_model(model, device), str(model))
