"""linear for awq_w4a16 in the layout rows16: the codes stay 4 bits until they are multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import native
from lowbit.backends.cpu.operands import address, dtype_code, output_of, refuses_input, rows_of
from lowbit.dispatch import kernel
from lowbit.formats.awq_w4a16 import AwqW4A16
from lowbit.formats.parts import Parts
from lowbit.layouts import rows16

_INT16, _REGISTERS, _PANELS = range(3)  # enum Way
# Up to how many tokens the integers, or decoding in registers for float32, are faster than panels: measured.
_FEW_INT16 = {"avx512": 1 << 30, "amx": 1 << 30, "neon": 1 << 30, "avx2": 1 << 30, "portable": 1 << 30}
_FEW_FLOAT32 = 16
_MOST_COLUMNS = 128  # that share a scale of the activations


def refuses(fmt: AwqW4A16, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    if fmt.group_size % 8:
        return f"groups of {fmt.group_size} columns; the kernel takes multiples of 8, as a word has"
    return refuses_input(fmt, x, parts, bias)


def integer_block(group: int) -> int:
    """How many columns of the activations share a scale: a divisor of the group that a kernel sums in one go."""
    sizes = range(min(group, _MOST_COLUMNS), 0, -8)
    return next(size for size in sizes if group % size == 0 and (size % 32 == 0 or size <= 32))


@kernel("linear", format="awq_w4a16", backend="cpu", layout=rows16.NAME, refuses=refuses, tolerance=6e-3)
def linear_awq_w4a16(fmt: AwqW4A16, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], parts in rows16, bias [N] or None -> [..., N] in the dtype of x."""
    rows, n = rows_of(x), rows16.rows(fmt, parts)
    out = output_of(x, n)
    m, k = rows.shape
    if x.dtype == torch.float32:
        way = _REGISTERS if m <= _FEW_FLOAT32 else _PANELS
    else:
        way = _INT16 if m <= _FEW_INT16.get(native.isa(), 1 << 30) else _PANELS
    words, scale = parts["qdata"], parts["scale"]
    native.module().linear_awq_w4a16(
        rows.data_ptr(), dtype_code(x), m, n, k, words.data_ptr(), words.shape[1], scale.data_ptr(),
        parts["zero"].data_ptr(), dtype_code(scale), fmt.group_size, integer_block(fmt.group_size), address(bias),
        dtype_code(bias), out.data_ptr(), way, native.threads(),
    )  # fmt: skip
    return out
