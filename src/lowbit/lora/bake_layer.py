"""One quantized weight with a LoRA baked in: the best way that its format allows, and what came through.

low_rank         the change joins the low-rank branch that the format has (svdquant_w4a4): nothing is rounded to few
                 bits, the rank grows
error_feedback   codes move by whole levels where the change adds up to one along a row (`solvers.rounding_cells`)
stochastic       codes move by whole levels by chance
nearest          what is smaller than half a level is lost, but nothing else is: best for changes of many levels

By default: low_rank where there is one; else nearest where that brings nearly all of the change through, by
measurement, and error_feedback where it does not.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.errors import FormatError, WeightError
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts, narrow_rows
from lowbit.formats.svdquant_w4a4 import SvdquantW4A4
from lowbit.lora.adapter_delta import Delta, LoraDelta
from lowbit.numerics.floats import all_finite
from lowbit.solvers.added_delta import add_delta, refuse_addition
from lowbit.solvers.rounding_cells import ROUNDINGS

LOW_RANK = "low_rank"
PLAIN = "plain"
METHODS = (LOW_RANK, *ROUNDINGS)
_NEARLY_ALL = 0.97
_SAMPLE = 128  # rows that the choice looks at
_RANK_MULTIPLE = 16  # kernels like the rank to be one; a rank that is stays one


@dataclass(frozen=True)
class LayerBake:
    """What baking did to one layer.

    `method`: one of `METHODS`, or "plain" for a weight that is not quantized. `recovered`: how much of the change the
    weight now has, <new - old, change> / <change, change>. `noise`: the norm of what differs from weight + change,
    relative to the change's. `refitted`: units (weights that share a scale) that got a larger scale, of those that
    `clipped`, of all `units`.
    """

    method: str
    recovered: float
    noise: float
    refitted: int = 0
    clipped: int = 0
    units: int = 0


@dataclass(frozen=True)
class BakedWeight:
    """The new format and parts, what the stored bias has to gain ([N] float32, or None), and the account."""

    format: Format
    parts: Parts
    bias_change: Tensor | None
    account: LayerBake


def methods_for(fmt: Format, delta: Delta, rounding: str | None) -> tuple[str, ...]:
    """The ways to bake: the last one where the first does not bring nearly all of the change through.

    Only a LoRA joins a low rank unasked: one that another method can be written as makes it much larger.
    """
    if rounding is not None:
        return (rounding,)
    low_rank = isinstance(fmt, SvdquantW4A4) and isinstance(delta, LoraDelta)
    return (LOW_RANK,) if low_rank else ("nearest", "error_feedback")


def baked_format(fmt: Format, delta: Delta, shape: tuple[int, int], rounding: str | None, where: str) -> Format:
    """The format after baking: another rank with "low_rank". Raises `FormatError` for what cannot be."""
    method = methods_for(fmt, delta, rounding)[-1]
    if method != LOW_RANK:
        if method not in ROUNDINGS:
            raise FormatError(f"{where}: unknown rounding {method!r}; known are {', '.join(METHODS)}")
        refuse_addition(fmt, method, where)
        return fmt
    if not isinstance(fmt, SvdquantW4A4):
        raise FormatError(f"{where}: {fmt.name} has no low-rank branch for the LoRA; use rounding='error_feedback'")
    low_rank = delta.low_rank()
    if low_rank is None:
        raise FormatError(
            f"{where}: its change is of the kind {delta.kind} and no thin product of low rank; use "
            "rounding='error_feedback'"
        )
    rank = fmt.rank + low_rank.rank
    if not fmt.rank % _RANK_MULTIPLE:
        rank += -rank % _RANK_MULTIPLE
    if rank > min(shape):
        rank = fmt.rank + low_rank.rank
    grown = replace(fmt, rank=rank)
    if why := grown.check_shape(*shape):
        raise FormatError(f"{where}: {list(shape)} {why}; use rounding='error_feedback' for this layer")
    return grown


def bake_weight(
    fmt: Format,
    parts: Mapping[str, Tensor],
    shape: tuple[int, int],
    delta: Delta,
    strength: float,
    rounding: str | None,
    *,
    seed: int,
    where: str,
) -> BakedWeight:
    """The plain parts of `weight + strength * delta`. `where` names the layer, and gives it its own chance.

    Raises `FormatError` for a format or rounding that cannot take the change, `WeightError` for a change that is not
    finite.
    """
    grown, methods = baked_format(fmt, delta, shape, rounding, where), methods_for(fmt, delta, rounding)
    weight = fmt.dequantize(parts, shape, torch.float32) if delta.needs_weight else None
    dense = _finite(delta.dense(strength, parts["qdata"].device, weight), where)
    if methods == (LOW_RANK,):
        low_rank = delta.low_rank()
        assert low_rank is not None  # `baked_format` has seen to it
        assert isinstance(grown, SvdquantW4A4)
        assert isinstance(fmt, SvdquantW4A4)
        made, account = _in_low_rank(fmt, grown, parts, low_rank, strength, dense)
        return BakedWeight(grown, made, None, account)
    method = methods[0]
    if len(methods) > 1 and _sample_recovered(fmt, parts, dense, method, where) < _NEARLY_ALL:
        method = methods[-1]
    added = add_delta(fmt, parts, dense, rounding=method, seed=seed + zlib.crc32(where.encode()), where=where)
    before, after = fmt.bias_share(parts), fmt.bias_share(added.parts)
    account = LayerBake(method, added.recovered, added.error**0.5, added.refitted, added.clipped, added.units)
    return BakedWeight(fmt, added.parts, None if before is None or after is None else before - after, account)


def _sample_recovered(fmt: Format, parts: Mapping[str, Tensor], dense: Tensor, method: str, where: str) -> float:
    """How much of a change some rows keep with a method."""
    n, per = dense.shape[0], fmt.row_multiple
    stop = min(n, -(-_SAMPLE // per) * per)
    cut = {name: part.contiguous() for name, part in narrow_rows(fmt.rules, parts, 0, stop).items()}
    return add_delta(fmt, cut, dense[:stop], rounding=method, where=where).recovered


def bake_plain(weight: Tensor, delta: Delta, strength: float, where: str) -> tuple[Tensor, LayerBake]:
    """A weight of 16 or 32 bits plus a change, rounded to nearest in its dtype, of any shape with N first.

    Raises `WeightError` for a change that is not finite, or that makes the weight so. `where` names the layer.
    """
    dense = delta.dense(strength, weight.device, weight.flatten(1) if delta.needs_weight else None).view(weight.shape)
    new = (weight.float() + _finite(dense, where)).to(weight.dtype)
    if not all_finite(new) and all_finite(weight):
        kind = str(weight.dtype).removeprefix("torch.")
        raise WeightError(f"{where}: the weight with its change leaves the range of {kind}; take a smaller strength")
    return new, _account(PLAIN, new.float() - weight.float(), dense)


def _finite(change: Tensor, where: str) -> Tensor:
    """A change. Raises `WeightError` for one that would spoil the weight."""
    if not all_finite(change):
        raise WeightError(f"{where}: the change holds NaN or infinity; repair the adapter, or lower its strength")
    return change


def _in_low_rank(
    fmt: SvdquantW4A4,
    grown: SvdquantW4A4,
    parts: Mapping[str, Tensor],
    delta: LoraDelta,
    strength: float,
    dense: Tensor,
) -> tuple[Parts, LayerBake]:
    """The parts with the change beside the low rank that is there, and zeros up to the new rank."""
    dtype, device = parts["proj_down"].dtype, parts["proj_down"].device
    down = delta.down.to(device, torch.float32).flatten(1).t()  # [K, R]
    up = delta.up.to(device, torch.float32) * (strength * delta.scale)  # [N, R]
    # Both factors of a rank alike in size: neither leaves the range of float16.
    ratio = torch.linalg.vector_norm(up, dim=0) / torch.linalg.vector_norm(down, dim=0)
    balance = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0).sqrt()
    down, up = (down * balance).to(dtype), (up / balance).to(parts["proj_up"].dtype)
    spare = grown.rank - fmt.rank - delta.rank
    made = dict(parts)
    for name, part in (("proj_down", down), ("proj_up", up)):
        made[name] = torch.cat([parts[name], part, part.new_zeros((part.shape[0], spare))], dim=1)
    return made, _account(LOW_RANK, up.float() @ down.float().t(), dense)


def _account(method: str, gained: Tensor, change: Tensor) -> LayerBake:
    whole = float(change.square().sum(dtype=torch.float64))
    if not whole:
        return LayerBake(method, 1.0, 0.0)
    recovered = float((gained * change).sum(dtype=torch.float64)) / whole
    return LayerBake(method, recovered, (float((gained - change).square().sum(dtype=torch.float64)) / whole) ** 0.5)
