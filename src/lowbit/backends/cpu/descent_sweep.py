"""descent_sweep for grids of integers and of floating-point values; as near to eager's as gptq_columns.

Few rows go through all columns in one call. Many do by eager's blocks of columns, which are worked on natively, and so
do those whose steps the kernel cannot refit: of units of many rows, or by a rule of the format's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import grid_columns, native
from lowbit.backends.cpu.operands import DTYPES
from lowbit.backends.eager import descent_sweep as blocks
from lowbit.dispatch import kernel
from lowbit.formats.grid import Grid, keep_as_they_are
from lowbit.formats.stored_steps import LARGEST_POWER, SMALLEST_E4M3, SMALLEST_POWER, E4m3Steps, FloatSteps, PowerSteps
from lowbit.numerics.floats import E4M3_MAX

_FLOATS, _E4M3, _POWERS = range(3)  # Steps of native/stored_steps.h
StoredFields = tuple[int, int, int, float, float, bool, int, bool, bool]


def refuses(
    grid: Grid, values: Tensor, gradient: Tensor, hessian: Tensor, codes: bool, scales: bool, last: bool
) -> str | None:
    """Why this call cannot run here, or None."""
    return grid_columns.refuses(grid, (values, gradient), hessian)


@kernel("descent_sweep", backend="cpu", refuses=refuses, tolerance=1e-3)
def descent_sweep(
    grid: Grid, values: Tensor, gradient: Tensor, hessian: Tensor, codes: bool, scales: bool, last: bool
) -> None:
    """See `lowbit.ops.columns`."""
    stored = _stored(grid) if scales and grid.rows == 1 else None
    cannot_refit = scales and stored is None
    if cannot_refit or not hessian.is_contiguous() or grid_columns.in_blocks(values, refits=scales):
        blocks.descent_sweep(grid, values, gradient, hessian, codes, scales, last)
        return
    native.module().descent_sweep(
        *grid_columns.describe(grid), *(stored or _fields(_FLOATS)), *values.shape, blocks.columns_at_once(grid),
        hessian.data_ptr(), gradient.data_ptr(), values.data_ptr(), codes, scales, last, native.threads(),
    )  # fmt: skip


def _stored(grid: Grid) -> StoredFields | None:
    """What the kernel is told of the steps that a format can store; None for a rule that it does not know."""
    snap = grid.snap
    if snap is keep_as_they_are:
        return _fields(_FLOATS, least=-torch.inf, most=torch.inf)
    if isinstance(snap, FloatSteps) and snap.dtype in DTYPES and snap.zero_dtype in DTYPES:
        return _fields(
            _FLOATS, DTYPES[snap.dtype], DTYPES[snap.zero_dtype], snap.least, snap.most, with_sign=snap.with_sign
        )
    if isinstance(snap, E4m3Steps):
        value, by_row = snap.global_scale, snap.kind.by_row
        if (
            value.dtype != torch.float32
            or not value.is_contiguous()
            or value.shape != (grid.target.shape[1:] if by_row else ())
        ):
            return None
        common = (value.data_ptr(), by_row, snap.kind.divides)
        return _fields(_E4M3, least=SMALLEST_E4M3, most=E4M3_MAX, common=common)
    if isinstance(snap, PowerSteps):
        return _fields(_POWERS, least=SMALLEST_POWER, most=LARGEST_POWER)
    return None


def _fields(
    kind: int, dtype: int = DTYPES[torch.float32], zero_dtype: int = DTYPES[torch.float32], least: float = 0.0,
    most: float = 0.0, with_sign: bool = False, common: tuple[int, bool, bool] = (0, False, False),
) -> StoredFields:  # fmt: skip
    return kind, dtype, zero_dtype, least, most, with_sign, *common
