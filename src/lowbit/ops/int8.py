"""The int8 ops that the field calls by name: quantizers with one scale or one a row, and the dynamic W8A8 linear.

Contracts: comfy-kitchen 0.2, but all arithmetic is float32 whatever the dtype of x (dividing in bfloat16 costs 21 % of
squared error), codes stay in [-127, 127], and M = 0 is a shape like any other. `stochastic_rounding`: a seed above 0
rounds up or down at random, the same on every device; 0 (or None) rounds half to even. Quantizing has no gradient:
codes and scales are detached from x; `int8_linear` passes gradients to x as if it had not been rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.errors import FormatError, PartsError
from lowbit.ops.library import declare, run


def quantize_int8_rowwise(x: Tensor, stochastic_rounding: int | None = 0) -> tuple[Tensor, Tensor]:
    """x [..., K] float -> int8 codes [..., K] and float32 scales [..., 1] = absmax / 127, at least 1e-30."""
    return _rowwise_op(x.detach(), stochastic_rounding or 0)


def quantize_int8_tensorwise(
    x: Tensor, scale: Tensor | float | str | None = None, stochastic_rounding: int | None = 0
) -> tuple[Tensor, Tensor]:
    """x of any shape -> int8 codes of that shape and one float32 scale [].

    `scale`: the one to use; None or "recalculate" takes absmax / 127, at least 1e-30. Raises `FormatError` for another
    word, `PartsError` for a scale of several values.
    """
    if isinstance(scale, str):
        if scale != "recalculate":
            raise FormatError(f'scale is {scale!r}, expected a number, a tensor of one value, None or "recalculate"')
        scale = None
    if scale is not None and not isinstance(scale, Tensor):
        scale = torch.tensor(scale, dtype=torch.float32, device=x.device)
    return _tensorwise_op(x.detach(), scale, stochastic_rounding or 0)


def quantize_int8_convrot_weight(w: Tensor, group: int, stochastic_rounding: int | None = 0) -> tuple[Tensor, Tensor]:
    """`quantize_int8_rowwise` of w [N, K] with its groups along K rotated by a regular Hadamard matrix of size `group`.

    Raises `FormatError` when `group` is no power of four or does not divide K.
    """
    return _convrot_op(w.detach(), group, stochastic_rounding or 0)


def dequantize_int8(q: Tensor, scale: Tensor, output_type: torch.dtype = torch.float32) -> Tensor:
    """int8 codes of any shape -> q * scale, computed in float32 and cast once.

    `scale`: one value, one a row ([..., 1]), or one a code. Raises `PartsError` for any other shape.
    """
    return _dequantize_op(q, scale, output_type)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    convrot: bool = False,
    convrot_groupsize: int = 256,
) -> Tensor:
    """Dynamic W8A8 linear: x [..., K], int8 weight [N, K], `weight_scale` of one value or N -> [..., N] in `out_dtype`.

    Each row of x is quantized by absmax / 127; the integer product is exact; scales and bias [N] are applied in float32
    and the result is cast once. With `convrot` the groups of x are rotated first, as those of the weight were. x and
    bias get gradients; the weight is frozen. Raises `PartsError` for tensors that do not fit together, `FormatError`
    for a group that does not divide K or is no power of four.
    """
    return _linear_op(x, weight, weight_scale, bias, out_dtype, convrot_groupsize if convrot else 0)


def _check_rotation(k: int, group: int) -> None:
    if group and k % group:
        raise FormatError(f"K = {k} is not a multiple of the rotation group {group}")


def _rowwise(x: Tensor, stochastic_rounding: int) -> tuple[Tensor, Tensor]:
    return _convrot(x, 0, stochastic_rounding)


def _rowwise_fake(x: Tensor, stochastic_rounding: int) -> tuple[Tensor, Tensor]:
    return _convrot_fake(x, 0, stochastic_rounding)


def _convrot(w: Tensor, group: int, stochastic_rounding: int) -> tuple[Tensor, Tensor]:
    _check_rows(w, group)
    return run("quantize_int8_rowwise", w.device, w, group, stochastic_rounding)


def _convrot_fake(w: Tensor, group: int, stochastic_rounding: int) -> tuple[Tensor, Tensor]:
    _check_rows(w, group)
    scales = w.new_empty((*w.shape[:-1], 1), dtype=torch.float32)
    return w.new_empty(w.shape, dtype=torch.int8), scales


def _check_rows(x: Tensor, rotation: int) -> None:
    if not x.dim():
        raise PartsError("x has no axes, expected [..., K]; quantize_int8_tensorwise takes any shape")
    _check_rotation(x.shape[-1], rotation)


def _tensorwise(x: Tensor, scale: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    _check_one(scale)
    return run("quantize_int8_tensorwise", x.device, x, scale, seed)


def _tensorwise_fake(x: Tensor, scale: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    _check_one(scale)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((), dtype=torch.float32)


def _check_one(scale: Tensor | None) -> None:
    if scale is not None and scale.numel() != 1:
        raise PartsError(f"scale has shape {list(scale.shape)}, expected one value for the whole tensor")


def _dequantize(q: Tensor, scale: Tensor, output_type: torch.dtype) -> Tensor:
    _check_scale(q, scale)
    return run("dequantize_int8", q.device, q, scale, output_type)


def _dequantize_fake(q: Tensor, scale: Tensor, output_type: torch.dtype) -> Tensor:
    _check_scale(q, scale)
    return q.new_empty(q.shape, dtype=output_type)


def _check_scale(q: Tensor, scale: Tensor) -> None:
    if scale.numel() != 1 and tuple(scale.shape) not in ((*q.shape[:-1], 1), tuple(q.shape)):
        expected = f"one value, {[*q.shape[:-1], 1]} or {list(q.shape)}"
        raise PartsError(f"scale has shape {list(scale.shape)}, expected {expected} for codes {list(q.shape)}")


def _linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype, rotation: int
) -> Tensor:
    _check_linear(x, weight, scale, bias, rotation)
    return run("int8_linear", x.device, x, weight, scale, bias, out_dtype, rotation)


def _linear_fake(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype, rotation: int
) -> Tensor:
    _check_linear(x, weight, scale, bias, rotation)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


def _check_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, rotation: int) -> None:
    if weight.dtype != torch.int8 or weight.dim() != 2:
        found = f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
        raise PartsError(f"weight is {found}, expected int8 codes [N, K]")
    n, k = weight.shape
    if not x.dim() or x.shape[-1] != k:
        raise PartsError(f"x has shape {list(x.shape)}, expected [..., {k}] for a weight {[n, k]}")
    if scale.numel() not in (1, n):
        raise PartsError(f"weight_scale has shape {list(scale.shape)}, expected one value or {n} for a weight {[n, k]}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise PartsError(f"bias has shape {list(bias.shape)}, expected [{n}]; add a matrix to the result instead")
    _check_rotation(k, rotation)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, bias, _, rotation = inputs
    ctx.save_for_backward(weight, scale)
    ctx.rotation, ctx.x_dtype = rotation, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The gradients of x and bias. The rounding of x is passed straight through; the weight is frozen."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _gradient_op(grad, *ctx.saved_tensors, ctx.rotation).to(ctx.x_dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).float().sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, None


def _gradient(grad: Tensor, weight: Tensor, scale: Tensor, rotation: int) -> Tensor:
    return run("int8_linear_input_gradient", grad.device, grad, weight, scale, rotation)


def _gradient_fake(grad: Tensor, weight: Tensor, scale: Tensor, rotation: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


_rowwise_op = declare(
    "quantize_int8_rowwise(Tensor x, int stochastic_rounding) -> (Tensor, Tensor)", _rowwise, _rowwise_fake
)
_convrot_op = declare(
    "quantize_int8_convrot_weight(Tensor w, int group, int stochastic_rounding) -> (Tensor, Tensor)",
    _convrot,
    _convrot_fake,
)
_tensorwise_op = declare(
    "quantize_int8_tensorwise(Tensor x, Tensor? scale, int seed) -> (Tensor, Tensor)", _tensorwise, _tensorwise_fake
)
_dequantize_op = declare(
    "dequantize_int8(Tensor q, Tensor scale, ScalarType output_type) -> Tensor", _dequantize, _dequantize_fake
)
_gradient_op = declare(
    "int8_linear_input_gradient(Tensor grad, Tensor weight, Tensor weight_scale, int rotation) -> Tensor",
    _gradient,
    _gradient_fake,
)
_linear_op = declare(
    "int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, ScalarType out_dtype, int rotation) -> Tensor",
    _linear,
    _linear_fake,
    _backward,
    _setup,
)
