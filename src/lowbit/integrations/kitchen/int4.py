"""The SVDQuant, AWQ and ConvRot 4-bit functions of comfy_kitchen."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import ops
from lowbit.errors import FormatError, PartsError
from lowbit.formats.convrot_w4a4 import ConvrotW4A4

QUANT_GROUP = 64  # of comfy_kitchen's signature; scales are one a row and the group changes nothing


def quantize_svdquant_w4a4(
    x: Tensor,
    smooth: Tensor,
    lora_down: Tensor,
    pad_size: int = 256,
    act_unsigned: bool = False,
    lora_x: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] -> codes, scales and low-rank activations. See `lowbit.ops.quantize_svdquant_w4a4`."""
    return ops.quantize_svdquant_w4a4(x, smooth, lora_down, pad_size, act_unsigned, lora_x)


def scaled_mm_svdquant_w4a4(
    act: Tensor,
    wgt: Tensor,
    ascales: Tensor,
    wscales: Tensor,
    lora_act_in: Tensor,
    lora_up: Tensor,
    bias: Tensor | None = None,
    act_unsigned: bool = False,
) -> Tensor:
    """The product of both 4-bit operands plus the low-rank branch. See `lowbit.ops.scaled_mm_svdquant_w4a4`."""
    return ops.scaled_mm_svdquant_w4a4(act, wgt, ascales, wscales, lora_act_in, lora_up, bias, act_unsigned)


def gemv_awq_w4a16(
    x: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor, bias: Tensor | None = None, group_size: int = 64
) -> Tensor:
    """x [..., K] times a weight with additive zeros -> [..., N] in the dtype of `wscales`, which x is cast to."""
    return ops.gemv_awq_w4a16(x.to(wscales.dtype), qweight, wscales, wzeros, bias, group_size)


def quantize_convrot_w4a4_weight(
    weight: Tensor, convrot_groupsize: int = 256, quant_group_size: int = 64, stochastic_rounding: int | None = 0
) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> bytes int8 [N, K/2], the even column in the low nibble, and float32 scales [N].

    The groups along K are rotated, each row is divided by absmax / 7. `quant_group_size` has to be 64 and changes
    nothing. Raises `FormatError` for groups that do not fit, `WeightError` for a weight that is not finite.
    """
    fmt = _convrot(convrot_groupsize, quant_group_size, "int4")
    _check_columns(weight.shape[-1], convrot_groupsize, quant_group_size)
    parts = fmt.quantize(weight.detach(), seed=stochastic_rounding or None)
    return parts["qdata"], parts["scale"]


def dequantize_convrot_w4a4_weight(
    qdata: Tensor,
    scales: Tensor,
    convrot_groupsize: int = 256,
    quant_group_size: int = 64,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """bytes [N, K/2], scales [N] (or [N, 1]) -> the weight [N, K], rotated back in float32 and cast once."""
    spec = str(_convrot(convrot_groupsize, quant_group_size, "int4"))
    shape = (qdata.shape[0], 2 * qdata.shape[1])
    _check_columns(shape[1], convrot_groupsize, quant_group_size)
    return ops.dequantize([qdata, _rows(scales)], spec, shape, output_dtype)


def convrot_w4a4_linear(
    x: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    bias: Tensor | None = None,
    convrot_groupsize: int = 256,
    quant_group_size: int = 64,
    linear_dtype: str = "int4",
) -> Tensor:
    """x [..., K] -> x @ W.T + bias [..., N] in the dtype of x; each row of the rotated x is rounded to `linear_dtype`.

    "int8" means 8 bits on every device (comfy_kitchen's eager backend reads it and takes 4).
    """
    fmt = _convrot(convrot_groupsize, quant_group_size, linear_dtype)
    if x.shape[-1] != 2 * qweight.shape[-1]:
        raise PartsError(f"Input K={x.shape[-1]} does not match qweight K={2 * qweight.shape[-1]}")
    _check_columns(x.shape[-1], convrot_groupsize, quant_group_size)
    return ops.linear(x, [qweight, _rows(wscales)], bias, str(fmt))


def _rows(scales: Tensor) -> Tensor:
    return scales.float().reshape(-1)


def _convrot(rotation: int, quant_group: int, linear_dtype: str) -> ConvrotW4A4:
    if quant_group != QUANT_GROUP:
        raise FormatError(f"quant_group_size is {quant_group}, expected {QUANT_GROUP}; scales are one a row")
    return ConvrotW4A4(rotation=rotation, linear_dtype=linear_dtype)


def _check_columns(k: int, rotation: int, quant_group: int) -> None:
    if k % rotation:
        raise FormatError(f"in_features {k} not divisible by convrot_groupsize {rotation}")
    if k % quant_group:
        raise FormatError(f"in_features {k} not divisible by quant_group_size {quant_group}")
