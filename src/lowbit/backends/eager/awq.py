"""gemv_awq_w4a16 and the gradient of its input: the generic linear of the format, under the field's name."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.eager.linear_input_gradient import linear_input_gradient
from lowbit.dispatch import kernel
from lowbit.formats.awq_w4a16 import AwqW4A16


@kernel("gemv_awq_w4a16", backend="eager")
def gemv_awq_w4a16(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """x [..., K], bytes [N, K/2], scales and zeros [K/g, N], bias [N] or None -> [..., N] in the dtype of x."""
    parts = {"qdata": q, "scale": scales, "zero": zeros}
    return AwqW4A16(group_size=group).linear(x, parts, None if bias is None else bias.to(x.dtype))


@kernel("gemv_awq_w4a16_input_gradient", backend="eager")
def gemv_awq_w4a16_input_gradient(grad: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, group: int) -> Tensor:
    """grad [..., N], bytes [N, K/2], scales and zeros [K/g, N] -> [..., K] in the dtype of grad."""
    parts = {"qdata": q, "scale": scales, "zero": zeros}
    return linear_input_gradient(AwqW4A16(group_size=group), grad, parts, 2 * q.shape[1])
