"""Tensors that are read with a scale folded in: a norm, rows and bias of a linear, the columns of those behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import WeightError
from lowbit.numerics.groups import row_chunks


@dataclass(frozen=True)
class Rescaling:
    """What is done to one tensor. `columns` [K] divides the columns of a weight [N, K].

    `rows` [n] multiplies what stands from `first_row` on along the first axis; of a norm that multiplies by one and its
    weight, `offset` is 1. Products are float32, rounded once.
    """

    columns: Tensor | None = None
    rows: Tensor | None = None
    first_row: int = 0
    offset: float = 0.0

    def apply(self, tensor: Tensor, start: int, where: str) -> Tensor:
        """Rows of the tensor, the first of which is its row `start`; changed in place and returned.

        Raises `WeightError`, naming `where`, when the result is too large for the tensor's dtype.
        """
        width = tensor.shape[1] if tensor.dim() == 2 else 1
        for a, b in row_chunks(tensor.shape[0], width):
            x = tensor[a:b].float()
            if self.columns is not None:
                x = x / self.columns
            if self.rows is not None:
                x = self._scaled(x, start + a)
            tensor[a:b] = x.to(tensor.dtype)
            if bool((tensor[a:b].isfinite() != x.isfinite()).any()):
                raise WeightError(
                    f"{where}: is too large for {tensor.dtype} with a scale folded in; set the exponent of its group "
                    "to 0 in a plan, or start from a file of another dtype"
                )
        return tensor

    def _scaled(self, x: Tensor, start: int) -> Tensor:
        """Rows from row `start` on, those multiplied that are to be."""
        assert self.rows is not None
        skipped = max(self.first_row - start, 0)
        from_row = max(start - self.first_row, 0)
        factor = self.rows[from_row : from_row + max(x.shape[0] - skipped, 0)]
        x = x.clone()
        part = x[skipped:]
        part.add_(self.offset).mul_(factor if x.dim() == 1 else factor.unsqueeze(1)).sub_(self.offset)
        return x


def joined(first: Rescaling | None, second: Rescaling) -> Rescaling:
    """Both: at most one of them divides columns, and one multiplies rows."""
    if first is None:
        return second
    by_row = first if first.rows is not None else second
    columns = second.columns if first.columns is None else first.columns
    return Rescaling(columns, by_row.rows, by_row.first_row, by_row.offset)


def found_again(before: Tensor, after: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale [K] with which what a norm multiplies by became what it is, as `lowbit.smoothing` makes scales."""
    scale = after / before
    if dtype == torch.float32:
        scale = scale.bfloat16().float()
    return torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale))
