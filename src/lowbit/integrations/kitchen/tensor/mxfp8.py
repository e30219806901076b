"""TensorCoreMXFP8Layout: float8_e4m3fn codes with swizzled powers of two as scales of 32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lowbit import ops
from lowbit.errors import WeightError
from lowbit.integrations.kitchen.tensor import stochastic
from lowbit.integrations.kitchen.tensor.base import BaseLayoutParams
from lowbit.integrations.kitchen.tensor.products import Scaled, register
from lowbit.integrations.kitchen.tensor.quantized import QuantizedTensor
from lowbit.numerics.groups import round_up

_GROUP = 32


class TensorCoreMXFP8Layout(Scaled):
    """mxfp8, padded to multiples of 32. Two such operands multiply; with a float input the weight is decoded."""

    MIN_SM_VERSION = (10, 0)

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """`scale`: float8_e8m0fnu, swizzled."""

        transposed: bool = False

        def _tensor_fields(self) -> list[str]:
            return ["scale"]

        def _validate_tensor_fields(self) -> None:
            """Powers of two stay in their own dtype."""

    @classmethod
    def quantize(cls, tensor: Tensor, **kwargs: Any) -> tuple[Tensor, Params]:
        """Codes of a matrix; `stochastic_rounding`: a seed above 0."""
        if tensor.dim() != 2:
            raise WeightError(f"MXFP8 requires 2D tensor, got {tensor.dim()}D")
        shape = tuple(tensor.shape)
        padded, seed = cls.get_padded_shape(shape), kwargs.get("stochastic_rounding") or 0
        if seed:
            codes, scale = stochastic.mxfp8(tensor, padded, seed)
        else:
            codes, scale = ops.quantize_mxfp8(tensor.detach(), padded != shape)
        return codes, cls.Params(scale, tensor.dtype, shape)

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Params) -> Tensor:
        """The padded matrix, in float32, cast once."""
        return ops.dequantize_mxfp8(qdata, params.scale, params.orig_dtype)

    @classmethod
    def get_padded_shape(cls, orig_shape: tuple[int, ...]) -> tuple[int, int]:
        """Both sizes as multiples of 32."""
        if len(orig_shape) != 2:
            raise WeightError(f"MXFP8 requires 2D shape, got {len(orig_shape)}D")
        return round_up(orig_shape[0], _GROUP), round_up(orig_shape[1], _GROUP)

    @classmethod
    def get_storage_shape(cls, orig_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the codes: the padded one."""
        return cls.get_padded_shape(orig_shape)

    @classmethod
    def get_logical_shape_from_storage(cls, storage_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The same: codes are not packed."""
        return storage_shape

    @classmethod
    def product(cls, x: Any, weight: QuantizedTensor, bias: Tensor | None) -> Any:
        """Codes times codes where x is one of these too, otherwise x times the decoded weight."""
        if not isinstance(x, QuantizedTensor):
            return F.linear(x, weight.dequantize().to(x.dtype), bias)
        if not issubclass(x.layout_cls, TensorCoreMXFP8Layout) or not cls.stored(x):
            return F.linear(x.dequantize(), weight.dequantize(), bias)
        (a, scale_a), (b, scale_b), n = cls.get_plain_tensors(x), cls.get_plain_tensors(weight), weight.shape[0]
        whole = None if bias is None else F.pad(bias, (0, b.shape[0] - n))
        return ops.scaled_mm_mxfp8(a, b, scale_a, scale_b, whole, x.dtype)[: x.shape[0], :n]


register("TensorCoreMXFP8Layout", TensorCoreMXFP8Layout)
