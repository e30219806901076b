"""A small model and adapters for it."""

from __future__ import annotations

import torch
from torch import nn

from lowbit.lora import LoraDelta

FORMATS = {"up": "awq_w4a16(group_size=32)", "down": "svdquant_w4a4(rank=16,act_unsigned=true)", "out": "int8"}


class Block(nn.Module):
    """up, GELU, down, out: with a bias, with one that a format folds into, without one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)
        self.out = nn.Linear(64, 48, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., 64] -> [..., 48]."""
        return self.out(self.down(nn.functional.gelu(self.up(x))))


def model(dtype: torch.dtype = torch.float32) -> Block:
    """A block with the same weights each time."""
    torch.manual_seed(0)
    return Block().to(dtype)


def adapter(size: float = 0.1, seed: int = 0, names: tuple[str, ...] = ("up", "down", "out")) -> dict[str, LoraDelta]:
    """Changes of rank 4 whose norm is `size` times that of the layer's weight."""
    block, made = model(), {}
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        weight = getattr(block, name).weight
        down = torch.randn((4, weight.shape[1]), generator=generator)
        up = torch.randn((weight.shape[0], 4), generator=generator)
        factor = float(size * weight.detach().norm() / (up @ down).norm())
        made[name] = LoraDelta(down, up * factor * 2, scale=0.5)
    return made
