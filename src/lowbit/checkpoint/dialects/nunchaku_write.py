"""How layers of nunchaku_lite are written: what the runtime cannot take, and the tensors of those that it can."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.dialects.base import StoredLayer
from lowbit.errors import PartsError
from lowbit.formats.awq_w4a16 import MIDDLE, AwqW4A16
from lowbit.formats.parts import HALVES
from lowbit.formats.svdquant_w4a4 import SvdquantW4A4
from lowbit.layouts import nunchaku_tiles as tiles

GROUP = 64
_AWQ_ROWS = 8  # that a block of the kernel of AWQ makes


def vectors(n: int, k: int, rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the 16-bit tensors of an SVDQuant layer."""
    return {"wscales": (k // GROUP, n), "smooth_factor": (k,), "proj_down": (k, rank), "proj_up": (n, rank)}


def name_of(dtype: torch.dtype) -> str:
    """A dtype as config.json says it."""
    return str(dtype).removeprefix("torch.")


def half_of(stored: StoredLayer) -> torch.dtype:
    """The dtype of the 16-bit tensors of a layer that is not refused."""
    if isinstance(stored.format, AwqW4A16):
        half: torch.dtype = getattr(torch, stored.format.wzeros)
        return half
    return stored.dtypes.get("scale", stored.format.part_dtypes(stored.dtype)["scale"])


def svdquant_refusal(fmt: SvdquantW4A4, stored: StoredLayer) -> str | None:
    """Why the runtime cannot take an SVDQuant layer, in words that follow its name, or None."""
    n, k = stored.shape
    if fmt.act_unsigned:
        return (
            "diffusers' nunchaku_lite rounds all inputs to signed codes, and this layer's are unsigned; use "
            "act_unsigned=false"
        )
    if n % tiles.ROWS or k % tiles.ROWS or fmt.rank % tiles.LOW_RANK:
        return (
            f"it is {n} x {k} of rank {fmt.rank}, and nunchaku has whole tiles of {tiles.ROWS} rows and columns and "
            f"ranks of a multiple of {tiles.LOW_RANK}"
        )
    default = fmt.part_dtypes(stored.dtype)
    found = {stored.dtypes.get(part, default[part]) for part in default if part != "qdata"}
    if len(found) > 1 or not found <= set(HALVES):
        names = ", ".join(sorted(map(name_of, found)))
        return f"nunchaku has its scales and factors in one dtype of 16 bits, and these are {names}"
    return None


def awq_refusal(fmt: AwqW4A16, stored: StoredLayer) -> str | None:
    """Why the runtime cannot take an AWQ layer, in words that follow its name, or None."""
    n, k = stored.shape
    if fmt.group_size != GROUP:
        return f"nunchaku has groups of {GROUP}, and this has {fmt.group_size}; use awq_w4a16(group_size={GROUP})"
    wanted = name_of(stored.dtype if stored.dtype in HALVES else torch.bfloat16)
    if fmt.wzeros != wanted:
        return f"nunchaku has the scale and what code 0 means in {wanted}; use awq_w4a16(wzeros={wanted})"
    if n % _AWQ_ROWS or k % GROUP:
        return f"it is {n} x {k}, and nunchaku's AWQ has multiples of {_AWQ_ROWS} rows and {GROUP} columns"
    return None


def svdquant_tensors(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an SVDQuant layer."""
    smooth = parts["smooth_factor"]
    return {
        "qweight": tiles.tile_codes(parts["qdata"]),
        "wscales": tiles.tile_scales(parts["scale"]),
        "smooth_factor": tiles.tile_scales(smooth.unsqueeze(0)).squeeze(0),
        "proj_down": tiles.tile_down(parts["proj_down"]),
        "proj_up": tiles.tile_up(parts["proj_up"]),
    }


def awq_tensors(stored: StoredLayer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an AWQ layer. Raises `PartsError` for a scale or a wzero that 16 bits do not hold."""
    half = half_of(stored)
    exact = {"wscales": parts["scale"].double()}
    exact["wzeros"] = parts["zero"].double() - MIDDLE * exact["wscales"]
    made = {name: value.to(half) for name, value in exact.items()}
    for name, value in exact.items():
        if not torch.equal(made[name].double(), value):
            raise PartsError(
                f"{stored.place}: its {name} do not fit into {name_of(half)}, so its codes cannot be kept; convert the "
                "16-bit model to this dialect"
            )
    return {"qweight": tiles.tile_awq(parts["qdata"]), **made}


def one_value(name: str, by_layer: Mapping[str, Any]) -> Any:
    """What all layers have. Raises `PartsError`, naming two of them, where they differ."""
    (first, value), *others = by_layer.items()
    for layer, other in others:
        if other != value:
            raise PartsError(
                f"diffusers' nunchaku_lite has one {name} for all layers, and {first!r} has {value}, {layer!r} "
                f"{other}; give them the same format"
            )
    return value
