"""AsymW4A8Int8Layout: 4- or 6-bit codes that stand for int8 values, of the rotated weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import UnsupportedError
from lowbit.integrations.kitchen.tensor.base import BaseLayoutParams
from lowbit.integrations.kitchen.tensor.products import Multiplied, register
from lowbit.integrations.kitchen.tensor.quantized import QuantizedTensor
from lowbit.integrations.kitchen.w4a8 import (
    dequantize_w4a8_int8_weight,
    quantize_w4a8_int8_weight,
    w4a8_int8_linear,
)

__all__ = [
    "AsymW4A8Int8Layout",
    "dequantize_w4a8_int8_weight",
    "quantize_w4a8_int8_weight",
    "w4a8_int8_linear",
]


class AsymW4A8Int8Layout(Multiplied):
    """w4a8_codebook: rows of the rotated input are rounded to 8 bits and integers multiply."""

    MIN_SM_VERSION = (8, 0)
    QUANTIZES_INPUT = False

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """`scale` is s_rel [N, K/g]; `s_channel` [N]; `correction` [K/g, N] and `codebook` [16] or None.

        `mma_packed` stands for the order in which comfy_kitchen's CUDA backend keeps weights resident; it is refused.
        """

        s_channel: Tensor | None = None
        correction: Tensor | None = None
        codebook: Tensor | None = None
        group_size: int = 16
        convrot_groupsize: int = 256
        mma_packed: bool = False
        transposed: bool = False

        def _tensor_fields(self) -> list[str]:
            names = ("scale", "s_channel", "correction", "codebook")
            return [name for name in names if getattr(self, name) is not None]

        def _validate_tensor_fields(self) -> None:
            if self.mma_packed:
                raise UnsupportedError(
                    "mma_packed weights are comfy_kitchen's resident CUDA order; load stored tensors"
                )

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        group_size: int = 16,
        convrot_groupsize: int = 256,
        symmetric: bool = True,
        scale_dtype: torch.dtype = torch.float8_e4m3fn,
        codebook: bool = True,
        codebook_tensor: Tensor | None = None,
        stochastic_rounding: int = 0,
        bits: int = 4,
        scale_search: bool = True,
        **kwargs: Any,
    ) -> tuple[Tensor, Params]:
        """See `quantize_w4a8_int8_weight`."""
        qdata, s_rel, s_channel, correction, table = quantize_w4a8_int8_weight(
            tensor,
            group_size,
            convrot_groupsize,
            symmetric,
            scale_dtype,
            codebook,
            codebook_tensor,
            stochastic_rounding,
            bits,
            scale_search,
        )
        sides = s_channel, correction, table, group_size, convrot_groupsize
        return qdata, cls.Params(s_rel, tensor.dtype, tuple(tensor.shape), *sides)

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Params) -> Tensor:
        """See `dequantize_w4a8_int8_weight`."""
        scales = params.scale, _channel(params), params.codebook, params.correction
        return dequantize_w4a8_int8_weight(
            qdata, *scales, params.group_size, params.convrot_groupsize, params.orig_dtype
        )

    @classmethod
    def get_plain_tensors(  # type: ignore[override]
        cls, qtensor: QuantizedTensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Codes, s_rel, s_channel, correction, codebook."""
        params = qtensor.params
        return qtensor.qdata, params.scale, params.s_channel, params.correction, params.codebook

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Params) -> dict[str, Tensor]:
        """Codes, scales and what else there is, by suffix."""
        out = {"": qdata, "_s_rel": params.scale, "_s_channel": _channel(params)}
        if params.correction is not None:
            out["_correction"] = params.correction
        if params.codebook is not None:
            out["_codebook"] = params.codebook
        return out

    @classmethod
    def unpacked_shape(cls, qtensor: QuantizedTensor) -> tuple[int, ...]:
        """The weight's own: it is never padded, and the width of its rows alone does not tell bits from columns."""
        shape = tuple(qtensor.params.orig_shape)
        return shape[::-1] if qtensor.params.transposed else shape

    @classmethod
    def bits(cls, qtensor: QuantizedTensor) -> int:
        """4 or 6, from the width of the rows."""
        shape = qtensor.params.orig_shape
        return 8 * qtensor.qdata.shape[1] // (shape[0] if qtensor.params.transposed else shape[1])

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """Its sizes, its codebook and what it stores."""
        params = qtensor.params
        return {
            "group_size": params.group_size,
            "convrot_groupsize": params.convrot_groupsize,
            "symmetric": params.correction is None,
            "codebook": params.codebook is not None,
            "codebook_tensor": params.codebook,
            "scale_dtype": params.scale.dtype,
            "bits": cls.bits(qtensor),
            "scale_search": False,
        }

    @classmethod
    def product(cls, x: Any, weight: QuantizedTensor, bias: Tensor | None) -> Any:
        """See `w4a8_int8_linear`."""
        x = x.dequantize() if isinstance(x, QuantizedTensor) else x
        return cls._linear(weight, x, bias, x.dtype)

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
        """See `w4a8_int8_linear`."""
        if weight.params.transposed:
            return NotImplemented
        act = input_act, input_act_weight, input_act_eps, residual, residual_scale
        return cls._linear(weight, x, bias, weight.params.orig_dtype, *act)

    @classmethod
    def _linear(cls, weight: QuantizedTensor, x: Tensor, bias: Tensor | None, dtype: torch.dtype, *act: Any) -> Tensor:
        params, qdata = weight.params, weight.qdata
        scales = params.scale, params.s_channel, params.codebook, params.correction
        sizes = params.group_size, params.convrot_groupsize
        return w4a8_int8_linear(x, qdata, *scales, bias, *sizes, dtype, False, *act)


def _channel(params: AsymW4A8Int8Layout.Params) -> Tensor:
    assert params.s_channel is not None
    return params.s_channel


register("AsymW4A8Int8Layout", AsymW4A8Int8Layout)
