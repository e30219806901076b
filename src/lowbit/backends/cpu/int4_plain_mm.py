"""int4_plain_mm: 4-bit weights in plain rows times activations that are rounded to int8 by blocks of 32."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends import coalesced_linear
from lowbit.backends.cpu import native
from lowbit.backends.cpu.operands import DTYPES, Operands
from lowbit.dispatch import kernel

_TOLERANCE = 1e-3


def refuses(x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, group_size: int) -> str | None:
    """Why this call cannot run here, or None."""
    for name, tensor in (("x", x), ("scale", scale), ("the bias", bias)):
        if tensor is not None and tensor.dtype not in DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            return f"{name} is {kind}; the kernel takes float32, bfloat16 and float16"
    for name, tensor in (("qdata", qdata), ("scale", scale), ("zero", zero), ("the bias", bias)):
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} has gaps between its elements; the kernel reads contiguous tensors: call .contiguous() once"
    return None


@kernel("int4_plain_mm", backend="cpu", refuses=refuses, tolerance=_TOLERANCE)
def int4_plain_mm(
    x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """x [..., K], bytes [N, K/2], scale and zero [N, K/g], bias [N] or None -> [..., N] in the dtype of x."""
    operands = Operands(x, qdata.shape[0], bias)
    native.module().int4_plain_mm(
        *operands.rows, qdata.data_ptr(), scale.data_ptr(), zero.data_ptr(), DTYPES[scale.dtype], group_size,
        *operands.bias_out, native.threads(),
    )  # fmt: skip
    return operands.out


coalesced_linear.serve("cpu", int4_plain_mm, refuses, tolerance=_TOLERANCE)
