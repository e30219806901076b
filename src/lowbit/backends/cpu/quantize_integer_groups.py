"""quantize and scale_search for awq_w4a16 and for wna16 of 4 and 8 bits, with the reference's codes and scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.backends.cpu import encoders, native
from lowbit.backends.cpu.operands import DTYPES, address
from lowbit.dispatch import kernel
from lowbit.formats.awq_w4a16 import TRIMS, AwqW4A16
from lowbit.formats.parts import Parts
from lowbit.formats.wna16 import WNA16

_MULTIPLE = 16  # of columns in a group, unless one group is a whole row


def _refuses_group(fmt: AwqW4A16 | WNA16, w: Tensor) -> str | None:
    if isinstance(fmt, WNA16) and fmt.bits not in {4, 8}:
        return f"codes of {fmt.bits} bits; the encoder makes those of 4 and 8"
    if isinstance(fmt, AwqW4A16) and fmt.wzeros != "none":
        return "wzeros that are exact in 16 bits, which the encoder does not make"
    if fmt.group_size % _MULTIPLE:
        return f"groups of {fmt.group_size} columns; the encoder takes multiples of {_MULTIPLE}"
    return None


def _refuses_quantize(fmt: AwqW4A16 | WNA16, w: Tensor, seed: int | None, where: str = "weight") -> str | None:
    return _refuses_group(fmt, w) or encoders.refuses_quantize(fmt, w, seed, where)


def _refuses_search(fmt: AwqW4A16 | WNA16, w: Tensor, weights: Tensor | None, where: str = "weight") -> str | None:
    return _refuses_group(fmt, w) or encoders.refuses_search(fmt, w, weights, where)


@kernel("quantize", format="awq_w4a16", backend="cpu", refuses=_refuses_quantize)
def quantize_awq_w4a16(fmt: AwqW4A16, w: Tensor, seed: int | None, where: str = "weight") -> Parts:
    """w [N, K] -> parts, by rounding to nearest."""
    return _awq(fmt, w, None, (), where)


@kernel("scale_search", format="awq_w4a16", backend="cpu", refuses=_refuses_search)
def scale_search_awq_w4a16(fmt: AwqW4A16, w: Tensor, weights: Tensor | None, where: str = "weight") -> Parts:
    """w [N, K], weights of columns [K] or None -> parts under the best scales and zeros."""
    return _awq(fmt, w, weights, TRIMS, where)


@kernel("quantize", format="wna16", backend="cpu", refuses=_refuses_quantize)
def quantize_wna16(fmt: WNA16, w: Tensor, seed: int | None, where: str = "weight") -> Parts:
    """w [N, K] -> parts, by rounding to nearest."""
    return _wna(fmt, w, None, (), where)


@kernel("scale_search", format="wna16", backend="cpu", refuses=_refuses_search)
def scale_search_wna16(fmt: WNA16, w: Tensor, weights: Tensor | None, where: str = "weight") -> Parts:
    """w [N, K], weights of columns [K] or None -> parts under the best scales and zero points."""
    return _wna(fmt, w, weights, fmt.narrowings, where)


def _awq(fmt: AwqW4A16, w: Tensor, weights: Tensor | None, trims: Sequence[Sequence[float]], where: str) -> Parts:
    source, columns, parts = encoders.begin(fmt, w, weights, where)
    n, k = source.shape
    tried, scale = torch.tensor(trims, dtype=torch.float32, device="cpu"), parts["scale"]
    finite = native.module().quantize_awq_w4a16(
        source.data_ptr(), DTYPES[source.dtype], n, k, fmt.group_size, tried.data_ptr(), len(trims), address(columns),
        parts["qdata"].data_ptr(), scale.data_ptr(), parts["zero"].data_ptr(), DTYPES[scale.dtype], native.threads(),
    )  # fmt: skip
    return encoders.finished(parts, source, where, finite=finite)


def _wna(fmt: WNA16, w: Tensor, weights: Tensor | None, tries: Sequence[Sequence[float]], where: str) -> Parts:
    source, columns, parts = encoders.begin(fmt, w, weights, where)
    n, k = source.shape
    tried, scale = torch.tensor(tries, dtype=torch.float32, device="cpu"), parts["scale"]
    finite = native.module().quantize_wna16(
        source.data_ptr(), DTYPES[source.dtype], n, k, fmt.group_size or k, fmt.bits, fmt.zero_point,
        fmt.largest_scale(scale.dtype), tried.data_ptr(), len(tries), address(columns), parts["qdata"].data_ptr(),
        parts["qdata"].shape[1], scale.data_ptr(), address(parts.get("zero_point")), DTYPES[scale.dtype],
        native.threads(),
    )  # fmt: skip
    if fmt.act_order:
        parts["g_idx"] = torch.arange(k, dtype=torch.int32, device="cpu") // fmt.group_size
    return encoders.finished(parts, source, where, finite=finite)
