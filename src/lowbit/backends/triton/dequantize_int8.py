"""int8 codes times their scales, the named op `dequantize_int8`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import device
from lowbit.backends.triton.int8_ops import refuses_result
from lowbit.backends.triton.tuning import config, tuned
from lowbit.dispatch import kernel

_VALUES = 4096  # of a program
_ONE, _ROW, _EACH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # how many scales there are


@tuned([config(warps=4, stages=1)])
@triton.jit(do_not_specialize=("m",))
def _dequantize_int8(
    codes, scale, out, m, k, SCALES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < m)[:, None] & (column < k)[None, :]
    at = row[:, None] * k + column[None, :]
    if SCALES == _ONE:
        factor = tl.load(scale)
    elif SCALES == _ROW:
        factor = tl.load(scale + row, mask=row < m, other=0.0)[:, None]
    else:
        factor = tl.load(scale + at, mask=inside, other=0.0)
    value = tl.load(codes + at, mask=inside, other=0).to(tl.float32) * factor.to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def refuses(q: Tensor, scale: Tensor, output_type: torch.dtype) -> str | None:
    """Why this call cannot run here, or None."""
    if q.dtype != torch.int8:
        return f"the codes are {str(q.dtype).removeprefix('torch.')}; the kernel reads int8"
    return device.refuses(q, scale=scale) or refuses_result(q, output_type)


@kernel("dequantize_int8", backend="triton", refuses=refuses)
def dequantize_int8(q: Tensor, scale: Tensor, output_type: torch.dtype) -> Tensor:
    """codes [...], scale of one value, [..., 1] or [...] -> [...] in `output_type`."""
    codes, out = q.contiguous(), torch.empty(q.shape, dtype=output_type, device=q.device)
    if not q.numel():
        return out
    k = q.shape[-1] if q.dim() else 1
    m = q.numel() // k
    scales = _ONE if scale.numel() == 1 else _ROW if scale.shape[-1] == 1 else _EACH
    columns = min(_VALUES, 1 << (k - 1).bit_length())
    _dequantize_int8(
        lambda meta: (triton.cdiv(m, meta["ROWS"]), triton.cdiv(k, columns)),
        q.device, codes=codes, scale=scale.contiguous(), out=out, m=m, k=k, SCALES=scales, ROWS=_VALUES // columns,
        COLUMNS=columns,
    )  # fmt: skip
    return out
