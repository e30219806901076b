"""Plain W4A4, the baseline of the quality benchmarks: every linear's weight and input rounded to 4 bits on the fly.

By groups of 64 along K, signed, with absmax / 7: no smoothing, no low rank, no data.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.numerics.int4_matmul import round_groups


class PlainLinear(nn.Module):
    """A linear whose weight or input is rounded to 4 bits in groups of 64 by absmax / 7, or both."""

    def __init__(self, layer: nn.Linear, *, weights: bool, inputs: bool) -> None:
        super().__init__()
        self.weight = round_groups(layer.weight) if weights else layer.weight
        self.bias, self.inputs = layer.bias, inputs

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        rows = x.reshape(-1, x.shape[-1])
        rows = round_groups(rows) if self.inputs else rows
        return F.linear(rows, self.weight, self.bias).reshape(*x.shape[:-1], -1)
