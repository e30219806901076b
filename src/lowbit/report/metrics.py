"""How close a model's embeddings stay to those of the original model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Agreement:
    """Embeddings beside their reference. `cosines`: of each row with its reference, in the order of the rows.

    `same_nearest`: the share of rows whose nearest other row is the one that the reference names.
    """

    cosines: tuple[float, ...]
    same_nearest: float

    @property
    def mean(self) -> float:
        """The mean cosine."""
        return sum(self.cosines) / len(self.cosines)

    @property
    def worst(self) -> float:
        """The lowest cosine."""
        return min(self.cosines)

    @property
    def worst_row(self) -> int:
        """The row that has it."""
        return self.cosines.index(self.worst)


def compare_embeddings(reference: Tensor, found: Tensor) -> Agreement:
    """Compare embeddings [rows, features] of the same inputs, at least two of them, in float64.

    Raises ValueError for shapes that differ, fewer than two rows or values that are not finite.
    """
    if reference.shape != found.shape or reference.dim() != 2 or reference.shape[0] < 2:
        raise ValueError(
            f"expected two equal shapes [rows >= 2, features], not {list(reference.shape)} and {list(found.shape)}"
        )
    a, b = F.normalize(reference.double(), dim=1), F.normalize(found.double(), dim=1)
    if not bool(torch.isfinite(a).all() & torch.isfinite(b).all()):
        raise ValueError("an embedding holds NaN or infinity")
    cosines = (a * b).sum(dim=1).clamp(-1.0, 1.0)
    same = (_nearest(a) == _nearest(b)).double().mean()
    return Agreement(tuple(cosines.tolist()), float(same))


def _nearest(rows: Tensor) -> Tensor:
    """For each of some unit vectors the index of the nearest other one."""
    similar = rows @ rows.T
    similar.fill_diagonal_(-2.0)
    return similar.argmax(dim=1)
