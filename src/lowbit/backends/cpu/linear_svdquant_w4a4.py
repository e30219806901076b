"""linear for svdquant_w4a4 and the two named ops it consists of: 4-bit activations, weights that stay 4 bits."""

from __future__ import annotations

from operator import itemgetter

import torch
from torch import Tensor

from lowbit.backends.cpu import native
from lowbit.backends.cpu.operands import DTYPES, Operands, address, dtype_code, refuses_input
from lowbit.dispatch import kernel
from lowbit.formats.parts import Parts
from lowbit.formats.svdquant_w4a4 import SvdquantW4A4
from lowbit.layouts import rows16, svdquant_tiles as tiles
from lowbit.numerics.groups import round_up
from lowbit.numerics.int4_matmul import GELU_SHIFT, GROUP

_ARRANGEMENTS = {rows16.NAME: 0, "": 1, tiles.NAME: 2}  # enum Arrangement
_PARTS = itemgetter("qdata", "scale", "smooth_factor", "proj_down", "proj_up")
_WORD = 4  # bytes
TOLERANCE = 3e-3  # codes and integer sums are eager's; what differs is the order of float32 sums before the last cast


def refuses(fmt: SvdquantW4A4, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    if parts["qdata"].data_ptr() % _WORD:
        return _refuses_words("qdata", parts["qdata"])
    return refuses_input(fmt, x, parts, bias)


def _refuses_words(name: str, codes: Tensor) -> str | None:
    if codes.data_ptr() % _WORD:
        return f"{name} begins at an address that is no multiple of {_WORD}; clone it"
    return None


def _refuses_dtypes(**tensors: Tensor | None) -> str | None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            return f"{name} is {kind}; the kernels take float32, bfloat16 and float16"
    return None


def _linear(fmt: SvdquantW4A4, x: Tensor, parts: Parts, bias: Tensor | None, layout: str) -> Tensor:
    operands = Operands(x, rows16.rows(fmt, parts) if layout == rows16.NAME else fmt.rows_of(parts), bias)
    words, scale, smooth, down, up = map(Tensor.contiguous, _PARTS(parts))
    native.module().linear_svdquant_w4a4(
        *operands.rows, down.shape[1], GELU_SHIFT if fmt.act_unsigned else 0.0, fmt.act_unsigned, smooth.data_ptr(),
        DTYPES[smooth.dtype], down.data_ptr(), DTYPES[down.dtype], _ARRANGEMENTS[layout], words.data_ptr(),
        words.stride(0), scale.data_ptr(), DTYPES[scale.dtype], up.data_ptr(), DTYPES[up.dtype], *operands.bias_out,
        native.threads(),
    )  # fmt: skip
    return operands.out


@kernel("linear", format="svdquant_w4a4", backend="cpu", layout=rows16.NAME, refuses=refuses, tolerance=TOLERANCE)
def linear_svdquant_w4a4(fmt: SvdquantW4A4, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], parts in rows16, bias [N] or None -> [..., N] in the dtype of x."""
    return _linear(fmt, x, parts, bias, rows16.NAME)


@kernel("linear", format="svdquant_w4a4", backend="cpu", refuses=refuses, tolerance=TOLERANCE)
def linear_svdquant_w4a4_plain(fmt: SvdquantW4A4, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """The same for plain parts, whose words are interleaved on the way, for all tokens at once."""
    return _linear(fmt, x, parts, bias, "")


@kernel("linear", format="svdquant_w4a4", backend="cpu", layout=tiles.NAME, refuses=refuses, tolerance=TOLERANCE)
def linear_svdquant_w4a4_tiles(fmt: SvdquantW4A4, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """The same for comfy-kitchen's tiles."""
    return _linear(fmt, x, parts, bias, tiles.NAME)


def refuses_quantize(
    x: Tensor, smooth: Tensor, down: Tensor, pad_size: int, unsigned: bool, lora_x: Tensor | None
) -> str | None:
    """Why this call cannot run here, or None."""
    return _refuses_dtypes(x=x, smooth=smooth, lora_down=down, lora_x=lora_x)


@kernel("quantize_svdquant_w4a4", backend="cpu", refuses=refuses_quantize, tolerance=1e-5)
def quantize_svdquant_w4a4(
    x: Tensor, smooth: Tensor, down: Tensor, pad_size: int, unsigned: bool, lora_x: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] -> bytes [Mp, K/2], scales [K/64, Mp] in the dtype of x, low-rank activations float32 [Mp, R]."""
    (m, k), rank = x.shape, down.shape[1]
    padded = round_up(m, pad_size)
    codes = torch.empty((padded, k // 2), dtype=torch.int8, device=x.device)
    by_row = torch.empty((padded, k // GROUP), dtype=torch.float32, device=x.device)
    low = torch.empty((padded, rank), dtype=torch.float32, device=x.device)
    for made in (codes, by_row, low):
        made[m:] = 0
    rows, factor, projection = x.contiguous(), smooth.contiguous(), down.contiguous()
    raw = rows if lora_x is None else lora_x.contiguous()
    native.module().quantize_svdquant_w4a4(
        rows.data_ptr(), dtype_code(rows), raw.data_ptr(), dtype_code(raw), m, k, rank, unsigned, factor.data_ptr(),
        dtype_code(factor), projection.data_ptr(), dtype_code(projection), codes.data_ptr(), by_row.data_ptr(),
        low.data_ptr(), native.threads(),
    )  # fmt: skip
    return codes, by_row.t().to(x.dtype).contiguous(), low


def refuses_mm(
    act: Tensor, wgt: Tensor, ascales: Tensor, wscales: Tensor, low: Tensor, up: Tensor, bias: Tensor | None,
    unsigned: bool,
) -> str | None:  # fmt: skip
    """Why this call cannot run here, or None."""
    return _refuses_words("wgt", wgt) or _refuses_dtypes(wscales=wscales, lora_up=up, bias=bias)


@kernel("scaled_mm_svdquant_w4a4", backend="cpu", refuses=refuses_mm, tolerance=TOLERANCE)
def scaled_mm_svdquant_w4a4(
    act: Tensor, wgt: Tensor, ascales: Tensor, wscales: Tensor, low: Tensor, up: Tensor, bias: Tensor | None,
    unsigned: bool,
) -> Tensor:  # fmt: skip
    """bytes [M, K/2] and their scales, a plain or tiled weight and its scales, low-rank factors -> [M, N] as `up`."""
    tiled = wgt.dim() == 4
    m, k, n, rank = act.shape[0], 2 * act.shape[1], wgt.shape[0] * (tiles.ROWS if tiled else 1), up.shape[1]
    out = torch.empty((m, n), dtype=up.dtype, device=act.device)
    codes, words, scale, raised = act.contiguous(), wgt.contiguous(), wscales.contiguous(), up.contiguous()
    by_row, factors = ascales.t().float().contiguous(), low.float().contiguous()
    added = None if bias is None else bias.contiguous()
    native.module().scaled_mm_svdquant_w4a4(
        codes.data_ptr(), m, n, k, rank, unsigned, by_row.data_ptr(), factors.data_ptr(),
        _ARRANGEMENTS[tiles.NAME if tiled else ""], words.data_ptr(), scale.data_ptr(), dtype_code(scale),
        raised.data_ptr(), dtype_code(raised), address(added), dtype_code(added), out.data_ptr(), dtype_code(out),
        native.threads(),
    )  # fmt: skip
    return out
