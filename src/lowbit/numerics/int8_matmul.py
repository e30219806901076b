"""Integer matrix products of int8 codes, exact, and the linear layers that are made of them.

The sum of K products of int8 codes must come out as the integer it is. `torch._int_mm` gives it quickly on CUDA and on
CPUs with VNNI instructions; elsewhere it is a plain loop, twenty times slower than a float32 product (or is missing).
There, pieces of 1024 columns are multiplied in float32: every product is at most 2**14 and every partial sum at most
2**24, so float32 holds all of them exactly, in any order of summation, and the pieces are added as integers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.numerics.block_products import linear_blocks
from lowbit.numerics.floats import divisor
from lowbit.numerics.groups import pad_to, round_up, row_chunks
from lowbit.numerics.rotations import rotate_groups

INT8_MAX = 127
MIN_ACTIVATION_SCALE = 1e-30  # only keeps a zero row from dividing by zero; activations may be far smaller than weights
EXACT_COLUMNS = 1024  # 1024 * 2**14 = 2**24, up to which float32 holds every integer
_INT32_COLUMNS = (1 << 17) - 1  # more columns can overflow an int32 sum of int8 products
_PIECE = 1 << 20  # elements of a weight piece as float32: 4 MiB
_ROWS = 1 << 22  # elements of a piece of activations or results as float32: 16 MiB


def quantize_rows(x: Tensor, largest: int = INT8_MAX) -> tuple[Tensor, Tensor]:
    """Dynamic quantization of rows: x [M, K] -> int8 codes [M, K] in [-largest, largest] and float32 scales [M, 1].

    `scale = absmax / largest`, at least 1e-30; `code = round_half_even(x / scale)`; all in float32. A zero row gives
    zeros. A row with a NaN or an infinity gets a scale that is not finite, so that its results are not finite either.
    """
    value = x.float()
    amax = value.abs().amax(dim=1, keepdim=True) if x.shape[1] else value.new_zeros((x.shape[0], 1))
    scale = (amax / divisor(largest, amax)).clamp_min_(MIN_ACTIVATION_SCALE)
    return (value / scale).round_().clamp_(-largest, largest).to(torch.int8), scale


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    """The exact product a @ b.T of int8 codes a [M, K] and b [N, K], any sizes -> int32 [M, N].

    int64 where K >= 2**17 could overflow an int32. Pieces of b of a few MiB are widened at a time.
    """
    k = a.shape[1]
    if k <= _INT32_COLUMNS and _has_fast_int_mm(a.device.type):
        return torch._int_mm(a, b.t()) if a.device.type == "cpu" else aligned_int_mm(a, b)
    wide = torch.int32 if k <= _INT32_COLUMNS else torch.int64
    out = torch.zeros((a.shape[0], b.shape[0]), dtype=wide, device=a.device)
    for left in range(0, k, EXACT_COLUMNS):
        right = min(left + EXACT_COLUMNS, k)
        codes = a[:, left:right].float()
        for start, stop in row_chunks(b.shape[0], right - left, elements=_PIECE):
            out[:, start:stop] += (codes @ b[start:stop, left:right].float().t()).to(wide)
    return out


def aligned_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """`int8_mm` through `torch._int_mm` as CUDA wants it: 32 rows or more, K a multiple of 8, N of 32 (for Turing)."""
    m, n, k = a.shape[0], b.shape[0], a.shape[1]
    if not m or not n or not k:
        return torch.zeros((m, n), dtype=torch.int32, device=a.device)
    columns = round_up(k, 8)
    a = pad_to(a, max(32, round_up(m, 8)), columns)
    if columns == k and n % 32 == 0:
        return torch._int_mm(a, b.t())[:m]
    out = torch.empty((m, n), dtype=torch.int32, device=a.device)
    for start, stop in row_chunks(n, columns, 32, _ROWS):
        piece = pad_to(b[start:stop], round_up(stop - start, 32), columns)
        out[:, start:stop] = torch._int_mm(a, piece.t())[:m, : stop - start]
    return out


def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype, rotation: int = 0
) -> Tensor:
    """Dynamic W8A8 linear: x [..., K], int8 weight [N, K] with one scale or N -> [..., N] in `out_dtype`.

    Every row of x (its groups rotated first, when `rotation` is not 0) is quantized by `quantize_rows`; then
    `float32(integer product) * (scale_x * scale_w) + bias` in float32, cast once.
    """
    k, n = x.shape[-1], weight.shape[0]
    columns = scale.float().reshape(1, -1)  # [1, 1] or [1, N]
    rows = x.reshape(-1, k) if k else x.new_empty((x.shape[:-1].numel(), 0))
    out = torch.empty((rows.shape[0], n), dtype=out_dtype, device=x.device)
    for start, stop in row_chunks(rows.shape[0], max(n, k), elements=_ROWS):
        piece = rows[start:stop].float()
        codes, row_scale = quantize_rows(rotate_groups(piece, rotation) if rotation else piece)
        total = int8_mm(codes, weight).float().mul_(row_scale * columns)
        out[start:stop] = total if bias is None else total.add_(bias.float())
    return out.reshape(*x.shape[:-1], n)


def coded_linear(
    x: Tensor,
    codes: Callable[[int, int], Tensor],
    scale: Tensor,
    bias: Tensor | None,
    rotation: int = 0,
    largest: int = INT8_MAX,
) -> Tensor:
    """`int8_linear`, in the dtype of x, for a weight whose int8 codes are made of narrower ones, some rows at a time.

    codes: (start, stop) -> int8 [stop - start, K]. scale: one a row of the weight, [N]. largest: the largest code of
    the activations (7 where they are to have 4 bits).
    """
    k, n = x.shape[-1], scale.shape[0]
    rows = x.reshape(-1, k) if k else x.new_empty((x.shape[:-1].numel(), 0))
    out = torch.empty((rows.shape[0], n), dtype=x.dtype, device=x.device)
    for start, stop in row_chunks(rows.shape[0], max(n, k), elements=_ROWS):
        piece = rows[start:stop].float()
        acts, row_scale = quantize_rows(rotate_groups(piece, rotation) if rotation else piece, largest)
        for a, b in row_chunks(n, k, 32, _PIECE):
            total = int8_mm(acts, codes(a, b)).float().mul_(row_scale * scale[a:b].float())
            out[start:stop, a:b] = total if bias is None else total.add_(bias[a:b].float())
    return out.reshape(*x.shape[:-1], n)


def int8_linear_blocks(
    x: Tensor, weight: Tensor, scale: Tensor, tile: tuple[int, int], bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """`int8_linear` for a weight with a scale per tile of (rows, columns), as in `linear_blocks`.

    The integer product of a block is exact.
    """
    return linear_blocks(x, weight, scale, tile, bias, out_dtype, quantize_rows, int8_mm)


def int8_linear_input_gradient(grad: Tensor, weight: Tensor, scale: Tensor, rotation: int = 0) -> Tensor:
    """grad [..., N] times the weight that int8 codes [N, K] and one scale or N mean -> [..., K] in the dtype of grad.

    The rounding of the activations is passed straight through. Sums in float32, in pieces of the weight.
    """
    n, k = weight.shape
    scaled = (grad.float() * scale.float().reshape(-1)).reshape(-1, n) if n else grad.float().reshape(-1, 0)
    total = torch.zeros((scaled.shape[0], k), dtype=torch.float32, device=grad.device)
    for start, stop in row_chunks(n, k, elements=_PIECE):
        total += scaled[:, start:stop] @ weight[start:stop].float()
    total = rotate_groups(total, rotation) if rotation else total
    return total.to(grad.dtype).reshape(*grad.shape[:-1], k)


@lru_cache(maxsize=8)
def _has_fast_int_mm(device: str) -> bool:
    """Whether `torch._int_mm` is there and quick on a type of device."""
    if device == "cpu":
        has_vnni = getattr(torch.cpu, "_is_vnni_supported", None)
        return has_vnni is not None and bool(has_vnni())
    return device == "cuda"
