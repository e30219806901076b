"""linear of 4-bit codes and activations of 16 bits for any number of tokens: which kernel multiplies.

awq_w4a16, wna16 without zero points, nvfp4 and mxfp4 in the layout words128; awq_w4a16 in plain bytes, too, for
gemv_awq_w4a16 and for a weight that was moved to the GPU as files hold it. Up to 8 tokens `words_gemv` reads the weight
once; more are the tensor cores' of a warpgroup on Hopper (`words_gemm_wgmma`), and of a warp elsewhere and for plain
bytes (`words_gemm_mma`): there no scale is rounded, and the result is, once. For many tokens the weight may be decoded
in pieces instead (`words_decoded`), rounded to the dtype of x: scaling sums, and adding zeros to them, grows with the
tokens, decoding does not.
"""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cuda import hopper_check, words_decoded, words_gemm_mma, words_gemm_wgmma, words_gemv
from lowbit.backends.cuda.words_operands import operands_of, refuses, refuses_plain, rows_of
from lowbit.backends.gpu import every_one_has
from lowbit.dispatch import kernel
from lowbit.formats.awq_w4a16 import AwqW4A16
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts import words128

# Tokens from which decoding the weight pays; on Hopper, and where no zeros are added, it is not expected to. Reasoned
# from instructions and bytes, not measured.
MANY = 2048
MANY_OF_ONE_PRODUCT = 1 << 30


def linear(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], parts in words128, bias [N] or None -> [..., N] in the dtype of x."""
    return _linear(fmt, x, parts, bias, plain=False)


@kernel("linear", format="awq_w4a16", backend="cuda", refuses=refuses_plain, tolerance=3e-3)
def linear_plain(fmt: AwqW4A16, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """The same for plain parts of awq_w4a16."""
    return _linear(fmt, x, parts, bias, plain=True)


def _linear(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None, *, plain: bool) -> Tensor:
    rows, operands = rows_of(x), operands_of(fmt, parts, x.shape[-1])
    out = x.new_empty((*x.shape[:-1], operands.codes.shape[0]))
    if not out.numel():
        return out
    bias = None if bias is None else bias.contiguous()
    m = rows.shape[0]
    hopper = not plain and m > words_gemv.MOST and hopper_check.refuses(x.device) is None
    if words_gemv.takes(m, operands):
        words_gemv.product(rows, operands, bias, out, plain=plain)
    elif m >= (MANY_OF_ONE_PRODUCT if hopper and operands.zero is None else MANY):
        words_decoded.product(rows, operands, bias, out, plain=plain)
    elif hopper:
        words_gemm_wgmma.product(rows, operands, bias, out)
    else:
        words_gemm_mma.product(rows, operands, bias, out, plain=plain)
    return out


def refuses_gemv(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, group: int) -> str | None:
    """Why this call cannot run here, or None."""
    return refuses_plain(AwqW4A16(group_size=group), x, {"qdata": q, "scale": scales, "zero": zeros}, bias)


@kernel("gemv_awq_w4a16", backend="cuda", refuses=refuses_gemv, tolerance=3e-3)
def gemv_awq_w4a16(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """x [..., K], bytes [N, K/2], scales and zeros [K/g, N], bias [N] or None -> [..., N] in the dtype of x."""
    return linear_plain(AwqW4A16(group_size=group), x, {"qdata": q, "scale": scales, "zero": zeros}, bias)


def _packs() -> bool:
    return every_one_has((8, 0))


for _name in words128.FORMATS:
    kernel(
        "linear", format=_name, backend="cuda", layout=words128.NAME, refuses=refuses, tolerance=3e-3, packs=_packs
    )(linear)  # fmt: skip
