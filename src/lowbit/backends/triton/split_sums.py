"""Sums of a product whose K was split over programs, added in a fixed order: the same bits at every call."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton.device import Target
from lowbit.backends.triton.tuning import config, tuned

_PROGRAMS = 4  # wanted for each processor
_MOST = 16
_ROWS = 128  # of a weight, in the tile that is thought of here


def splits_for(m: int, n: int, blocks: int, target: Target) -> int:
    """Into how many pieces to cut `blocks` blocks of columns so that every processor has work: a power of two."""
    tiles = triton.cdiv(n, _ROWS) * triton.cdiv(m, 128)
    wanted = min(_PROGRAMS * target.processors // tiles, blocks, _MOST)
    return 1 << max(0, wanted.bit_length() - 1)


@triton.jit
def store_sums(
    sums, alpha, bias, out, rows, tokens, split, m, n, SPLITS: tl.constexpr, ROW_ALPHA: tl.constexpr
):  # fmt: skip
    """Where a product ends: float32 sums [rows, tokens] -> out [m, n] as alpha * sums + bias, alpha [] or [n].

    With K split, the sums as they are -> out [SPLITS, m, n], for `add_splits`.
    """
    inside = rows < n
    present = (tokens < m)[None, :] & inside[:, None]
    if SPLITS == 1:
        loaded = tl.where(inside, rows, 0)
        if ROW_ALPHA:
            sums *= tl.load(alpha + loaded)[:, None]
        elif alpha is not None:
            sums *= tl.load(alpha)
        if bias is not None:
            sums += tl.load(bias + loaded).to(tl.float32)[:, None]
        at = out + tokens[None, :].to(tl.int64) * n + rows[:, None]
        tl.store(at, sums.to(out.dtype.element_ty), mask=present)
    else:
        at = out + (split.to(tl.int64) * m + tokens[None, :]) * n + rows[:, None]
        tl.store(at, sums, mask=present)


@tuned([config(BLOCK=1024, warps=4, stages=1)])
@triton.jit(do_not_specialize=("m",))
def _add_splits(
    sums, alpha, bias, out, m, n, SPLITS: tl.constexpr, ROW_ALPHA: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = m.to(tl.int64) * n
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums + split * size + at, mask=inside, other=0.0)
    row = at % n
    if ROW_ALPHA:
        total *= tl.load(alpha + row, mask=inside, other=0.0)
    elif alpha is not None:
        total *= tl.load(alpha)
    if bias is not None:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def add_splits(sums: Tensor, alpha: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """float32 sums [S, M, N], alpha [] or [N], bias [N] -> out [..., N] of M rows: alpha * (sum over S) + bias."""
    splits, m, n = sums.shape
    _add_splits(
        lambda meta: (triton.cdiv(m * n, meta["BLOCK"]),),
        sums.device, sums=sums, alpha=alpha, bias=bias, out=out, m=m, n=n, SPLITS=splits,
        ROW_ALPHA=alpha is not None and alpha.numel() > 1,
    )  # fmt: skip
