"""int4_plain_mm for many tokens of 16 bits: rounded activations times pieces of the decoded weight, by PyTorch.

Both operands are rounded to the dtype of x, which costs less than the rounding of x to int8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cuda import kernels
from lowbit.backends.cuda.int4_plain_operands import DTYPES, LOWEST, Operands
from lowbit.numerics.groups import ceil_div, row_chunks

PIECE = 1 << 25  # decoded weights at a time, 64 MiB; reasoned, not measured
TOKENS = 1 << 14  # of a piece of x, whose rounded values are kept meanwhile

_SOURCE = "int4_plain_many.cu"
_THREADS = 256
_WORDS = 4  # of 8 codes that a thread decodes
_CODES = 8  # in a word
_FIRST_WITH_BFLOAT16 = (8, 0)


def refuses(x: Tensor, capability: tuple[int, int]) -> str | None:
    """Why this way is closed to x, or None."""
    if x.dtype == torch.float32:
        return "float32 activations need tensor cores with int8, from compute capability 8.0"
    if x.dtype == torch.bfloat16 and capability < _FIRST_WITH_BFLOAT16:
        return "bfloat16 needs compute capability 8.0"
    return None


def product(rows: Tensor, operands: Operands, bias: Tensor | None, out: Tensor) -> None:
    """rows [M, K] times the weight -> out [M, N]."""
    n, k = operands.qdata.shape[0], rows.shape[1]
    for first in range(0, rows.shape[0], TOKENS):
        left, result = _rounded(rows[first : first + TOKENS]), out[first : first + TOKENS]
        for start, stop in row_chunks(n, k, elements=PIECE):
            right = _decoded(operands, start, stop, rows.dtype).t()
            if bias is None:
                torch.mm(left, right, out=result[:, start:stop])
            else:
                torch.addmm(bias[start:stop], left, right, out=result[:, start:stop])


def _rounded(rows: Tensor) -> Tensor:
    """rows [M, K], rounded to int8 and decoded again."""
    out, halves = torch.empty_like(rows), rows.numel() // LOWEST
    kernels.launch(
        _SOURCE, f"lowbit::rounded_blocks<lowbit::{DTYPES[rows.dtype]}>", rows.device, ceil_div(halves, _THREADS),
        _THREADS, [rows, out, halves],
    )  # fmt: skip
    return out


def _decoded(operands: Operands, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start .. stop of the weight, [stop - start, K]."""
    qdata, scale, zero = operands.qdata[start:stop], operands.scale, operands.zero
    words = qdata.numel() // (_CODES // 2)
    out = torch.empty((stop - start, 2 * qdata.shape[1]), dtype=dtype, device=qdata.device)
    name = (
        f"lowbit::decoded_rows<lowbit::{DTYPES[dtype]}, lowbit::{DTYPES[scale.dtype]}, "
        f"{str(zero is not None).lower()}, {_WORDS}>"
    )
    kernels.launch(
        _SOURCE, name, qdata.device, ceil_div(words, _WORDS * _THREADS), _THREADS,
        [qdata, scale[start:stop], None if zero is None else zero[start:stop], out, words,
         (operands.group // _CODES).bit_length() - 1],
    )  # fmt: skip
    return out
