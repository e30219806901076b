"""The product of svdquant_w4a4 by a warp's own tensor-core instructions: int4 from sm_80 to sm_89, else int8.

Which codes of activations a GPU's instructions take says `storage_of`. How a call is cut up is reasoned from counted
instructions, not measured: `_plan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.backends.cuda import kernels
from lowbit.backends.cuda.quantize_svdquant_w4a4 import STORAGES
from lowbit.backends.gpu import target_of
from lowbit.numerics.groups import ceil_div, round_up
from lowbit.numerics.int4_matmul import GROUP

TOKENS_MULTIPLE = 16
"""What the tokens of activations, of their scales and of the low rank's sums are padded to."""
DTYPES = {torch.float32: "kFloat32", torch.bfloat16: "kBFloat16Type", torch.float16: "kFloat16Type"}

_SOURCE = "svdquant_gemm_mma.cu"
_BIAS_TYPES = {dtype: number for number, dtype in enumerate(DTYPES)}  # as the enum Dtype numbers them
_INT4 = ((8, 0), (8, 9))  # the first and the last GPUs with products of int4
_RANKS = 32  # of the low rank, at a time
_PITCH = _RANKS + 4  # floats
_MOST_SPLITS = 16
_FEWEST_GROUPS = 4  # of a split
_ALIGNMENT = 16  # bytes, of what is copied at a time
_MOST_ROWS = 65535 * 64  # a grid's second size times the smallest tile


@dataclass(frozen=True)
class _Tile:
    """How a block works on so many tokens and rows.

    row_warps times token_warps warps; `depth` groups a step, `stages` steps in shared memory; `warps` that a
    multiprocessor should have room for, which bounds a thread's registers. cost: cycles for a group where other blocks
    fill the gaps, the instructions of the warps that a scheduler has; alone: how many times that it takes by itself.
    """

    tokens: int
    rows: int
    row_warps: int
    token_warps: int
    depth: int
    stages: int
    warps: int
    cost: int
    alone: float

    @property
    def threads(self) -> int:
        return 32 * self.row_warps * self.token_warps

    @property
    def arguments(self) -> str:
        """Those of the kernel's template."""
        one = (self.tokens, self.rows, self.row_warps, self.token_warps, self.depth, self.stages, self.warps)
        return ", ".join(map(str, one))

    def shared(self, storage: str, scale: torch.dtype, out: torch.dtype) -> int:
        """Bytes of shared memory: the stages; then the low rank's sums in two parts; then results on their way out."""
        codes = GROUP // 2 if storage == "fragments4" else GROUP
        group = self.rows * (GROUP // 2 + scale.itemsize) + self.tokens * (codes + 4)
        low = 2 * self.tokens * _PITCH * 4
        lines = self.token_warps * 8 * (self.rows * out.itemsize + self.row_warps * 16)
        return max(self.stages * self.depth * group, low, lines)


_TILES = (
    _Tile(16, 64, 4, 1, depth=2, stages=4, warps=16, cost=72, alone=3),
    _Tile(32, 64, 4, 1, depth=2, stages=4, warps=16, cost=96, alone=3),
    _Tile(64, 64, 2, 2, depth=1, stages=4, warps=16, cost=180, alone=3),
    _Tile(128, 128, 4, 2, depth=2, stages=3, warps=8, cost=540, alone=1.2),
)
_FIXED, _FIXED_A_TOKEN = 2000, 15  # cycles of a block beside its groups
_FINISHING, _SUMS_A_CYCLE = 3000, 500  # of adding up sums, and what all processors add up


@dataclass(frozen=True)
class _Plan:
    tile: _Tile
    splits: int


def storage_of(device: torch.device) -> str:
    """How codes must be stored for the products of this GPU."""
    first, last = _INT4
    return "fragments4" if first <= target_of(device).capability <= last else "fragments8"


def refuses_product(m: int, n: int, k: int, rank: int) -> str | None:
    """Why a product of these sizes cannot run here, or None."""
    if k % GROUP or not k:
        return f"{k} columns; the kernel takes multiples of {GROUP}"
    if n > _MOST_ROWS:
        return f"{n} rows; the kernel takes up to {_MOST_ROWS}"
    if max(m, rank) >= 1 << 24:
        return f"{m} tokens of rank {rank}; the kernel takes fewer than {1 << 24} of either"
    return None


@lru_cache(maxsize=1024)
def _plan(m: int, n: int, groups: int, processors: int) -> _Plan:
    """The tile and the number of pieces of K that are reasoned to take the fewest cycles."""
    fewest = next((tile.tokens for tile in _TILES if tile.tokens >= m), _TILES[-1].tokens)
    plans = [
        _Plan(tile, splits)
        for tile in _TILES
        if tile.tokens in (fewest, fewest // 2)
        for splits in range(1, max(1, min(_MOST_SPLITS, groups // _FEWEST_GROUPS)) + 1)
    ]
    return min(plans, key=lambda plan: _cycles(plan, m, n, groups, processors))


def _cycles(plan: _Plan, m: int, n: int, groups: int, processors: int) -> float:
    tile, splits = plan.tile, plan.splits
    blocks = ceil_div(ceil_div(n, tile.rows) * ceil_div(m, tile.tokens) * splits, processors)  # of a processor
    each = ceil_div(groups, splits) * tile.cost * max(blocks, tile.alone) + _FIXED + _FIXED_A_TOKEN * tile.tokens
    return each + (0 if splits == 1 else _FINISHING + splits * m * n / _SUMS_A_CYCLE)


def product(
    codes: Tensor, scale: Tensor, low: Tensor, weight: Tensor, weight_scale: Tensor, up: Tensor, bias: Tensor | None,
    out: Tensor, *, storage: str, unsigned: bool,
) -> None:  # fmt: skip
    """Write the whole linear, from quantized activations, into out [..., N] of M tokens.

    codes: int8 of Mp tokens in `storage`, fragments4 (signed or not) or fragments8, with scales float32 [K/64, Mp],
    Mp >= M a multiple of 16. low: float32 [S, L, R], L >= M, to be added over S in order. weight: qdata in the layout
    svdquant_fragments or plain with weight_scale [K/64, N] and up [N, R], or all three in kitchen_tile_packed_w4a4.
    bias [N]. All floats may be float32, bfloat16 or float16.
    """
    n, (groups, padded), (lows, low_rows, rank) = out.shape[-1], scale.shape, low.shape
    if not out.numel():
        return
    m, device = out.numel() // n, out.device
    if weight_scale.dtype != up.dtype:
        weight_scale, up = weight_scale.float(), up.float()
    arrangement = {5: "kFragments", 2: "kRowMajor", 4: "kTiled"}[weight.dim()]
    scale_rows = n
    if arrangement != "kTiled":
        scale_rows = round_up(n, _ALIGNMENT // weight_scale.dtype.itemsize)
        weight_scale = torch.nn.functional.pad(weight_scale, (0, scale_rows - n)) if scale_rows != n else weight_scale
    bias = None if bias is None else bias.contiguous()
    plan = _plan(m, n, groups, target_of(device).processors)
    tile, splits = plan.tile, plan.splits
    sums = out if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=device)
    bias_type = 0 if bias is None else _BIAS_TYPES[bias.dtype]
    is_unsigned = str(unsigned and storage == "fragments4").lower()  # as bytes they are the same
    name = (
        f"lowbit::svdquant_product<lowbit::{STORAGES[storage]}, {is_unsigned}, lowbit::{arrangement}, "
        f"lowbit::{DTYPES[up.dtype]}, lowbit::{DTYPES[sums.dtype]}, {tile.arguments}>"
    )
    kernels.launch(
        _SOURCE, name, device, (ceil_div(m, tile.tokens), ceil_div(n, tile.rows), splits), tile.threads,
        [
            _aligned(codes), _aligned(scale), low.contiguous(), _aligned(weight), _aligned(weight_scale),
            up.contiguous(), bias if splits == 1 else None, sums, m, n, groups, padded, scale_rows, rank, lows,
            low_rows, bias_type,
        ],
        shared=tile.shared(storage, weight_scale.dtype, sums.dtype),
    )  # fmt: skip
    if splits > 1:
        arguments: list[Tensor | int | None] = [sums, bias, out, splits, m, n, bias_type]
        name = f"lowbit::svdquant_add<lowbit::{DTYPES[out.dtype]}>"
        kernels.launch(_SOURCE, name, device, ceil_div(m * n, 256), 256, arguments)


def _aligned(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor.clone() if not tensor.is_meta and tensor.data_ptr() % _ALIGNMENT else tensor
