"""Activations of svdquant_w4a4, read once: smoothing, 4-bit codes by groups of 64, and the low rank's first product.

Codes and scales have eager's bits; a group with a NaN or an infinity has codes of 0 and a scale that is not finite. The
low rank sees the activations as they are, without smoothing and without the shift of unsigned codes. With few tokens K
is split over blocks, which leave that many sums of the low rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.backends.cuda import device_check, kernels
from lowbit.backends.gpu import target_of
from lowbit.dispatch import kernel
from lowbit.numerics.groups import ceil_div, round_up
from lowbit.numerics.int4_matmul import GROUP

_SOURCE = "quantize_svdquant_w4a4.cu"
_OLDEST = (8, 0)  # the first with asynchronous copies and with products of bfloat16
_DTYPES = {torch.float32: "kFloat32", torch.bfloat16: "kBFloat16Type", torch.float16: "kFloat16Type"}
_HALVES = (torch.bfloat16, torch.float16)
STORAGES = {"plain": "kPlain", "fragments4": "kFragments4", "fragments8": "kFragments8", "swizzled8": "kSwizzled8"}
"""How codes can be written, by name: device/activation_tiles.cuh says where each lies."""
_TILE = 16  # tokens
_ALIGNMENT = 16  # bytes of x, and of proj_down, that are loaded at a time
_WIDE = 8  # ranks in that many bytes
_RANKS = (16, 32, 64, 128)  # of a block
_MANY = 512  # rows from which on blocks take 64: more of them share what they read of proj_down
_BLOCKS = 2  # that keep a multiprocessor busy
_MOST = 1 << 35  # elements of x, whose places are counted in 32 bits by eights
MOST_SPLITS = 16


@dataclass(frozen=True)
class _Block:
    """A block's warps: `across` groups side by side, `token_warps` times `tiles` tiles of 16 tokens."""

    ranks: int
    tiles: int
    token_warps: int
    across: int

    @property
    def threads(self) -> int:
        return 32 * self.token_warps * self.across

    @property
    def tokens(self) -> int:
        return _TILE * self.tiles * self.token_warps

    def shared(self, storage: str) -> int:
        """Bytes: two stages of what belongs to columns, and room to turn codes in; at the end, the sums."""
        turned = 32 * self.threads if storage == "swizzled8" else 0
        stages = 2 * self.across * GROUP * (2 * self.ranks + 8) + turned
        return max(stages, self.across * self.tokens * (self.ranks + 4) * 4)


def _block(rows: int, rank: int) -> _Block:
    ranks = next((size for size in _RANKS if size >= rank), _RANKS[-1])
    if rows < _MANY:
        return _Block(ranks, 1, 1, 4 if ranks < 128 else 2)
    return _Block(ranks, 2, 2, 2) if ranks <= 32 else _Block(ranks, 1, 4, 1)


@lru_cache(maxsize=1024)
def _splits(blocks: int, k: int, rank: int, block: _Block, most: int, processors: int) -> int:
    """Into how many pieces to cut K: as little time as possible, in shares of one multiprocessor's for one block.

    A multiprocessor with less than two blocks waits for memory half of the time; and each piece's sums are written, and
    read once more. Reasoned, not measured.
    """
    share = 4 * rank / max(1, k)

    def time(pieces: int) -> float:
        return max(_BLOCKS, ceil_div(blocks * pieces, processors)) / pieces + share * pieces * blocks / processors

    return min(range(1, max(1, min(most, ceil_div(k, GROUP * block.across))) + 1), key=time)


def _run(
    x: Tensor, raw: Tensor | None, smooth: Tensor, down: Tensor, codes: Tensor, scale: Tensor, rows: int, *,
    storage: str, unsigned: bool, shift: float, most_splits: int,
) -> Tensor:  # fmt: skip
    """Fill codes and scale, of `rows` tokens with padding, and return the low rank's sums, float32 [S, rows, R]."""
    (m, k), rank = x.shape, down.shape[1]
    x, down = _aligned(x), _aligned(down)
    raw = None if raw is None else _aligned(raw)
    block = _block(rows, rank)
    blocks, passes = ceil_div(rows, block.tokens), max(1, ceil_div(rank, block.ranks))
    splits = _splits(blocks * passes, k, rank, block, most_splits, target_of(x.device).processors)
    low = torch.empty((splits, rows, rank), dtype=torch.float32, device=x.device)
    if not m:
        return low
    kinds = ", ".join(f"lowbit::{_DTYPES[one.dtype]}" for one in (x, smooth, scale))
    flags = ", ".join(str(flag).lower() for flag in (unsigned, raw is not None, rank % _WIDE == 0))
    name = (
        f"lowbit::quantize_svdquant<lowbit::{STORAGES[storage]}, {kinds}, {flags}, {block.ranks}, {block.tiles}, "
        f"{block.token_warps}, {block.across}>"
    )
    kernels.launch(
        _SOURCE, name, x.device, (blocks, splits, passes), block.threads,
        [x, raw, smooth.contiguous(), down, codes, scale, low, m, rows, k // GROUP, rank, shift],
        shared=block.shared(storage),
    )  # fmt: skip
    return low


def _aligned(x: Tensor) -> Tensor:
    """The same values, without gaps, from a multiple of 16 bytes on."""
    x = x.contiguous()
    return x.clone() if x.device.type != "meta" and x.data_ptr() % _ALIGNMENT else x


def quantized(
    x: Tensor, smooth: Tensor, down: Tensor, *, storage: str, tokens_multiple: int, unsigned: bool, shift: float,
    most_splits: int = MOST_SPLITS,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x [M, K] -> int8 codes of Mp tokens in `storage`, float32 scales [K/64, Mp], float32 sums [S, Mp, R].

    The codes are those of (x + shift) / smooth; the sums, over S <= most_splits in their order, are x @ down. Mp is M
    rounded up to `tokens_multiple`, itself a multiple of 16. What `refuses_operands` refuses must not be given.

    Shapes of codes: fragments4 [K/64, Mp/16, 512], fragments8 [K/64, Mp/8, 512], swizzled8 [K/64, Mp, 64].
    """
    k, rows = x.shape[1], round_up(x.shape[0], tokens_multiple)
    tile = {"fragments4": (rows // _TILE, 512), "fragments8": (2 * rows // _TILE, 512), "swizzled8": (rows, GROUP)}
    codes = torch.empty((k // GROUP, *tile[storage]), dtype=torch.int8, device=x.device)
    scale = torch.empty((k // GROUP, rows), dtype=torch.float32, device=x.device)
    low = _run(
        x, None, smooth, down, codes, scale, rows, storage=storage, unsigned=unsigned, shift=shift,
        most_splits=most_splits,
    )  # fmt: skip
    return codes, scale, low


def refuses_operands(x: Tensor, smooth: Tensor, down: Tensor, raw: Tensor | None = None) -> str | None:
    """Why these tensors cannot be quantized and projected here, or None."""
    if why := device_check.refuses(x.device, _OLDEST):
        return why
    if x.numel() >= _MOST:
        return f"x has {x.numel()} elements; the kernel takes less than {_MOST}: give it fewer tokens at a time"
    named = {"x": x, "smooth": smooth, "lora_down": down, "lora_x": raw}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}; move one of them"
        if name == "smooth":
            if tensor.dtype not in _DTYPES:
                return f"smooth is {_kind(tensor)}; the kernel takes float32, bfloat16 and float16"
        elif tensor.dtype not in _HALVES:
            return f"{name} is {_kind(tensor)}; the kernel takes bfloat16 and float16"
        elif tensor.dtype != x.dtype:
            return f"{name} is {_kind(tensor)}, x {_kind(x)}; the kernel takes one dtype"
    return None


def refuses_quantize(
    x: Tensor, smooth: Tensor, down: Tensor, pad_size: int, unsigned: bool, lora_x: Tensor | None
) -> str | None:
    """Why this call cannot run here, or None."""
    return refuses_operands(x, smooth, down, lora_x)


@kernel("quantize_svdquant_w4a4", backend="cuda", refuses=refuses_quantize, tolerance=1e-5)
def quantize_svdquant_w4a4(
    x: Tensor, smooth: Tensor, down: Tensor, pad_size: int, unsigned: bool, lora_x: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] -> bytes [Mp, K/2], scales [K/64, Mp] in the dtype of x, low-rank activations float32 [Mp, R]."""
    k, rows = x.shape[1], round_up(x.shape[0], pad_size)
    codes = torch.empty((rows, k // 2), dtype=torch.int8, device=x.device)
    scale = torch.empty((k // GROUP, rows), dtype=x.dtype, device=x.device)
    low = _run(
        x, lora_x, smooth, down, codes, scale, rows, storage="plain", unsigned=unsigned, shift=0.0,
        most_splits=MOST_SPLITS,
    )  # fmt: skip
    if low.shape[0] == 1:
        return codes, scale, low[0]
    out = torch.empty(low.shape[1:], dtype=torch.float32, device=x.device)
    if out.numel():
        arguments: list[Tensor | int] = [low, out, out.numel(), low.shape[0]]
        kernels.launch(_SOURCE, "lowbit::add_splits", x.device, ceil_div(out.numel(), 256), 256, arguments)
    return codes, scale, out


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
