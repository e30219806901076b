"""linear for plain parts of awq_w4a16, wna16, nvfp4 and mxfp4: fused for few tokens, else on the decoded weight."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.triton import decoded_linear, device, linear_nibbles, words
from lowbit.backends.triton.linear_nibbles import E4M3, E8M0, PLAIN, WHOLE_ROW
from lowbit.dispatch import kernel
from lowbit.formats.awq_w4a16 import AwqW4A16
from lowbit.formats.base import Format
from lowbit.formats.parts import Dim, Parts
from lowbit.formats.wna16 import WNA16

FORMATS = ("awq_w4a16", "wna16", "nvfp4", "mxfp4")
FEW = 256  # tokens up to which the fused kernel runs; where the two cross on a GPU has not been measured
_STORED = {torch.float8_e4m3fn: E4M3, torch.uint8: E8M0}


def refuses(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    return device.refuses_product(x, bias=bias, **parts) or decoded_linear.refuses(fmt, x, parts, bias, "")


def linear_plain(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], plain parts, bias [N] or None -> [..., N] in the dtype of x."""
    group = _group(fmt, x.shape[-1])
    if not _is_fused(fmt, x, group, parts["qdata"]):
        return decoded_linear.product(fmt, x, parts, bias, "")
    scale, zero, offset = parts["scale"], parts.get("zero"), parts.get("zero_point")
    other = zero if offset is None else offset
    if other is not None and other.stride() != scale.stride():
        scale, other = scale.contiguous(), other.contiguous()
        zero, offset = (other, None) if offset is None else (None, other)
    alpha = parts.get("global_scale")
    if alpha is not None and getattr(fmt, "global_scale_divides", False):
        alpha = alpha.reciprocal()
    by_row = 1 if isinstance(fmt, AwqW4A16) else 0  # the axis of rows
    integers = isinstance(fmt, AwqW4A16 | WNA16)
    return linear_nibbles.product(
        x, parts["qdata"].view(torch.int32), scale.view(torch.uint8) if scale.dtype.itemsize == 1 else scale,
        group=group, steps=(scale.stride(by_row), scale.stride(1 - by_row)),
        code=words.INTEGERS if integers else words.E2M1, stored=_STORED.get(scale.dtype, PLAIN), zero=zero,
        offset=offset, alpha=alpha, bias=bias,
    )  # fmt: skip


def _is_fused(fmt: Format, x: Tensor, group: int, codes: Tensor) -> bool:
    """Whether the weight is decoded where it is multiplied."""
    target = device.target_of(x.device)
    if x.dtype == torch.float32 or (target.kind == "cuda" and not target.assembles):
        return False  # Triton multiplies these without tensor cores: for Turing it writes scalar code that spills
    few = x.numel() <= FEW * x.shape[-1]
    return few and getattr(fmt, "bits", 4) == 4 and linear_nibbles.fits(group, codes)


def _group(fmt: Format, k: int) -> int:
    """Columns of a group, `WHOLE_ROW` where there is one for all."""
    dims = next(rule for rule in fmt.rules if rule.name == "scale").dims
    group = next((dim.per for dim in dims if isinstance(dim, Dim) and dim.axis == "K"), k)
    return WHOLE_ROW if group >= k else group


for _name in FORMATS:
    kernel("linear", format=_name, backend="triton", refuses=refuses, tolerance=6e-3)(linear_plain)
