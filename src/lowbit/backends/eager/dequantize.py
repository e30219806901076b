"""dequantize for every format."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.dispatch import ANY_LAYOUT, kernel
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts


@kernel("dequantize", backend="eager", layout=ANY_LAYOUT)
@kernel("dequantize", backend="eager")
def dequantize(fmt: Format, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """parts -> the effective weight [N, K] in `dtype`."""
    return fmt.dequantize(parts, shape, dtype)
