"""Stochastic rounding for the layouts of small floats: up or down at random, so that the mean is what it was.

This is how a LoRA is baked into a weight whose steps are wider than the change. The random numbers depend on the seed
alone, not on the device. comfy_kitchen's layouts take `stochastic_rounding` and round to nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats.base import Format
from lowbit.formats.fp8 import Fp8E4M3, Fp8E5M2
from lowbit.formats.mxfp8 import Mxfp8
from lowbit.formats.nvfp4 import Nvfp4
from lowbit.formats.parts import raw_bytes
from lowbit.layouts.scale_128x4 import swizzle
from lowbit.numerics.groups import pad_to
from lowbit.numerics.integers import uniform_noise
from lowbit.numerics.packing import swap_nibbles

_FP8: dict[torch.dtype, Format] = {torch.float8_e4m3fn: Fp8E4M3(), torch.float8_e5m2: Fp8E5M2()}


def fp8(x: Tensor, scale: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """x [..., K] -> float8 codes [..., K] of x / scale."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return _FP8[dtype].quantize(rows, params={"scale": scale.reshape(())}, seed=seed)["qdata"].reshape(x.shape)


def mxfp8(x: Tensor, padded: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes of the padded matrix and its swizzled scales, as `ops.quantize_mxfp8` stores them."""
    parts = Mxfp8().quantize(pad_to(x.detach(), *padded), seed=seed)
    return parts["qdata"], swizzle(raw_bytes(parts["scale"])).view(torch.float8_e8m0fnu)


def nvfp4(x: Tensor, scale: Tensor, padded: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes of the padded matrix and its swizzled scales, as `ops.quantize_nvfp4` stores them."""
    fmt, w, qdata, scales = Nvfp4(), pad_to(x.detach(), *padded), [], []
    fmt.check_weight(w, "weight")
    for start, stop in fmt.row_ranges(*padded):
        rows = fmt.prepared(w, start, stop, "weight")
        params = fmt.fit(rows, {"global_scale": scale.reshape(())})
        noise = uniform_noise(tuple(rows.shape), seed, start, w.device)
        qdata.append(fmt.pack(fmt.encode(rows, params, noise)))
        scales.append(raw_bytes(params["scale"]))
    return swap_nibbles(torch.cat(qdata)), swizzle(torch.cat(scales)).view(torch.float8_e4m3fn)
