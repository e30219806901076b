"""TensorCoreConvRotW4A4Layout: signed 4-bit codes of the rotated weight with one float32 scale a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowbit.errors import FormatError
from lowbit.integrations.kitchen.int4 import (
    convrot_w4a4_linear,
    dequantize_convrot_w4a4_weight,
    quantize_convrot_w4a4_weight,
)
from lowbit.integrations.kitchen.tensor.base import BaseLayoutParams
from lowbit.integrations.kitchen.tensor.products import Scaled, register
from lowbit.integrations.kitchen.tensor.quantized import QuantizedTensor

__all__ = [
    "TensorCoreConvRotW4A4Layout",
    "convrot_w4a4_linear",
    "dequantize_convrot_w4a4_weight",
    "quantize_convrot_w4a4_weight",
]


def _check_linear_dtype(linear_dtype: str) -> None:
    if linear_dtype not in ("int4", "int8"):
        raise FormatError(f"ConvRot W4A4 linear_dtype must be 'int4' or 'int8', got {linear_dtype!r}")


class TensorCoreConvRotW4A4Layout(Scaled):
    """4-bit weights times an input whose rotated rows are rounded to 4 or 8 bits on the fly."""

    MIN_SM_VERSION = (7, 5)
    QUANTIZES_INPUT = False

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """`scale`: float32 [N]."""

        convrot_groupsize: int = 256
        quant_group_size: int = 64
        linear_dtype: str = "int4"
        transposed: bool = False

        def __post_init__(self) -> None:
            super().__post_init__()
            _check_linear_dtype(self.linear_dtype)

        def _tensor_fields(self) -> list[str]:
            return ["scale"]

        def _validate_tensor_fields(self) -> None:
            """Nothing to convert."""

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        convrot_groupsize: int = 256,
        quant_group_size: int = 64,
        stochastic_rounding: int | None = 0,
        linear_dtype: str = "int4",
        **kwargs: Any,
    ) -> tuple[Tensor, Params]:
        """See `quantize_convrot_w4a4_weight`."""
        _check_linear_dtype(linear_dtype)
        sizes = convrot_groupsize, quant_group_size
        codes, scale = quantize_convrot_w4a4_weight(tensor, *sizes, stochastic_rounding)
        return codes, cls.Params(scale, tensor.dtype, tuple(tensor.shape), *sizes, linear_dtype)

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Params) -> Tensor:
        """See `dequantize_convrot_w4a4_weight`."""
        sizes = params.convrot_groupsize, params.quant_group_size
        return dequantize_convrot_w4a4_weight(qdata, params.scale, *sizes, params.orig_dtype)

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """Its rotation and what its input is rounded to."""
        params = qtensor.params
        return {
            "convrot_groupsize": params.convrot_groupsize,
            "quant_group_size": params.quant_group_size,
            "linear_dtype": params.linear_dtype,
        }

    @classmethod
    def get_logical_shape_from_storage(cls, storage_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Two codes in a byte."""
        return storage_shape[0], 2 * storage_shape[1]

    @classmethod
    def product(cls, x: Any, weight: QuantizedTensor, bias: Tensor | None) -> Any:
        """See `convrot_w4a4_linear`."""
        x, params = x.dequantize() if isinstance(x, QuantizedTensor) else x, weight.params
        sizes = params.convrot_groupsize, params.quant_group_size
        return convrot_w4a4_linear(x, weight.qdata, params.scale, bias, *sizes, params.linear_dtype)


register("TensorCoreConvRotW4A4Layout", TensorCoreConvRotW4A4Layout)
