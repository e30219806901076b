"""What the ops on block-scaled matrices (nvfp4, mxfp8) ask of their operands: codes and swizzled scales.

Every check runs in the op and in its fake, so that a traced program fails with the same message.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import FormatError, PartsError, WeightError
from lowbit.formats.parts import FLOATS
from lowbit.layouts.scale_128x4 import swizzled_shape
from lowbit.numerics.groups import round_up


@dataclass(frozen=True)
class BlockScaled:
    """A kind of operand: `group` values along K share a scale and take `stored` elements of dtype `codes`."""

    name: str
    group: int
    stored: int
    codes: torch.dtype
    scales: tuple[torch.dtype, ...]

    def padded(self, x: Tensor, pad: bool) -> tuple[int, int]:
        """M' and K', the sizes an x [M, K] is stored with; with `pad` both are multiples of the group.

        Raises `WeightError` for an x that is no float matrix, or whose K is no multiple of the group without `pad`.
        """
        if x.dim() != 2 or not is_float(x.dtype):
            found = f"a {x.dim()}-D {_name(x.dtype)} tensor"
            raise WeightError(f"quantize_{self.name} takes a 2-D floating-point x, not {found}; flatten or cast it")
        if pad:
            return round_up(x.shape[0], self.group), round_up(x.shape[1], self.group)
        if x.shape[1] % self.group:
            remedy = f"pass pad_{self.group}x=True"
            raise WeightError(f"quantize_{self.name}: K = {x.shape[1]} is not a multiple of {self.group}; {remedy}")
        return x.shape[0], x.shape[1]

    def empty(self, x: Tensor, pad: bool) -> tuple[Tensor, Tensor]:
        """Uninitialised codes and swizzled scales of an x."""
        m, k = self.padded(x, pad)
        groups = k // self.group
        scale = x.new_empty(swizzled_shape(m, groups), dtype=self.scales[0])
        return x.new_empty((m, groups * self.stored), dtype=self.codes), scale

    def columns(self, codes: Tensor) -> int:
        """K of a matrix of codes."""
        return codes.shape[1] // self.stored * self.group

    def check(self, codes: Tensor, scale: Tensor, name: str) -> None:
        """Raise `PartsError`, calling them `name`, unless these are codes and their scales."""
        if codes.dim() != 2 or codes.dtype != self.codes or codes.shape[1] % self.stored:
            wanted = f"{_name(self.codes)} [rows, K{f' / {self.group // self.stored}' * (self.stored < self.group)}]"
            raise PartsError(f"{name} is {_found(codes)}, expected {wanted} with K a multiple of {self.group}")
        shape = swizzled_shape(codes.shape[0], codes.shape[1] // self.stored)
        if scale.dtype not in self.scales or tuple(scale.shape) != shape:
            wanted = f"{' or '.join(map(_name, self.scales))} {list(shape)}, swizzled"
            raise PartsError(f"the scales of {name} are {_found(scale)}, expected {wanted}")

    def check_product(self, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None) -> None:
        """Raise `PartsError` unless a b^T + bias can be formed."""
        self.check(a, scale_a, "a")
        self.check(b, scale_b, "b")
        if a.shape[1] != b.shape[1]:
            raise PartsError(f"a has K = {self.columns(a)} and b has K = {self.columns(b)}; both are [rows, K]")
        if bias is not None and tuple(bias.shape) != (b.shape[0],):
            raise PartsError(f"bias has shape {list(bias.shape)}, expected [{b.shape[0]}], one value a row of b")


def is_float(dtype: torch.dtype) -> bool:
    """Whether values of this dtype can be quantized or be a result."""
    return dtype in FLOATS or dtype == torch.float64


def check_result_type(dtype: torch.dtype, name: str) -> None:
    """Raise `FormatError`, calling it `name`, unless a result can have this dtype."""
    if not is_float(dtype):
        raise FormatError(f"{name} is {_name(dtype)}, expected a floating-point type such as bfloat16")


def check_one_value(name: str, value: Tensor | None) -> None:
    """Raise `PartsError`, calling it `name`, unless this is one float value, or None."""
    if value is not None and (value.numel() != 1 or not is_float(value.dtype)):
        raise PartsError(f"{name} is {_found(value)}, expected one float value for the whole tensor")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _found(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)} {list(tensor.shape)}"
