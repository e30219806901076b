"""linear for int8 in plain parts.

With activations=int8 it is two kernels, also for a single token: one makes codes of the activations, one multiplies. A
single kernel would have every program of the product read all of its tokens before its first product, which only a few
tokens would bear.
"""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.triton import device, int8_gemm, int8_gemm_blocks, linear_int8_weights
from lowbit.backends.triton.quantize_rows import quantize_rows
from lowbit.dispatch import kernel
from lowbit.formats.int8 import Int8
from lowbit.formats.parts import Parts


def refuses(fmt: Int8, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    if fmt.activations == "none":
        return linear_int8_weights.refuses(fmt, x, parts, bias)
    if fmt.granularity == "block" and (why := int8_gemm_blocks.refuses_block(fmt.block_size[1])):
        return why
    return (
        device.refuses_product(x, bias=bias, **parts)
        or int8_gemm.refuses(x, x.shape[-1])
        or refuses_gaps(parts["qdata"])
    )


def refuses_gaps(codes: Tensor) -> str | None:
    """Why codes that do not lie side by side cannot be read, or None."""
    return None if codes.is_contiguous() else "codes with gaps between them; call contiguous() once, at load"


@kernel("linear", format="int8", backend="triton", refuses=refuses, tolerance=3e-3)
def linear_int8(fmt: Int8, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], plain parts, bias [N] or None -> [..., N] in the dtype of x.

    With activations=int8, no rotation and a scale a row or tensor the result is eager's, bit for bit.
    """
    if fmt.activations == "none":
        return linear_int8_weights.linear(fmt, x, parts, bias)
    qdata, scale = parts["qdata"], parts["scale"].contiguous()
    bias = None if bias is None else bias.contiguous()
    if fmt.granularity == "block":
        codes, row = quantize_rows(x, blocks=fmt.block_size[1])
        out = int8_gemm_blocks.product(codes, row, qdata, scale, fmt.block_size, bias, x.dtype)
    else:
        codes, row = quantize_rows(x, rotation=fmt.rotation)
        out = int8_gemm.product(codes, row, qdata, scale, bias, x.dtype)
    return out.reshape(*x.shape[:-1], qdata.shape[0])
