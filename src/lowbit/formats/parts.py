"""The stored tensors of a quantized weight: their names, dtypes and shapes, and what follows from those rules alone.

A rule gives each axis of a part as a count of N, K or R, so that checking, counting bytes, cutting rows, gathering rows
and joining weights are written once, here, for all formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import PartsError, UnsupportedError

Parts = dict[str, Tensor]
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)


@dataclass(frozen=True)
class Dim:
    """The length of one axis: `ceil(axis / per) * times`, where `axis` is "N", "K" or "R" (the low rank)."""

    axis: str
    per: int = 1
    times: int = 1

    def size(self, sizes: Mapping[str, int]) -> int:
        """The length for the given sizes of N, K and R."""
        return -(-sizes[self.axis] // self.per) * self.times


N, K, R = Dim("N"), Dim("K"), Dim("R")


@dataclass(frozen=True)
class Part:
    """The rule of one stored tensor: a fixed set of dtypes and one `Dim` or constant an axis."""

    name: str
    dims: tuple[Dim | int, ...]
    dtypes: tuple[torch.dtype, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for the given sizes of N, K and R."""
        return tuple(d if isinstance(d, int) else d.size(sizes) for d in self.dims)

    @property
    def row_axis(self) -> int | None:
        """The axis that runs along N, or None for a part that all rows share."""
        for index, dim in enumerate(self.dims):
            if isinstance(dim, Dim) and dim.axis == "N":
                return index
        return None

    @property
    def rows_per_entry(self) -> int:
        """How many rows of the weight one entry along `row_axis` covers (1 where there is none)."""
        axis = self.row_axis
        dim = self.dims[axis] if axis is not None else 1
        return dim.per if isinstance(dim, Dim) else 1


def check_parts(rules: Sequence[Part], parts: Mapping[str, Tensor], sizes: Mapping[str, int], where: str) -> None:
    """Raise `PartsError`, naming `where`, unless `parts` holds exactly the tensors of `rules` for these sizes."""
    names = [rule.name for rule in rules]
    missing = [name for name in names if name not in parts]
    extra = [name for name in parts if name not in names]
    if missing or extra:
        what = f"lacks {', '.join(missing)}" if missing else f"has unknown tensors {', '.join(extra)}"
        raise PartsError(f"{where}: {what}; expected the tensors {', '.join(names)}")
    for rule in rules:
        tensor, shape = parts[rule.name], rule.shape(sizes)
        if tensor.dtype not in rule.dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in rule.dtypes)
            found = str(tensor.dtype).removeprefix("torch.")
            raise PartsError(f"{where}: {rule.name} is {found}, expected {allowed}; convert the weight again")
        if tuple(tensor.shape) != shape:
            logical = ", ".join(f"{axis} = {size}" for axis, size in sizes.items())
            raise PartsError(
                f"{where}: {rule.name} has shape {list(tensor.shape)}, expected {list(shape)} for {logical}; "
                "the file does not fit this layer or is in another layout"
            )


def narrow_rows(rules: Sequence[Part], parts: Mapping[str, Tensor], start: int, stop: int) -> Parts:
    """The parts of rows [start, stop) as views. `start` must be a multiple of every part's rows per entry."""
    cut: Parts = {}
    for rule in rules:
        tensor, axis, per = parts[rule.name], rule.row_axis, rule.rows_per_entry
        if axis is None:
            cut[rule.name] = tensor
            continue
        if start % per:
            raise UnsupportedError(f"rows from {start} do not start a block of {per} rows of {rule.name}")
        first = start // per
        cut[rule.name] = tensor.narrow(axis, first, -(-stop // per) - first)
    return cut


def gather_rows(rules: Sequence[Part], parts: Mapping[str, Tensor], rows: Tensor) -> Parts:
    """The parts of the given rows (1-D int64), one entry a row: blocks of rows become blocks of one row."""
    picked: Parts = {}
    for rule in rules:
        tensor, axis, per = parts[rule.name], rule.row_axis, rule.rows_per_entry
        if axis is None:
            picked[rule.name] = tensor
        else:
            raw = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
            picked[rule.name] = raw.index_select(axis, rows if per == 1 else rows // per).view(tensor.dtype)
    return picked


def concat_rows(rules: Sequence[Part], weights: Sequence[Mapping[str, Tensor]], sizes: Sequence[int]) -> Parts:
    """Join weights of `sizes` rows along N. Parts that all rows share must be equal; otherwise `UnsupportedError`."""
    joined: Parts = {}
    for rule in rules:
        tensors, axis = [weight[rule.name] for weight in weights], rule.row_axis
        if axis is None:
            others = [other for other in tensors[1:] if other is not tensors[0]]  # pieces of one weight need no look
            if any(not torch.equal(raw_bytes(tensors[0]), raw_bytes(other)) for other in others):
                raise UnsupportedError(f"weights with different {rule.name} cannot be joined into one")
            joined[rule.name] = tensors[0]
            continue
        if any(size % rule.rows_per_entry for size in sizes[:-1]):
            raise UnsupportedError(f"only weights of a multiple of {rule.rows_per_entry} rows can be joined")
        joined[rule.name] = torch.cat([raw_bytes(t) for t in tensors], dim=axis).view(tensors[0].dtype)
    return joined


def raw_bytes(tensor: Tensor) -> Tensor:
    """A one-byte tensor as uint8 (float8 lacks most operations), any other as it is."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
