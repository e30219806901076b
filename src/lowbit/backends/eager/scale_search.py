"""scale_search for every format: the best of the scales that it proposes, for each unit, then rounding to nearest."""

from __future__ import annotations

from torch import Tensor

from lowbit.dispatch import kernel
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.formats.scale_search import best_params


@kernel("scale_search", backend="eager")
def scale_search(fmt: Format, w: Tensor, weights: Tensor | None, where: str = "weight") -> Parts:
    """w [N, K], weights of columns [K] or None -> parts. Errors name `where`."""
    return fmt.quantize(w, params=best_params(w, fmt, weights, where), where=where)
