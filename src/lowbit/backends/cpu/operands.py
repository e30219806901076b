"""What every launcher does before it calls a kernel: the activations as rows, dtypes as the kernels number them."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats.base import Format
from lowbit.formats.parts import Parts

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of native/simd.h


def refuses_input(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why no kernel here takes these activations or this bias, or None."""
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


def rows_of(x: Tensor) -> Tensor:
    """x [..., K] as rows without gaps: [M, K]."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def output_of(x: Tensor, n: int) -> Tensor:
    """Room for the product of x [..., K] with n rows of a weight: [..., n] in the dtype of x."""
    return x.new_empty((*x.shape[:-1], n))


def address(tensor: Tensor | None) -> int:
    """Where a tensor without gaps begins; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_code(tensor: Tensor | None) -> int:
    """The number of a tensor's dtype; any for none."""
    return 0 if tensor is None else DTYPES[tensor.dtype]
