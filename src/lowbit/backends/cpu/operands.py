"""What every launcher does before it calls a kernel: the activations as rows, dtypes as the kernels number them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from lowbit.errors import UnsupportedError
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of native/simd.h


class Operands:
    """x [..., K], bias [N] or None, and room for the result [..., N] of a linear, as its kernel is told of them.

    It holds what it points into, so it has to outlive the call. One object rather than a function for each of these:
    see `generic.multiply` for what a call of ours costs there.
    """

    __slots__ = ("_held", "bias_out", "k", "m", "out", "rows")

    rows: tuple[int, int, int, int, int]
    """What a kernel takes first: the address and the dtype of x as rows without gaps, then M, N and K."""
    bias_out: tuple[int, int, int]
    """The address and the dtype of the bias, both 0 for none, and the address of the result."""

    def __init__(self, x: Tensor, n: int, bias: Tensor | None, dtype: torch.dtype | None = None) -> None:
        """`dtype` is that of the result, by default the one of x. Raises `UnsupportedError` for freed memory."""
        *leading, self.k = x.shape
        self.m = prod(leading)
        self.out = x.new_empty(*leading, n) if dtype is None else x.new_empty(*leading, n, dtype=dtype)
        x = x.contiguous()
        self.rows = (x.data_ptr(), DTYPES[x.dtype], self.m, n, self.k)
        if bias is None:
            self.bias_out = (0, 0, self.out.data_ptr())
        else:
            bias = bias.contiguous()
            self.bias_out = (bias.data_ptr(), DTYPES[bias.dtype], self.out.data_ptr())
        if not (self.rows[0] and (self.bias_out[0] or bias is None)):
            for name, tensor in (("x", x), ("the bias", bias)):  # a kernel would take a bias at 0 for none
                if tensor is not None and tensor.numel() and not tensor.data_ptr():
                    raise UnsupportedError(f"{name} has no memory, which was freed; bring it back before it is used")
        self._held = (x, bias)


def refuses_input(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why no kernel here takes these activations or this bias, or None."""
    if x.dtype in DTYPES and (bias is None or bias.dtype in DTYPES):
        return None
    for name, tensor in (("x", x), ("the bias", bias)):
        if tensor is not None and tensor.dtype not in DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            return f"{name} is {kind}; the kernels take float32, bfloat16 and float16"
    return None


def refuses_result(dtype: torch.dtype) -> str | None:
    """Why no decoder here gives this dtype, or None."""
    if dtype in DTYPES:
        return None
    return f"the result is {str(dtype).removeprefix('torch.')}; the decoder gives float32, bfloat16 and float16"


def check_found(indices: Tensor, wrong: int, n: int) -> None:
    """Raise `IndexError` where a kernel met an index that names none of n rows: `wrong`, its place; -1 for none."""
    if wrong >= 0:
        index = int(indices.reshape(-1)[wrong])
        raise IndexError(f"index out of range: {index} names no row of a table with {n}")


def address(tensor: Tensor | None) -> int:
    """Where a tensor without gaps begins; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_code(tensor: Tensor | None) -> int:
    """The number of a tensor's dtype; any for none."""
    return 0 if tensor is None else DTYPES[tensor.dtype]


def refuses_unlike(shape: Sequence[int], dtype: torch.dtype = torch.float32, /, **tensors: Tensor) -> str | None:
    """Why operands that a kernel reads by their addresses are not of this shape and dtype on a CPU, or None."""
    for name, tensor in tensors.items():
        if tensor.dtype != dtype or tensor.device.type != "cpu" or tuple(tensor.shape) != tuple(shape):
            found, wanted = (str(kind).removeprefix("torch.") for kind in (tensor.dtype, dtype))
            return f"{name} is {found} {list(tensor.shape)} on {tensor.device}, not {wanted} {list(shape)} on a CPU"
    return None
