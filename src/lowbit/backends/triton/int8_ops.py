"""The named ops of int8 that quantize rows: `int8_linear` and `quantize_int8_rowwise`."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.triton import device, int8_gemm, rotate_rows
from lowbit.backends.triton.linear_int8 import refuses_gaps
from lowbit.backends.triton.quantize_rows import quantize_rows
from lowbit.dispatch import kernel


def refuses_rowwise(x: Tensor, rotation: int, seed: int) -> str | None:
    """Why this call cannot run here, or None."""
    return _refuses_rotation(rotation) or device.refuses(x)


@kernel("quantize_int8_rowwise", backend="triton", refuses=refuses_rowwise)
def quantize_int8_rowwise(x: Tensor, rotation: int, seed: int) -> tuple[Tensor, Tensor]:
    """x [..., K] -> codes [..., K], scales [..., 1]; the groups of x are rotated first unless `rotation` is 0."""
    codes, scales = quantize_rows(x, rotation=rotation, seed=seed)
    return codes.reshape(x.shape), scales.reshape(*x.shape[:-1], 1)


def refuses_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype, rotation: int
) -> str | None:
    """Why this call cannot run here, or None."""
    return (
        _refuses_rotation(rotation)
        or device.refuses(x, weight=weight, weight_scale=scale, bias=bias)
        or refuses_result(x, out_dtype)
        or int8_gemm.refuses(x, weight.shape[1])
        or refuses_gaps(weight)
    )


@kernel("int8_linear", backend="triton", refuses=refuses_linear, tolerance=3e-3)
def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype, rotation: int
) -> Tensor:
    """x [..., K], codes [N, K], one scale or N, bias [N] or None -> [..., N] in `out_dtype`."""
    codes, row = quantize_rows(x, rotation=rotation)
    bias = None if bias is None else bias.contiguous()
    out = int8_gemm.product(codes, row, weight, scale.float().reshape(-1).contiguous(), bias, out_dtype)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def refuses_result(x: Tensor, dtype: torch.dtype) -> str | None:
    """Why no result of this dtype can be written on the device of x, or None."""
    if dtype not in device.DTYPES:
        return f"the result is {str(dtype).removeprefix('torch.')}; the kernels write float32, bfloat16 and float16"
    if dtype == torch.bfloat16 and device.target_of(x.device).kind == "interpreter":
        return "the result is bfloat16, which Triton's interpreter rounds wrongly; test with float16 or float32"
    return None


def _refuses_rotation(rotation: int) -> str | None:
    if rotation and rotation not in rotate_rows.SIZES:
        return f"rotation groups of {rotation}; the kernel rotates {', '.join(map(str, rotate_rows.SIZES))}"
    return None
