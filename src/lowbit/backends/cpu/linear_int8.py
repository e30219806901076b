"""linear for int8: exact integer products, or float ones where activations stay what they are."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import linear_plain, native
from lowbit.backends.cpu.operands import DTYPES, Operands, refuses_input
from lowbit.dispatch import kernel
from lowbit.formats.int8 import Int8
from lowbit.formats.parts import Parts
from lowbit.layouts import rows16
from lowbit.numerics.rotations import rotate_groups

_TENSOR, _ROW, _TILE = range(3)  # enum Granularity
_GRANULARITIES = {"tensor": _TENSOR, "row": _ROW, "block": _TILE}
_BYTES, _PAIRS, _REGISTERS, _PANELS = range(4)  # enum Int8Way
# Up to how many tokens bytes are multiplied faster than pairs of int16: measured on AVX2, where four products take as
# many instructions either way; without any limit where they are one instruction.
_FEW_BYTES = {"avx2": 40, "portable": 4}
_FEW_FLOATS = 8
_MOST_COLUMNS = (1 << 17) - 1  # more could overflow an int32


def refuses(fmt: Int8, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    if fmt.granularity == "block" and fmt.block_size[1] % 4:
        return f"tiles of {fmt.block_size[1]} columns; the kernel takes multiples of 4, as a word has"
    if fmt.activations == "int8" and (why := _refuses_columns(x.shape[-1])):
        return why
    return refuses_input(fmt, x, parts, bias)


def refuses_plain(fmt: Int8, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here on plain parts, or None."""
    if fmt.activations == "none":
        return linear_plain.refuses(fmt, x, parts, bias)
    return refuses(fmt, x, parts, bias) or _refuses_codes(parts["qdata"])


@kernel("linear", format="int8", backend="cpu", layout=rows16.NAME, refuses=refuses, tolerance=3e-3)
def linear_int8(fmt: Int8, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], parts in rows16, bias [N] or None -> [..., N] in the dtype of x.

    Without a rotation the codes of x, their sums and the result are those of the reference, bit for bit; a rotation
    sums in another order than a matrix product does.
    """
    operands, granularity = Operands(x, rows16.rows(fmt, parts), bias), _GRANULARITIES[fmt.granularity]
    floats = _REGISTERS if operands.m <= _FEW_FLOATS else _PANELS
    way = _integers(operands.m) if fmt.activations == "int8" else floats
    return _run(operands, parts["qdata"], parts["scale"], granularity, fmt.block_size, fmt.rotation, way, plain=False)


@kernel("linear", format="int8", backend="cpu", refuses=refuses_plain, tolerance=3e-3)
def linear_int8_plain(fmt: Int8, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """The same for plain parts, whose words are put in order in the cache at every call."""
    if fmt.activations == "none":
        return linear_plain.linear_plain(fmt, x, parts, bias)
    codes, scale, granularity = parts["qdata"], parts["scale"].contiguous(), _GRANULARITIES[fmt.granularity]
    operands = Operands(x, codes.shape[0], bias)
    way = _integers(operands.m)
    return _run(operands, codes, scale, granularity, fmt.block_size, fmt.rotation, way, plain=True)


def refuses_op(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype, rotation: int
) -> str | None:
    """Why a call of the named op cannot run here, or None."""
    if out_dtype not in DTYPES or x.dtype not in DTYPES or (bias is not None and bias.dtype not in DTYPES):
        return "x, the bias and the result have to be float32, bfloat16 or float16"
    return _refuses_columns(weight.shape[1]) or _refuses_codes(weight)


@kernel("int8_linear", backend="cpu", refuses=refuses_op)
def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype, rotation: int
) -> Tensor:
    """x [..., K], codes [N, K], one scale or N, bias [N] or None -> [..., N] in `out_dtype`.

    Every bit is the reference's: what is rotated is rotated by the same matrix product.
    """
    x = rotate_groups(x.float(), rotation) if rotation else x
    scale = scale.float().reshape(-1).contiguous()
    granularity = _TENSOR if scale.numel() == 1 else _ROW
    operands = Operands(x, weight.shape[0], bias, out_dtype)
    return _run(operands, weight, scale, granularity, (1, 1), 0, _integers(operands.m), plain=True)


def _refuses_columns(k: int) -> str | None:
    if k > _MOST_COLUMNS:
        return f"{k} columns; sums of more than {_MOST_COLUMNS} products could overflow an int32"
    return None


def _refuses_codes(codes: Tensor) -> str | None:
    if not codes.shape[1] or codes.shape[1] % 4:
        return f"{codes.shape[1]} columns; the kernel takes multiples of 4, as a word has"
    if not codes.is_contiguous() or codes.data_ptr() % 4:
        return "codes with gaps, or not on a border of 4 bytes; the kernel reads words"
    return None


def _integers(m: int) -> int:
    """The way of multiplying integers for so many tokens."""
    return _BYTES if m <= _FEW_BYTES.get(native.isa(), 1 << 30) else _PAIRS


def _run(
    operands: Operands, words: Tensor, scale: Tensor, granularity: int, tile: tuple[int, int], rotation: int, way: int,
    *, plain: bool,
) -> Tensor:  # fmt: skip
    """The product by one way; `plain`: of codes in rows, else of words in rows16."""
    stride = words.stride(0) * words.element_size() // 4
    native.module().linear_int8(
        *operands.rows, words.data_ptr(), stride, plain, scale.data_ptr(), granularity, *tile, rotation,
        *operands.bias_out, DTYPES[operands.out.dtype], way, native.threads(),
    )  # fmt: skip
    return operands.out
