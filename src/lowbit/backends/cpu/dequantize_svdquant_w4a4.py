"""dequantize and embedding for svdquant_w4a4, from plain parts, rows16 and comfy-kitchen's tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import memory
from lowbit.backends.cpu import native
from lowbit.backends.cpu.operands import DTYPES, refuses_result
from lowbit.dispatch import ANY_LAYOUT, kernel
from lowbit.formats.parts import Parts, gather_rows
from lowbit.formats.svdquant_w4a4 import SvdquantW4A4
from lowbit.layouts import rows16, svdquant_tiles as tiles
from lowbit.ops.packing import unpack

# Of a float32 result 1e-6: the low-rank product is summed in another order than the reference's, and the residual is
# multiplied with 1 / smooth. A bfloat16 that this moves over the middle between two is off by 1/256.
_TOLERANCE = 1e-4


def refuses(fmt: SvdquantW4A4, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why this call cannot run here, or None."""
    return refuses_result(dtype)


def refuses_rows(fmt: SvdquantW4A4, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype) -> str | None:
    """The same of some rows."""
    return refuses_result(dtype)


@kernel("dequantize", format="svdquant_w4a4", backend="cpu", refuses=refuses, tolerance=_TOLERANCE)
def dequantize_svdquant_w4a4(fmt: SvdquantW4A4, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """parts -> the effective weight [N, K] in `dtype`."""
    out = memory.empty(shape, dtype)
    _decode_into(out, parts)
    return out


@kernel("dequantize", format="svdquant_w4a4", backend="cpu", layout=rows16.NAME, refuses=refuses, tolerance=_TOLERANCE)
def dequantize_svdquant_w4a4_rows16(
    fmt: SvdquantW4A4, parts: Parts, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The same of parts in rows16, which are put in order first."""
    return dequantize_svdquant_w4a4(fmt, unpack(fmt, parts, rows16.NAME), shape, dtype)


@kernel("dequantize", format="svdquant_w4a4", backend="cpu", layout=tiles.NAME, refuses=refuses, tolerance=_TOLERANCE)
def dequantize_svdquant_w4a4_tiles(
    fmt: SvdquantW4A4, parts: Parts, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The same of tiles, in bounded pieces."""
    out = memory.empty(shape, dtype)
    for start, stop, plain in tiles.pieces(fmt, parts):
        _decode_into(out[start:stop], plain)
    return out


@kernel(
    "embedding", format="svdquant_w4a4", backend="cpu", layout=ANY_LAYOUT, refuses=refuses_rows, tolerance=_TOLERANCE
)
@kernel("embedding", format="svdquant_w4a4", backend="cpu", refuses=refuses_rows, tolerance=_TOLERANCE)
def embedding_svdquant_w4a4(fmt: SvdquantW4A4, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype) -> Tensor:
    """indices [...] -> [..., K] in `dtype`: the bits of the same rows of the decoded weight."""
    out = memory.empty((indices.numel(), k), dtype)
    _decode_into(out, gather_rows(fmt.rules, parts, indices.reshape(-1).long()))
    return out.reshape(*indices.shape, k)


def _decode_into(out: Tensor, parts: Parts) -> None:
    """Write the effective weight of plain parts into out [N, K], which has no gaps."""
    scale, codes, smooth = parts["scale"], parts["qdata"].contiguous(), parts["smooth_factor"].contiguous()
    down, up = parts["proj_down"].contiguous(), parts["proj_up"].contiguous()
    if (factor := parts.get("pre_quant_scale")) is not None:  # of columns of the effective weight
        smooth = torch.where(smooth == 0, 0.0, smooth.float() / factor.float())
        down = down.float() * factor.float().unsqueeze(1)
    if scale.stride(1) != 1:
        scale = scale.contiguous()
    native.module().dequantize_svdquant_w4a4(
        *out.shape, down.shape[1], codes.data_ptr(), scale.data_ptr(), scale.stride(0), DTYPES[scale.dtype],
        smooth.data_ptr(), DTYPES[smooth.dtype], down.data_ptr(), DTYPES[down.dtype], up.data_ptr(), DTYPES[up.dtype],
        out.data_ptr(), DTYPES[out.dtype], native.threads(),
    )  # fmt: skip
