"""int4_plain_mm: 4-bit weights in groups times activations rounded to int8 by blocks of 32, for any number of tokens.

Contract: ExecuTorch's op of that name (pytorch/executorch#20038), with a bias, any leading axes and any floating dtype,
and with the arrangement of the weight named by the caller (`layouts.coalesced_int4`), because shapes cannot tell it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowbit.errors import PartsError
from lowbit.layouts.coalesced_int4 import check, check_tag
from lowbit.ops.library import declare, run


def int4_plain_mm(
    x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None = None, *, group_size: int, layout: str
) -> Tensor:
    """x [..., K] -> x @ W.T + bias [..., N] in the dtype of x, with W = (q - zero) * scale and x rounded to int8.

    qdata: uint8 or int8 [N, K/2], codes 0..15, the even column in the low nibble. scale, zero: [N, K/group_size] of one
    floating dtype. bias: [N]. layout: the arrangement that the caller knows these to be in,
    `layouts.coalesced_int4.TAG`; there is no default, since [n_groups, N] has the same shape where N = n_groups.
    x and bias get gradients, the rounding of x passed straight through; the weight is frozen. Raises `PartsError`, with
    the remedy, for any other layout and for tensors that are missing or do not fit together.
    """
    for name, tensor in (("x", x), ("qdata", qdata), ("scale", scale), ("zero", zero)):
        if not isinstance(tensor, Tensor):
            raise PartsError(f"{name} is {tensor!r}, expected a tensor; pass the operands of layouts.coalesced_int4")
    return _op(x, qdata, scale, zero, bias, group_size, layout)


def _check(
    x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, group_size: int, layout: str
) -> None:
    check_tag(layout)
    check(qdata, scale, zero, group_size)
    n, k = qdata.shape[0], 2 * qdata.shape[1]
    if not x.dim() or x.shape[-1] != k or not x.is_floating_point():
        kind = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        raise PartsError(f"x is {kind}, expected floating-point [..., {k}] for a weight {[n, k]}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise PartsError(f"bias has shape {list(bias.shape)}, expected [{n}]; add a matrix to the result instead")


def _mm(
    x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, group_size: int, layout: str
) -> Tensor:
    _check(x, qdata, scale, zero, bias, group_size, layout)
    return run("int4_plain_mm", x.device, x, qdata, scale, zero, bias, group_size)


def _mm_fake(
    x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, group_size: int, layout: str
) -> Tensor:
    _check(x, qdata, scale, zero, bias, group_size, layout)
    return x.new_empty((*x.shape[:-1], qdata.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qdata, scale, zero, bias, group_size, _ = inputs
    ctx.save_for_backward(qdata, scale, zero)
    ctx.group_size, ctx.bias_dtype = group_size, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The gradients of x and bias; the weight is frozen."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _gradient_op(grad, *ctx.saved_tensors, ctx.group_size)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).float().sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None


def _gradient(grad: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    return run("int4_plain_mm_input_gradient", grad.device, grad, qdata, scale, zero, group_size)


def _gradient_fake(grad: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], 2 * qdata.shape[1]))


_gradient_op = declare(
    "int4_plain_mm_input_gradient(Tensor grad, Tensor qdata, Tensor scale, Tensor zero, int group_size) -> Tensor",
    _gradient,
    _gradient_fake,
)
_op = declare(
    "int4_plain_mm(Tensor x, Tensor qdata, Tensor scale, Tensor zero, Tensor? bias, int group_size, str layout)"
    " -> Tensor",
    _mm,
    _mm_fake,
    _backward,
    _setup,
)
