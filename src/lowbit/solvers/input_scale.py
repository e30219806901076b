"""Static scales of activations, from the magnitudes that calibration counted.

`Statistics.magnitudes` counts |x| by the upper 12 of its 31 float32 bits: 16 bins an octave, each 4.4 % wide, so that a
percentile interpolated within its bin is exact to about 2 %. The counts are of all elements that calibration looked at.
A scale rounded to that is no loss: a few percent either way neither clip nor coarsen what counts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit.errors import SolverError
from lowbit.formats.base import Format

from .base import Statistics

BINS = 4096
_SHIFT = 19  # the lower bits of a float32, which a bin leaves open
FRACTION = 0.9999
"""Of the elements that a static scale covers; the rest is clipped to the largest code."""
_SMALLEST = 1e-8


def percentile(statistics: Statistics, fraction: float, where: str = "weight") -> float:
    """The magnitude that this fraction (0 to 1) of the input's elements does not exceed.

    Linear within a bin, and never above the largest magnitude seen, where that is known. Raises `SolverError` for a
    fraction out of range, and when nothing was counted.
    """
    if not 0.0 <= fraction <= 1.0:
        raise SolverError(f"{where}: {fraction} is no fraction of the input; give one from 0 to 1, such as {FRACTION}")
    counts = statistics.magnitudes
    if counts is None or not int(counts.sum()):
        raise SolverError(f"{where}: the magnitudes of its input were not counted; calibrate again")
    found = _from_counts(counts, fraction)
    return found if statistics.absmax is None else min(found, float(statistics.absmax.max()))


def input_scale(
    statistics: Statistics | None, fmt: Format, fraction: float = FRACTION, where: str = "weight"
) -> Tensor:
    """The activation scale to store, a float32 scalar: a percentile over the largest activation code of the format.

    The statistics are those of the input as the kernel gets it: see `transformed`. Raises `SolverError` for a format
    whose activations have no static scale, and where nothing is known of the input.
    """
    if not fmt.largest_activation:
        raise SolverError(f"{where}: {fmt.name} has no static scale of activations; leave input_scale out")
    if statistics is None:
        raise SolverError(
            f"{where}: {fmt} stores a static scale of its input, and nothing is known of that; calibrate, or leave "
            "input_scale out"
        )
    top = percentile(statistics, fraction, where)
    return torch.tensor(max(top / fmt.largest_activation, _SMALLEST), dtype=torch.float32)


def scale_problem(value: object) -> str | None:
    """Why a value can be no static scale, in words that go on a sentence about it; None for a number that can."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"is {value!r}, expected a number"
    try:
        kept = float(torch.tensor(float(value), dtype=torch.float32))
    except OverflowError:  # an int that no float holds
        kept = math.inf
    return None if 0 < kept < math.inf else f"is {value!r}, expected a number above zero that float32 holds"


def fraction_problem(value: object) -> str | None:
    """The same of a fraction of the input's elements that a static scale is to cover."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        return f"is {value!r}, expected a number above 0 and up to 1, such as {FRACTION} for 99.99 % of the input"
    return None


def transformed(statistics: Statistics, fmt: Format, k: int, scale: Tensor | None, where: str = "weight") -> Statistics:
    """What calibration would have counted of the input [., K] as a kernel gets it: times a scale [K], then rotated.

    The same statistics where nothing happens to the input. Raises `SolverError` when no samples of it were kept.
    """
    probe = torch.zeros((1, k))
    if scale is None and fmt.prepare(probe) is probe:
        return statistics
    if statistics.samples is None:
        raise SolverError(f"{where}: no samples of its input were kept, and {fmt} changes it first; calibrate again")
    x = statistics.samples.float()
    x = fmt.prepare(x if scale is None else x * scale.float().to(x.device))
    return Statistics(absmax=x.abs().amax(0), magnitudes=magnitudes_of(x))


def magnitudes_of(x: Tensor) -> Tensor:
    """`Statistics.magnitudes` of some rows, float32."""
    return torch.bincount((x.abs().contiguous().view(torch.int32) >> _SHIFT).flatten(), minlength=BINS)


def _from_counts(counts: Tensor, fraction: float) -> float:
    """The percentile of a histogram [4096] over the upper bits of float32."""
    sums = counts.double().cumsum(0)
    wanted = fraction * float(sums[-1])
    index = min(int(torch.searchsorted(sums, wanted)), int(counts.nonzero().max()))
    index = max(index, int(counts.nonzero().min()))
    before = float(sums[index - 1]) if index else 0.0
    edges = (torch.tensor([index, index + 1], dtype=torch.int32) << _SHIFT).view(torch.float32)
    low, high = float(edges[0]), float(edges[1])
    if not math.isfinite(high):  # the bins of infinity and NaN have no upper edge
        return low
    return low + (high - low) * (wanted - before) / float(counts[index])
