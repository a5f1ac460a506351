"""A training step of D2-Net as the paper's authors formulate it, in plain PyTorch, without d2net's network and trainer.

Batches are padded to their longest recording, the convolutions are `nn.Conv1d` over the padding too, the optimizer is
`torch.optim.Adam` with its defaults, all eager. The loss is a loop over the recordings, or with ``batched`` d2net's own
formulation in batched PyTorch. The batches lie on the device beforehand: reading and copying them is not in the time.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from bench_loss import loops
from torch import Tensor, nn
from torch.nn import functional as F
from training_sizes import Drawn, Sizes

from d2net.data.dataset import Dataset
from d2net.losses import D2NetLoss
from d2net.ops import use_backend
from d2net.recipes import ModelRecipe


class PlainStream(nn.Module):
    """Three temporal convolutions of (B, width, T): embeddings (B, D, T) and logits (B, C, T)."""

    def __init__(self, width: int, classes: int, recipe: ModelRecipe) -> None:
        super().__init__()
        kernel, last = recipe.kernel_size, recipe.classifier_kernel_size or recipe.kernel_size
        self.first = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.second = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.classifier = nn.Conv1d(width, classes, last, padding=last // 2)
        self.dropout = nn.Dropout(recipe.dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.leaky_relu(self.first(x), 0.2)
        x = F.leaky_relu(self.second(x), 0.2)
        return x, self.classifier(self.dropout(x))


class PlainNetwork(nn.Module):
    """Features (B, T, 2 * width) -> TCAM (B, T, C) and embeddings (B, T, width)."""

    def __init__(self, width: int, classes: int, recipe: ModelRecipe) -> None:
        super().__init__()
        self.stream_a = PlainStream(width, classes, recipe)
        self.stream_b = PlainStream(width, classes, recipe)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        rgb, flow = features.transpose(1, 2).chunk(2, dim=1)
        (x_a, logits_a), (x_b, logits_b) = self.stream_a(rgb), self.stream_b(flow)
        tcam = 0.5 * (torch.sigmoid(logits_a.float()) + torch.sigmoid(logits_b.float()))
        return tcam.transpose(1, 2), (0.5 * (x_a + x_b)).float().transpose(1, 2)


class PlainBatch:
    """A padded batch on the device, and the pairs of Eq. 3."""

    def __init__(
        self, chosen: list[int], dataset: Dataset, labels: Tensor, snippets: int, device: torch.device
    ) -> None:
        cut = [torch.from_numpy(dataset.features(i))[:snippets] for i in chosen]
        self.features = nn.utils.rnn.pad_sequence(cut, batch_first=True).to(device)
        self.lengths = [len(x) for x in cut]
        self.lengths_on_device = torch.tensor(self.lengths, device=device)
        self.labels = labels[chosen].to(device)
        self.partners = [*range(1, len(chosen)), 0]  # the batch is in random order


class PlainTraining:
    """Steps with one batch of an epoch after the other.

    Attributes:
        drawn: The batches of :meth:`step` so far.
        epoch: Batches of an epoch.
    """

    def __init__(self, sizes: Sizes, dataset: Dataset, device: torch.device, precision: str, batched: bool) -> None:
        recipe = sizes.recipe(1)
        self.device, self.precision, self.batched = device, precision, batched
        self.network = PlainNetwork(sizes.width, sizes.classes, recipe.model).to(device)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=recipe.training.learning_rate, weight_decay=recipe.training.weight_decay
        )
        self.x_ref = torch.zeros(sizes.width, device=device)
        self.module = D2NetLoss.from_recipe(recipe.loss, num_classes=sizes.classes, embedding_dim=sizes.width)
        self.module.to(device)
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
        labels = torch.from_numpy(dataset.label_matrix())
        self.epoch = len(order) // sizes.batch
        self.batches = [
            PlainBatch(order[i * sizes.batch :][: sizes.batch], dataset, labels, sizes.snippets, device)
            for i in range(self.epoch)
        ]
        self.drawn: list[Drawn] = []
        self._turn = cycle(self.batches)

    def step(self) -> None:
        """One step with the next batch."""
        batch = next(self._turn)
        self.drawn.append(Drawn(sum(batch.lengths), batch.features.shape[0] * batch.features.shape[1]))
        loss = self.criterion(*self.forward(batch), batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def forward(self, batch: PlainBatch) -> tuple[Tensor, Tensor]:
        """TCAM and embeddings, float32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.network(batch.features)

    def criterion(self, tcam: Tensor, embeddings: Tensor, batch: PlainBatch) -> Tensor:
        if self.batched:
            partners = torch.tensor(batch.partners, device=self.device)
            with use_backend("reference"):
                return self.module(tcam, embeddings, batch.lengths_on_device, batch.labels, partners).total
        loss, self.x_ref = loops(tcam, embeddings, batch.lengths, batch.labels, self.x_ref, batch.partners)
        return loss

    def loss(self) -> Callable[[], Any]:
        """The loss alone of one batch after the other of an epoch, forward and backward."""
        with torch.no_grad():
            outputs = [(self.forward(batch), batch) for batch in self.batches]
        turn = cycle([([x.requires_grad_() for x in output], batch) for output, batch in outputs])

        def run() -> None:
            leaves, batch = next(turn)
            torch.autograd.grad(self.criterion(*leaves, batch), leaves)

        return run
