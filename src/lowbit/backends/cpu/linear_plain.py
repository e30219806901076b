"""linear for plain parts: a bounded piece of the weight is decoded at a time, natively, and multiplied by torch.

For weights that nobody has packed. Pieces and products are those of the reference, and with float32 activations so is
every bit of the result. Those of 16 bits are multiplied as float32, too, which many CPUs do ten times as fast, with
weights that are not rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.backends.cpu import coded_rows, native
from lowbit.backends.cpu.operands import DTYPES, refuses_input
from lowbit.dispatch import kernel
from lowbit.formats.base import DECODE_ELEMENTS, Format
from lowbit.formats.parts import Parts
from lowbit.numerics.groups import row_chunks


def refuses(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    if fmt.rounds_input:
        return "rounds its input, too; the kernel multiplies activations as they are"
    return refuses_input(fmt, x, parts, bias) or coded_rows.refuses(fmt, x.dtype)


def linear_plain(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], bias [N] or None -> [..., N] in the dtype of x."""
    n, k = fmt.rows_of(parts), x.shape[-1]
    weight = coded_rows.describe(fmt, parts, k, packed=False)
    wide, added = x.float(), None if bias is None else bias.float()
    whole = n * k <= DECODE_ELEMENTS
    pieces = [(0, n)] if whole else list(row_chunks(n, k, fmt.row_multiple, DECODE_ELEMENTS))
    room = torch.empty((max(b - a for a, b in pieces), k), dtype=torch.float32, device="cpu")

    def product(a: int, b: int) -> Tensor:
        native.module().dequantize(weight.address, a, b, room.data_ptr(), DTYPES[room.dtype], native.threads())
        return F.linear(wide, room[: b - a], None if added is None else added[a:b])

    if whole:
        return product(0, n).to(x.dtype)
    out = x.new_empty((*x.shape[:-1], n))
    for a, b in pieces:
        out[..., a:b] = product(a, b)
    return out


for _name in coded_rows.FORMATS:
    if _name != "int8":  # see linear_int8, which multiplies integers where the format asks for them
        kernel("linear", format=_name, backend="cpu", refuses=refuses, tolerance=3e-3)(linear_plain)
