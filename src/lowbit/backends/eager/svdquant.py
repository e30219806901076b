"""The named svdquant ops, and the generic ops over tile-packed weights, in pieces of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.eager.linear_input_gradient import linear_input_gradient
from lowbit.dispatch import kernel
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts import svdquant_tiles as tiles
from lowbit.numerics.groups import round_up, row_chunks
from lowbit.numerics.int4_matmul import GROUP, grouped_linear_, quantize_groups, unpack_codes, weight_pieces
from lowbit.numerics.packing import pack_nibbles

_PIECE = 1 << 22  # elements of a piece of activations or results: 16 MiB as float32


@kernel("quantize_svdquant_w4a4", backend="eager")
def quantize_svdquant_w4a4(
    x: Tensor, smooth: Tensor, down: Tensor, pad_size: int, unsigned: bool, lora_x: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] -> bytes [Mp, K/2], scales [K/64, Mp] in the dtype of x, low-rank activations float32 [Mp, R]."""
    m, k = x.shape
    padded = round_up(m, pad_size)
    codes = torch.zeros((padded, k // 2), dtype=torch.int8, device=x.device)
    scales = torch.zeros((k // GROUP, padded), dtype=x.dtype, device=x.device)
    low = torch.zeros((padded, down.shape[1]), dtype=torch.float32, device=x.device)
    raw, down = x if lora_x is None else lora_x, down.float()
    for start, stop in row_chunks(m, k, elements=_PIECE):
        values, scale = quantize_groups(x[start:stop], smooth, unsigned)
        codes[start:stop] = pack_nibbles(values).view(torch.int8)
        scales[:, start:stop] = scale.t()
        low[start:stop] = raw[start:stop].float() @ down
    return codes, scales, low


@kernel("scaled_mm_svdquant_w4a4", backend="eager")
def scaled_mm_svdquant_w4a4(
    act: Tensor,
    wgt: Tensor,
    ascales: Tensor,
    wscales: Tensor,
    low: Tensor,
    up: Tensor,
    bias: Tensor | None,
    unsigned: bool,
) -> Tensor:
    """bytes [M, K/2] and their scales, a plain or tiled weight and its scales, low-rank factors -> [M, N] as `up`."""
    m, tiled = act.shape[0], wgt.dim() == 4
    out = torch.empty((m, wgt.shape[0] * (tiles.ROWS if tiled else 1)), dtype=up.dtype, device=act.device)
    for start, stop in row_chunks(m, max(2 * act.shape[1], out.shape[1]), elements=_PIECE):
        codes, scale = unpack_codes(act[start:stop], unsigned), ascales[:, start:stop].t().float()
        if not tiled:
            grouped_linear_(out[start:stop], codes, scale, low[start:stop], wgt, wscales, up, bias)
            continue
        for first, last in weight_pieces(out.shape[1], codes):  # the same pieces as above, so the same bits
            run = slice(first // tiles.ROWS, last // tiles.ROWS)
            plain = tiles.untile_rows(wgt[run]), tiles.untile_scale(wscales[run]), tiles.untile_up(up[run])
            part_bias = None if bias is None else bias[first:last]
            grouped_linear_(out[start:stop, first:last], codes, scale, low[start:stop], *plain, part_bias)
    return out


@kernel("linear", backend="eager", format="svdquant_w4a4", layout=tiles.NAME)
def linear_tiles(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], a tiled weight, bias [N] or None -> [..., N] in the dtype of x."""
    out = torch.empty((*x.shape[:-1], fmt.rows_of(parts)), dtype=x.dtype, device=x.device)
    for start, stop, plain in tiles.pieces(fmt, parts):
        out[..., start:stop] = fmt.linear(x, plain, None if bias is None else bias[start:stop])
    return out


@kernel("dequantize", backend="eager", format="svdquant_w4a4", layout=tiles.NAME)
def dequantize_tiles(fmt: Format, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A tiled weight -> the effective weight [N, K] in `dtype`."""
    out = torch.empty(shape, dtype=dtype, device=parts["qdata"].device)
    for start, stop, plain in tiles.pieces(fmt, parts):
        out[start:stop] = fmt.dequantize(plain, (stop - start, shape[1]), dtype)
    return out


@kernel("linear_input_gradient", backend="eager", format="svdquant_w4a4", layout=tiles.NAME)
def linear_input_gradient_tiles(fmt: Format, grad: Tensor, parts: Parts, k: int) -> Tensor:
    """grad [..., N], a tiled weight -> [..., K] in the dtype of grad."""
    total = torch.zeros((*grad.shape[:-1], k), dtype=torch.float32, device=grad.device)
    for start, stop, plain in tiles.pieces(fmt, parts):
        total += linear_input_gradient(fmt, grad[..., start:stop].float(), plain, k)
    return total.to(grad.dtype)
