"""Parts of a weight in svdquant_w4a4, for tests of its layouts."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats.svdquant_w4a4 import SvdquantW4A4

FMT = SvdquantW4A4(rank=5)


def random_parts(n: int, k: int = 192, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Of any codes and numbers."""

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    return {
        "qdata": torch.randint(-128, 128, (n, k // 2), dtype=torch.int8),
        "scale": floats(k // 64, n),
        "smooth_factor": floats(k),
        "proj_down": floats(k, 5),
        "proj_up": floats(n, 5),
    }
