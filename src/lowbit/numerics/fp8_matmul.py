"""Matrix products of float8_e4m3fn codes, and the linear layers with 8-bit floating-point activations made of them.

A product of two e4m3 codes is exact in float32 (and each code in bfloat16 and TF32, so that no setting of PyTorch's
matmul precision rounds one); the sums are float32 and differ by their order alone. Tensor cores of Ada and
Hopper keep about 14 bits of such sums, which is why kernels there add up no more than 128 columns in them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.numerics.block_products import linear_blocks
from lowbit.numerics.floats import E4M3_MAX, divisor, from_fp8, to_fp8
from lowbit.numerics.groups import row_chunks
from lowbit.numerics.int8_matmul import MIN_ACTIVATION_SCALE

_PIECE = 1 << 20  # elements of a weight piece as float32: 4 MiB
_ROWS = 1 << 22  # elements of a piece of activations or results as float32: 16 MiB


def quantize_rows_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic quantization of rows: x [M, K] -> float8_e4m3fn codes [M, K] and float32 scales [M, 1].

    `scale = absmax / 448`, at least 1e-30; `code = x / scale`, rounded half to even; all in float32. A zero row gives
    zeros. A row with a NaN or an infinity gets a scale that is not finite, and its results are NaN.
    """
    value = x.float()
    amax = value.abs().amax(dim=1, keepdim=True) if x.shape[1] else value.new_zeros((x.shape[0], 1))
    scale = (amax / divisor(E4M3_MAX, amax)).clamp_min_(MIN_ACTIVATION_SCALE)
    return to_fp8(value / scale, torch.float8_e4m3fn), scale


def fp8_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T of float8 codes a [M, K] and b [N, K], any sizes -> float32 [M, N].

    Pieces of b of a few MiB are widened at a time.
    """
    out = torch.empty((a.shape[0], b.shape[0]), dtype=torch.float32, device=a.device)
    wide = from_fp8(a)
    for start, stop in row_chunks(b.shape[0], b.shape[1], elements=_PIECE):
        out[:, start:stop] = wide @ from_fp8(b[start:stop]).t()
    return out


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Dynamic W8A8 linear: x [..., K], codes [N, K] with one scale or N -> [..., N] in `out_dtype`.

    Every row of x is quantized by `quantize_rows_fp8`; then `product * (scale_x * scale_w) + bias` in float32, cast
    once.
    """
    k, n = x.shape[-1], weight.shape[0]
    columns = scale.float().reshape(1, -1)  # [1, 1] or [1, N]
    rows = x.reshape(-1, k)
    out = torch.empty((rows.shape[0], n), dtype=out_dtype, device=x.device)
    for start, stop in row_chunks(rows.shape[0], max(n, k), elements=_ROWS):
        codes, row_scale = quantize_rows_fp8(rows[start:stop])
        total = fp8_mm(codes, weight).mul_(row_scale * columns)
        out[start:stop] = total if bias is None else total.add_(bias.float())
    return out.reshape(*x.shape[:-1], n)


def fp8_linear_blocks(
    x: Tensor, weight: Tensor, scale: Tensor, tile: tuple[int, int], bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """`fp8_linear` for a weight with a scale per tile of (rows, columns), as in `linear_blocks`."""
    return linear_blocks(x, weight, scale, tile, bias, out_dtype, quantize_rows_fp8, fp8_mm)
