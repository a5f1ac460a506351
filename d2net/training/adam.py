"""Adam, one call of a fused kernel a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from d2net.ops.adam import WeightCopies, adam_step

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8  # PyTorch's defaults


class Adam:
    """``torch.optim.Adam(parameters, lr, weight_decay, fused=True)``, with the same results.

    With copies (:meth:`keep`) a kernel of our own takes the step. PyTorch's for GPUs rounds 1 - beta_2 to four digits,
    ours does not, so their results differ by as much.

    That class imports ``torch._dynamo`` when it is made, which takes about a second; this one does not, and does less
    in Python each step. It never waits for the device, and a CUDA graph can hold its step.

    A gradient must lie in memory as its parameter does, which autograd sees to.

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
        self._copies: Sequence[WeightCopies] = ()

    def keep(self, copies: Sequence[WeightCopies]) -> None:
        """Write copies of the parameters in bfloat16, now and with every step; on a GPU only.

        Args:
            copies: For each parameter; none: write none from now on.
        """
        self._copies = copies
        for p, of in zip(self.parameters, copies, strict=bool(copies)):
            of.write(p.detach())

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Change the parameters by their gradients, which all must have."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_add_(self.steps, 1)
        if self._copies:
            rates = self.lr, BETA_1, BETA_2, EPSILON, self.weight_decay
            adam_step(
                rates, self.steps[0], self.parameters, gradients, self.averages, self.squares, copies=self._copies
            )
            return
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
