"""linear for int8 in the layout rows16: exact integer products, or float ones where activations stay what they are."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cpu import native
from lowbit.backends.cpu.operands import address, dtype_code, output_of, refuses_input, rows_of
from lowbit.dispatch import kernel
from lowbit.formats.int8 import Int8
from lowbit.formats.parts import Parts
from lowbit.layouts import rows16

_GRANULARITIES = {"tensor": 0, "row": 1, "block": 2}  # enum Granularity
_BYTES, _PAIRS, _REGISTERS, _PANELS = range(4)  # enum Int8Way
# Up to how many tokens bytes are multiplied faster than pairs of int16: measured on AVX2, where four products take as
# many instructions either way; without any limit where they are one instruction.
_FEW_BYTES = {"avx2": 40, "portable": 4}
_FEW_FLOATS = 8
_MOST_COLUMNS = (1 << 17) - 1  # more could overflow an int32


def refuses(fmt: Int8, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    k = x.shape[-1]
    if fmt.granularity == "block" and fmt.block_size[1] % 4:
        return f"tiles of {fmt.block_size[1]} columns; the kernel takes multiples of 4, as a word has"
    if fmt.activations == "int8" and k > _MOST_COLUMNS:
        return f"{k} columns; sums of more than {_MOST_COLUMNS} products could overflow an int32"
    return refuses_input(fmt, x, parts, bias)


@kernel("linear", format="int8", backend="cpu", layout=rows16.NAME, refuses=refuses, tolerance=3e-3)
def linear_int8(fmt: Int8, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], parts in rows16, bias [N] or None -> [..., N] in the dtype of x.

    Without a rotation the codes of x, their sums and the result are those of the reference, bit for bit; a rotation
    sums in another order than a matrix product does.
    """
    rows, n = rows_of(x), rows16.rows(fmt, parts)
    out = output_of(x, n)
    m, k = rows.shape
    if fmt.activations == "int8":
        way = _BYTES if m <= _FEW_BYTES.get(native.isa(), 1 << 30) else _PAIRS
    else:
        way = _REGISTERS if m <= _FEW_FLOATS else _PANELS
    words = parts["qdata"]
    native.module().linear_int8(
        rows.data_ptr(), dtype_code(x), m, n, k, words.data_ptr(), words.shape[1], parts["scale"].data_ptr(),
        _GRANULARITIES[fmt.granularity], *fmt.block_size, fmt.rotation, address(bias), dtype_code(bias), out.data_ptr(),
        way, native.threads(),
    )  # fmt: skip
    return out
