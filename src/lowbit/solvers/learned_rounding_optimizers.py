"""First-order optimizers for the learned rounding: small, deterministic, and given their gradients.

Each holds the variable, a float32 tensor that it changes in place, and is told the gradient and the loss at it.

original   gradient descent with Polyak's step, loss / |gradient|^2: the least loss possible is known to be 0
adamw      Adam with decoupled weight decay (arXiv 1711.05101)
radam      Adam whose step is rectified while its second moment rests on few gradients (arXiv 1908.03265)
prodigy    Adam that finds its step size from how far it has come (arXiv 2306.06101, algorithm 4)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lowbit.numerics.floats import divisor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
LEARNING_RATE = 0.05  # codes an iteration
WEIGHT_DECAY = 0.01  # toward plain rounding, where the variable is 0
FIRST_DISTANCE = 1e-6  # what Prodigy first takes for the distance to go


class Optimizer(Protocol):
    """Steps along given gradients."""

    def step(self, gradient: Tensor, loss: float) -> None:
        """Change the variable in place; both are those at its present value."""
        ...


class Polyak:
    """See `original` in the module."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def step(self, gradient: Tensor, loss: float) -> None:
        """See `Optimizer`."""
        length = float(gradient.square().sum(dtype=torch.float64))
        if length:
            self.x.sub_(gradient, alpha=loss / length)


class AdamW:
    """See `adamw` in the module."""

    def __init__(self, x: Tensor, rate: float = LEARNING_RATE, decay: float = WEIGHT_DECAY) -> None:
        self.x, self.rate, self.decay = x, rate, decay
        self.mean, self.square = torch.zeros_like(x), torch.zeros_like(x)
        self.count = 0

    def step(self, gradient: Tensor, loss: float) -> None:
        """See `Optimizer`."""
        self.count += 1
        self.mean.lerp_(gradient, 1 - BETA1)
        self.square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        self.x.mul_(1 - self.rate * self.decay)
        self._move(1 - BETA1**self.count, 1 - BETA2**self.count)

    def _move(self, known_mean: float, known_square: float) -> None:
        root = (self.square / divisor(known_square, self.square)).sqrt_().add_(EPSILON)
        self.x.addcdiv_(self.mean, root, value=-self.rate / known_mean)


class RAdam(AdamW):
    """See `radam` in the module. Without weight decay, as published."""

    def __init__(self, x: Tensor, rate: float = LEARNING_RATE) -> None:
        super().__init__(x, rate, decay=0.0)

    def _move(self, known_mean: float, known_square: float) -> None:
        most = 2 / (1 - BETA2) - 1
        length = most - 2 * self.count * BETA2**self.count / known_square
        if length <= 5:  # the variance of the second moment is not yet finite: no division by it
            self.x.sub_(self.mean, alpha=self.rate / known_mean)
            return
        rectified = (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)
        root = self.square.sqrt().add_(EPSILON)
        self.x.addcdiv_(self.mean, root, value=-self.rate * math.sqrt(rectified * known_square) / known_mean)


class Prodigy:
    """See `prodigy` in the module."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.start, self.distance = x, x.clone(), FIRST_DISTANCE
        self.mean, self.square, self.weighted = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
        self.progress = 0.0

    def step(self, gradient: Tensor, loss: float) -> None:
        """See `Optimizer`."""
        d, slow = self.distance, math.sqrt(BETA2)
        along = float((gradient * (self.start - self.x)).sum(dtype=torch.float64))
        self.mean.mul_(BETA1).add_(gradient, alpha=(1 - BETA1) * d)
        self.square.mul_(BETA2).addcmul_(gradient, gradient, value=(1 - BETA2) * d * d)
        self.progress = slow * self.progress + (1 - slow) * d * d * along
        self.weighted.mul_(slow).add_(gradient, alpha=(1 - slow) * d * d)
        self.x.addcdiv_(self.mean, self.square.sqrt().add_(d * EPSILON), value=-d)
        size = float(self.weighted.abs().sum(dtype=torch.float64))
        if size:
            self.distance = max(d, self.progress / size)


OPTIMIZERS: dict[str, Callable[[Tensor], Optimizer]] = {
    "original": Polyak,
    "adamw": AdamW,
    "radam": RAdam,
    "prodigy": Prodigy,
}
