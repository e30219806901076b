"""Activations to float8_e4m3fn on the fly, a scale for each row or for each block of columns of each row.

One kernel: the largest magnitude, the scale, a correctly rounded quotient, the code. Codes and scales are those of
`numerics.fp8_matmul.quantize_rows_fp8` bit for bit; of a row with an infinity the scales, while all its codes are NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import device, rounding
from lowbit.backends.triton.tuning import config, tuned
from lowbit.numerics.floats import E4M3_MAX
from lowbit.numerics.int8_matmul import MIN_ACTIVATION_SCALE

_LARGEST, _SMALLEST = tl.constexpr(E4M3_MAX), tl.constexpr(MIN_ACTIVATION_SCALE)
_ONE_PASS = 16384  # columns that a program keeps in registers between the two passes
_TILE = 2048  # elements of a program where rows are short
_ROUNDS = (9, 0)  # the first that surely rounds float32 to e4m3 at once: for 8.9, Triton 3.6 truncates to float16 first


@tuned([config(warps=4, stages=1), config(warps=8, stages=1), config(warps=16, stages=1)], key=("x", "k", "columns"))
@triton.jit(do_not_specialize=("m",))
def _quantize_rows_fp8(
    x, codes, scale, m, k, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr, ONE_PASS: tl.constexpr,
    CONVERTS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(k, columns)
    block = tl.program_id(0) % blocks
    rows = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    left = block * columns
    width = tl.minimum(columns, k - left)
    column = tl.arange(0, BLOCK)[None, :]
    present = (rows < m)[:, None]
    start = rows[:, None].to(tl.int64) * k + left
    if ONE_PASS:
        value = tl.load(x + start + column, mask=present & (column < width), other=0.0).to(tl.float32)
        largest = tl.max(rounding.magnitude(value), axis=1)
    else:
        largest = tl.zeros((ROWS,), tl.int32)
        for at in range(0, width, BLOCK):
            value = tl.load(x + start + at + column, mask=present & (at + column < width), other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(rounding.magnitude(value), axis=1))
    divisor = tl.div_rn(largest.to(tl.float32, bitcast=True), tl.full((ROWS,), _LARGEST, tl.float32))
    divisor = tl.where(divisor < _SMALLEST, _SMALLEST, divisor)  # a NaN stays
    tl.store(scale + block.to(tl.int64) * m + rows, divisor, mask=rows < m)
    divisor, reciprocal = divisor[:, None], tl.div_rn(1.0, divisor)[:, None]
    if ONE_PASS:
        quotient = rounding.quotient(value, divisor, reciprocal)
        code = rounding.fp8_code(quotient, value, None, rounding.E4M3, CONVERTS)
        tl.store(codes + start + column, code, mask=present & (column < width))
    else:
        for at in range(0, width, BLOCK):
            inside = present & (at + column < width)
            value = tl.load(x + start + at + column, mask=inside, other=0.0).to(tl.float32)
            quotient = rounding.quotient(value, divisor, reciprocal)
            code = rounding.fp8_code(quotient, value, None, rounding.E4M3, CONVERTS)
            tl.store(codes + start + at + column, code, mask=inside)


def quantize(x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Rows x [M, K] -> float8_e4m3fn codes [M, K], float32 scales [ceil(K / columns), M]. M and K are not 0."""
    (m, k), target = x.shape, device.target_of(x.device)
    columns = min(columns, k)
    blocks = triton.cdiv(k, columns)
    block = min(triton.next_power_of_2(columns), _ONE_PASS)
    rows = max(1, _TILE // block)
    codes = torch.empty((m, k), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((blocks, m), dtype=torch.float32, device=x.device)
    _quantize_rows_fp8(
        lambda _: (triton.cdiv(m, rows) * blocks,),
        x.device, x=x, codes=codes.view(torch.uint8), scale=scale, m=m, k=k, columns=columns, ROWS=rows, BLOCK=block,
        ONE_PASS=columns <= _ONE_PASS, CONVERTS=target.kind == "cuda" and target.capability >= _ROUNDS,
    )  # fmt: skip
    return codes, scale
