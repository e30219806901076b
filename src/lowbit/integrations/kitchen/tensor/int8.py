"""TensorWiseINT8Layout: int8 codes with one scale, or one a row, of the weight or of the rotated weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit import ops
from lowbit.errors import FormatError
from lowbit.integrations.kitchen.int8 import int8_linear, int8_linear_rms_modulated
from lowbit.integrations.kitchen.tensor.base import BaseLayoutParams
from lowbit.integrations.kitchen.tensor.products import Scaled, register
from lowbit.integrations.kitchen.tensor.quantized import QuantizedTensor
from lowbit.numerics.rotations import rotate_groups


class TensorWiseINT8Layout(Scaled):
    """int8 weights; each row of an input is quantized on the fly, and integers multiply."""

    MIN_SM_VERSION = (7, 5)

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """`scale`: float32 [], [N, 1] for a weight by rows, or [..., 1] for an input."""

        is_weight: bool = True
        convrot: bool = False
        convrot_groupsize: int = 256
        transposed: bool = False

        def _tensor_fields(self) -> list[str]:
            return ["scale"]

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        scale: Tensor | float | str | None = None,
        stochastic_rounding: int | None = 0,
        inplace_ops: bool = False,
        is_weight: bool = True,
        per_channel: bool = False,
        convrot: bool = False,
        convrot_groupsize: int = 256,
        **kwargs: Any,
    ) -> tuple[Tensor, Params]:
        """Codes with one scale; with one a row if `per_channel`, or if it is no weight; of rotated groups if `convrot`.

        `scale` is for one scale; `inplace_ops` changes nothing. Raises `FormatError` for options that do not fit.
        """
        if convrot and not is_weight:
            raise FormatError("convrot is only supported when is_weight is True")
        if convrot and not per_channel:
            raise FormatError("convrot is only supported when per_channel is True")
        if convrot and tensor.shape[-1] % convrot_groupsize:
            raise FormatError(f"in_features {tensor.shape[-1]} not divisible by group_size {convrot_groupsize}")
        if convrot:
            codes, scales = ops.quantize_int8_convrot_weight(tensor, convrot_groupsize, stochastic_rounding)
        elif is_weight and not per_channel:
            codes, scales = ops.quantize_int8_tensorwise(tensor, scale, stochastic_rounding)
        else:
            codes, scales = ops.quantize_int8_rowwise(tensor, stochastic_rounding)
        return codes, cls.Params(scales, tensor.dtype, tuple(tensor.shape), is_weight, convrot, convrot_groupsize)

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Params) -> Tensor:
        """Codes times scales, rotated back, in float32, cast once."""
        if not params.convrot:
            return ops.dequantize_int8(qdata, params.scale, params.orig_dtype)
        rows = ops.dequantize_int8(qdata, params.scale, torch.float32)
        return rotate_groups(rows, params.convrot_groupsize).to(params.orig_dtype)

    @classmethod
    def dequantize_embedding(cls, qdata: Tensor, params: Params, indices: Tensor) -> Tensor:
        """The rows of a table [V, K] at `indices` [...], nothing else -> [..., K]."""
        scale = params.scale if params.scale.numel() == 1 else params.scale[indices.reshape(-1)]
        rows = ops.dequantize_int8(qdata[indices.reshape(-1)], scale, torch.float32)
        rows = rotate_groups(rows, params.convrot_groupsize) if params.convrot else rows
        return rows.to(params.orig_dtype).reshape(*indices.shape, qdata.shape[1])

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """Its kind of scale and rotation."""
        params = qtensor.params
        return {
            "is_weight": params.is_weight,
            "per_channel": params.is_weight and (params.convrot or params.scale.dim() > 0),
            "convrot": params.convrot,
            "convrot_groupsize": params.convrot_groupsize,
        }

    @classmethod
    def product(cls, x: Any, weight: QuantizedTensor, bias: Tensor | None) -> Any:
        """Rows of x rounded to 8 bits times the codes."""
        x = x.dequantize() if isinstance(x, QuantizedTensor) else x
        return cls.linear_input_act(weight, x, bias)

    @classmethod
    def linear_input_act(
        cls,
        weight: QuantizedTensor,
        x: Tensor,
        bias: Tensor | None = None,
        input_act: str | None = None,
        input_act_weight: Tensor | None = None,
        input_act_eps: float = 0.0,
        residual: Tensor | None = None,
        residual_scale: Tensor | None = None,
    ) -> Any:
        """See `int8_linear`."""
        params = weight.params
        if params.transposed:
            return NotImplemented
        return int8_linear(
            x,
            weight.qdata,
            params.scale,
            bias,
            x.dtype,
            params.convrot,
            params.convrot_groupsize,
            input_act,
            input_act_weight,
            input_act_eps,
            residual,
            residual_scale,
        )

    @classmethod
    def fused_rms_modulated(
        cls,
        x: Tensor,
        weight: QuantizedTensor,
        bias: Tensor | None,
        norm_weight: Tensor,
        norm_eps: float,
        modulation_scale: Tensor,
    ) -> Any:
        """See `int8_linear_rms_modulated`; NotImplemented for a modulation of more than one row."""
        params, k = weight.params, x.shape[-1]
        if modulation_scale.numel() != k or norm_weight.numel() != k or params.transposed:
            return NotImplemented
        modulation = norm_weight, norm_eps, modulation_scale
        rotation = params.convrot, params.convrot_groupsize
        return int8_linear_rms_modulated(x, *modulation, weight.qdata, params.scale, bias, x.dtype, *rotation)


register("TensorWiseINT8Layout", TensorWiseINT8Layout)
