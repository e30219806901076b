"""The named op `scaled_mm_svdquant_w4a4`: packed activations are put into the tensor cores' order, then multiplied.

Weights are read as they come, plain or in comfy-kitchen's tiles: from shared memory a lane gets its words of 4 bytes by
ldmatrix, which costs no more instructions than the layout svdquant_fragments, of which this op knows nothing. Hopper's
own products want that layout, so there, too, a warp's own are used.
"""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cuda import device_check
from lowbit.backends.cuda.svdquant_gemm_mma import DTYPES, TOKENS_MULTIPLE, product, refuses_product, storage_of
from lowbit.backends.cuda.svdquant_storage import stored
from lowbit.dispatch import kernel
from lowbit.layouts import svdquant_tiles as tiles

_OLDEST = (8, 0)  # the first with asynchronous copies


def refuses(
    act: Tensor, wgt: Tensor, ascales: Tensor, wscales: Tensor, low: Tensor, up: Tensor, bias: Tensor | None,
    unsigned: bool,
) -> str | None:  # fmt: skip
    """Why this call cannot run here, or None."""
    if why := device_check.refuses(act.device, _OLDEST):
        return why
    floats = {"ascales": ascales, "wscales": wscales, "lora_act_in": low, "lora_up": up, "bias": bias}
    for name, tensor in {"wgt": wgt, **floats}.items():
        if tensor is not None and tensor.device != act.device:
            return f"{name} is on {tensor.device}, act on {act.device}; move one of them"
    for name, tensor in floats.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            return f"{name} is {kind}; the kernel takes float32, bfloat16 and float16"
    return refuses_product(act.shape[0], _rows(wgt), 2 * act.shape[1], low.shape[1])


@kernel("scaled_mm_svdquant_w4a4", backend="cuda", refuses=refuses, tolerance=3e-3)
def scaled_mm_svdquant_w4a4(
    act: Tensor, wgt: Tensor, ascales: Tensor, wscales: Tensor, low: Tensor, up: Tensor, bias: Tensor | None,
    unsigned: bool,
) -> Tensor:  # fmt: skip
    """bytes [M, K/2] and their scales, a plain or tiled weight and its scales, low-rank factors -> [M, N] as `up`."""
    out = up.new_empty((act.shape[0], _rows(wgt)))
    if not out.numel():
        return out
    storage = storage_of(act.device)
    codes, scale = stored(act, ascales, storage=storage, tokens_multiple=TOKENS_MULTIPLE, unsigned=unsigned)
    product(
        codes, scale, low.float().unsqueeze(0), wgt, wscales, up, bias, out, storage=storage, unsigned=unsigned
    )  # fmt: skip
    return out


def _rows(wgt: Tensor) -> int:
    return wgt.shape[0] * (tiles.ROWS if wgt.dim() == 4 else 1)
