"""Packed 4-bit codes of activations, as the op `quantize_svdquant_w4a4` returns them, in a kernel's own storage."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cuda import kernels
from lowbit.backends.cuda.quantize_svdquant_w4a4 import STORAGES
from lowbit.numerics.groups import ceil_div, round_up

_SOURCE = "svdquant_storage.cu"
_DTYPES = {torch.float32: "kFloat32", torch.bfloat16: "kBFloat16Type", torch.float16: "kFloat16Type"}
_TILE = 16  # tokens
_THREADS = 256
_ALIGNMENT = 16  # bytes of codes that a thread loads


def stored(act: Tensor, scales: Tensor, *, storage: str, tokens_multiple: int, unsigned: bool) -> tuple[Tensor, Tensor]:
    """Bytes [M, K/2] and scales [K/64, M] -> int8 codes of Mp tokens in `storage`, float32 scales [K/64, Mp].

    Mp is M > 0 rounded up to `tokens_multiple`, itself a multiple of 16. Shapes of codes as `quantized` has them.
    """
    groups, m = scales.shape
    padded = round_up(m, tokens_multiple)
    tile = {"fragments4": (padded // _TILE, 512), "fragments8": (2 * padded // _TILE, 512), "swizzled8": (padded, 64)}
    codes = torch.empty((groups, *tile[storage]), dtype=torch.int8, device=act.device)
    scale = torch.empty((groups, padded), dtype=torch.float32, device=act.device)
    act = act.contiguous()
    if not act.is_meta and act.data_ptr() % _ALIGNMENT:
        act = act.clone()
    name = f"lowbit::store_codes<lowbit::{STORAGES[storage]}, {str(unsigned).lower()}, lowbit::{_DTYPES[scales.dtype]}>"
    kernels.launch(
        _SOURCE, name, act.device, ceil_div(2 * groups * padded, _THREADS), _THREADS,
        [act, scales.contiguous(), codes, scale, m, padded, groups],
    )  # fmt: skip
    return codes, scale
