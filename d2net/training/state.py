"""Everything that a training changes, which is what it is resumed from."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from d2net.checkpoint import X_REF, Checkpoint
from d2net.data.batches import BatchSampler, labels_of
from d2net.data.dataset import Dataset
from d2net.data.moments import moments
from d2net.distributed import ALONE, Ranks
from d2net.errors import InputError
from d2net.losses import D2NetLoss
from d2net.model import D2Net
from d2net.recipes import Recipe
from d2net.training.adam import Adam
from d2net.training.agreement import Agreement
from d2net.training.resume import check_tensors, digests


class TrainingState:
    """The networks with x_ref, the optimizer, the batch sampler and the random generators of a run.

    Args:
        dataset: The recordings to train on.
        recipe: All settings.
        seed: Of the weights, the batches, the pairing and the dropout.
        device: Where to train.
        ranks: The processes that train it together; each has all of this state.

    Attributes:
        model: The network that is trained.
        result: The network with the average of its weights, or ``model`` itself where the recipe averages none.
        loss: Of the recipe. ``loss.reference`` and the networks' ``x_ref`` are one tensor.
        optimizer: Adam.
        sampler: Draws the batches.
        pairing: The random generator of the pairs of Eq. 3, on the device.
        agreement: Decides when L_D begins; None where the recipe asks for no agreement, or has no L_D.

    Raises:
        InputError: settings that do not go together, or unlabelled recordings.
    """

    def __init__(self, dataset: Dataset, recipe: Recipe, seed: int, device: torch.device, ranks: Ranks = ALONE) -> None:
        self._device = device
        self._decay = recipe.training.ema_decay
        if len(dataset) > 0:  # which the sampler refuses
            labels_of(dataset, recipe.loss.skip_unlabelled)  # raises now, not for a network without classes
        with self._own_rng():
            torch.manual_seed(seed)
            self.model = (
                D2Net.from_recipe(recipe.model, num_classes=len(dataset.classes), stream_widths=dataset.stream_widths)
                .to(device)
                .order_weights()
            )
            self._rng = self._rng_state()  # dropout draws from here on
        self.sampler = BatchSampler(
            dataset,
            batch_size=recipe.training.batch_size,
            max_snippets=recipe.training.max_snippets,
            layout=self.model,
            seed=seed,
            allow_unlabelled=recipe.loss.skip_unlabelled,
            ranks=ranks,
        )
        if self.model.feature_mean is not None and self.model.feature_scale is not None:
            mean, deviation = moments(dataset)
            self.model.feature_mean.copy_(torch.from_numpy(mean))
            self.model.feature_scale.copy_(torch.from_numpy(1 / deviation))
        self.model.classes, self.model.recipe, self.model.trained_on = dataset.classes, recipe, dataset.name
        self.model.extraction = dataset.extraction
        # What is evaluated and saved as the network: the average of the weights, or the trained network itself.
        self.result = copy.deepcopy(self.model) if self._decay > 0 else self.model
        # 1 + decay + decay^2 + ..., the divisor of the average; on the device, so that a CUDA graph can update it.
        self._average_size = torch.zeros((), device=device)
        self.loss = D2NetLoss.from_recipe(
            recipe.loss, num_classes=len(dataset.classes), embedding_dim=self.model.embedding_dim
        ).to(device)
        # One tensor, which the loss updates in place, so that evaluations and checkpoints have the same x_ref as the
        # loss. x_ref is not averaged, also where the weights are.
        self.loss.reference = self.result.x_ref = self.model.x_ref
        self.optimizer = Adam(
            self.model.parameters(), lr=recipe.training.learning_rate, weight_decay=recipe.training.weight_decay
        )
        self.pairing = torch.Generator(device).manual_seed(seed)
        self.agreement: Agreement | None = None
        if recipe.training.denoising_agreement is not None and (recipe.loss.alpha_snippet or recipe.loss.alpha_video):
            self.agreement = Agreement(recipe, device)
        self._digests = digests(dataset)

    @torch.no_grad()
    def average(self) -> None:
        """Add the weights to their average: after n steps the newest ones count (1 - decay) / (1 - decay^n).

        The first average is the weights after the first step; the initial weights do not enter.
        """
        if self.result is self.model:
            return
        self._average_size.mul_(self._decay).add_(1)
        weight = self._average_size.reciprocal()
        for average, new in zip(self.result.parameters(), self.model.parameters(), strict=True):
            average.lerp_(new, weight)

    @contextmanager
    def generators(self) -> Iterator[None]:
        """Within the block, torch's global generators, which dropout draws from, have this run's state."""
        with self._own_rng():
            torch.set_rng_state(self._rng["cpu"])
            if self._device.type == "cuda" and "cuda" in self._rng:  # not there when the run began on a CPU
                torch.cuda.set_rng_state(self._rng["cuda"], self._device)
            yield

    def tensors(self) -> dict[str, Tensor]:
        """The whole state by dotted name, for :class:`d2net.checkpoint.Checkpoint`; call within :meth:`generators`."""
        return _named(self._groups())

    def restore(self, saved: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            InputError: a tensor is missing, or of another shape or type.
            RuntimeError, ValueError: tensors that are no state of a generator or an optimizer.
        """
        check_tensors(saved.tensors, _named(self._needed(saved)))
        self.result.load_state_dict(saved.group("model"))  # in place, x_ref too
        if self.result is not self.model:
            self.model.load_state_dict({**saved.group("weights"), "x_ref": saved.tensors[X_REF]})
            # Older files lack it: their averages began with the initial weights, whose sum of weights is the limit.
            limit = torch.tensor(1 / (1 - self._decay))
            self._average_size.copy_(saved.group("average").get("size", limit))
        for key, t in saved.group("optimizer").items():
            if (key.endswith(".step") and t != saved.iteration) or (key.endswith(".exp_avg_sq") and (t < 0).any()):
                raise InputError(f"optimizer.{key} is none of an optimizer after {saved.iteration} steps")
        self.optimizer.restore(saved.group("optimizer"))
        self.sampler.restore(saved.group("sampler"))
        if self.loss.queue is not None:
            self.loss.queue.load_state_dict(saved.group("video_queue"))
        if self.agreement is not None:
            self.agreement.restore(saved.group("denoising"))
        self._rng = saved.group("rng")
        torch.Generator().set_state(self._rng["cpu"])  # raises now, not when training begins
        if self._began_elsewhere(saved):
            self.pairing.manual_seed(saved.seed)
        else:
            self.pairing.set_state(self._rng[self._pairing_key])

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        groups: dict[str, Mapping[str, Tensor]] = {
            "model": self.result.state_dict(),
            "optimizer": self.optimizer.tensors(),
            "sampler": self.sampler.state(),
            "rng": {self._pairing_key: self.pairing.get_state(), **self._rng_state()},
            "recordings": {"digests": self._digests},
        }
        if self.result is not self.model:
            groups["weights"] = {key: t for key, t in self.model.state_dict().items() if key != "x_ref"}
            groups["average"] = {"size": self._average_size}
        if self.loss.queue is not None:
            groups["video_queue"] = self.loss.queue.state_dict()
        if self.agreement is not None:
            groups["denoising"] = self.agreement.tensors()
        return groups

    def _needed(self, saved: Checkpoint) -> dict[str, Mapping[str, Tensor]]:
        """Tensors with the names, shapes and dtypes that ``saved`` must have."""
        groups = self._groups()
        if self._began_elsewhere(saved):
            groups["rng"] = {"cpu": groups["rng"]["cpu"]}
        if saved.format == 1:
            del groups["recordings"]
            if not saved.group("average"):
                groups.pop("average", None)
        return groups

    def _began_elsewhere(self, saved: Checkpoint) -> bool:
        """Whether it began on a GPU and goes on on a CPU, or the reverse: their generators have different states."""
        pairings = {key for key in saved.group("rng") if key.startswith("pairing")}
        return bool(pairings) and self._pairing_key not in pairings

    @property
    def _pairing_key(self) -> str:
        return "pairing_cuda" if self._device.type == "cuda" else "pairing"

    def _own_rng(self) -> AbstractContextManager[None]:
        return torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else [])

    def _rng_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        return state


def _named(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{name}.{key}": t for name, group in groups.items() for key, t in group.items()}
