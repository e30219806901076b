"""Making the blocks of K-quants: units whose steps and zeros are whole multiples of two float16 of their block.

    w = level * (factor * scale) - zero_factor * minimum

1. Each unit gets its own best step and zero (`gguf_units`).
2. The float16 of the zeros and the multiples of it are chosen together: of several float16, the one whose multiples
   miss the zeros by least, each zero by how much missing it costs once its step has made up for it.
3. Steps are fitted again beside the zeros as they are now, and float16 and multiples chosen for them in the same way.
   Units then try the neighbours of both multiples, with codes of their own.
4. With codes and multiples as they are, the two float16 are least squares in two unknowns.
5. Codes are the nearest under what is stored.

A block of values that are far from zero and positive is made upside down: both float16 are negative. The measure is the
squared error, each column by its weight; that ggml's own search weights values by their size costs it 0.1 to 1 dB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from lowbit.numerics.floats import divisor
from lowbit.numerics.gguf_blocks import BlockType
from lowbit.numerics.gguf_headers import MAX_HALF, MIN_HALF, Shared, Split, nearest_half
from lowbit.numerics.gguf_units import Sums, Units, inverse, search_steps, search_steps_and_zeros
from lowbit.numerics.levels import IntegerLevels

_CACHED, _AT_ONCE = 1 << 16, 1 << 20  # values worked on at once: on a CPU what stays in its second cache
_LEAST_WEIGHT = 1e-6  # of the largest of a block: what counts nothing is still not to become anything
_SMALL = 2.0**-14  # of a block's largest value: below, its float16 may be the smallest there is
_SOLVABLE = 1e-6  # of the product of the diagonal: the least determinant of two equations


@dataclass(frozen=True)
class Effort:
    """What is tried for a type. More gains less than 0.05 dB on Gaussian weights.

    `tries`, `passes`: of `gguf_units`. `factors`: float16 to try, as multiples of the one whose largest multiple is the
    largest step. `rounds` of the neighbours and of 4.; `both_signs`: of steps; which end of the levels has one more
    counts where they are few.
    """

    tries: tuple[float, ...]
    passes: int
    factors: tuple[float, ...]
    rounds: int = 1
    both_signs: bool = False


def _evenly(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(first + (last - first) * i / (count - 1) for i in range(count))


EFFORTS = {
    "Q2_K": Effort(_evenly(-0.3, 1.6, 5), 1, _evenly(0.6, 1.12, 14), rounds=2),
    "Q3_K": Effort(_evenly(-0.9, 0.9, 5), 2, (0.85, 0.9, 0.95, 1.0), both_signs=True),
    "Q4_K": Effort(_evenly(-0.6, 3.0, 5), 2, _evenly(0.94, 1.02, 5)),
    "Q5_K": Effort(_evenly(-0.6, 4.0, 5), 2, _evenly(0.94, 1.02, 5)),
    "Q6_K": Effort(_evenly(-1.0, 4.0, 9), 2, (0.995, 1.0)),
}
WRITABLE_K = tuple(EFFORTS)


def encode_k_blocks(kind: BlockType, x: Tensor, weights: Tensor | None = None) -> Tensor:
    """float32 [B, 256], finite -> uint8 [B, size] of a type in `WRITABLE_K`.

    weights: float32, finite and not negative, of the shape of x or one that broadcasts to it: how much the squared
    error of each value counts. None: all the same.
    """
    out = torch.empty((x.shape[0], kind.size), dtype=torch.uint8, device=x.device)
    count = (_CACHED if x.device.type == "cpu" else _AT_ONCE) // kind.columns
    spread = None if weights is None else weights.expand_as(x)
    for start in range(0, x.shape[0], count):
        piece = slice(start, start + count)
        out[piece] = _encode(kind, x[piece], None if spread is None else spread[piece])
    return out


def _encode(kind: BlockType, x: Tensor, weights: Tensor | None) -> Tensor:
    shared, effort = kind.shared, EFFORTS[kind.name]
    assert shared is not None
    assert isinstance(kind.levels, IntegerLevels)
    x = x.clamp(-MAX_HALF * shared.high, MAX_HALF * shared.high)  # beyond, a sum of squares may overflow
    up = None if shared.low else _upside_down(x, kind.unit)
    turned = x if up is None else x * up
    units = Units(_by_unit(turned, kind.unit), _unit_weights(weights, kind.unit), kind.levels)
    found = _begin(units, x.shape[0], shared, effort)
    for _ in range(effort.rounds):
        found = _moved(units, found, shared)
        found = _refitted(units, found)
    if bool((x.abs().amax(1) < _SMALL).any()):
        found = _at_least_zeros(units, found)
    if up is not None and found.zero_factor is not None:
        found = found._replace(factor=found.factor * up, zero_factor=found.zero_factor * up)
    step, zero = found.steps
    values = x.unflatten(1, (-1, kind.unit))
    shifted = values if zero is None else values - zero.unsqueeze(-1)
    codes = kind.nearest(shifted / step.masked_fill(step == 0, torch.inf).unsqueeze(-1))
    return kind.join(codes.flatten(1), shared.join(found))


def _at_least_zeros(units: Units, found: Split) -> Split:
    """Zeros for blocks of which even those are better: a float16 cannot be as small as their steps."""
    step, zero = found.steps
    lost = units.errors(step.flatten(), None if zero is None else zero.flatten())
    whole = units.weighted(units.x.square()).sum(0)
    kept = (lost.view_as(step).sum(1, keepdim=True) <= whole.view_as(step).sum(1, keepdim=True)).float()
    if found.zero_factor is not None:
        found = found._replace(zero_factor=found.zero_factor * kept)
    return found._replace(factor=found.factor * kept)


def _upside_down(x: Tensor, unit: int) -> Tensor:
    """-1 for blocks [B, 1] whose units lie above 0 rather than below it, else 1."""
    low, high = x.unflatten(1, (-1, unit)).aminmax(dim=2)
    above, below = low.clamp_min(0.0).square().sum(1), high.clamp_max(0.0).square().sum(1)
    return torch.where(above > below, -1.0, 1.0).unsqueeze(1)


def _by_unit(x: Tensor, unit: int) -> Tensor:
    """[B, columns] -> [unit, B * U], contiguous."""
    return x.reshape(-1, unit).t().contiguous()


def _unit_weights(weights: Tensor | None, unit: int) -> Tensor | None:
    """Weights by unit, those of a block relative to the largest among them."""
    if weights is None:
        return None
    relative = weights * inverse(weights.amax(dim=1, keepdim=True))
    return _by_unit(relative.clamp_min_(_LEAST_WEIGHT), unit)


def _begin(units: Units, blocks: int, shared: Shared, effort: Effort) -> Split:
    """The first choice of multiples and float16."""
    if shared.low:
        step = search_steps(units, effort.tries, effort.passes, both_signs=effort.both_signs)
        curve = units.sums(units.rounded(step, None)).qq
        return Split(*_multiples(step.view(blocks, -1), curve.view(blocks, -1), shared, effort.factors))
    step, zero = search_steps_and_zeros(units, effort.tries, effort.passes)
    sums = units.sums(units.rounded(step, zero))
    # What an error of the zero costs when the step makes up for it as far as it can.
    curve = (sums.one - sums.q * sums.q * inverse(sums.qq)).clamp_min_(0.0)
    zero_factor, minima = _multiples(-zero.view(blocks, -1), curve.view(blocks, -1), shared, effort.factors)
    stored = -(zero_factor * minima).flatten()
    for _ in range(effort.passes):
        sums = units.sums(units.rounded(step, stored))
        step = ((sums.qx - stored * sums.q) * inverse(sums.qq)).clamp_min_(0.0)
    factor, scales = _multiples(step.view(blocks, -1), sums.qq.view(blocks, -1), shared, effort.factors)
    return Split(factor, scales, zero_factor, minima)


def _multiples(wanted: Tensor, curve: Tensor, shared: Shared, factors: Sequence[float]) -> tuple[Tensor, Tensor]:
    """A float16 [B, 1] and whole multiples of it [B, U] that miss what is wanted by least, errors counting `curve`."""
    magnitude = wanted.abs()
    extreme = wanted.gather(1, magnitude.argmax(1, keepdim=True)) / divisor(shared.low or shared.high, wanted)
    larger = extreme + torch.where(extreme < 0, -MIN_HALF, MIN_HALF)  # the next one, where float16 are far apart
    least = torch.full_like(extreme, torch.inf)
    best, multiples = torch.zeros_like(extreme), torch.zeros_like(wanted)
    for one in (*(extreme * factor for factor in factors), larger):
        factor = nearest_half(one)
        scales = (wanted * inverse(factor)).round_().clamp_(shared.low, shared.high)
        missed = (curve * (wanted - factor * scales).square_()).sum(1, keepdim=True)
        better = missed < least
        least, best = torch.where(better, missed, least), torch.where(better, factor, best)
        multiples = torch.where(better, scales, multiples)
    return best, multiples


def _moved(units: Units, found: Split, shared: Shared) -> Split:
    """The best of the multiples beside those of each unit, with the nearest codes of each."""
    scales, minima = found.scales, found.minima
    least = torch.full_like(scales, torch.inf)
    around = (0, -1, 1)  # of equals the first stays: zeros have multiples of 0
    for i, j in product(around, around if minima is not None else (0,)):
        other = found._replace(scales=(found.scales + i).clamp_(shared.low, shared.high))
        if found.minima is not None:
            other = other._replace(minima=(found.minima + j).clamp_(0, shared.high))
        step, zero = other.steps
        error = units.errors(step.flatten(), None if zero is None else zero.flatten()).view_as(least)
        better = error < least
        least = torch.where(better, error, least)
        scales = torch.where(better, other.scales, scales)
        if minima is not None and other.minima is not None:
            minima = torch.where(better, other.minima, minima)
    return found._replace(scales=scales, minima=minima)


def _refitted(units: Units, found: Split) -> Split:
    """The best float16 for the multiples as they are and the nearest codes under them; the old ones if none is."""
    step, zero = found.steps
    sums = Sums(*(x.view_as(found.scales) for x in units.sums(_rounded(units, step, zero))))
    s = found.scales
    curve, lean = (s * s * sums.qq).sum(1, keepdim=True), (s * sums.qx).sum(1, keepdim=True)
    if found.zero_factor is None or found.minima is None:
        new, old = nearest_half(lean * inverse(curve)), found.factor
        better = new * (new * curve - 2 * lean) < old * (old * curve - 2 * lean)
        return found._replace(factor=torch.where(better, new, old))
    m = found.minima
    both = -(s * m * sums.q).sum(1, keepdim=True)
    zero_curve, zero_lean = (m * m * sums.one).sum(1, keepdim=True), -(m * sums.x).sum(1, keepdim=True)
    determinant = curve * zero_curve - both * both
    solvable = determinant > _SOLVABLE * curve * zero_curve
    down = inverse(determinant)
    alone = lean * inverse(curve)
    new = nearest_half(torch.where(solvable, (lean * zero_curve - zero_lean * both) * down, alone))
    new_zero = torch.where(solvable, (zero_lean * curve - lean * both) * down, found.zero_factor)
    pairs = (new, nearest_half(new_zero)), (found.factor, found.zero_factor)
    costs = [a * (a * curve + 2 * b * both - 2 * lean) + b * (b * zero_curve - 2 * zero_lean) for a, b in pairs]
    taken = [torch.where(costs[0] < costs[1], a, b) for a, b in zip(*pairs, strict=True)]
    return found._replace(factor=taken[0], zero_factor=taken[1])


def _rounded(units: Units, step: Tensor, zero: Tensor | None) -> Tensor:
    return units.rounded(step.flatten(), None if zero is None else zero.flatten())
