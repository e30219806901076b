"""TensorCoreFP8Layout: float8 codes of any shape and one float32 scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit import ops
from lowbit.backends.eager.block_scaled import product
from lowbit.integrations.kitchen.tensor import stochastic
from lowbit.integrations.kitchen.tensor.base import BaseLayoutParams, register_layout_op
from lowbit.integrations.kitchen.tensor.products import Scaled, aten, register
from lowbit.integrations.kitchen.tensor.quantized import QuantizedTensor
from lowbit.integrations.kitchen.tensor.scales import given_or_fitted
from lowbit.numerics.floats import fp8_max, from_fp8

_FORMATS = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}


class TensorCoreFP8Layout(Scaled):
    """float8 codes times one scale. A product with a float input decodes the weight; two float8 operands multiply."""

    MIN_SM_VERSION = (8, 9)

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """The scale decodes: value = code * scale."""

        def _validate_tensor_fields(self) -> None:
            if isinstance(self.scale, Tensor):
                object.__setattr__(self, "scale", self.scale.to(torch.float32, non_blocking=True))

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        scale: Tensor | float | str | None = None,
        dtype: torch.dtype = torch.float8_e4m3fn,
        **kwargs: Any,
    ) -> tuple[Tensor, Params]:
        """Codes of tensor / scale; the scale is the given one, or absmax / the largest code, in float32.

        `stochastic_rounding`: a seed above 0.
        """
        one, seed = given_or_fitted(tensor, scale, fp8_max(dtype)), kwargs.get("stochastic_rounding") or 0
        codes = stochastic.fp8(tensor, one, dtype, seed) if seed else ops.quantize_per_tensor_fp8(tensor, one, dtype)
        return codes, cls.Params(one, tensor.dtype, tuple(tensor.shape))

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Params) -> Tensor:
        """Codes times the scale, in float32, cast once."""
        return ops.dequantize_per_tensor_fp8(qdata, params.scale, params.orig_dtype)

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """The kind of float8."""
        return {"dtype": qtensor.qdata.dtype}

    @classmethod
    def transposed(cls, tensor: QuantizedTensor) -> QuantizedTensor:
        """The transposed codes: one scale serves them in any order."""
        return _with_codes(tensor, tensor.qdata.t())

    @classmethod
    def stored(cls, tensor: QuantizedTensor) -> bool:
        """Always: see `transposed`."""
        return True

    @classmethod
    def product(cls, x: Any, weight: QuantizedTensor, bias: Tensor | None) -> Any:
        """Codes times codes where x is one of these too, otherwise x times the decoded weight."""
        codes, scale = cls.get_plain_tensors(weight)
        if not isinstance(x, QuantizedTensor):
            return ops.linear(x, [codes.contiguous(), scale.reshape(())], bias, _FORMATS[codes.dtype])
        if not issubclass(x.layout_cls, TensorCoreFP8Layout):
            return F.linear(x.dequantize(), weight.dequantize(), bias)
        rows, x_scale = cls.get_plain_tensors(x)
        flat = rows.reshape(-1, rows.shape[-1])
        factor = (scale * x_scale).reshape(())
        sizes = flat.shape[0], codes.shape[0], codes.shape[1]
        left, right = (lambda a, b: from_fp8(flat[a:b])), (lambda a, b: from_fp8(codes[a:b]))
        return product(left, right, sizes, factor, bias, x.dtype).reshape(*rows.shape[:-1], codes.shape[0])


register("TensorCoreFP8Layout", TensorCoreFP8Layout)


def _with_codes(tensor: QuantizedTensor, codes: Tensor) -> QuantizedTensor:
    params = dataclasses.replace(tensor.params, orig_shape=tuple(codes.shape))
    return QuantizedTensor(codes, tensor.layout_name, params)


def _reshaping(overload: Any) -> Callable[..., Any]:
    """A handler for an op that only arranges elements: codes are arranged as the values would be."""

    def handler(first: Any, args: Any, kwargs: Any) -> Any:
        return _with_codes(args[0], overload(args[0].qdata, *args[1:], **kwargs))

    return handler


# F.linear and matmul of more than two axes flatten their input and give the result its axes back.
for _overload in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
    register_layout_op(_overload, TensorCoreFP8Layout)(_reshaping(_overload))
