"""gemv_awq_w4a16: a product with 4-bit weights in groups with additive zeros, for any number of tokens.

Contract: comfy-kitchen 0.2, except that the result has the dtype of x, as `F.linear` and `lowbit::linear` give it, not
that of the scales; where the two dtypes are equal, so are the results. The weight is decoded in float32 and rounded
once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.errors import PartsError
from lowbit.ops.library import declare, run

_SCALES = (torch.bfloat16, torch.float16, torch.float32)


def gemv_awq_w4a16(
    x: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor, bias: Tensor | None = None, group_size: int = 64
) -> Tensor:
    """x [..., K] -> x @ W.T + bias [..., N] in the dtype of x, with W = (q - 8) * wscales + wzeros, by groups along K.

    qweight: int8 [N, K/2], codes 0..15, the even column in the low nibble. wscales, wzeros: [K/group_size, N] of one
    floating dtype. bias: [N]. x and bias get gradients; the weight is frozen. Raises `PartsError` for tensors that do
    not fit together.
    """
    return _op(x, qweight, wscales, wzeros, bias, group_size)


def _check(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, group: int) -> None:
    if q.dim() != 2 or q.dtype != torch.int8:
        raise PartsError(f"qweight is {_kind(q)}, expected int8 [N, K / 2]")
    n, k = q.shape[0], 2 * q.shape[1]
    if not x.dim() or x.shape[-1] != k or not x.is_floating_point():
        raise PartsError(f"x is {_kind(x)}, expected floating-point [..., {k}] for a weight {[n, k]}")
    if group < 1 or k % group:
        raise PartsError(f"group_size is {group}, expected a divisor of K = {k}")
    expected = (k // group, n)
    for name, part in (("wscales", scales), ("wzeros", zeros)):
        if tuple(part.shape) != expected or part.dtype not in _SCALES or part.dtype != scales.dtype:
            raise PartsError(
                f"{name} is {_kind(part)}, expected {list(expected)} in bfloat16, float16 or float32, scales and zeros "
                f"alike, for a weight {[n, k]} in groups of {group}"
            )
    if bias is not None and tuple(bias.shape) != (n,):
        raise PartsError(f"bias has shape {list(bias.shape)}, expected [{n}]; add a matrix to the result instead")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _linear(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, group: int) -> Tensor:
    _check(x, q, scales, zeros, bias, group)
    return run("gemv_awq_w4a16", x.device, x, q, scales, zeros, bias, group)


def _linear_fake(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, group: int) -> Tensor:
    _check(x, q, scales, zeros, bias, group)
    return x.new_empty((*x.shape[:-1], q.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, q, scales, zeros, bias, group = inputs
    ctx.save_for_backward(q, scales, zeros)
    ctx.group, ctx.bias_dtype = group, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The gradients of x and bias; the weight is frozen."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _gradient_op(grad, *ctx.saved_tensors, ctx.group)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).float().sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None


def _gradient(grad: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, group: int) -> Tensor:
    return run("gemv_awq_w4a16_input_gradient", grad.device, grad, q, scales, zeros, group)


def _gradient_fake(grad: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, group: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], 2 * q.shape[1]))


_gradient_op = declare(
    "gemv_awq_w4a16_input_gradient(Tensor grad, Tensor qweight, Tensor wscales, Tensor wzeros, int group_size)"
    " -> Tensor",
    _gradient,
    _gradient_fake,
)
_op = declare(
    "gemv_awq_w4a16(Tensor x, Tensor qweight, Tensor wscales, Tensor wzeros, Tensor? bias, int group_size) -> Tensor",
    _linear,
    _linear_fake,
    _backward,
    _setup,
)
