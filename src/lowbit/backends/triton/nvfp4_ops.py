"""The nvfp4 ops that the field calls by name, and their quantizer fused with an activation: eager's codes and values.

Scales are written and read where the layout `scale_128x4` has them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import encoders, floats, group_tiles, quantize_nvfp4
from lowbit.backends.triton.tuning import config, tuned
from lowbit.dispatch import kernel
from lowbit.formats.nvfp4 import GROUP
from lowbit.layouts.scale_128x4 import swizzled_shape
from lowbit.numerics.groups import ceil_div, round_up

_GROUP = tl.constexpr(GROUP)


@triton.jit
def _e2m1_value(code):
    """int32 codes 0..15 -> float32."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2**126


@tuned(
    [config(ROWS=8, GROUPS=32, warps=4), config(ROWS=4, GROUPS=32, warps=4), config(ROWS=4, GROUPS=64, warps=4)],
    key=("m_bucket", "groups", "out"),
)
@triton.jit(do_not_specialize=("m", "m_bucket"))
def _decode_nvfp4(
    codes, shared, scales, out, m, m_bucket, groups, HIGH_FIRST: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr
):
    """ROWS rows of GROUPS groups a program."""
    HALF: tl.constexpr = _GROUP // 2
    across = tl.cdiv(groups, GROUPS)
    row, index, byte, inside = group_tiles.place(m, groups * HALF, HALF, across, True, ROWS, GROUPS, HALF)
    packed = tl.load(codes + row * (groups * HALF) + byte, mask=inside, other=0).to(tl.int32)
    low, high = _e2m1_value(packed & 15), _e2m1_value(packed >> 4)
    pairs = tl.join(high, low) if HIGH_FIRST else tl.join(low, high)
    values = tl.reshape(pairs, (ROWS, GROUPS, _GROUP))
    known = (row < m) & (index < groups)
    scale = tl.load(scales + group_tiles.swizzled(row, index, groups), mask=known, other=0).to(tl.int32)
    values = values * (floats.e4m3_value(scale) * tl.load(shared).to(tl.float32))
    inner = tl.arange(0, _GROUP)[None, None, :]
    at = out + row * (groups * _GROUP) + index * _GROUP + inner
    tl.store(at, values.to(out.dtype.element_ty), mask=known & (inner < _GROUP))


def refuses_quantize(x: Tensor, per_tensor_scale: Tensor, epsilon: float, pad_16x: bool, hi_first: bool) -> str | None:
    """Why this call cannot run here, or None."""
    return encoders.refuses_values(values=x, per_tensor_scale=per_tensor_scale)


def refuses_dequantize(
    qx: Tensor, per_tensor_scale: Tensor, block_scales: Tensor, output_type: torch.dtype, hi_first: bool
) -> str | None:
    """Why this call cannot run here, or None."""
    why = encoders.refuses_result(output_type)
    return why or encoders.refuses_values(qx=qx, per_tensor_scale=per_tensor_scale, block_scales=block_scales)


@kernel("quantize_nvfp4", backend="triton", refuses=refuses_quantize)
def quantize(
    x: Tensor, per_tensor_scale: Tensor, epsilon: float, pad_16x: bool, hi_first: bool
) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes [M', K' / 2], swizzled scales."""
    return quantize_activated(x, per_tensor_scale, None, pad_16x=pad_16x, hi_first=hi_first)


def quantize_activated(
    x: Tensor, per_tensor_scale: Tensor, activation: str | None, *, pad_16x: bool = False, hi_first: bool = True
) -> tuple[Tensor, Tensor]:
    """The op quantize_nvfp4 of "gelu", "gelu_tanh" or "swiglu" of x; swiglu takes [M, 2 K], gate and up."""
    m, columns = x.shape
    k = columns // 2 if activation == group_tiles.SWIGLU.value else columns
    rows, groups = round_up(m, GROUP) if pad_16x else m, ceil_div(k, GROUP)
    qdata = torch.empty((rows, groups * GROUP // 2), dtype=torch.uint8, device=x.device)
    qdata[m:].zero_()
    scale = torch.zeros(swizzled_shape(rows, groups), dtype=torch.uint8, device=x.device)
    if m and k:
        quantize_nvfp4.encode(
            x.contiguous(), per_tensor_scale.float().reshape(()), qdata, scale, None, activation=activation,
            high_first=hi_first, swizzled=True,
        )  # fmt: skip
    return qdata, scale.view(torch.float8_e4m3fn)


@kernel("dequantize_nvfp4", backend="triton", refuses=refuses_dequantize)
def dequantize(
    qx: Tensor, per_tensor_scale: Tensor, block_scales: Tensor, output_type: torch.dtype, hi_first: bool
) -> Tensor:
    """codes [M, K / 2], swizzled scales -> [M, K]."""
    m, groups = qx.shape[0], qx.shape[1] * 2 // GROUP
    out = torch.empty((m, groups * GROUP), dtype=output_type, device=qx.device)
    if out.numel():
        _decode_nvfp4(
            lambda meta: (ceil_div(groups, meta["GROUPS"]) * ceil_div(m, meta["ROWS"]),),
            qx.device, codes=qx.contiguous(), shared=per_tensor_scale,
            scales=block_scales.contiguous().view(torch.uint8), out=out, m=m,
            m_bucket=encoders.power_of_two(m), groups=groups, HIGH_FIRST=hi_first,
        )  # fmt: skip
    return out
