"""Changes of a quantized weight in place: what PEFT does to merge an adapter and to take it out again.

    weight.data += delta        codes move by whole levels, at the scales that are there (`solvers.added_delta`)

Error feedback decides which codes: nothing is left to chance, and on evenly spaced codes subtracting the same delta
moves the same ones back, unless a scale had to grow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.errors import UnsupportedError
from lowbit.solvers.added_delta import add_delta
from lowbit.tensor import QuantizedTensor, implements, shortcut

aten = torch.ops.aten
_STATE = ("format", "kernel_layout", "matrix", "spec", "transposed", "is_matrix", "view_of", "room")


@implements(aten.add_.Tensor, aten.sub_.Tensor)
def _add_in_place(func: Any, args: Any, kwargs: Any) -> Any:
    """`w += alpha * delta`, or -=; raises `UnsupportedError` where the layer's bias would have to change, too."""
    target, delta = args[:2]
    if not isinstance(target, QuantizedTensor) or not isinstance(delta, Tensor) or not delta.dim():
        return NotImplemented  # a number would be lost in a temporary: refused as any other write
    if target.format.folds_bias:
        raise UnsupportedError(
            f"the bias of this layer holds a share of its weight ({target.format}), so the weight cannot be changed "
            "alone; bake a LoRA with lowbit.lora.bake_lora, or leave it beside the weight"
        )
    alpha = kwargs.get("alpha", 1) * (-1 if func is aten.sub_.Tensor else 1)
    plain = delta.dequantize(torch.float32) if isinstance(delta, QuantizedTensor) else delta.to(torch.float32)
    change = (plain * alpha).expand(target.shape)
    if target.transposed:
        _add_in_place(aten.add_.Tensor, (target.transpose(-1, -2), change.transpose(-1, -2)), {})
        return target
    weight = target.in_layout("")
    parts = add_delta(target.format, weight.parts, change.reshape(target.matrix).to(target.device)).parts
    target.copy_(weight.with_parts(parts, view_of="").in_layout(target.kernel_layout))
    return target


@shortcut(torch.Tensor.data.__set__)  # type: ignore[attr-defined]
def _set_data(self: Tensor, value: Tensor) -> Any:
    """`w.data = other`: the parts are attributes of the wrapper, which PyTorch would leave as they are."""
    if not isinstance(self, QuantizedTensor) or not isinstance(value, QuantizedTensor):
        kinds = f"{type(value).__name__} as the data of a {type(self).__name__}"
        raise UnsupportedError(f"cannot set a {kinds}; assign a new parameter instead")
    with torch._C.DisableTorchFunctionSubclass():
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
    for name in (*_STATE, *value.format.part_names):
        setattr(self, name, getattr(value, name))
    return None


@shortcut(torch.isfinite, torch.Tensor.isfinite)
def _isfinite(input: QuantizedTensor) -> Tensor:
    """Asked of merged weights."""
    return torch.isfinite(input.dequantize())
