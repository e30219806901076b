"""The named int8 ops, in pieces of rows: no temporary grows with the tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.dispatch import kernel
from lowbit.formats.base import whole_amax
from lowbit.numerics import int8_matmul
from lowbit.numerics.floats import divisor
from lowbit.numerics.groups import row_chunks
from lowbit.numerics.int8_matmul import INT8_MAX, MIN_ACTIVATION_SCALE
from lowbit.numerics.integers import round_clamp_, uniform_noise
from lowbit.numerics.rotations import rotate_groups


@kernel("quantize_int8_rowwise", backend="eager")
def quantize_int8_rowwise(x: Tensor, rotation: int, seed: int) -> tuple[Tensor, Tensor]:
    """x [..., K] -> codes [..., K], scales [..., 1]; the groups of x are rotated first unless `rotation` is 0."""
    rows = _as_rows(x)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty((rows.shape[0], 1), dtype=torch.float32, device=x.device)
    for start, stop in row_chunks(*rows.shape):
        value = rows[start:stop].float()
        value = rotate_groups(value, rotation) if rotation else value
        amax = value.abs().amax(dim=1, keepdim=True) if rows.shape[1] else value.new_zeros((stop - start, 1))
        scales[start:stop] = scale = (amax / divisor(INT8_MAX, amax)).clamp_min_(MIN_ACTIVATION_SCALE)
        codes[start:stop] = _codes(value, scale, seed, start)
    return codes.reshape(x.shape), scales.reshape(*x.shape[:-1], 1)


@kernel("quantize_int8_tensorwise", backend="eager")
def quantize_int8_tensorwise(x: Tensor, scale: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    """x [...] -> codes [...], scale []; the scale is the given one or absmax / 127."""
    rows = _as_rows(x)
    if scale is None:
        amax = whole_amax(rows)
        one = (amax / divisor(INT8_MAX, amax)).clamp_min(MIN_ACTIVATION_SCALE)
    else:
        one = scale.to(x.device, torch.float32, copy=True).reshape(())
    step = one.clamp_min(MIN_ACTIVATION_SCALE)  # a given scale of 0 would make zeros NaN
    codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    for start, stop in row_chunks(*rows.shape):
        codes[start:stop] = _codes(rows[start:stop].float(), step, seed, start)
    return codes.reshape(x.shape), one


@kernel("dequantize_int8", backend="eager")
def dequantize_int8(q: Tensor, scale: Tensor, output_type: torch.dtype) -> Tensor:
    """codes [...], scale of one value, [..., 1] or [...] -> [...] in `output_type`."""
    rows, factor = _as_rows(q), scale.float()
    factor = factor.reshape(1, 1) if scale.numel() == 1 else _as_rows(factor)
    out = torch.empty(rows.shape, dtype=output_type, device=q.device)
    for start, stop in row_chunks(*rows.shape):
        piece = factor if factor.shape[0] == 1 else factor[start:stop]
        out[start:stop] = rows[start:stop].float().mul_(piece)
    return out.reshape(q.shape)


@kernel("int8_linear", backend="eager")
def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype, rotation: int
) -> Tensor:
    """x [..., K], codes [N, K], one scale or N, bias [N] or None -> [..., N] in `out_dtype`."""
    return int8_matmul.int8_linear(x, weight, scale, bias, out_dtype, rotation)


@kernel("int8_linear_input_gradient", backend="eager")
def int8_linear_input_gradient(grad: Tensor, weight: Tensor, scale: Tensor, rotation: int) -> Tensor:
    """grad [..., N], codes [N, K], one scale or N -> [..., K] in the dtype of grad."""
    return int8_matmul.int8_linear_input_gradient(grad, weight, scale, rotation)


def _as_rows(x: Tensor) -> Tensor:
    """[..., K] as [M, K]; also where K or M is 0, or where there are no axes."""
    if not x.dim():
        return x.reshape(1, 1)
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _codes(value: Tensor, scale: Tensor, seed: int, start: int) -> Tensor:
    """int8 codes of float32 rows; `start` is the first one's number."""
    noise = uniform_noise(tuple(value.shape), seed, start, value.device) if seed > 0 else None
    return round_clamp_(value / scale, -INT8_MAX, INT8_MAX, noise).to(torch.int8)
