"""Activations to int8: codes and a float32 scale a row, or a block of columns of each row, in one kernel.

    scale = absmax / 127, at least 1e-30        code = value / scale, rounded half to even, or with noise stochastically

The value may be an activation of x (GELU, or SiLU(gate) * up), rounded to the dtype of x as a kernel of its own would
round it, and may be rotated in groups (`rotate_rows`). Codes and scales are eager's, bit for bit, but for the order of
a rotation's sums and the last bits of an activation.

A program holds whole rows, in float32, between the maximum and the division; rows of more than 16384 columns are read
twice. Quotients are IEEE's (`rounding.quotient`): Triton's own `/` is not rounded right, and its exact form is a
routine with branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import device, rotate_rows
from lowbit.backends.triton.rounding import magnitude, quotient
from lowbit.backends.triton.tuning import Arguments, Config, config, tuned
from lowbit.numerics.groups import row_chunks
from lowbit.numerics.int8_matmul import INT8_MAX, MIN_ACTIVATION_SCALE
from lowbit.numerics.integers import uniform_noise

ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu")
_GELU, _GELU_TANH, _SWIGLU = tl.constexpr("gelu"), tl.constexpr("gelu_tanh"), tl.constexpr("swiglu")
_LARGEST, _SMALLEST_SCALE = tl.constexpr(float(INT8_MAX)), tl.constexpr(MIN_ACTIVATION_SCALE)
_NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2**23: its last bit is worth 1, so that adding to it rounds half to even
_VALUES = 4096  # that a program should have at least
_MOST_VALUES = 16384  # columns of a row that stay in registers
_LONGEST_PIECE = 4096  # columns of longer rows at a time


@triton.jit
def code_of(steps, noise):
    """float32 steps and noise in [0, 1), or None -> int8 codes in [-127, 127]; NaN gives 0."""
    steps = tl.where(steps == steps, steps, 0.0)  # noqa: PLR0124
    if noise is not None:
        steps = tl.floor(steps + noise)
    steps = tl.minimum(tl.maximum(steps, -_LARGEST), _LARGEST)
    return (steps + _NEAREST).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _sigmoid(value):
    return 1.0 / (1.0 + tl.exp(-value))


@triton.jit
def _input(at, up, inside, ACTIVATION: tl.constexpr):
    """What is to be quantized, in the dtype of x. at, up: pointers to x and to the second half of its row."""
    loaded = tl.load(at, mask=inside, other=0.0)
    if ACTIVATION is not None:
        value = loaded.to(tl.float32)
        if ACTIVATION == _GELU:
            value = value * 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
        elif ACTIVATION == _GELU_TANH:
            value = value * _sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
        else:
            value = value * _sigmoid(value) * tl.load(up, mask=inside, other=0.0).to(tl.float32)
        loaded = value.to(loaded.dtype)
    return loaded


@triton.jit
def _values(
    x, matrix, stride, m, k, first, ACTIVATION: tl.constexpr, ROTATED: tl.constexpr, CUTS: tl.constexpr,
    TOKENS: tl.constexpr, GROUPS: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """PIECES tensors float32 [TOKENS * GROUPS, COLUMNS] of the groups from `first` on; zeros outside of x."""
    row = tl.arange(0, TOKENS * GROUPS)
    token = tl.program_id(0) * TOKENS + row // GROUPS
    left = (first + row % GROUPS) * (PIECES * COLUMNS)
    start = token.to(tl.int64) * stride
    if ROTATED:
        square = tl.arange(0, COLUMNS)
        hadamard = tl.load(matrix + square[:, None] * COLUMNS + square[None, :])
    parts = ()
    for piece in tl.static_range(PIECES):
        column = left[:, None] + (piece * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        inside = (token < m)[:, None] & (column < k)
        at = x + start[:, None] + column
        value = _input(at, at + k, inside, ACTIVATION)
        if ROTATED:
            parts += (rotate_rows.rotate(value, hadamard, CUTS),)  # type: ignore[assignment]
        else:
            parts += (value.to(tl.float32),)  # type: ignore[assignment]
    if ROTATED:
        parts = rotate_rows.combine(parts)
    return parts


@triton.jit
def _largest(parts, TOKENS: tl.constexpr, GROUPS: tl.constexpr, BLOCKS: tl.constexpr):
    """The bits of the largest magnitude: [TOKENS], or with BLOCKS of each row of the parts."""
    found = magnitude(parts[0])
    for piece in tl.static_range(1, len(parts)):
        found = tl.maximum(found, magnitude(parts[piece]))
    found = tl.max(found, axis=1)
    if not BLOCKS:
        found = tl.max(tl.reshape(found, (TOKENS, GROUPS)), axis=1)
    return found


def _for_size(configs: Sequence[Config], arguments: Arguments) -> Sequence[Config]:
    """As many warps as keep about 64 values in a thread."""
    size = arguments["TOKENS"] * arguments["GROUPS"] * arguments["PIECES"] * arguments["COLUMNS"]
    wanted = max(4, min(16, size // 2048))
    return [one for one in configs if one.warps == wanted]


@tuned(
    [config(warps=4, stages=1), config(warps=8, stages=1), config(warps=16, stages=1)],
    key=("TOKENS", "GROUPS", "PIECES", "COLUMNS"),
    prune=_for_size,
)
@triton.jit(do_not_specialize=("m",))
def _quantize_rows(
    x, matrix, noise, codes, scales, stride, m, k, ACTIVATION: tl.constexpr, ROTATED: tl.constexpr, CUTS: tl.constexpr,
    BLOCKS: tl.constexpr, LOOPS: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr, PIECES: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (i, j): TOKENS rows from i * TOKENS on; with BLOCKS their GROUPS blocks from j * GROUPS on, else all."""
    group = tl.program_id(1) * GROUPS
    if LOOPS == 1:
        parts = _values(
            x, matrix, stride, m, k, group, ACTIVATION, ROTATED, CUTS, TOKENS, GROUPS, PIECES, COLUMNS
        )  # fmt: skip
        bits = _largest(parts, TOKENS, GROUPS, BLOCKS)
    else:
        bits = tl.zeros((TOKENS,), tl.int32)
        for loop in range(LOOPS):
            first = _values(
                x, matrix, stride, m, k, loop * GROUPS, ACTIVATION, ROTATED, CUTS, TOKENS, GROUPS, PIECES, COLUMNS
            )  # fmt: skip
            bits = tl.maximum(bits, _largest(first, TOKENS, GROUPS, BLOCKS))
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), _LARGEST)
    scale = tl.where(scale < _SMALLEST_SCALE, _SMALLEST_SCALE, scale)  # NaN stays
    row = tl.arange(0, TOKENS * GROUPS)
    token = tl.program_id(0) * TOKENS + row // GROUPS
    if BLOCKS:
        block = group + row % GROUPS
        tl.store(scales + block.to(tl.int64) * m + token, scale, mask=(token < m) & (block * COLUMNS < k))
    else:
        alone = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        tl.store(scales + alone, scale, mask=alone < m)
        scale = tl.reshape(tl.broadcast_to(scale[:, None], (TOKENS, GROUPS)), (TOKENS * GROUPS,))
    reciprocal = tl.div_rn(1.0, scale)[:, None]
    start = token.to(tl.int64) * k
    for loop in range(LOOPS):
        if LOOPS > 1:
            group = loop * GROUPS
            parts = _values(
                x, matrix, stride, m, k, group, ACTIVATION, ROTATED, CUTS, TOKENS, GROUPS, PIECES, COLUMNS
            )  # fmt: skip
        left = (group + row % GROUPS) * (PIECES * COLUMNS)
        for piece in tl.static_range(PIECES):
            column = left[:, None] + (piece * COLUMNS + tl.arange(0, COLUMNS))[None, :]
            inside = (token < m)[:, None] & (column < k)
            at = start[:, None] + column
            added = None
            if noise is not None:
                added = tl.load(noise + at, mask=inside, other=0.0)
            steps = quotient(parts[piece], scale[:, None], reciprocal)
            tl.store(codes + at, code_of(steps, added), mask=inside)


@dataclass(frozen=True)
class _Tile:
    """Rows and columns of a program: TOKENS rows of GROUPS groups, each PIECES tensors of COLUMNS; LOOPS over a row."""

    tokens: int
    groups: int
    pieces: int
    columns: int
    loops: int = 1


def _tile(k: int, rotation: int, blocks: int) -> _Tile:
    if blocks:
        groups = min(_power(triton.cdiv(k, blocks)), max(1, _VALUES // blocks))
        return _Tile(max(1, _VALUES // (groups * blocks)), groups, 1, blocks)
    if rotation:
        pieces, columns = rotate_rows.pieces(rotation), rotate_rows.COLUMNS
        groups = _power(triton.cdiv(k, pieces * columns))
        held = min(groups, _MOST_VALUES // (pieces * columns))
        tokens = max(1, 16 // held)  # a product in the tensor cores has 16 rows at least
        return _Tile(tokens, held, pieces, columns, triton.cdiv(triton.cdiv(k, pieces * columns), held))
    columns = _power(k)
    if columns > _MOST_VALUES:
        return _Tile(1, 1, 1, _LONGEST_PIECE, triton.cdiv(k, _LONGEST_PIECE))
    return _Tile(max(1, _VALUES // columns), 1, 1, columns)


def _power(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def quantize_rows(
    x: Tensor, *, rotation: int = 0, activation: str | None = None, blocks: int = 0, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """x [..., K] (with swiglu [..., 2K], of gate and up) -> int8 codes [M, K] and float32 scales.

    scales: [M, 1], or with `blocks`, a power of two of columns, [M, ceil(K / blocks)], whose storage is its transpose.
    rotation: one of `rotate_rows.SIZES` that divides K, not together with blocks. activation: one of `ACTIVATIONS`,
    applied first. seed: above 0 rounds stochastically, with the noise that eager draws.
    """
    columns = x.shape[-1]
    k = columns // 2 if activation == "swiglu" else columns
    m = x.shape[:-1].numel()
    rows = (x.reshape(m, columns) if x.dim() != 2 else x).contiguous()
    codes = torch.empty((m, k), dtype=torch.int8, device=x.device)
    count = triton.cdiv(k, blocks) if blocks else 1
    scales = _scales(m, count, x.device)
    if not m or not k:
        return codes, scales.fill_(MIN_ACTIVATION_SCALE)
    if not seed or seed < 0:
        _launch(rows, None, codes, scales, rotation, activation, blocks)
        return codes, scales
    for start, stop in row_chunks(m, k):  # the noise of a chunk is drawn from the number of its first row
        noise = uniform_noise((stop - start, k), seed, start, x.device)
        piece = _scales(stop - start, count, x.device)
        _launch(rows[start:stop], noise, codes[start:stop], piece, rotation, activation, blocks)
        scales[start:stop] = piece
    return codes, scales


def _scales(m: int, count: int, where: torch.device) -> Tensor:
    """[M, count], stored as its transpose: a product reads those of all tokens in one block."""
    shape = (m, 1) if count == 1 else (count, m)
    scales = torch.empty(shape, dtype=torch.float32, device=where)
    return scales if count == 1 else scales.t()


def _launch(
    x: Tensor,
    noise: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    rotation: int,
    activation: str | None,
    blocks: int,
) -> None:
    m, k = codes.shape
    tile, target = _tile(k, rotation, blocks), device.target_of(x.device)
    across = triton.cdiv(scales.shape[1], tile.groups) if blocks else 1
    _quantize_rows(
        lambda _: (triton.cdiv(m, tile.tokens), across),
        x.device, x=x, matrix=rotate_rows.matrix(rotation, x.dtype, target, x.device) if rotation else None,
        noise=noise, codes=codes, scales=scales, stride=x.shape[1], m=m, k=k, ACTIVATION=activation,
        ROTATED=rotation > 0, CUTS=rotate_rows.cuts(x.dtype, target), BLOCKS=blocks > 0, LOOPS=tile.loops,
        TOKENS=tile.tokens, GROUPS=tile.groups, PIECES=tile.pieces, COLUMNS=tile.columns,
    )  # fmt: skip
