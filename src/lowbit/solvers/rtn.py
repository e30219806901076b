"""rtn: the format's own scales, and every weight to the nearest code.

At given scales nothing has a smaller squared error without statistics: that error is a sum over single weights.
"""

from __future__ import annotations

from torch import Tensor

from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.ops.encode import encode
from lowbit.solvers.base import Statistics, register_solver


@register_solver("rtn")
def rtn(
    w: Tensor, fmt: Format, statistics: Statistics | None = None, *, where: str = "weight", seed: int | None = None
) -> Parts:
    """Round to nearest, or stochastically with a `seed`. Statistics change nothing. See `Solver`."""
    return encode(w, fmt, where=where, seed=seed)
