"""int4_plain_mm for up to 8 tokens: the weights are read once, four products an instruction (W4A8 decode)."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cuda import kernels
from lowbit.backends.gpu import target_of
from lowbit.dispatch import kernel
from lowbit.numerics.w4a8 import BLOCK

_SOURCE = "int4_plain_mm.cu"
_TOKENS = 8
_OLDEST = (7, 5)
_DTYPES = {torch.float32: "kFloat32", torch.bfloat16: "kBFloat16Type", torch.float16: "kFloat16Type"}
_WARPS = 4  # of a block
_ROWS = {1: 4, 2: 4, 4: 2, 8: 2}  # of a warp, by tokens: more of them share a load of x, fewer need fewer registers


def refuses(x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, group_size: int) -> str | None:
    """Why this call cannot run here, or None."""
    m, target = x.shape[:-1].numel(), target_of(x.device)
    if m > _TOKENS:
        return f"{m} tokens; the kernel takes up to {_TOKENS}"
    if target.kind != "cuda":
        return "the GPU is not one of NVIDIA's"
    if target.capability < _OLDEST:
        return f"the GPU has compute capability {'.'.join(map(str, target.capability))}; the kernel needs 7.5 or later"
    if group_size < BLOCK:
        return f"groups of {group_size} columns; the kernel takes {BLOCK} and more"
    for name, tensor in (("x", x), ("scale", scale), ("zero", zero), ("bias", bias)):
        if tensor is not None and tensor.dtype not in _DTYPES:
            return f"{name} is {_kind(tensor)}; the kernel takes float32, bfloat16 and float16"
    if bias is not None and bias.dtype != x.dtype:
        return f"the bias is {_kind(bias)}, x {_kind(x)}; the kernel takes one dtype"
    return _refuses_storage(x, qdata=qdata, scale=scale, zero=zero, bias=bias)


def _refuses_storage(x: Tensor, **others: Tensor | None) -> str | None:
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}; move one of them"
        if not tensor.is_contiguous() or (tensor.device.type != "meta" and name == "qdata" and tensor.data_ptr() % 16):
            return f"{name} has gaps, or does not begin at a multiple of 16 bytes; clone it once, at load"
    return None


@kernel("int4_plain_mm", backend="cuda", refuses=refuses, tolerance=3e-3)
def int4_plain_mm(
    x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """x [..., K] of at most 8 tokens, bytes [N, K/2], scale and zero [N, K/g], bias [N] or None -> [..., N] as x."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    (m, k), n = rows.shape, qdata.shape[0]
    out = x.new_empty((*x.shape[:-1], n))
    if not m or not n:
        return out
    blocks, kind = k // BLOCK, f"lowbit::{_DTYPES[x.dtype]}"
    codes = torch.empty((m, k), dtype=torch.int8, device=x.device)
    steps = torch.empty((m, blocks, 2), dtype=torch.float32, device=x.device)
    arguments: list[Tensor | int] = [rows, codes, steps, m * blocks]
    kernels.launch(_SOURCE, f"lowbit::quantize_blocks<{kind}>", x.device, -(-m * blocks // 8), 256, arguments)
    tokens = 1 << (m - 1).bit_length()
    name = f"lowbit::int4_rows<{kind}, lowbit::{_DTYPES[scale.dtype]}, {tokens}, {_ROWS[tokens]}, {_WARPS}>"
    kernels.launch(
        _SOURCE, name, x.device, -(-n // (_ROWS[tokens] * _WARPS)), 32 * _WARPS,
        [codes, steps, qdata, scale, zero, bias, out, m, n, blocks, group_size // BLOCK],
    )  # fmt: skip
    return out


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
