"""linear for up to 8 tokens of 16 bits and 4-bit codes: in the layout words128, and awq_w4a16 in plain bytes, too.

The weights are read once whatever the number of tokens, no scale is rounded, and one launch does it all. Of the plain
storage there is gemv_awq_w4a16, and the linear of a weight that was moved to the GPU as files hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.backends.cuda import device_check, kernels
from lowbit.backends.gpu import target_of
from lowbit.dispatch import kernel
from lowbit.formats.awq_w4a16 import AwqW4A16
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts import words128

_SOURCE = "linear_words.cu"
_TOKENS = 8
_OLDEST = (8, 0)  # the first with this product of bfloat16
_HALVES = {torch.bfloat16: "kBFloat16", torch.float16: "kFloat16"}
_WARPS = 8  # of a block
_WAVES = 4  # blocks for each multiprocessor that make larger tiles worth while; reasoned, not measured
_STEP = 16
_GROUP_OF_WORDS = 32  # columns of four lanes' words of plain bytes
_ALIGNMENT = 16  # bytes that a lane loads at a time
_BYTE_SCALES = 4  # rows whose scales of one byte are read at a time


@dataclass(frozen=True)
class _Operands:
    """What the formats differ in: the kind of code, of scale, and what is added to the products."""

    code: str
    scale: str
    group: int
    zero: Tensor | None = None
    alpha: Tensor | None = None


def refuses(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    m = x.shape[:-1].numel()
    if m > _TOKENS:
        return f"{m} tokens; the kernel takes up to {_TOKENS}"
    if x.dtype not in _HALVES:
        return f"x is {_kind(x)}; the kernel takes bfloat16 and float16"
    if why := device_check.refuses(x.device, _OLDEST):
        return why
    for name, tensor in (("bias", bias), *parts.items()):
        if tensor is not None and tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}; move one of them"
    if bias is not None and bias.dtype != x.dtype:
        return f"the bias is {_kind(bias)}, x {_kind(x)}; the kernel takes one dtype"
    return _refuses_groups(fmt, x, parts)


def _refuses_groups(fmt: Format, x: Tensor, parts: Parts) -> str | None:
    scale, zero, group = parts["scale"], parts.get("zero"), fmt.unit((1, x.shape[-1]))[1]
    if "zero_point" in parts:
        return "codes with zero points"
    if scale.dtype.itemsize == 2 and scale.dtype != x.dtype:
        return f"scales are {_kind(scale)}, x {_kind(x)}; the kernel takes one dtype, or scales in float32"
    if zero is not None and zero.dtype != scale.dtype:
        return f"zeros are {_kind(zero)}, scales {_kind(scale)}; the kernel takes one dtype"
    if group % _STEP or (words128.COLUMNS % group and group % words128.COLUMNS):
        return f"groups of {group} columns; the kernel takes 16, 32, 64, 128 and multiples of 128"
    if scale.dtype.itemsize == 1 and scale.shape[1] % _BYTE_SCALES:
        return f"{scale.shape[1]} rows; with scales of one byte the kernel takes multiples of {_BYTE_SCALES}"
    return None


def refuses_plain(fmt: AwqW4A16, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """The same for parts as files hold them."""
    if x.shape[-1] % words128.COLUMNS:
        return f"{x.shape[-1]} columns; the kernel takes multiples of {words128.COLUMNS}"
    if fmt.group_size < _GROUP_OF_WORDS:
        return f"groups of {fmt.group_size} columns; in plain bytes the kernel takes {_GROUP_OF_WORDS} and more"
    for name, part in parts.items():
        if not part.is_contiguous() or (not part.is_meta and name == "qdata" and part.data_ptr() % _ALIGNMENT):
            return f"{name} has gaps, or does not begin at a multiple of {_ALIGNMENT} bytes; clone it once, at load"
    return refuses(fmt, x, parts, bias)


def linear(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None, storage: str = "kWords") -> Tensor:
    """x [..., K] of at most 8 tokens, parts in words128, bias [N] or None -> [..., N] in the dtype of x."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    (m, k), codes, found = rows.shape, parts["qdata"], _operands(fmt, parts, x)
    n = codes.shape[0]
    out = x.new_empty((*x.shape[:-1], n))
    if not m or not n:
        return out
    if rows.data_ptr() % _ALIGNMENT:
        rows = rows.clone()
    sixteens = min(found.group, words128.COLUMNS) // _STEP
    tiles = _tiles(n, sixteens, x.device)
    name = (
        f"lowbit::linear_words<lowbit::{found.code}, lowbit::{_HALVES[x.dtype]}, lowbit::{found.scale}, "
        f"{str(found.zero is not None).lower()}, lowbit::{storage}, {sixteens}, {tiles}, {_WARPS}>"
    )
    step = 0 if found.alpha is None or found.alpha.numel() == 1 else 1
    arguments = [
        rows, codes, parts["scale"], found.zero, found.alpha, step, None if bias is None else bias.contiguous(), out,
        m, n, k, max(1, found.group // words128.COLUMNS),
    ]  # fmt: skip
    kernels.launch(_SOURCE, name, x.device, -(-n // (_STEP * tiles)), 32 * _WARPS, arguments)
    return out


@kernel("linear", format="awq_w4a16", backend="cuda", refuses=refuses_plain, tolerance=3e-3)
def linear_plain(fmt: AwqW4A16, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """The same for plain parts of awq_w4a16."""
    return linear(fmt, x, parts, bias, "kBytes")


def refuses_gemv(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, group: int) -> str | None:
    """Why this call cannot run here, or None."""
    return refuses_plain(AwqW4A16(group_size=group), x, {"qdata": q, "scale": scales, "zero": zeros}, bias)


@kernel("gemv_awq_w4a16", backend="cuda", refuses=refuses_gemv, tolerance=3e-3)
def gemv_awq_w4a16(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """x [..., K], bytes [N, K/2], scales and zeros [K/g, N], bias [N] or None -> [..., N] in the dtype of x."""
    return linear_plain(AwqW4A16(group_size=group), x, {"qdata": q, "scale": scales, "zero": zeros}, bias)


def _operands(fmt: Format, parts: Parts, x: Tensor) -> _Operands:
    config: dict[str, Any] = fmt.config()
    if fmt.name == "nvfp4":
        shared = parts["global_scale"].float()
        alpha = shared.reciprocal() if config["global_scale_divides"] else shared
        return _Operands("kE2M1", "kE4M3", 16, alpha=alpha.contiguous())
    if fmt.name == "mxfp4":
        return _Operands("kE2M1", "kE8M0", 32)
    scale = "kFloatScale" if parts["scale"].dtype == torch.float32 else "kHalfScale"
    return _Operands("kIntegers", scale, config["group_size"], zero=parts.get("zero"))


def _tiles(n: int, sixteens: int, device: torch.device) -> int:
    """Tiles of 16 rows a warp: more of them share a load of x, fewer make more blocks and need fewer registers."""
    return 2 if sixteens > 2 and n >= _WAVES * target_of(device).processors * 2 * _STEP else 1


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


for _name in words128.FORMATS:
    kernel("linear", format=_name, backend="cuda", layout=words128.NAME, refuses=refuses, tolerance=3e-3)(linear)
