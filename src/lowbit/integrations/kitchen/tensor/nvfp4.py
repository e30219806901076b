"""TensorCoreNVFP4Layout: e2m1 codes, high nibble first, with swizzled float8 scales of 16 and one float32 scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit import ops
from lowbit.errors import WeightError
from lowbit.integrations.kitchen.tensor import stochastic
from lowbit.integrations.kitchen.tensor.base import BaseLayoutParams
from lowbit.integrations.kitchen.tensor.products import Multiplied, register
from lowbit.integrations.kitchen.tensor.quantized import QuantizedTensor
from lowbit.integrations.kitchen.tensor.scales import given_or_fitted
from lowbit.numerics.floats import E2M1_MAX, E4M3_MAX
from lowbit.numerics.groups import round_up

_GROUP = 16


class TensorCoreNVFP4Layout(Multiplied):
    """nvfp4, padded to multiples of 16. Two such operands multiply; with a float input the weight is decoded."""

    MIN_SM_VERSION = (10, 0)

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """`scale` is the tensor's; `block_scale` those of the groups, float8_e4m3fn and swizzled."""

        block_scale: Tensor
        transposed: bool = False

        def _tensor_fields(self) -> list[str]:
            return ["scale", "block_scale"]

        def _validate_tensor_fields(self) -> None:
            if isinstance(self.scale, Tensor):
                object.__setattr__(self, "scale", self.scale.to(torch.float32, non_blocking=True))

    @classmethod
    def quantize(
        cls, tensor: Tensor, scale: Tensor | float | str | None = None, **kwargs: Any
    ) -> tuple[Tensor, Params]:
        """Codes of a matrix; the tensor's scale is the given one, or absmax / 2688 in float32.

        `stochastic_rounding`: a seed above 0.
        """
        if tensor.dim() != 2:
            raise WeightError(f"NVFP4 requires 2D tensor, got {tensor.dim()}D")
        shape = tuple(tensor.shape)
        one = given_or_fitted(tensor, scale, E2M1_MAX * E4M3_MAX)
        padded, seed = cls.get_padded_shape(shape), kwargs.get("stochastic_rounding") or 0
        if seed:
            codes, block_scale = stochastic.nvfp4(tensor, one, padded, seed)
        else:
            codes, block_scale = ops.quantize_nvfp4(tensor.detach(), one, pad_16x=padded != shape)
        return codes, cls.Params(one, tensor.dtype, shape, block_scale)

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Params) -> Tensor:
        """The padded matrix, in float32, cast once."""
        return ops.dequantize_nvfp4(qdata, params.scale, params.block_scale, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, the tensor's scale, the groups' scales."""
        return qtensor.qdata, qtensor.params.scale, qtensor.params.block_scale

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Params) -> dict[str, Tensor]:
        """`_scale` are the groups' scales, `_scale_2` is the tensor's."""
        return {"": qdata, "_scale": params.block_scale, "_scale_2": params.scale}

    @classmethod
    def get_padded_shape(cls, orig_shape: tuple[int, ...]) -> tuple[int, int]:
        """Both sizes as multiples of 16."""
        if len(orig_shape) != 2:
            raise WeightError(f"NVFP4 requires 2D shape, got {len(orig_shape)}D")
        return round_up(orig_shape[0], _GROUP), round_up(orig_shape[1], _GROUP)

    @classmethod
    def get_storage_shape(cls, orig_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the codes, two in a byte."""
        rows, columns = cls.get_padded_shape(orig_shape)
        return rows, columns // 2

    @classmethod
    def get_logical_shape_from_storage(cls, storage_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The padded shape that codes of a shape unpack to."""
        return storage_shape[0], 2 * storage_shape[1]

    @classmethod
    def product(cls, x: Any, weight: QuantizedTensor, bias: Tensor | None) -> Any:
        """Codes times codes where x is one of these too, otherwise x times the decoded weight."""
        if not isinstance(x, QuantizedTensor):
            return F.linear(x, weight.dequantize().to(x.dtype), bias)
        if not issubclass(x.layout_cls, TensorCoreNVFP4Layout) or not cls.stored(x):
            return F.linear(x.dequantize(), weight.dequantize(), bias)
        a, scale_a, blocks_a = cls.get_plain_tensors(x)
        b, scale_b, blocks_b = cls.get_plain_tensors(weight)
        n = weight.shape[0]
        whole = None if bias is None else F.pad(bias, (0, b.shape[0] - n))
        out = ops.scaled_mm_nvfp4(a, b, scale_a, scale_b, blocks_a, blocks_b, whole, x.dtype)
        return out[: x.shape[0], :n]


register("TensorCoreNVFP4Layout", TensorCoreNVFP4Layout)
