"""linear, mm, addmm and t for any layout, from one method of it: `product(x, weight, bias)`.

`product` gives x [..., K] times the transpose of a stored weight [N, K], plus a bias [N], in the dtype of x, or
NotImplemented; x may be a quantized tensor. In inference mode PyTorch asks for linear; elsewhere F.linear becomes t
and then mm or addmm, so all four have to lead there. The gradient of x is a product with the weight as it lies, which
is dequantized for it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.integrations.kitchen.tensor.base import QuantizedLayout, register_layout_class, register_layout_op
from lowbit.integrations.kitchen.tensor.generic import dequantize_args
from lowbit.integrations.kitchen.tensor.quantized import QuantizedTensor

aten = torch.ops.aten


class Multiplied(QuantizedLayout):
    """A layout with a product."""

    @classmethod
    def product(cls, x: Any, weight: QuantizedTensor, bias: Tensor | None) -> Any:
        """x [..., K], a stored weight [N, K], bias [N] or None -> [..., N], or NotImplemented."""
        return NotImplemented

    @classmethod
    def transposed(cls, tensor: QuantizedTensor) -> QuantizedTensor:
        """The same codes, read as the transpose: a flag."""
        params = tensor.params
        shape, flipped = tuple(params.orig_shape)[::-1], not params.transposed
        new = dataclasses.replace(params, orig_shape=shape, transposed=flipped)
        return QuantizedTensor(tensor.qdata, tensor.layout_name, new)

    @classmethod
    def stored(cls, tensor: QuantizedTensor) -> bool:
        """Whether the rows of the tensor are the rows that the scales belong to."""
        return not tensor.params.transposed


class Scaled(Multiplied):
    """One whose weights are codes and one tensor of scales."""

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, Tensor]:
        """Codes and scales."""
        return qtensor.qdata, qtensor.params.scale

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
        """Codes and scales by suffix."""
        return {"": qdata, "_scale": params.scale}


def register(name: str, layout: type[Multiplied]) -> None:
    """Make a layout known, with its handlers."""
    register_layout_class(name, layout)
    for overload, handler in _HANDLERS.items():
        register_layout_op(overload, layout)(handler)


def multiplied(x: Any, weight: Any, bias: Tensor | None) -> Any:
    """x @ weight.T + bias by the layout of the weight, or NotImplemented."""
    if not isinstance(weight, QuantizedTensor) or not issubclass(weight.layout_cls, Multiplied):
        return NotImplemented
    if weight.dim() != 2 or not weight.layout_cls.stored(weight):
        return NotImplemented
    if x.shape[-1:] != weight.shape[1:] or not x.dtype.is_floating_point:
        return NotImplemented  # PyTorch's own error names the shapes
    return weight.layout_cls.product(x, weight, bias)


def _plain(tensor: Any) -> Any:
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


def _linear(first: Any, args: Any, kwargs: Any) -> Any:
    x, weight, bias = (*args, kwargs.get("bias"))[:3] if len(args) < 3 else args[:3]
    result = multiplied(x, weight, _plain(bias))
    return F.linear(*dequantize_args((x, weight, bias))) if result is NotImplemented else result


def _mm(first: Any, args: Any, kwargs: Any) -> Any:
    a, b = args[:2]
    result = _against(a, b, None)
    return torch.mm(*dequantize_args((a, b))) if result is NotImplemented else result


def _addmm(first: Any, args: Any, kwargs: Any) -> Any:
    """beta * addend + alpha * (a @ b), the addend broadcast; beta = 0 ignores it."""
    addend, a, b = args[0], args[1], args[2]
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    plain = alpha == 1 and beta == 1 and isinstance(addend, Tensor) and addend.dim() == 1
    fits = plain and addend.shape == b.shape[1:]
    result = _against(a, b, _plain(addend) if fits else None)
    if result is NotImplemented:
        return torch.addmm(*dequantize_args((addend, a, b)), alpha=alpha, beta=beta)
    if fits:
        return result
    total = result.float() * alpha
    return (total if beta == 0 else total + beta * _plain(addend).float()).to(result.dtype)


def _t(first: Any, args: Any, kwargs: Any) -> Any:
    tensor = args[0]
    return tensor if tensor.dim() < 2 else tensor.layout_cls.transposed(tensor)


def _against(a: Any, b: Any, bias: Tensor | None) -> Any:
    if not isinstance(b, QuantizedTensor) or not issubclass(b.layout_cls, Multiplied):
        return NotImplemented
    return multiplied(a, b.layout_cls.transposed(b), bias)


_HANDLERS = {
    aten.linear.default: _linear,
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.t.default: _t,
}
