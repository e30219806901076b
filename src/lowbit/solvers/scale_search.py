"""scale_search: try every scale that a format proposes, for each unit on its own, and keep the best.

What is searched is told in `lowbit.formats.scale_search`; the kernel of the weight's device does it. With statistics
the squares are weighted by E[x_k^2], the diagonal of H.
"""

from __future__ import annotations

from torch import Tensor

from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.formats.scale_search import best_params
from lowbit.ops.encode import encode, encode_searched
from lowbit.solvers.base import Statistics, register_solver


@register_solver("scale_search")
def scale_search(
    w: Tensor, fmt: Format, statistics: Statistics | None = None, *, where: str = "weight", seed: int | None = None
) -> Parts:
    """Search the scales, then round to nearest, or stochastically with a `seed`. See `Solver`."""
    fmt.check_weight(w, where)
    if not w.numel():
        return encode(w, fmt, where=where, seed=seed)
    weights = None if statistics is None else statistics.column_weights(w.shape[1], where)
    if seed is None:
        return encode_searched(w, fmt, weights, where=where)
    return fmt.quantize(w, params=best_params(w, fmt, weights, where), seed=seed, where=where)
