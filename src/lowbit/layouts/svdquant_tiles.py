"""kitchen_tile_packed_w4a4: svdquant_w4a4 in tiles of 128 rows and 64 columns, so that a warp reads whole cache lines.

part       plain       tiles                      where row n = 128 t + 4 q + l, byte b and group g of a row go
qdata      [N, K/2]    [N/128, K/64, 32, 128]     [t, g, q, 32 l + b]       stripes of 4 rows, 32 bytes each
scale      [K/64, N]   [N/128, K/64, 128]         [t, g, n mod 128]
proj_up    [N, R]      [N/128, R, 128]            [t, r, n mod 128]

smooth_factor and proj_down stay as they are. comfy-kitchen stores checkpoints in this arrangement under the same name.
Version 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from lowbit.errors import PartsError
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts.base import Layout, register_layout

NAME = "kitchen_tile_packed_w4a4"
VERSION = 1
ROWS = 128
_STRIPE = 4  # rows side by side in a tile
_STRIPES = ROWS // _STRIPE
_BYTES = 32  # of one row in a tile: 64 codes
_PIECE = 1 << 24  # bytes of codes taken out of their tiles at a time


def tile_rows(qdata: Tensor) -> Tensor:
    """[N, K/2] -> [N/128, K/64, 32, 128]."""
    n, k = qdata.shape[0], qdata.shape[1] * 2
    split = qdata.view(n // ROWS, _STRIPES, _STRIPE, k // 64, _BYTES)  # t q l g b
    return split.permute(0, 3, 1, 2, 4).reshape(n // ROWS, k // 64, _STRIPES, _STRIPE * _BYTES)


def untile_rows(tiles: Tensor) -> Tensor:
    """[T, K/64, 32, 128] -> [128 T, K/2]."""
    t, groups = tiles.shape[:2]
    split = tiles.reshape(t, groups, _STRIPES, _STRIPE, _BYTES)  # t g q l b
    return split.permute(0, 2, 3, 1, 4).reshape(t * ROWS, groups * _BYTES)


def untile_scale(tiles: Tensor) -> Tensor:
    """[T, K/64, 128] -> [K/64, 128 T]."""
    return tiles.transpose(0, 1).reshape(tiles.shape[1], tiles.shape[0] * ROWS)


def untile_up(tiles: Tensor) -> Tensor:
    """[T, R, 128] -> [128 T, R]."""
    return tiles.transpose(1, 2).reshape(tiles.shape[0] * ROWS, tiles.shape[1])


def refuses(fmt: Format, n: int, k: int) -> str | None:
    """Why a weight [n, k] does not fit into tiles, or None."""
    return f"has {n} rows, not a multiple of {ROWS}" if n % ROWS else None


def pack(fmt: Format, parts: Mapping[str, Tensor]) -> Parts:
    """Plain parts -> tiles. Raises `PartsError` when the rows are no multiple of 128."""
    n, groups, rank = fmt.rows_of(parts), parts["scale"].shape[0], parts["proj_up"].shape[1]
    if parts["qdata"].dim() != 2:
        raise PartsError(
            f"qdata has shape {list(parts['qdata'].shape)}, expected [N, K / 2]; the weight is in tiles already"
        )
    why = refuses(fmt, n, groups * 64)
    if why:
        raise PartsError(f"a weight that {why} cannot be stored in {NAME}; keep it in plain parts")
    tiles = {
        "qdata": tile_rows(parts["qdata"].contiguous()),
        "scale": parts["scale"].reshape(groups, n // ROWS, ROWS).transpose(0, 1).contiguous(),
        "proj_up": parts["proj_up"].reshape(n // ROWS, ROWS, rank).transpose(1, 2).contiguous(),
    }
    return {name: tiles.get(name, part) for name, part in parts.items()}


def unpack(fmt: Format, parts: Mapping[str, Tensor]) -> Parts:
    """Tiles -> plain parts, the exact inverse of `pack`. Raises `PartsError` for shapes that are not those of tiles."""
    check_tiles(parts["qdata"], parts["scale"], parts["proj_up"])
    plain = {
        "qdata": untile_rows(parts["qdata"]),
        "scale": untile_scale(parts["scale"]),
        "proj_up": untile_up(parts["proj_up"]),
    }
    return {name: plain.get(name, part) for name, part in parts.items()}


def pieces(fmt: Format, parts: Mapping[str, Tensor]) -> Iterator[tuple[int, int, Parts]]:
    """(first row, last row + 1, their plain parts) for bounded runs of tiles."""
    count, groups = parts["qdata"].shape[:2]
    step = max(1, _PIECE // (groups * ROWS * _BYTES))
    for first in range(0, count, step):
        last = min(first + step, count)
        some = {name: parts[name][first:last] for name in ("qdata", "scale", "proj_up")}
        yield first * ROWS, last * ROWS, unpack(fmt, {**parts, **some})


def check_tiles(qdata: Tensor, scale: Tensor, proj_up: Tensor) -> None:
    """Raise `PartsError` unless these are [T, K/64, 32, 128], [T, K/64, 128] and [T, R, 128]."""
    if qdata.dim() != 4 or tuple(qdata.shape[2:]) != (_STRIPES, _STRIPE * _BYTES):
        raise PartsError(f"qdata has shape {list(qdata.shape)}, expected [N/128, K/64, 32, 128] for {NAME}")
    t, groups = qdata.shape[:2]
    if tuple(scale.shape) != (t, groups, ROWS):
        raise PartsError(f"scale has shape {list(scale.shape)}, expected {[t, groups, ROWS]} for {NAME}")
    if proj_up.dim() != 3 or (proj_up.shape[0], proj_up.shape[2]) != (t, ROWS):
        raise PartsError(f"proj_up has shape {list(proj_up.shape)}, expected [{t}, R, {ROWS}] for {NAME}")


register_layout(Layout(NAME, VERSION, ("svdquant_w4a4",), pack, unpack, refuses))
