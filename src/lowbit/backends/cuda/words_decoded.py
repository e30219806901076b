"""4-bit codes, in words128 or plain bytes, and many tokens of 16 bits: the weight is decoded in pieces for PyTorch.

A decoded weight is rounded to the dtype of the activations, as no other way of these kernels does it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cuda import kernels
from lowbit.backends.cuda.words_operands import HALVES, Operands
from lowbit.numerics.groups import ceil_div, row_chunks

PIECE = 1 << 25  # decoded weights at a time, 64 MiB; reasoned, not measured
_SOURCE = "words_decoded.cu"
_THREADS, _COLUMNS = 256, 32  # of a block; of a thread


def product(rows: Tensor, operands: Operands, bias: Tensor | None, out: Tensor, *, plain: bool) -> None:
    """Write rows [M, K] times the weight, and bias [N], into out [.., N]. plain: codes are bytes, not words128."""
    (m, k), n = rows.shape, out.shape[-1]
    result = out.view(m, n)
    for start, stop in row_chunks(n, k, elements=PIECE):
        weight = decoded(operands, start, stop, k, rows.dtype, plain=plain).t()
        if bias is None:
            torch.mm(rows, weight, out=result[:, start:stop])
        else:
            torch.addmm(bias[start:stop], rows, weight, out=result[:, start:stop])


def decoded(operands: Operands, start: int, stop: int, k: int, dtype: torch.dtype, *, plain: bool) -> Tensor:
    """Rows start .. stop of the weight, [stop - start, K] in bfloat16 or float16."""
    rows = stop - start
    out = torch.empty((rows, k), dtype=dtype, device=operands.codes.device)
    name = (
        f"lowbit::decoded_weights<lowbit::{operands.code}, {HALVES[dtype]}, lowbit::{operands.scale_kind}, "
        f"{operands.has_zero}, lowbit::{'kBytes' if plain else 'kWords'}>"
    )
    arguments = [
        operands.codes, operands.scale, operands.zero, operands.alpha, operands.alpha_kind, out, start, rows,
        operands.codes.shape[0], k, operands.group,
    ]  # fmt: skip
    kernels.launch(_SOURCE, name, out.device, ceil_div(rows * (k // _COLUMNS), _THREADS), _THREADS, arguments)
    return out
