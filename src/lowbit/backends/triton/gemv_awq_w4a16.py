"""gemv_awq_w4a16 and the gradient of its input: the linear of the format, under the field's name."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.triton import decoded_linear, linear_plain
from lowbit.dispatch import kernel
from lowbit.formats.awq_w4a16 import AwqW4A16


def refuses(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, group: int) -> str | None:
    """Why this call cannot run here, or None."""
    return linear_plain.refuses(AwqW4A16(group_size=group), x, {"qdata": q, "scale": scales, "zero": zeros}, bias)


@kernel("gemv_awq_w4a16", backend="triton", refuses=refuses, tolerance=6e-3)
def gemv_awq_w4a16(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """x [..., K], bytes [N, K/2], scales and zeros [K/g, N], bias [N] or None -> [..., N] in the dtype of x."""
    parts = {"qdata": q, "scale": scales, "zero": zeros}
    return linear_plain.linear_plain(AwqW4A16(group_size=group), x, parts, bias)


def refuses_gradient(grad: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, group: int) -> str | None:
    """Why this call cannot run here, or None."""
    return refuses(grad, q, scales, zeros, None, group)


@kernel("gemv_awq_w4a16_input_gradient", backend="triton", refuses=refuses_gradient, tolerance=6e-3)
def gemv_awq_w4a16_input_gradient(grad: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, group: int) -> Tensor:
    """grad [..., N], bytes [N, K/2], scales and zeros [K/g, N] -> [..., K] in the dtype of grad."""
    parts = {"qdata": q, "scale": scales, "zero": zeros}
    return decoded_linear.input_gradient(AwqW4A16(group_size=group), grad, parts, 2 * q.shape[1], "")
