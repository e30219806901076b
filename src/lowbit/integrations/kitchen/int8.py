"""The int8 functions of comfy_kitchen, on the ops of those names."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit import ops
from lowbit.errors import PartsError
from lowbit.integrations.kitchen.input_act import activated, modulated, with_residual
from lowbit.numerics.int8_matmul import int8_mm


def quantize_int8_rowwise(x: Tensor, stochastic_rounding: int | None = 0) -> tuple[Tensor, Tensor]:
    """x [..., K] -> int8 codes and float32 scales [..., 1]. See `lowbit.ops.quantize_int8_rowwise`."""
    return ops.quantize_int8_rowwise(x, stochastic_rounding)


def quantize_int8_tensorwise(
    x: Tensor, scale: Tensor | float | str | None = None, stochastic_rounding: int | None = 0
) -> tuple[Tensor, Tensor]:
    """x of any shape -> int8 codes and one float32 scale. See `lowbit.ops.quantize_int8_tensorwise`."""
    return ops.quantize_int8_tensorwise(x, scale, stochastic_rounding)


def dequantize_int8_simple(q: Tensor, scale: Tensor) -> Tensor:
    """int8 codes -> float32 q * scale; one scale, one a row ([..., 1]) or one a code."""
    return ops.dequantize_int8(q, scale, torch.float32)


def mm_int8(a: Tensor, b: Tensor) -> Tensor:
    """a int8 [M, K] @ b int8 [K, N], exact -> int32 [M, N]. Raises `PartsError` for other operands."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or {a.dtype, b.dtype} != {torch.int8}:
        raise PartsError(
            f"mm_int8 takes int8 [M, K] and [K, N], not {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        )
    return int8_mm(a, b.t())


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    convrot: bool = False,
    convrot_groupsize: int = 256,
    input_act: str | None = None,
    input_act_weight: Tensor | None = None,
    input_act_eps: float = 0.0,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
) -> Tensor:
    """Dynamic W8A8 linear of act(x) [..., K] -> [..., N] in `out_dtype` (bfloat16); `lowbit.ops.int8_linear`.

    `input_act` is applied first (`lowbit.integrations.kitchen.input_act`). With a `residual` [..., N] the result is
    residual + residual_scale [N] * linear.
    """
    x, dtype = activated(x, input_act, input_act_weight, input_act_eps), out_dtype or torch.bfloat16
    inner = dtype if residual is None else torch.float32
    out = ops.int8_linear(x, weight, weight_scale, bias, inner, convrot, convrot_groupsize)
    return out if residual is None else with_residual(out, residual, residual_scale, dtype)


def int8_linear_modulated(
    x: Tensor,
    modulation_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    convrot: bool = False,
    convrot_groupsize: int = 256,
) -> Tensor:
    """`int8_linear` of x * (1 + modulation_scale), one row of K values for all of x."""
    x = modulated(x, modulation_scale)
    return int8_linear(x, weight, weight_scale, bias, out_dtype, convrot, convrot_groupsize)


def int8_linear_rms_modulated(
    x: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    modulation_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    convrot: bool = False,
    convrot_groupsize: int = 256,
) -> Tensor:
    """`int8_linear_modulated` of rms_norm(x, norm_weight, norm_eps)."""
    normed = F.rms_norm(x.float(), (x.shape[-1],), norm_weight.float(), norm_eps)
    x = modulated(normed, modulation_scale).to(x.dtype)
    return int8_linear(x, weight, weight_scale, bias, out_dtype, convrot, convrot_groupsize)
