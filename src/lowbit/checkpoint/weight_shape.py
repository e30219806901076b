"""What stored matrices [N, K] are in the module: kernels, turned over weights, banks of experts; and their options.

Files hold matrices. What else there is to a weight, the options of its layer say, which stand in its marker:

kernel_shape     the shape [O, I / groups, ...] of the convolution's kernel whose matrix this is
turned_over      the weight is [K, N], as in the Conv1D of transformers
num_experts      a bank of so many experts, [E, N, K]: every tensor of the layer has a leading axis E
bank_transposed  the bank's weight is [E, K, N], for experts that are multiplied as `x @ w`
bank_parameter   the bank is a parameter that has the layer's name, without ".weight" behind it
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError

from .dialects import Dialect, StoredLayer
from .dialects.base import join_key
from .dialects.comfy_banks import EXPERTS

KERNEL, TURNED = "kernel_shape", "turned_over"
TRANSPOSED, PARAMETER = "bank_transposed", "bank_parameter"
_OPTIONS = (KERNEL, TURNED, EXPERTS, TRANSPOSED, PARAMETER)

_PADDING = 32  # a file that pads, and does not tell the shape, adds less than this to rows and columns
MATRIX_AXES, TURNED_AXES, KERNEL_AXES, BANK_AXES, TURNED_BANK_AXES = "", "K N", "O I ...", "E N K", "E K N"
CAST_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)  # what plain weights are cast to without a scale
AXES = (MATRIX_AXES, TURNED_AXES, KERNEL_AXES, BANK_AXES, TURNED_BANK_AXES)


def may_pad(held: tuple[int, int], shape: tuple[int, int]) -> bool:
    """Whether a file that does not tell the shape may hold a matrix of `shape` as one of shape `held`."""
    return all(size <= larger < size + _PADDING for size, larger in zip(shape, held, strict=True))


def value_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to work in: that of the source, and for 8-bit floats without a scale bfloat16, which holds them all."""
    return torch.bfloat16 if dtype in CAST_DTYPES else dtype


@dataclass(frozen=True)
class WeightShape:
    """The shape of a weight as the module has it, and what its axes are: one of `AXES`, "" for a matrix [N, K]."""

    shape: tuple[int, ...]
    axes: str = MATRIX_AXES

    @property
    def problem(self) -> str | None:
        """Why these cannot be the axes of this shape, or None."""
        rank = len(self.shape)
        if self.axes not in AXES:
            return f"has axes {self.axes!r}, expected one of {', '.join(map(repr, AXES))}"
        wanted = rank > 2 if self.axes == KERNEL_AXES else rank == (3 if self.is_bank else 2)
        return None if wanted else f"has {rank} axes, which are not {self.axes or 'N K'!r}"

    @property
    def is_bank(self) -> bool:
        """Whether it is the weight of many experts."""
        return self.axes in (BANK_AXES, TURNED_BANK_AXES)

    @property
    def turned(self) -> bool:
        """Whether the last axis counts the outputs."""
        return self.axes in (TURNED_AXES, TURNED_BANK_AXES)

    @property
    def experts(self) -> int:
        """How many experts a bank has; 0 for a weight that is none."""
        return self.shape[0] if self.is_bank else 0

    @property
    def count(self) -> int:
        """How many matrices it is."""
        return self.shape[0] if self.is_bank else 1

    @property
    def matrix(self) -> tuple[int, int]:
        """(N, K) of its matrix, or of each of them."""
        n, *rest = self.shape[1:] if self.is_bank else self.shape
        return (rest[0], n) if self.turned else (n, math.prod(rest))

    @property
    def kind(self) -> str:
        """What it is, for messages."""
        return {
            KERNEL_AXES: "kernel of a convolution",
            TURNED_AXES: "weight [K, N] of a Conv1D",
            MATRIX_AXES: "matrix",
        }.get(self.axes, "bank of experts")

    def options(self, *, parameter: bool = False) -> dict[str, Any]:
        """What the layer's options say of it. `parameter`: a bank whose key has no ".weight"."""
        if self.axes == KERNEL_AXES:
            return {KERNEL: list(self.shape)}
        if not self.is_bank:
            return {TURNED: True} if self.turned else {}
        found: dict[str, Any] = {EXPERTS: self.shape[0]}
        return found | ({TRANSPOSED: True} if self.turned else {}) | ({PARAMETER: True} if parameter else {})

    def as_matrix(self, w: Tensor) -> Tensor:
        """A weight, or one expert of a bank, as a matrix [N, K]; 8-bit floats without a scale as bfloat16."""
        return (w.t() if self.turned else w.flatten(1)).to(value_dtype(w.dtype))

    def as_plain(self, matrix: Tensor) -> Tensor:
        """A matrix [N, K] as the weight, or as one expert of a bank."""
        if self.turned:
            return matrix.t().contiguous()
        return matrix if self.is_bank else matrix.reshape(self.shape)


def weight_shape(stored: StoredLayer) -> WeightShape:
    """What a layer's matrix is in the module. Raises `CheckpointError` for a marker that cannot be true."""
    n, k = stored.shape
    options, kernel = stored.options, stored.options.get(KERNEL)
    if experts := options.get(EXPERTS):
        turned = bool(options.get(TRANSPOSED))
        return WeightShape((experts, k, n), TURNED_BANK_AXES) if turned else WeightShape((experts, n, k), BANK_AXES)
    if kernel is None:
        return WeightShape((k, n), TURNED_AXES) if options.get(TURNED) else WeightShape((n, k))
    whole = isinstance(kernel, list) and all(isinstance(size, int) and size > 0 for size in kernel)
    if not whole or len(kernel) < 3 or (kernel[0], math.prod(kernel[1:])) != (n, k):
        raise CheckpointError(
            f"{stored.place}: {KERNEL} is {kernel!r} in the marker, which is no kernel of the matrix {[n, k]}; a "
            "program has changed it, convert again"
        )
    return WeightShape(tuple(kernel), KERNEL_AXES)


def plain_shape(stored: StoredLayer) -> tuple[int, ...]:
    """The shape of the weight that a layer stands for. Raises `CheckpointError` for a marker that cannot be true."""
    return weight_shape(stored).shape


def plain_key(stored: StoredLayer) -> str:
    """The key of the weight where it is plain."""
    return stored.layer if stored.options.get(PARAMETER) else join_key(stored.layer, "weight")


def as_plain(w: Tensor, stored: StoredLayer) -> Tensor:
    """A decoded matrix [N, K] as the weight that it stands for."""
    return weight_shape(stored).as_plain(w)


def shape_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a layer's options that say what its matrix is in the module."""
    return {name: options[name] for name in _OPTIONS if name in options}


def lacks_place(dialect: Dialect, weight: WeightShape) -> str | None:
    """Why a dialect has no place for this kind of weight, or None.

    Only comfy says what a matrix [N, K] is in the module; elsewhere it would be read as no more than that.
    """
    if weight.axes == MATRIX_AXES or dialect.name == "comfy":
        return None
    return f"the dialect {dialect.name} has no place for a {weight.kind}, only for matrices [N, K]"


def lacks_lookup(dialect: Dialect) -> str | None:
    """Why a table of embeddings had better stay plain in a dialect, or None.

    Where config.json describes the layers, it does so for linears. Programs take the weights of all other modules for
    plain ones: those of transformers look codes up as if they were values, or start from random numbers.
    """
    if not dialect.needs_folder:
        return None
    return f"embedding table, which programs that read {dialect.name} take for a plain one"


def refusal(dialect: Dialect, stored: StoredLayer) -> str | None:
    """Why a layer cannot be written in a dialect, in words that follow its name, or None."""
    return lacks_place(dialect, weight_shape(stored)) or dialect.refuses(stored)
