"""The named mxfp8 ops: the format's own arithmetic with swizzled scales."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.eager.block_scaled import Rows, product
from lowbit.dispatch import kernel
from lowbit.formats.e8m0_scales import GROUP
from lowbit.formats.mxfp8 import Mxfp8
from lowbit.layouts.scale_128x4 import swizzle, unswizzle
from lowbit.numerics.groups import round_up, row_chunks

_FORMAT = Mxfp8()


@kernel("quantize_mxfp8", backend="eager")
def quantize_mxfp8(x: Tensor, pad_32x: bool) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes [M', K'], swizzled scales."""
    m, k = x.shape
    shape = (round_up(m, GROUP) if pad_32x else m, k)
    qdata = torch.zeros(_FORMAT.part_shapes(*shape)["qdata"], dtype=torch.uint8, device=x.device)
    scale = torch.zeros(_FORMAT.part_shapes(*shape)["scale"], dtype=torch.uint8, device=x.device)
    for start, stop in row_chunks(m, k):
        rows = x[start:stop].float()
        params = _FORMAT.fit(rows, {})
        qdata[start:stop] = _FORMAT.encode(rows, params).view(torch.uint8)
        scale[start:stop] = params["scale"]
    return qdata.view(torch.float8_e4m3fn), swizzle(scale).view(torch.float8_e8m0fnu)


@kernel("dequantize_mxfp8", backend="eager")
def dequantize_mxfp8(qx: Tensor, block_scales: Tensor, output_type: torch.dtype) -> Tensor:
    """codes [M, K], swizzled scales -> [M, K]."""
    rows = _rows(qx, block_scales)
    out = torch.empty(qx.shape, dtype=output_type, device=qx.device)
    for start, stop in row_chunks(qx.shape[0], qx.shape[1]):
        out[start:stop] = rows(start, stop)
    return out


@kernel("scaled_mm_mxfp8", backend="eager")
def scaled_mm_mxfp8(
    a: Tensor, b: Tensor, block_scale_a: Tensor, block_scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """codes [M, K] and [N, K] -> [M, N]."""
    sizes = (a.shape[0], b.shape[0], a.shape[1])
    return product(_rows(a, block_scale_a), _rows(b, block_scale_b), sizes, None, bias, out_dtype)


def _rows(q: Tensor, swizzled: Tensor) -> Rows:
    """A reader of decoded rows."""
    scale = unswizzle(swizzled.view(torch.uint8), q.shape[0], q.shape[1] // GROUP)
    return lambda start, stop: _FORMAT.decode(q[start:stop], {"scale": scale[start:stop]})
