"""The classifier of the published I3D as a network that is localized with: its scores are the activations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2net.features.methods import kinetics400
from d2net.recipes import LocalizationRecipe, Recipe

KINETICS400 = "kinetics400"


class Activations(NamedTuple):
    """tcam: (B, T, 400); embeddings: (B, T, 1), all 0: there is nothing to compare with x_ref."""

    tcam: Tensor
    embeddings: Tensor


class Kinetics400(nn.Module):
    """Scores of windows (B, T, 400), as ``d2net features --extractor kinetics400`` makes them, as a TCAM.

    No training: I3D learnt the 400 classes from clips that were cut to one action each. Sec. 3.3 does the rest, without
    bottom-up attention, of which a classifier has none.
    """

    classes: tuple[str, ...]
    stream_widths = (400,)
    trained_on = "Kinetics-400"
    x_ref: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.classes = tuple(kinetics400())
        self.recipe = Recipe(
            name=KINETICS400,
            description="Scores of I3D's own classifier, localized without training",
            localization=LocalizationRecipe(attention=False),
        )
        self.extraction = {"extractor": KINETICS400}
        self.register_buffer("x_ref", torch.zeros(1))

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Activations:
        return Activations(features, features.new_zeros(*features.shape[:2], 1))
