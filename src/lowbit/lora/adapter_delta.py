"""The change that a LoRA makes to one weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraDelta:
    """The change of one layer, times a strength: `scale * up @ down`.

    down: [R, K], or [R, K, ...] of a convolution; up: [N, R]; any float dtype, on any device.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it changes: [N, K], or a convolution's."""
        return (self.up.shape[0], *self.down.shape[1:])

    def dense(self, strength: float = 1.0, device: torch.device | None = None) -> Tensor:
        """The change as a matrix: float32 [N, K]."""
        down, up = self.down.to(device, torch.float32).flatten(1), self.up.to(device, torch.float32)
        return (up * (strength * self.scale)) @ down
