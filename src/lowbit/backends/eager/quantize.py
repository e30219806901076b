"""quantize for every format: rounding to nearest, or stochastically with a seed."""

from __future__ import annotations

from torch import Tensor

from lowbit.dispatch import kernel
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts


@kernel("quantize", backend="eager")
def quantize(fmt: Format, w: Tensor, seed: int | None, where: str = "weight") -> Parts:
    """w [N, K] -> parts. Errors name `where`."""
    return fmt.quantize(w, seed=seed, where=where)
