"""linear for fp8_e4m3 with activations=fp8: rows of x are rounded by one kernel, codes are multiplied by another.

Many tokens go to PyTorch's own product of scaled codes where it takes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.triton import device, fp8_gemm, quantize_rows_fp8
from lowbit.formats.fp8 import Fp8E4M3
from lowbit.formats.parts import Parts

_MANY = 1024
"""Tokens from which PyTorch's product is taken: not measured yet."""
_MULTIPLE = 16  # of rows and columns that PyTorch's product takes


def refuses(fmt: Fp8E4M3, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    if not parts["qdata"].is_contiguous() or not parts["scale"].is_contiguous():
        return "parts with gaps between their elements; the kernel reads whole rows (.contiguous() closes them)"
    return device.refuses_product(x, bias=bias, **parts)


def linear(fmt: Fp8E4M3, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], plain parts, bias [N] or None -> [..., N] in the dtype of x."""
    rows, weight = x.reshape(-1, x.shape[-1]).contiguous(), parts["qdata"]
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if not out.numel():
        return out
    bias = None if bias is None else bias.contiguous()
    tile = fmt.block_size if fmt.granularity == "block" else None
    codes, scale = quantize_rows_fp8.quantize(rows, tile[1] if tile else rows.shape[1])
    if rows.shape[0] >= _MANY and refuses_scaled(fmt, x, parts, bias) is None:
        return scaled(codes, scale, weight, parts["scale"], bias).reshape(out.shape)
    fp8_gemm.product(codes, scale, weight, parts["scale"], tile, bias, out)
    return out


def refuses_scaled(fmt: Fp8E4M3, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why PyTorch's product cannot take this call, or None."""
    n, k = parts["qdata"].shape
    if not fp8_gemm.multiplies_e4m3(device.target_of(x.device)):
        return "the device does not multiply e4m3 codes"
    if fmt.granularity == "block":
        return "scales of blocks; PyTorch's product takes scales of rows"
    if x.dtype != torch.bfloat16 or (bias is not None and bias.dtype != torch.bfloat16):
        return "x and the bias have to be bfloat16"
    if n % _MULTIPLE or k % _MULTIPLE:
        return f"a weight {[n, k]}; PyTorch's product takes multiples of {_MULTIPLE}"
    return None


def scaled(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """codes [M, K], scale [1, M], weight [N, K], its scale [] or [N, 1], bias [N] bfloat16 -> bfloat16 [M, N].

    Without `use_fast_accum`, so that PyTorch carries sums over to float32 registers, as `fp8_gemm` does.
    """
    columns = weight_scale.reshape(1, -1).expand(1, weight.shape[0]).contiguous()
    product = torch._scaled_mm  # noqa: SLF001  (no public op multiplies fp8 codes)
    return product(codes, weight.t(), scale.t(), columns, bias, out_dtype=torch.bfloat16)
