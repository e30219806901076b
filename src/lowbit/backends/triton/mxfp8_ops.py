"""The mxfp8 ops that the field calls by name, and their quantizer fused with an activation: eager's codes and values.

Scales are written and read where the layout `scale_128x4` has them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import encoders, floats, group_tiles, quantize_mx
from lowbit.backends.triton.tuning import config, tuned
from lowbit.dispatch import kernel
from lowbit.formats.e8m0_scales import GROUP
from lowbit.layouts.scale_128x4 import swizzled_shape
from lowbit.numerics.groups import ceil_div, round_up

_GROUP = tl.constexpr(GROUP)


@tuned(
    [config(ROWS=8, GROUPS=16, warps=4), config(ROWS=4, GROUPS=16, warps=4), config(ROWS=4, GROUPS=32, warps=4)],
    key=("m_bucket", "groups", "out"),
)
@triton.jit(do_not_specialize=("m", "m_bucket"))
def _decode_mxfp8(codes, scales, out, m, m_bucket, groups, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """ROWS rows of GROUPS groups a program."""
    across = tl.cdiv(groups, GROUPS)
    row, index, column, inside = group_tiles.place(m, groups * _GROUP, _GROUP, across, True, ROWS, GROUPS, _GROUP)
    at = row * (groups * _GROUP) + column
    values = floats.e4m3_value(tl.load(codes + at, mask=inside, other=0).to(tl.int32))
    known = (row < m) & (index < groups)
    scale = tl.load(scales + group_tiles.swizzled(row, index, groups), mask=known, other=0).to(tl.int32)
    tl.store(out + at, (values * floats.e8m0_value(scale)).to(out.dtype.element_ty), mask=inside)


def refuses_quantize(x: Tensor, pad_32x: bool) -> str | None:
    """Why this call cannot run here, or None."""
    return encoders.refuses_values(values=x)


def refuses_dequantize(qx: Tensor, block_scales: Tensor, output_type: torch.dtype) -> str | None:
    """Why this call cannot run here, or None."""
    return encoders.refuses_result(output_type) or encoders.refuses_values(qx=qx, block_scales=block_scales)


@kernel("quantize_mxfp8", backend="triton", refuses=refuses_quantize)
def quantize(x: Tensor, pad_32x: bool) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes [M', K'], swizzled scales."""
    return quantize_activated(x, None, pad_32x=pad_32x)


def quantize_activated(x: Tensor, activation: str | None, *, pad_32x: bool = False) -> tuple[Tensor, Tensor]:
    """The op quantize_mxfp8 of "gelu", "gelu_tanh" or "swiglu" of x; swiglu takes [M, 2 K], gate and up."""
    m, columns = x.shape
    k = columns // 2 if activation == group_tiles.SWIGLU.value else columns
    rows, groups = round_up(m, GROUP) if pad_32x else m, ceil_div(k, GROUP)
    qdata = torch.empty((rows, groups * GROUP), dtype=torch.uint8, device=x.device)
    qdata[m:].zero_()
    scale = torch.zeros(swizzled_shape(rows, groups), dtype=torch.uint8, device=x.device)
    if m and k:
        quantize_mx.encode(x.contiguous(), qdata, scale, None, activation=activation, swizzled=True)
    return qdata.view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)


@kernel("dequantize_mxfp8", backend="triton", refuses=refuses_dequantize)
def dequantize(qx: Tensor, block_scales: Tensor, output_type: torch.dtype) -> Tensor:
    """codes [M, K], swizzled scales -> [M, K]."""
    m, groups = qx.shape[0], qx.shape[1] // GROUP
    out = torch.empty(qx.shape, dtype=output_type, device=qx.device)
    if out.numel():
        _decode_mxfp8(
            lambda meta: (ceil_div(groups, meta["GROUPS"]) * ceil_div(m, meta["ROWS"]),),
            qx.device, codes=qx.contiguous().view(torch.uint8), scales=block_scales.contiguous().view(torch.uint8),
            out=out, m=m, m_bucket=encoders.power_of_two(m), groups=groups,
        )  # fmt: skip
    return out
