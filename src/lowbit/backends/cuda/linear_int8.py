"""linear for int8 weights and up to 8 tokens: every weight is read once. The format `int8` and the op `int8_linear`.

With activations=int8 the tokens are rounded to codes first, and sums are exact integers: in one kernel where that is
little work, which every block does for itself, else by a kernel of its own. With activations=none weights are decoded,
exactly, where they are multiplied with tokens of 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cuda import device_check, kernels, quantize_rows_int8
from lowbit.backends.cuda.quantize_rows_int8 import DTYPES, PIECE, quantize_rows
from lowbit.backends.gpu import target_of
from lowbit.dispatch import kernel
from lowbit.formats.int8 import Int8
from lowbit.formats.parts import Parts
from lowbit.numerics.rotations import rotate_groups

_SOURCE = "linear_int8.cu"
_TOKENS = 8
_OLDEST = (8, 0)  # the first with these products in the tensor cores
_MOST_COLUMNS = (1 << 17) - 1  # more could overflow an int32
_ALIGNMENT = 16  # bytes that a lane loads at a time
_ROWS = 16  # of a block
_HALVES = {torch.bfloat16: "Halves<lowbit::kBFloat16>", torch.float16: "Halves<lowbit::kFloat16>"}
# Turns whose loads are under way, warps, blocks side by side: where blocks are few, more of the loads must be a block's
# own to keep some 64 KiB of a multiprocessor under way. Reasoned, not measured.
_MANY_BLOCKS = (3, 4, 6)
_MANY_ROTATING_BLOCKS = (3, 4, 5)  # which need more registers
_FEW_BLOCKS = (6, 8, 2)
_BLOCKS = 4  # for each multiprocessor, that are many
# Pieces of 1024 columns that the blocks of a multiprocessor may round to codes, and those of a block: more of them take
# longer than a launch. Reasoned, not measured.
_PIECES, _PIECES_OF_BLOCK = 24, 32
_ROTATIONS_OF_BLOCK = (0, 16, 64, 256)  # 1024 takes too many registers beside the weights


def refuses(fmt: Int8, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    if fmt.granularity == "block":
        return "a scale for each block of columns; the kernel takes one a row, or one for the weight"
    if fmt.activations == "none" and x.dtype not in _HALVES:
        return f"x is {_kind(x)}, and activations=none; the kernel multiplies bfloat16 and float16"
    return _refuses_operands(x, parts["qdata"], parts["scale"], bias, fmt.rotation)


def refuses_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype, rotation: int
) -> str | None:
    """Why this call cannot run here, or None."""
    if out_dtype not in DTYPES:
        kind = str(out_dtype).removeprefix("torch.")
        return f"the result is {kind}; the kernel writes float32, bfloat16 and float16"
    return _refuses_operands(x, weight, scale, bias, rotation)


def _refuses_operands(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, rotation: int) -> str | None:
    m, k = x.shape[:-1].numel(), x.shape[-1]
    if m > _TOKENS:
        return f"{m} tokens; the kernel takes up to {_TOKENS}"
    if why := quantize_rows_int8.refuses_rows(x, rotation):
        return why
    if why := device_check.refuses(x.device, _OLDEST):
        return why
    if k % _ALIGNMENT or not 0 < k <= _MOST_COLUMNS:
        return f"{k} columns; the kernel takes multiples of {_ALIGNMENT} up to {_MOST_COLUMNS}"
    for name, tensor in (("weight", weight), ("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}; move one of them"
    if bias is not None and bias.dtype not in DTYPES:
        return f"the bias is {_kind(bias)}; the kernel takes float32, bfloat16 and float16"
    if not weight.is_contiguous() or (weight.device.type != "meta" and weight.data_ptr() % _ALIGNMENT):
        return f"codes with gaps, or that do not begin at a multiple of {_ALIGNMENT} bytes; clone them once, at load"
    return None


@kernel("linear", format="int8", backend="cuda", refuses=refuses, tolerance=3e-3)
def linear_int8(fmt: Int8, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K] of at most 8 tokens, plain parts, bias [N] or None -> [..., N] in the dtype of x.

    With activations=int8 and no rotation the result is eager's, bit for bit.
    """
    if fmt.activations == "int8":
        return _product(x, parts["qdata"], parts["scale"], bias, x.dtype, fmt.rotation)
    rows = _aligned(rotate_groups(x, fmt.rotation) if fmt.rotation else x)
    out = _multiply(rows, parts["qdata"], parts["scale"], bias, x.dtype)
    return out.reshape(*x.shape[:-1], out.shape[1])


@kernel("int8_linear", backend="cuda", refuses=refuses_linear, tolerance=3e-3)
def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype, rotation: int
) -> Tensor:
    """x [..., K] of at most 8 tokens, codes [N, K], one scale or N, bias [N] or None -> [..., N] in `out_dtype`."""
    return _product(x, weight, scale.float(), bias, out_dtype, rotation)


def _product(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, rotation: int
) -> Tensor:
    rows = _aligned(x)
    (m, k), n = rows.shape, weight.shape[0]
    pieces = m * -(-k // PIECE)
    if rotation in _ROTATIONS_OF_BLOCK and pieces <= min(
        _PIECES_OF_BLOCK, _PIECES // _blocks_side_by_side(n, x.device)
    ):
        out = _multiply(rows, weight, scale, bias, dtype, rotation=rotation)
    else:
        codes, step = quantize_rows(rows, rotation=rotation)
        out = _multiply(codes, weight, scale, bias, dtype, step=step)
    return out.reshape(*x.shape[:-1], n)


def _aligned(x: Tensor) -> Tensor:
    """x [..., K] -> [M, K] that begins where a lane can load it."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    return rows.clone() if rows.device.type != "meta" and rows.data_ptr() % _ALIGNMENT else rows


def _blocks_side_by_side(n: int, device: torch.device) -> int:
    """On the busiest multiprocessor."""
    return max(1, -(-n // (_ROWS * target_of(device).processors)))


def _multiply(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    step: Tensor | None = None,
    rotation: int | None = None,
) -> Tensor:
    """x [M, K], codes [N, K], one scale or N, bias [N] or None -> [M, N].

    x: codes with a step [M, 1]; numbers that the kernel rounds to codes, where a rotation (or 0) is given; or 16 bits.
    """
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    if not m or not n:
        return out
    many = n >= _BLOCKS * _ROWS * target_of(x.device).processors
    depth, warps, blocks = (_MANY_ROTATING_BLOCKS if rotation else _MANY_BLOCKS) if many else _FEW_BLOCKS
    arguments: list[kernels.Argument] = [
        weight, scale.contiguous(), int(scale.numel() > 1), None if bias is None else bias.contiguous(),
        0 if bias is None else _number(bias.dtype), out, _number(dtype), m, n, k // _ALIGNMENT,
    ]  # fmt: skip
    if rotation is None:
        kind = _HALVES[x.dtype] if step is None else "Codes"
        name, arguments, shared = f"linear_int8<lowbit::{kind}", [x, step, *arguments], 0
    else:
        name, arguments, shared = f"quantize_linear_int8<lowbit::{DTYPES[x.dtype]}, {rotation}", [x, *arguments], m * k
    kernels.launch(
        _SOURCE, f"lowbit::{name}, {depth}, {warps}, {blocks}>", x.device, -(-n // _ROWS), 32 * warps, arguments, shared
    )
    return out


def _number(dtype: torch.dtype) -> int:
    """What the kernels call the dtype, as a number: enum Dtype."""
    return list(DTYPES).index(dtype)


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
