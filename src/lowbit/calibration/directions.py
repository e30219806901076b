"""Random directions z with E[z z^T] = 1, along which the outputs of a model are followed back.

What is learned of J^T J grows with the number of directions, one for each sample, not with that of the tokens below. So
they are rows of random orthogonal matrices, one row after the other from one batch to the next: no two of d successive
ones repeat each other, and each has the length sqrt(d). Beyond `_WIDEST` random rows are nearly that by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_WIDEST = 1024  # channels
_RANDOM, _LEFT = "random", "left"  # names in `Directions.state`


class Directions:
    """An endless sequence of them, the same for the same `seed` and shapes."""

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self._left = torch.empty(0, 0)  # rows [R, d] of the last matrix that no target had yet

    def like(self, target: Tensor) -> Tensor:
        """One for each sample of `target`, [..., d], whose last axis has the rows: of its shape, dtype and device."""
        shape = target.shape or (1,)
        d = shape[-1]
        if d > _WIDEST or not target.numel():
            z = torch.randn(shape, generator=self._random)
        else:
            z = self._rows(math.prod(shape[:-1]), d)
        return z.reshape(target.shape).to(target.device, target.dtype)

    def _rows(self, count: int, d: int) -> Tensor:
        """The next [count, d]; what is left of rows of another length is dropped."""
        if self._left.shape[1] != d:
            self._left = torch.empty(0, d)
        taken: list[Tensor] = []
        while count:
            if not len(self._left):
                self._left = orthogonal(d, self._random) * math.sqrt(d)
            taken.append(self._left[:count])
            self._left = self._left[count:]
            count -= len(taken[-1])
        return torch.cat(taken)

    def state(self) -> dict[str, Tensor]:
        """Where the sequence is, by name, for `restore`."""
        left = {_LEFT: self._left.clone()} if len(self._left) else {}  # not the matrix whose rows it shows
        return {_RANDOM: self._random.get_state(), **left}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        self._random.set_state(state[_RANDOM])
        self._left = state.get(_LEFT, torch.empty(0, 0))


def orthogonal(d: int, random: torch.Generator) -> Tensor:
    """One of all orthogonal [d, d], each as likely as another: QR with a positive diagonal of R (Mezzadri, 2007)."""
    q, r = torch.linalg.qr(torch.randn(d, d, generator=random))
    return q * r.diagonal().sign()
