"""The named float8 ops in pieces of 256 K values: no temporary grows with the tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.dispatch import kernel
from lowbit.numerics.floats import bytes_to_fp8, from_fp8, to_fp8
from lowbit.numerics.groups import row_chunks


@kernel("quantize_per_tensor_fp8", backend="eager")
def quantize_per_tensor_fp8(x: Tensor, scale: Tensor, output_type: torch.dtype) -> Tensor:
    """x [...], scale of one value -> codes [...]."""
    divisor = scale.float().reshape(()).clamp_min(torch.finfo(torch.float32).tiny)
    return _in_pieces(x, output_type, lambda piece, _: to_fp8(piece.float() / divisor, output_type))


@kernel("dequantize_per_tensor_fp8", backend="eager")
def dequantize_per_tensor_fp8(x: Tensor, scale: Tensor, output_type: torch.dtype) -> Tensor:
    """codes [...], scale of one value -> [...] in `output_type`."""
    factor = scale.float().reshape(())
    return _in_pieces(x, output_type, lambda piece, _: from_fp8(piece).mul_(factor))


@kernel("stochastic_rounding_fp8", backend="eager")
def stochastic_rounding_fp8(x: Tensor, rng: Tensor, output_type: torch.dtype) -> Tensor:
    """x [...], random bytes [...] -> codes [...]."""
    noise = rng.reshape(-1)
    return _in_pieces(x, output_type, lambda piece, part: bytes_to_fp8(piece, noise[part], output_type))


def _in_pieces(x: Tensor, dtype: torch.dtype, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Apply an element-wise function to flat pieces of x; it is given the piece and where it lies."""
    flat = x.reshape(-1)
    out = torch.empty(flat.shape, dtype=dtype, device=x.device)
    for start, stop in row_chunks(flat.shape[0], 1):
        part = slice(start, stop)
        out[part] = function(flat[part], part)
    return out.reshape(x.shape)
