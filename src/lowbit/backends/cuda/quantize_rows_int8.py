"""Activations to int8, a scale a row: x is read once, activated and rotated in registers. `quantize_int8_rowwise`.

    scale = absmax / 127, at least 1e-30        code = value / scale, rounded half to even

The value may be an activation of x (GELU, or SiLU(gate) * up), rounded to the dtype of x as a kernel of its own would
round it, and may be rotated in groups. Codes and scales are eager's, bit for bit, but for the order of a rotation's
sums and the last bits of an activation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cuda import device_check, kernels
from lowbit.dispatch import kernel
from lowbit.numerics.int8_matmul import MIN_ACTIVATION_SCALE
from lowbit.numerics.rotations import REGULAR_SIZES

_SOURCE = "quantize_rows_int8.cu"
DTYPES = {torch.float32: "kFloat32", torch.bfloat16: "kBFloat16Type", torch.float16: "kFloat16Type"}
ACTIVATIONS = {None: "kNone", "gelu": "kGelu", "gelu_tanh": "kGeluTanh", "swiglu": "kSwiGLU"}
PIECE = 1024  # columns of a warp
_MOST_WARPS = 20  # of a block, so that a row of as many pieces is read once
_MOST_WARPS_OF_WIDE = 16  # of float32 and of SwiGLU, which need more registers
_WARPS_OF_LONG_ROWS = 16
_WARPS = 4  # that a block has at least
_ALIGNMENT = 16  # bytes of x that a lane loads at a time
_TOGETHER = 8  # columns of a lane that lie side by side


def refuses(x: Tensor, rotation: int, seed: int) -> str | None:
    """Why this call cannot run here, or None."""
    if seed > 0:
        return "stochastic rounding; the kernel rounds to the nearest code"
    return refuses_rows(x, rotation)


def refuses_rows(x: Tensor, rotation: int) -> str | None:
    """Why rows like these cannot be quantized here, or None."""
    if why := device_check.refuses(x.device):
        return why
    if x.dtype not in DTYPES:
        return f"x is {str(x.dtype).removeprefix('torch.')}; the kernel takes float32, bfloat16 and float16"
    if rotation and rotation not in REGULAR_SIZES:
        return f"rotation groups of {rotation}; the kernel rotates {', '.join(map(str, REGULAR_SIZES))}"
    return None


@kernel("quantize_int8_rowwise", backend="cuda", refuses=refuses)
def quantize_int8_rowwise(x: Tensor, rotation: int, seed: int) -> tuple[Tensor, Tensor]:
    """x [..., K] -> codes [..., K], scales [..., 1]; the groups of x are rotated first unless `rotation` is 0."""
    codes, scales = quantize_rows(x, rotation=rotation)
    return codes.reshape(x.shape), scales.reshape(*x.shape[:-1], 1)


def quantize_rows(x: Tensor, *, rotation: int = 0, activation: str | None = None) -> tuple[Tensor, Tensor]:
    """x [..., K] (with swiglu [..., 2K], of gate and up) -> int8 codes [M, K] and float32 scales [M, 1].

    rotation: 0, or one of `REGULAR_SIZES` that divides K. activation: one of `ACTIVATIONS`, applied first.
    """
    columns, m = x.shape[-1], x.shape[:-1].numel()
    k = columns // 2 if activation == "swiglu" else columns
    rows = x.reshape(m, columns).contiguous()
    codes = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scales = torch.empty((m, 1), dtype=torch.float32, device=x.device)
    if not m or not k:
        return codes, scales.fill_(MIN_ACTIVATION_SCALE)
    aligned = k % _TOGETHER == 0
    if aligned and rows.device.type != "meta" and rows.data_ptr() % _ALIGNMENT:
        rows = rows.clone()
    pieces = -(-k // PIECE)
    wide = x.dtype == torch.float32 or activation == "swiglu"
    twice = pieces > (_MOST_WARPS_OF_WIDE if wide else _MOST_WARPS)
    warps = _WARPS_OF_LONG_ROWS if twice else pieces
    rows_a_block = max(1, _WARPS // warps)
    name = (
        f"lowbit::quantize_rows_int8<lowbit::{DTYPES[x.dtype]}, lowbit::{ACTIVATIONS[activation]}, {rotation}, "
        f"{str(aligned).lower()}, {str(twice).lower()}>"
    )
    kernels.launch(
        _SOURCE, name, x.device, -(-m // rows_a_block), 32 * warps * rows_a_block,
        [rows, codes, scales, m, k, warps, rows_a_block],
    )  # fmt: skip
    return codes, scales
