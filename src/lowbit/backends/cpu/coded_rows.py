"""What the kernels that decode rows are told of a weight: where its codes and scales lie, plain or in rows16."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.backends.cpu.operands import DTYPES, address, refuses_result
from lowbit.formats.base import Format
from lowbit.formats.convrot_w4a4 import ConvrotW4A4
from lowbit.formats.fp8 import Fp8E4M3, Fp8E5M2
from lowbit.formats.int8 import Int8
from lowbit.formats.nvfp4 import Nvfp4
from lowbit.formats.parts import Dim, Part, Parts
from lowbit.formats.wna16 import WNA16
from lowbit.layouts import rows16

FORMATS = ("fp8_e4m3", "fp8_e5m2", "int8", "nvfp4", "mxfp4", "mxfp8", "awq_w4a16", "wna16")
DECODED = (*FORMATS, "convrot_w4a4")  # whose linear is more than a product with what the rows decode to
ROTATED = ("int8", "convrot_w4a4")  # or not: as a weight's format says
_E4M3, _E5M2, _INT8, _E2M1, _UINT4, _UINT8, _INT4 = range(7)  # enum Codec
_CODECS = {
    "fp8_e4m3": _E4M3,
    "fp8_e5m2": _E5M2,
    "int8": _INT8,
    "nvfp4": _E2M1,
    "mxfp4": _E2M1,
    "mxfp8": _E4M3,
    "awq_w4a16": _UINT4,
    "convrot_w4a4": _INT4,
}
_SCALE_KINDS = {**DTYPES, torch.float8_e4m3fn: 3, torch.uint8: 4}  # enum ScaleKind
_PLAIN, _WORDS, _BYTES = range(3)  # enum Arrangement
_BYTEWISE = (Fp8E4M3.name, Fp8E5M2.name, "mxfp8")


def refuses(fmt: Format, dtype: torch.dtype) -> str | None:
    """Why the rows of a format cannot be decoded here to a dtype, or None."""
    if isinstance(fmt, WNA16) and fmt.bits not in {4, 8}:
        return f"codes of {fmt.bits} bits; the decoder takes 4 and 8"
    if isinstance(fmt, WNA16) and fmt.act_order:
        return "columns whose groups are scattered (act_order); the decoder takes groups of neighbours"
    group = getattr(fmt, "group_size", 0)
    if group % 2:
        return f"groups of {group} columns; the decoder takes even numbers, as two codes share a byte"
    return refuses_result(dtype)


@dataclass(frozen=True)
class Coded:
    """A description for the kernels, and the tensors it points into, which must outlive the call."""

    fields: array[int]
    tensors: tuple[Tensor | None, ...]
    n: int

    @property
    def address(self) -> int:
        """Where the description lies."""
        return self.fields.buffer_info()[0]


def describe(fmt: Format, parts: Parts, k: int, *, packed: bool) -> Coded:
    """The description of a weight with k columns: the struct CodedWeight of native/coded_rows.h."""
    rules = {rule.name: rule for rule in fmt.rules}
    qdata, scale = parts["qdata"], parts["scale"]
    if scale.dim() == 1:
        scale = scale.unsqueeze(1)
    if qdata.stride(-1) != 1 or (packed and not qdata.is_contiguous()):
        qdata = qdata.contiguous()
    zeros = parts.get("zero_point")
    offsets = parts["zero"] if fmt.name == "awq_w4a16" else None
    other = zeros if offsets is None else offsets
    if other is not None and other.stride() != scale.stride():
        scale, other = scale.contiguous(), other.contiguous()
        zeros, offsets = (other, None) if offsets is None else (None, other)
    n = rows16.rows(fmt, parts) if packed else fmt.rows_of(parts)
    tile_rows, group, steps = _steps(rules["scale"], scale, k, packed=packed)
    bits = fmt.bits if isinstance(fmt, WNA16) else 8
    unsigned = 8 if fmt.name == "awq_w4a16" else 2 ** (bits - 1)
    total, use, by_row = None, 0, 0
    if isinstance(fmt, Nvfp4):
        total, use, by_row = parts["global_scale"].contiguous(), 1 + fmt.global_scale_divides, fmt.row_global_scale
    columns = parts["pre_quant_scale"].contiguous() if fmt.pre_quant_scale else None
    codec = (_UINT4 if bits == 4 else _UINT8) if isinstance(fmt, WNA16) else _CODECS[fmt.name]
    arrangement = (_BYTES if fmt.name in _BYTEWISE else _WORDS) if packed else _PLAIN
    row_bytes = (qdata.shape[1] // 16 * 4) if packed else qdata.shape[1]
    fields = array(
        "q",
        (
            codec, arrangement, qdata.data_ptr(), row_bytes, qdata.stride(0) * qdata.element_size(), n, k, group,
            fmt.rotation if isinstance(fmt, Int8 | ConvrotW4A4) else 0, scale.data_ptr(), _SCALE_KINDS[scale.dtype],
            tile_rows,
            *steps, unsigned, address(zeros), address(offsets), 0 if offsets is None else DTYPES[offsets.dtype],
            address(total), use, by_row, address(columns), 0 if columns is None else DTYPES[columns.dtype],
        ),
    )  # fmt: skip
    return Coded(fields, (qdata, scale, zeros, offsets, total, columns), n)


def _steps(rule: Part, scale: Tensor, k: int, *, packed: bool) -> tuple[int, int, tuple[int, int, int]]:
    """Rows and columns that share a scale, and the steps for 16 rows (of tiles), for one and for a group of columns."""
    if rule.row_axis is None:
        return 1, k, (0, 0, 0)
    groups = rule.dims[1 - rule.row_axis] if len(rule.dims) > 1 else 1
    tall, group = rule.rows_per_entry, groups.per if isinstance(groups, Dim) else k
    if packed and tall == 1:
        return 1, group, (scale.shape[1] * rows16.ROWS, 1, rows16.ROWS)
    row_step = scale.stride(rule.row_axis)
    return tall, group, (row_step * rows16.ROWS, row_step, scale.stride(1 - rule.row_axis))
