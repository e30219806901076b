"""Sums of a product whose K was split over programs, added in a fixed order: the same bits at every call."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton.device import Target
from lowbit.backends.triton.tuning import config, tuned

_DECODING = ((16, 4), (64, 2))  # up to so many tokens, programs wanted for each processor; one for more
_MOST = 16
_ROWS = 128  # of a weight, in the tile that is thought of here


def programs_for(m: int, *, decodes: bool) -> int:
    """Programs of 128 rows that m tokens want for each processor; decodes: as `splits_for`."""
    return next((each for tokens, each in _DECODING if m <= tokens), 1) if decodes else 1


def splits_for(m: int, n: int, blocks: int, target: Target, *, decodes: bool = True) -> int:
    """Into how many pieces to cut `blocks` blocks of columns so that every processor has work: a power of two.

    decodes: whether weights are decoded in registers. Then a few warps a processor cannot issue as fast as memory
    gives, and with few tokens more are wanted; codes that go to the tensor cores as they are need no more programs than
    have enough bytes on their way. A piece costs 8 bytes a result, written and read again, and a second kernel: two
    pieces for 256 tokens are as many bytes as a weight of 4 bits. Reasoned, not measured on a GPU yet.
    """
    tiles = triton.cdiv(n, _ROWS) * triton.cdiv(m, 128)
    wanted = min(programs_for(m, decodes=decodes) * target.processors // tiles, blocks, _MOST)
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


@tuned([config(BLOCK=512, warps=4, stages=1)])
@triton.jit(do_not_specialize=("m",))
def _add_splits(
    sums, alpha, bias, out, m, n, SPLITS: tl.constexpr, ROW_ALPHA: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program adds a piece of a token, so that rows of the weight are found without a division for each of them."""
    across = tl.cdiv(n, BLOCK)
    row = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    inside = row < n
    at = (tl.program_id(0) // across).to(tl.int64) * n + row
    size = m.to(tl.int64) * n
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums + split * size + at, mask=inside, other=0.0)
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
    if bias is None and (alpha is None or alpha.numel() == 1):  # all rows are alike: short ones fill no program
        m, n = 1, m * n
    _add_splits(
        lambda meta: (triton.cdiv(n, meta["BLOCK"]) * m,),
        sums.device, sums=sums, alpha=alpha, bias=bias, out=out, m=m, n=n, SPLITS=splits,
        ROW_ALPHA=alpha is not None and alpha.numel() > 1,
    )  # fmt: skip
