"""What comfy_kitchen's linears can do before the product (an activation or a norm) and after it (a gated residual).

name        input      result
gelu_tanh   [..., K]   gelu(x), by its tanh formula
swiglu      [..., 2K]  silu(gate) * up                                       for [gate | up]
situ        [..., 2K]  4 tanh(gate / 4) sigmoid(gate) * 25 tanh(hidden / 25)  for [hidden | gate]
rms_norm    [..., K]   x / sqrt(mean(x^2) + eps) * weight

Computed in float32 and rounded once, to the dtype of x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.errors import FormatError, PartsError


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _situ(x: Tensor) -> Tensor:
    hidden, gate = x.chunk(2, dim=-1)
    return (4 * torch.tanh(gate / 4) * torch.sigmoid(gate)) * (25 * torch.tanh(hidden / 25))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu_tanh": _gelu_tanh, "swiglu": _swiglu, "situ": _situ}


def activated(x: Tensor, name: str | None, weight: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """x after the activation of that name; None and "none" leave it alone.

    Raises `FormatError` for another name, `PartsError` for rms_norm without its weight [K].
    """
    if name in (None, "none"):
        return x
    if name == "rms_norm":
        if weight is None or tuple(weight.shape) != (x.shape[-1],):
            found = None if weight is None else list(weight.shape)
            raise PartsError(f"input_act 'rms_norm' needs input_act_weight of shape {[x.shape[-1]]}, not {found}")
        return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)
    function = _ACTIVATIONS.get(name)
    if function is None:
        known = ", ".join(sorted([*_ACTIVATIONS, "none", "rms_norm"]))
        raise FormatError(f"unsupported input_act: {name!r}; known are {known}")
    return function(x.float()).to(x.dtype)


def with_residual(out: Tensor, residual: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """residual + scale * out, in float32, cast once to `dtype`. Raises `PartsError` without a scale."""
    if scale is None:
        raise PartsError("residual requires residual_scale, one value a column of the result")
    return torch.addcmul(residual.float(), out.float(), scale.float()).to(dtype)


def modulated(x: Tensor, scale: Tensor) -> Tensor:
    """x [..., K] * (1 + scale), one row of K values for all of x; float32, rounded once to the dtype of x."""
    if scale.numel() != x.shape[-1]:
        raise PartsError(
            f"modulation_scale has {scale.numel()} values, expected one row of {x.shape[-1]}; modulate a batch "
            "with rows of its own beforehand"
        )
    return (x.float() * (1 + scale.float().reshape(-1))).to(x.dtype)
