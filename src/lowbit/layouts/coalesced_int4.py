"""coalesced_int4: 4-bit codes, scales and zero points of a row all beside each other, for int8 activations (W4A8).

    w = (code - zero) * scale              code: 0..15

part         plain            here       meaning
qdata        [N, K/2]         [N, K/2]   uint8, the even column in the low nibble
scale        [N, G], [G, N]   [N, G]     bfloat16, float16 or float32
zero_point   [N, G]           [N, G]     wna16: the same dtype as scale; a code, which may be fractional
zero         [G, N]           [N, G]     awq_w4a16: the same, 8 - zero / scale

With groups of 32 columns and more, a load of 16 bytes of codes lies in one group, and the loads of a warp use
neighbouring scales: one cache line, where [G, N] takes 32. ExecuTorch measured 29.2 to 37.4 tokens a second on a model
of 31 billion weights (pytorch/executorch#20038, which this arrangement is from).

It is an arrangement for kernels. Files hold the plain parts: shapes cannot tell [N, G] from [G, N] where N = G, so
`int4_plain_mm` wants to be told `TAG`, and takes nothing else. Version 1.

A linear of a weight in this layout is `int4_plain_mm`: its activations are rounded to int8, by blocks of 32 columns
with a scale each, on every device (`numerics.w4a8`). That costs about 0.5 % of the result's RMS, more where single
activations are far larger than their neighbours. As plain parts leave activations alone, "auto" never chooses the
layout; whoever wants it names it: `lowbit.load(.., layout="coalesced_int4")`, `lowbit.nn.repack_(module,
"coalesced_int4")` or `QuantizedTensor.in_layout("coalesced_int4")`. All else (dequantize, embedding, gradients, saving)
gives what the plain parts give.

Packing is exact or refused: an offset of awq_w4a16 that is no multiple of its scale within the dtype has no zero point.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.errors import PartsError
from lowbit.formats.awq_w4a16 import MIDDLE
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts.base import Layout, register_layout

NAME = "coalesced_int4"
VERSION = 1
TAG = f"{NAME}:{VERSION}"
FORMATS = ("awq_w4a16", "wna16")
ACTIVATION_BLOCK = 32  # columns that share a scale of the activations
MIN_GROUP = 8  # columns in a word of codes
_BITS = 4
_AWQ = "awq_w4a16"


def refuses(fmt: Format, n: int, k: int) -> str | None:
    """Why a weight [n, k] cannot be arranged like this, in words that follow its shape, or None."""
    config = fmt.config()
    if config.get("bits", _BITS) != _BITS:
        return f"has codes of {config['bits']} bits, not of {_BITS}"
    if config.get("act_order"):
        return "has columns whose groups are scattered (act_order)"
    return refuses_groups(k, config["group_size"] or k)


def refuses_groups(k: int, group_size: int) -> str | None:
    """Why K columns in groups of this size cannot be arranged like this, or None."""
    if group_size < MIN_GROUP or group_size & (group_size - 1):
        return f"has groups of {group_size}; expected a power of two from {MIN_GROUP}"
    if k % ACTIVATION_BLOCK:
        return f"has {k} columns, not a multiple of {ACTIVATION_BLOCK}"
    return f"has {k} columns, not a multiple of the group size {group_size}" if k % group_size else None


def pack(fmt: Format, parts: Mapping[str, Tensor]) -> Parts:
    """Plain parts of wna16 or awq_w4a16 -> this arrangement. Raises `PartsError` for what it cannot hold exactly."""
    if why := refuses(fmt, fmt.rows_of(parts), 2 * parts["qdata"].shape[1]):
        raise PartsError(f"a weight that {why} cannot be stored in {NAME}; keep it in plain parts")
    found = {**parts, "qdata": parts["qdata"].view(torch.uint8).contiguous()}
    if fmt.name == _AWQ:
        scale, zero = parts["scale"].t().contiguous(), parts["zero"].t()
        return {**found, "scale": scale, "zero": _zero_points(scale, zero)}
    found["scale"] = parts["scale"].contiguous()
    if "zero_point" in parts:
        found["zero_point"] = parts["zero_point"].to(parts["scale"].dtype)  # up to 16: exact in every dtype
    check(*operands(found), _group_size(fmt, found))
    return found


def unpack(fmt: Format, parts: Mapping[str, Tensor]) -> Parts:
    """The inverse of `pack`, bit for bit. Raises `PartsError` for parts that are not in this arrangement."""
    check(*operands(parts), _group_size(fmt, parts))
    if fmt.name == _AWQ:
        scale, zero = parts["scale"], parts["zero"]
        offset = ((MIDDLE - zero.double()) * scale.double()).to(zero.dtype)
        plain = {"scale": scale.t().contiguous(), "zero": offset.t().contiguous()}
        return {**parts, "qdata": parts["qdata"].view(torch.int8), **plain}
    zeros = {"zero_point": parts["zero_point"].to(torch.uint8)} if "zero_point" in parts else {}
    return {**parts, **zeros}


def operands(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """qdata, scale and zero of packed parts, as `int4_plain_mm` takes them; without zero points, 8 for all."""
    zero = zeros(parts)
    return parts["qdata"], parts["scale"], torch.full_like(parts["scale"], MIDDLE) if zero is None else zero


def zeros(parts: Mapping[str, Tensor]) -> Tensor | None:
    """The zero points of packed parts, [N, G]; None where 8 stands for all."""
    return parts.get("zero", parts.get("zero_point"))


def check_tag(layout: str) -> None:
    """Raise `PartsError` unless a caller says that its tensors are in this version of this arrangement."""
    if layout != TAG:
        raise PartsError(
            f"layout is {layout!r}, and this op reads {TAG!r} alone: scale and zero [N, K / group_size], beside the "
            "rows of qdata. Scales that lie as [n_groups, N] must be repacked once, at load: "
            f"lowbit.layouts.coalesced_int4.pack, or QuantizedTensor.in_layout({NAME!r})"
        )


def check(qdata: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> None:
    """Raise `PartsError`, with the remedy, unless these are operands of this arrangement."""
    if qdata.dim() != 2 or qdata.dtype not in (torch.uint8, torch.int8):
        raise PartsError(f"qdata is {_kind(qdata)}, expected uint8 or int8 [N, K / 2]")
    n, k = qdata.shape[0], 2 * qdata.shape[1]
    if why := refuses_groups(k, group_size):
        raise PartsError(f"a weight {[n, k]} {why}, as {NAME} needs; keep it in plain parts")
    expected = (n, k // group_size)
    for name, part in (("scale", scale), ("zero", zero)):
        if tuple(part.shape) != expected or part.dtype != scale.dtype or not part.is_floating_point():
            raise PartsError(
                f"{name} is {_kind(part)}, expected {list(expected)} in one floating dtype for scale and zero: it must "
                f"be coalesced [N, K / group_size], row for row with qdata {list(qdata.shape)}. The native "
                "[n_groups, N] layout is not supported; repack it with lowbit.layouts.coalesced_int4.pack"
            )


def _zero_points(scale: Tensor, zero: Tensor) -> Tensor:
    """8 - zero / scale [N, G] in the dtype of zero, exactly. Raises `PartsError`."""
    wide = scale.double()
    steps = zero.double() / wide.masked_fill(wide == 0, 1.0)  # a scale of 0 is right for an offset of 0 alone
    found = (MIDDLE - steps).to(zero.dtype)
    if not found.is_meta and not torch.equal((MIDDLE - found.double()) * wide, zero.double()):
        raise PartsError(
            f"its offsets are no multiples of its scales that {str(zero.dtype).removeprefix('torch.')} can hold, so "
            f"{NAME} would change the weight; convert it to wna16(group_size=..,zero_point=true), whose zero points "
            "are codes"
        )
    return found.contiguous()


def _group_size(fmt: Format, parts: Mapping[str, Tensor]) -> int:
    return int(fmt.config()["group_size"]) or 2 * parts["qdata"].shape[1]


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


register_layout(Layout(NAME, VERSION, FORMATS, pack, unpack, refuses, stored=False, named=True))
