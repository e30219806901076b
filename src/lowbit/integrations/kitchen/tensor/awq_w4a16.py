"""TensorCoreAWQW4A16Layout: unsigned 4-bit codes with scales and additive zeros of groups along K."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowbit import ops
from lowbit.formats.awq_w4a16 import AwqW4A16
from lowbit.integrations.kitchen.tensor.base import BaseLayoutParams
from lowbit.integrations.kitchen.tensor.products import Multiplied, register
from lowbit.integrations.kitchen.tensor.quantized import QuantizedTensor


class TensorCoreAWQW4A16Layout(Multiplied):
    """4-bit weights times an input as it is. Weights can be quantized here too, by rounding to nearest."""

    MIN_SM_VERSION = None
    QUANTIZES_INPUT = False

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """`scale` and `zeros`: [K/g, N]; weight = (code - 8) * scale + zeros."""

        zeros: Tensor
        group_size: int = 64
        transposed: bool = False

        def _tensor_fields(self) -> list[str]:
            return ["scale", "zeros"]

        def _validate_tensor_fields(self) -> None:
            """Scales stay in the dtype of the weight."""

    @classmethod
    def quantize(cls, tensor: Tensor, **kwargs: Any) -> tuple[Tensor, Params]:
        """Codes of a weight [N, K]; options are `group_size` (64) and `stochastic_rounding`, a seed above 0."""
        group, seed = int(kwargs.get("group_size", 64)), kwargs.get("stochastic_rounding") or None
        parts = AwqW4A16(group_size=group).quantize(tensor.detach(), seed=seed)
        params = cls.Params(parts["scale"], tensor.dtype, tuple(tensor.shape), parts["zero"], group)
        return parts["qdata"], params

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Params) -> Tensor:
        """The weight, in float32, cast once."""
        shape = (qdata.shape[0], 2 * qdata.shape[1])
        return ops.dequantize([qdata, params.scale, params.zeros], _spec(params), shape, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales, zeros."""
        return qtensor.qdata, qtensor.params.scale, qtensor.params.zeros

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Params) -> dict[str, Tensor]:
        """Codes, scales and zeros by suffix."""
        return {"": qdata, "_scale": params.scale, "_zeros": params.zeros}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """Its group size."""
        return {"group_size": qtensor.params.group_size}

    @classmethod
    def get_logical_shape_from_storage(cls, storage_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Two codes in a byte."""
        return storage_shape[0], 2 * storage_shape[1]

    @classmethod
    def product(cls, x: Any, weight: QuantizedTensor, bias: Tensor | None) -> Any:
        """x times the decoded weight, a piece at a time."""
        x = x.dequantize() if isinstance(x, QuantizedTensor) else x
        return ops.linear(x, list(cls.get_plain_tensors(weight)), bias, _spec(weight.params))


def _spec(params: TensorCoreAWQW4A16Layout.Params) -> str:
    return f"awq_w4a16(group_size={params.group_size})"


register("TensorCoreAWQW4A16Layout", TensorCoreAWQW4A16Layout)
