"""The operands that the kernels of 4-bit codes with activations of 16 bits share: `words_gemv` and `words_gemm_*`.

Formats differ in the kind of code and of scale, and in what is added to the products; the kernels have these as
template parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.backends.cuda import device_check
from lowbit.formats.awq_w4a16 import AwqW4A16
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts import words128

HALVES = {torch.bfloat16: "lowbit::kBFloat16", torch.float16: "lowbit::kFloat16"}
STEP = 16  # columns of a product of tensor cores
ALIGNMENT = 16  # bytes of x and of codes that are read at a time
_ALIGNMENTS = {"qdata": ALIGNMENT}  # of a part's first byte; of others, what reads four scales of a byte at a time
_OLDEST = (8, 0)  # the first with these products of bfloat16
_GROUP_OF_BYTES = 32  # columns that share a scale in plain bytes, at least


@dataclass(frozen=True)
class Operands:
    """A weight [N, K]: int32 words or bytes, and scales by group. The kinds are names in the kernels' sources."""

    codes: Tensor
    scale: Tensor
    code: str
    scale_kind: str
    group: int
    """Columns that share a scale."""
    zero: Tensor | None = None
    alpha: Tensor | None = None
    """What all products are multiplied by, or those of each row."""
    divides: bool = False
    """Whether they are divided by alpha instead."""

    @property
    def sixteens(self) -> int:
        """Sixteens of columns that share a scale; 8 where a group has 128 or more."""
        return min(self.group, words128.COLUMNS) // STEP

    @property
    def blocks_a_group(self) -> int:
        """Blocks of 128 columns that share a scale, at least one."""
        return max(1, self.group // words128.COLUMNS)

    @property
    def alpha_kind(self) -> int:
        """1 where each row has a factor of its own, 0 where all have one; and 2 where products are divided by it."""
        own = self.alpha is not None and self.alpha.numel() > 1
        return int(own) + 2 * self.divides

    @property
    def has_zero(self) -> str:
        """Whether there are zeros, as a template parameter."""
        return str(self.zero is not None).lower()


def operands_of(fmt: Format, parts: Parts, k: int) -> Operands:
    """The operands of a weight with K columns, in words128 or as files hold it."""
    codes, scale, group = parts["qdata"], parts["scale"], fmt.unit((1, k))[1]
    if fmt.name == "nvfp4":
        shared, divides = parts["global_scale"].float().contiguous(), fmt.config()["global_scale_divides"]
        return Operands(codes, scale, "kE2M1", "kE4M3", group, alpha=shared, divides=divides)
    if fmt.name == "mxfp4":
        return Operands(codes, scale, "kE2M1", "kE8M0", group)
    kind = "kFloatScale" if scale.dtype == torch.float32 else "kHalfScale"
    return Operands(codes, scale, "kIntegers", kind, group, zero=parts.get("zero"))


def rows_of(x: Tensor) -> Tensor:
    """x [..., K] as rows [M, K] that the kernels can read 16 bytes at a time."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return rows.clone() if not rows.is_meta and rows.data_ptr() % ALIGNMENT else rows


def refuses(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why none of the kernels can run with a weight in words128, or None."""
    if not x.shape[-1]:
        return "no columns"
    if x.dtype not in HALVES:
        return f"x is {_kind(x)}; the kernel takes bfloat16 and float16"
    if why := device_check.refuses(x.device, _OLDEST):
        return why
    for name, tensor in (("bias", bias), *parts.items()):
        if tensor is not None and tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}; move one of them"
    for name, part in parts.items():
        if not part.is_contiguous() or (not part.is_meta and part.data_ptr() % _ALIGNMENTS.get(name, 4)):
            return f"{name} has gaps, or begins where the kernel cannot read it; clone it once, at load"
    if bias is not None and bias.dtype != x.dtype:
        return f"the bias is {_kind(bias)}, x {_kind(x)}; the kernel takes one dtype"
    return _refuses_groups(fmt, x, parts)


def refuses_plain(fmt: AwqW4A16, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why none of them can run with parts of awq_w4a16 as files hold them, or None."""
    if x.shape[-1] % words128.COLUMNS:
        return f"{x.shape[-1]} columns; the kernel takes multiples of {words128.COLUMNS}"
    if fmt.group_size < _GROUP_OF_BYTES:
        return f"groups of {fmt.group_size} columns; in plain bytes the kernel takes {_GROUP_OF_BYTES} and more"
    return refuses(fmt, x, parts, bias)


def _refuses_groups(fmt: Format, x: Tensor, parts: Parts) -> str | None:
    scale, zero, group = parts["scale"], parts.get("zero"), fmt.unit((1, x.shape[-1]))[1]
    if "zero_point" in parts:
        return "codes with zero points"
    if scale.dtype.itemsize == 2 and scale.dtype != x.dtype:
        return f"scales are {_kind(scale)}, x {_kind(x)}; the kernel takes one dtype, or scales in float32"
    if zero is not None and zero.dtype != scale.dtype:
        return f"zeros are {_kind(zero)}, scales {_kind(scale)}; the kernel takes one dtype"
    if group % STEP or (words128.COLUMNS % group and group % words128.COLUMNS):
        return f"groups of {group} columns; the kernel takes 16, 32, 64, 128 and multiples of 128"
    return None


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
