"""Attention of a few tokens that runs backward on a CPU: multiplied out, which is faster there than in one kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_FEW = 128  # tokens up to which PyTorch's fused kernel took longer: 1.6 to 3 times in bfloat16, 1 to 1.4 in float32


class ShortAttention(TorchFunctionMode):
    """For a with block: `scaled_dot_product_attention` of up to 128 tokens goes by matrix products on a CPU.

    Only where a gradient is asked for, as it is the way back that PyTorch's kernel is slow in. Attention of more tokens
    keeps that kernel, which does not hold [tokens, tokens].
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and _better_multiplied(*args[:2], **kwargs):
            with sdpa_kernel(SDPBackend.MATH):
                return function(*args, **kwargs)
        return function(*args, **kwargs)


def _better_multiplied(query: Tensor, key: Tensor, *_: Any, **__: Any) -> bool:
    few = query.shape[-2] <= _FEW and key.shape[-2] <= _FEW
    return few and query.device.type == "cpu" and torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
