"""What the kernels for w4a8_codebook are told of a weight: where its codes, scales and levels lie."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import memory
from lowbit.backends.cpu import native
from lowbit.backends.cpu.operands import DTYPES, address, check_found, dtype_code, refuses_result
from lowbit.formats.parts import Parts
from lowbit.formats.w4a8_codebook import W4A8Codebook


class Coded:
    """The parts of a weight, plain and without gaps within a row, which it holds for the time of a call."""

    __slots__ = ("_held", "fields", "n")

    n: int
    """Rows."""
    fields: tuple[int, ...]
    """What follows the sizes in a call: the fields of CodebookWeight of native/codebook_rows.h."""

    def __init__(self, fmt: W4A8Codebook, parts: Parts) -> None:
        codes, scales, rows = parts["qdata"], parts["s_rel"], parts["s_channel"].contiguous()
        if codes.stride(-1) != 1:
            codes = codes.contiguous()
        if scales.stride(-1) != 1:
            scales = scales.contiguous()
        levels = parts["codebook"].contiguous() if fmt.codebook else None
        self.n = codes.shape[0]
        self.fields = (
            codes.data_ptr(), codes.stride(0), fmt.bits, fmt.group_size, scales.data_ptr(), scales.stride(0),
            scales.dtype == torch.float32, address(levels), rows.data_ptr(),
        )  # fmt: skip
        self._held = (codes, scales, levels, rows)


def refuses(dtype: torch.dtype, k: int) -> str | None:
    """Why rows of k columns cannot be decoded here to a dtype, or None."""
    return refuses_result(dtype) or (None if k else "no columns; the decoder takes whole groups")


def decode(
    fmt: W4A8Codebook, parts: Parts, k: int, dtype: torch.dtype, indices: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    """The rows that indices name, or all of them -> `shape` in `dtype`. Raises `IndexError` for one that is none."""
    weight, out = Coded(fmt, parts), memory.empty(shape, dtype)
    indices = None if indices is None else indices.contiguous()
    correction = parts["correction"].contiguous() if fmt.correction else None
    columns = parts["pre_quant_scale"].contiguous() if fmt.pre_quant_scale else None
    wrong = native.module().dequantize_w4a8_codebook(
        weight.n, k, *weight.fields, address(correction), dtype_code(correction), fmt.rotation, address(columns),
        dtype_code(columns), address(indices), indices is not None and indices.dtype == torch.int64,
        weight.n if indices is None else indices.numel(), out.data_ptr(), DTYPES[dtype], native.threads(),
    )  # fmt: skip
    if indices is not None:
        check_found(indices, wrong, weight.n)
    return out
