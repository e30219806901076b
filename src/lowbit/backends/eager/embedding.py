"""embedding for every format: gathers the coded rows first and decodes only those."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.dispatch import ANY_LAYOUT, kernel
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts


@kernel("embedding", backend="eager", layout=ANY_LAYOUT)
@kernel("embedding", backend="eager")
def embedding(fmt: Format, indices: Tensor, parts: Parts, k: int, dtype: torch.dtype) -> Tensor:
    """indices [...] -> [..., K] in `dtype`."""
    return fmt.embedding(indices, parts, k, dtype)
