"""descent_sweep for few rows and grids of integers and of floating-point values; as near to eager's as gptq_columns."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import grid_columns, native
from lowbit.backends.cpu.operands import DTYPES
from lowbit.backends.eager.descent_sweep import columns_at_once
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
    if scales and grid.rows != 1:
        return f"units of {grid.rows} rows; the kernel refits those of one row"
    if scales and _stored(grid) is None:
        return "the format has a rule of its own for the steps that it can store"
    if not hessian.is_contiguous():
        return "the second moments have gaps"
    return grid_columns.refuses_rows(values, refits=scales) or grid_columns.refuses(grid, (values, gradient), hessian)


@kernel("descent_sweep", backend="cpu", refuses=refuses, tolerance=1e-3)
def descent_sweep(
    grid: Grid, values: Tensor, gradient: Tensor, hessian: Tensor, codes: bool, scales: bool, last: bool
) -> None:
    """See `lowbit.ops.columns`."""
    stored = _stored(grid) if scales else None
    native.module().descent_sweep(
        *grid_columns.describe(grid), *(stored or _fields(_FLOATS)), *values.shape, columns_at_once(grid),
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
    if isinstance(snap, E4m3Steps) and snap.global_scale.dtype == torch.float32 and snap.global_scale.is_contiguous():
        common = (snap.global_scale.data_ptr(), bool(snap.global_scale.dim()), snap.kind.divides)
        return _fields(_E4M3, least=SMALLEST_E4M3, most=E4M3_MAX, common=common)
    if isinstance(snap, PowerSteps):
        return _fields(_POWERS, least=SMALLEST_POWER, most=LARGEST_POWER)
    return None


def _fields(
    kind: int, dtype: int = DTYPES[torch.float32], zero_dtype: int = DTYPES[torch.float32], least: float = 0.0,
    most: float = 0.0, with_sign: bool = False, common: tuple[int, bool, bool] = (0, False, False),
) -> StoredFields:  # fmt: skip
    return kind, dtype, zero_dtype, least, most, with_sign, *common
