"""linear for svdquant_w4a4: one kernel quantizes and projects down, one multiplies and projects up."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.triton import device
from lowbit.backends.triton.quantize_svdquant_w4a4 import MOST_SPLITS, quantized
from lowbit.backends.triton.svdquant_gemm import TOLERANCE, grouped_product, low_splits
from lowbit.dispatch import ANY_LAYOUT, kernel
from lowbit.formats.parts import Parts
from lowbit.formats.svdquant_w4a4 import SvdquantW4A4
from lowbit.layouts import svdquant_tiles as tiles
from lowbit.numerics.int4_matmul import GELU_SHIFT


def refuses(fmt: SvdquantW4A4, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    return device.refuses_product(x, bias=bias, **parts)


@kernel("linear", format="svdquant_w4a4", backend="triton", refuses=refuses, tolerance=TOLERANCE)
def linear_svdquant_w4a4(fmt: SvdquantW4A4, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], plain parts or tiles, bias [N] or None -> [..., N] in the dtype of x."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = x.new_empty((*x.shape[:-1], fmt.rows_of(parts)))
    if not out.numel():
        return out
    (m, k), n = rows.shape, out.shape[-1]
    codes, scale, low = quantized(
        rows, parts["smooth_factor"], parts["proj_down"], unsigned=fmt.act_unsigned,
        shift=GELU_SHIFT if fmt.act_unsigned else 0.0,
        most_splits=min(MOST_SPLITS, low_splits(m, n, k, device.target_of(x.device))),
    )  # fmt: skip
    weight, weight_scale, up = (parts[name].contiguous() for name in ("qdata", "scale", "proj_up"))
    grouped_product(codes, scale, low, weight, weight_scale, up, bias, out)
    return out


@kernel("linear", format="svdquant_w4a4", backend="triton", layout=tiles.NAME, refuses=refuses, tolerance=TOLERANCE)
def linear_svdquant_w4a4_tiles(fmt: SvdquantW4A4, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """The same for comfy-kitchen's tiles."""
    return linear_svdquant_w4a4(fmt, x, parts, bias)


@kernel("linear", format="svdquant_w4a4", backend="triton", layout=ANY_LAYOUT, refuses=refuses, tolerance=TOLERANCE)
def linear_svdquant_w4a4_unpacked(fmt: SvdquantW4A4, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """The same for a weight that was packed for a kernel that refuses this call, such as one with float32 x."""
    return linear_svdquant_w4a4(fmt, x, parts, bias)
