"""Adam, one call of PyTorch's fused kernel a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8  # PyTorch's defaults


class Adam:
    """``torch.optim.Adam(parameters, lr, weight_decay, fused=True)``, with the same results.

    That class imports ``torch._dynamo`` when it is made, which takes about a second; this one does not, and does less
    in Python each step. It never waits for the device, and a CUDA graph can hold its step.

    Args:
        parameters: What to train; on one device.
        lr: The learning rate.
        weight_decay: Times the weights, added to the gradient.

    Attributes:
        steps: For each parameter a scalar float32, the steps taken.
        averages: For each parameter the running mean of its gradient.
        squares: For each parameter that of the gradient's square.
    """

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, weight_decay: float) -> None:
        self.parameters = list(parameters)
        self.lr, self.weight_decay = lr, weight_decay
        self.steps = [torch.zeros((), dtype=torch.float32, device=p.device) for p in self.parameters]
        self.averages = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Change the parameters by their gradients, which all must have."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_add_(self.steps, 1)
        torch._fused_adam_(
            self.parameters,
            gradients,
            self.averages,
            self.squares,
            [],
            self.steps,
            lr=self.lr,
            beta1=BETA_1,
            beta2=BETA_2,
            weight_decay=self.weight_decay,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The state by name: "0.step", "0.exp_avg", "0.exp_avg_sq", "1.step" …; these are the tensors themselves."""
        kept = {"step": self.steps, "exp_avg": self.averages, "exp_avg_sq": self.squares}
        return {f"{i}.{name}": found[i] for i in range(len(self.parameters)) for name, found in kept.items()}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`tensors`, of any device."""
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])
