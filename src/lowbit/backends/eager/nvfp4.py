"""The named nvfp4 ops: the format's own arithmetic, the order of nibbles and scales around it."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.eager.block_scaled import Rows, product
from lowbit.dispatch import kernel
from lowbit.formats.nvfp4 import GROUP, Nvfp4
from lowbit.formats.parts import Parts
from lowbit.layouts.scale_128x4 import swizzle, unswizzle
from lowbit.numerics.groups import round_up, row_chunks
from lowbit.numerics.packing import swap_nibbles

_FORMAT = Nvfp4()


@kernel("quantize_nvfp4", backend="eager")
def quantize_nvfp4(
    x: Tensor, per_tensor_scale: Tensor, epsilon: float, pad_16x: bool, hi_first: bool
) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes [M', K' / 2], swizzled scales."""
    m, k = x.shape
    shared = {"global_scale": per_tensor_scale.float().reshape(())}
    shape = (round_up(m, GROUP) if pad_16x else m, k)
    qdata = torch.zeros(_FORMAT.part_shapes(*shape)["qdata"], dtype=torch.uint8, device=x.device)
    scale = torch.zeros(_FORMAT.part_shapes(*shape)["scale"], dtype=torch.uint8, device=x.device)
    for start, stop in row_chunks(m, k):
        rows = x[start:stop].float()
        params = _FORMAT.fit(rows, shared)
        packed = _FORMAT.pack(_FORMAT.encode(rows, params))
        qdata[start:stop] = swap_nibbles(packed) if hi_first else packed
        scale[start:stop] = params["scale"].view(torch.uint8)
    return qdata, swizzle(scale).view(torch.float8_e4m3fn)


@kernel("dequantize_nvfp4", backend="eager")
def dequantize_nvfp4(
    qx: Tensor, per_tensor_scale: Tensor, block_scales: Tensor, output_type: torch.dtype, hi_first: bool
) -> Tensor:
    """codes [M, K / 2], swizzled scales -> [M, K]."""
    rows = _rows(qx, block_scales, per_tensor_scale.float().reshape(()), hi_first=hi_first)
    m, k = qx.shape[0], 2 * qx.shape[1]
    out = torch.empty((m, k), dtype=output_type, device=qx.device)
    for start, stop in row_chunks(m, k):
        out[start:stop] = rows(start, stop)
    return out


@kernel("scaled_mm_nvfp4", backend="eager")
def scaled_mm_nvfp4(
    a: Tensor,
    b: Tensor,
    tensor_scale_a: Tensor,
    tensor_scale_b: Tensor,
    block_scale_a: Tensor,
    block_scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    alpha: Tensor | None,
) -> Tensor:
    """codes [M, K / 2] and [N, K / 2] -> [M, N]. Code times group scale is exact in float32."""
    one = torch.ones((), device=a.device)
    factor = tensor_scale_a.float() * tensor_scale_b.float() if alpha is None else alpha.float()
    sizes = (a.shape[0], b.shape[0], 2 * a.shape[1])
    return product(
        _rows(a, block_scale_a, one), _rows(b, block_scale_b, one), sizes, factor.reshape(()), bias, out_dtype
    )


def _rows(q: Tensor, swizzled: Tensor, global_scale: Tensor, *, hi_first: bool = False) -> Rows:
    """A reader of decoded rows."""
    scale = unswizzle(swizzled, q.shape[0], 2 * q.shape[1] // GROUP)

    def read(start: int, stop: int) -> Tensor:
        packed = swap_nibbles(q[start:stop]) if hi_first else q[start:stop]
        params: Parts = {"scale": scale[start:stop], "global_scale": global_scale}
        return _FORMAT.decode(_FORMAT.unpack(packed, 2 * q.shape[1]), params)

    return read
