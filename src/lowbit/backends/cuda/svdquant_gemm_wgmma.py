"""The product of svdquant_w4a4 on Hopper: int8 products of warpgroups, a weight in the layout svdquant_fragments.

How a call is cut up is reasoned from counted instructions, not measured: `_plan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.backends.cuda import kernels
from lowbit.backends.gpu import target_of
from lowbit.layouts.svdquant_fragments import GROUP, ROWS
from lowbit.numerics.groups import ceil_div, round_up

TOKENS_MULTIPLE = 16
"""What the tokens of activations, of their scales and of the low rank's sums are padded to."""

_SOURCE = "svdquant_gemm_wgmma.cu"
_HALVES = {torch.bfloat16: "kBFloat16", torch.float16: "kFloat16"}
_SCALES = {torch.bfloat16: "kScaleBFloat16", torch.float16: "kScaleFloat16", torch.float32: "kScaleFloat32"}
_BLOCK_ROWS = 2 * ROWS
_THREADS = 384
_LOW_COLUMNS = 32
_MOST_SPLITS = 16
_ALIGNMENT = 16  # bytes, of what is copied in bulk
_SCALES_TOGETHER = 8  # rows whose scales begin at such a multiple whatever the group
_AXIS = 65535  # blocks along a grid's second axis, which tokens are shared out along
_MOST_TOKENS = _AXIS * 256  # with the largest tile
_FINISHED = 16  # tokens of a block that adds up sums


@dataclass(frozen=True)
class _Tile:
    """How a block works on so many tokens.

    groups: in a slot of the ring. offset: the parts of 64 tokens, as bits, whose sums are made positive, which saves
    instructions where there are many. cost: cycles for a group of 128 rows, the instructions of both warps that a
    scheduler has. resident: blocks on a processor.
    """

    tokens: int
    groups: int
    slots: int
    offset: int
    cost: int
    resident: int = 1

    def shared(self, scale: torch.dtype) -> int:
        """Bytes of shared memory: the ring, the constants that offset sums, the mailboxes."""
        each = self.tokens * (GROUP + 4) + _BLOCK_ROWS * (GROUP // 2 + scale.itemsize)
        return self.slots * (round_up(self.groups * each, 1024) + 16) + (
            64 * min(self.tokens, 64) if self.offset else 0
        )


_TILES = (
    _Tile(8, groups=4, slots=3, offset=0, cost=195, resident=2),
    _Tile(16, groups=4, slots=3, offset=0, cost=220, resident=2),
    _Tile(32, groups=4, slots=6, offset=0, cost=260),
    _Tile(64, groups=1, slots=8, offset=1, cost=285),
    _Tile(128, groups=1, slots=8, offset=3, cost=480),
    _Tile(256, groups=1, slots=8, offset=7, cost=880),  # one part without: a register too few for all
)
_HANDED_OVER, _REGISTERS = 64, 168  # tiles of more tokens hand registers over, of so many a thread
_FIXED, _FIXED_A_TOKEN = 2000, 15  # cycles of a block beside its groups
_FINISHING, _SUMS_A_CYCLE = 3000, 500  # of adding up sums, and what all processors add up


@dataclass(frozen=True)
class _Plan:
    tile: _Tile
    splits: int

    @property
    def whole(self) -> bool:
        """Whether a block writes results, not sums for others to finish."""
        return self.splits == 1 and self.tile.groups == 1


def refuses_product(m: int, n: int, k: int, rank: int) -> str | None:
    """Why a product of these sizes cannot run here, or None."""
    if k % GROUP or not k:
        return f"{k} columns; the kernel takes multiples of {GROUP}, one at least"
    if m > _MOST_TOKENS:
        return f"{m} tokens; the kernel takes up to {_MOST_TOKENS}"
    if max(n, rank) >= 1 << 24:
        return f"{n} rows of rank {rank}; the kernel takes fewer than {1 << 24} of either"
    return None


@lru_cache(maxsize=1024)
def _plan(m: int, n: int, groups: int, processors: int) -> _Plan:
    """The tile and the number of pieces of K with the fewest cycles, as far as reasoning goes."""
    fewest = next((tile.tokens for tile in _TILES if tile.tokens >= m), _TILES[-1].tokens)
    most_splits = max(1, min(_MOST_SPLITS, groups // 8)) if m <= _AXIS * _FINISHED else 1
    plans = [
        _Plan(tile, splits)
        for tile in _TILES
        if (tile.tokens == fewest or tile.tokens in range(64, fewest)) and m <= _AXIS * tile.tokens
        for splits in range(1, most_splits + 1)
    ]
    return min(plans, key=lambda plan: _cycles(plan, m, n, groups, processors))


def _cycles(plan: _Plan, m: int, n: int, groups: int, processors: int) -> float:
    tile = plan.tile
    blocks = ceil_div(n, _BLOCK_ROWS) * ceil_div(m, tile.tokens) * plan.splits
    rounds = ceil_div(blocks, processors * tile.resident)
    together = min(tile.resident, ceil_div(blocks, processors))
    each = ceil_div(groups, plan.splits) * tile.cost * together + _FIXED + _FIXED_A_TOKEN * tile.tokens
    return rounds * each + (0 if plan.whole else _FINISHING + plan.splits * m * n / _SUMS_A_CYCLE)


def product(
    codes: Tensor, scale: Tensor, low: Tensor, weight: Tensor, weight_scale: Tensor, up: Tensor, bias: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    """Write the whole linear, from quantized activations, into out [..., N] of M tokens, bfloat16 or float16.

    codes: int8 [K/64, Mp, 64], in each group the even columns first, in 16-byte pieces at their place ^ token / 2 % 4,
    with scales float32 [K/64, Mp], Mp >= M a multiple of 16. low: float32 [S, Mp, R], to be added over S in order.
    weight: qdata of svdquant_fragments, with weight_scale [K/64, N] in bfloat16, float16 or float32. up [N, R] and bias
    [N] are of the dtype of out.
    """
    n, (groups, padded, _), (low_splits, _, rank) = out.shape[-1], codes.shape, low.shape
    if not out.numel():
        return
    m, device = out.numel() // n, out.device
    plan = _plan(m, n, groups, target_of(device).processors)
    tile, half = plan.tile, f"lowbit::{_HALVES[out.dtype]}"
    up, bias = _aligned(up), None if bias is None else bias.contiguous()
    halves = factor = sums = None
    if not plan.whole:
        sums = torch.empty((plan.splits, n, padded), dtype=torch.float32, device=device)
    elif rank:
        halves = torch.empty((2 * ceil_div(rank, _LOW_COLUMNS), padded, _LOW_COLUMNS), dtype=out.dtype, device=device)
        factor = torch.empty(padded, dtype=torch.float32, device=device)
        kernels.launch(
            _SOURCE, f"lowbit::split_low<{half}>", device, ceil_div(padded, 4), 128,
            [low.contiguous(), halves, factor, low_splits, padded, rank],
        )  # fmt: skip
    row_step = round_up(n, _SCALES_TOGETHER)
    if row_step != n:
        weight_scale = torch.nn.functional.pad(weight_scale, (0, row_step - n))
    name = (
        f"lowbit::svdquant_product<{tile.tokens}, {tile.groups}, {tile.slots}, {tile.offset}, "
        f"lowbit::{_SCALES[weight_scale.dtype]}, {half}, {str(plan.whole).lower()}>"
    )
    grid = (ceil_div(n, _BLOCK_ROWS), ceil_div(m, tile.tokens), plan.splits)
    kernels.launch(
        _SOURCE, name, device, grid, _THREADS,
        [
            _aligned(codes), _aligned(scale), _aligned(weight), _aligned(weight_scale), halves, factor, up, bias, out,
            sums, m, padded, n, row_step, groups, rank,
        ],
        tile.shared(weight_scale.dtype),
        registers=_REGISTERS if tile.tokens > _HANDED_OVER else 0,
    )  # fmt: skip
    if sums is not None:
        kernels.launch(
            _SOURCE, f"lowbit::finish_sums<{half}>", device, (ceil_div(n, 64), ceil_div(m, _FINISHED)), 256,
            [sums, low.contiguous(), up, bias, out, plan.splits, low_splits, m, padded, n, rank],
        )  # fmt: skip


def _aligned(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor.clone() if not tensor.is_meta and tensor.data_ptr() % _ALIGNMENT else tensor
