"""linear for svdquant_w4a4 in the layout svdquant_fragments: one kernel quantizes and projects down, one multiplies.

What multiplies is the GPU's: products of int4 from sm_80 to sm_89, of warpgroups on sm_90, of int8 on what came later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cuda import hopper_check, svdquant_gemm_mma, svdquant_gemm_wgmma
from lowbit.backends.cuda.quantize_svdquant_w4a4 import quantized, refuses_operands
from lowbit.backends.gpu import every_one_has
from lowbit.dispatch import kernel
from lowbit.formats.parts import Parts
from lowbit.formats.svdquant_w4a4 import SvdquantW4A4
from lowbit.layouts import svdquant_fragments
from lowbit.numerics.int4_matmul import GELU_SHIFT

_OLDEST = (8, 0)  # the first with asynchronous copies
# Sums of the low rank that the product adds up: on Hopper a kernel before it does so once. Reasoned, not measured.
_LOW_SPLITS = {True: 16, False: 8}


def refuses(fmt: SvdquantW4A4, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    if why := refuses_operands(x, parts["smooth_factor"], parts["proj_down"]):
        return why
    for name, tensor in (("bias", bias), *parts.items()):
        if tensor is not None and tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}; move one of them"
    for name, tensor in (("bias", bias), ("proj_up", parts["proj_up"])):
        if tensor is not None and tensor.dtype != x.dtype:
            return f"{name} is {_kind(tensor)}, x {_kind(x)}; the kernel takes one dtype"
    (n, rank), (m, k) = parts["proj_up"].shape, (x.shape[:-1].numel(), x.shape[-1])
    gemm = svdquant_gemm_wgmma if _is_hopper(x.device) else svdquant_gemm_mma
    return gemm.refuses_product(m, n, k, rank)


def _packs() -> bool:
    """Whether this machine's GPUs can run it; without one nothing is known against it."""
    return every_one_has(_OLDEST)


def _is_hopper(device: torch.device) -> bool:
    """Whether products of warpgroups are there, and were found right."""
    return hopper_check.refuses(device) is None


@kernel(
    "linear", format="svdquant_w4a4", backend="cuda", layout=svdquant_fragments.NAME, refuses=refuses, tolerance=3e-3,
    packs=_packs,
)  # fmt: skip
def linear_svdquant_w4a4(fmt: SvdquantW4A4, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], parts in svdquant_fragments, bias [N] or None -> [..., N] in the dtype of x."""
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty((*x.shape[:-1], svdquant_fragments.rows(fmt, parts)))
    if not out.numel():
        return out
    hopper, unsigned = _is_hopper(x.device), fmt.act_unsigned
    gemm = svdquant_gemm_wgmma if hopper else svdquant_gemm_mma
    storage = "swizzled8" if hopper else svdquant_gemm_mma.storage_of(x.device)
    codes, scale, low = quantized(
        rows, parts["smooth_factor"], parts["proj_down"], storage=storage, tokens_multiple=gemm.TOKENS_MULTIPLE,
        unsigned=unsigned, shift=GELU_SHIFT if unsigned else 0.0, most_splits=_LOW_SPLITS[hopper],
    )  # fmt: skip
    operands = (codes, scale, low, parts["qdata"], parts["scale"], parts["proj_up"], bias, out)
    if hopper:
        svdquant_gemm_wgmma.product(*operands)
    else:
        svdquant_gemm_mma.product(*operands, storage=storage, unsigned=unsigned)
    return out


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
