"""row_errors for every format, in pieces: how far each row of a weight is from what its parts mean."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.dispatch import kernel
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.numerics.groups import row_chunks
from lowbit.numerics.row_energies import row_energies
from lowbit.ops.encode import decode_rows


@kernel("row_errors", backend="eager")
def row_errors(fmt: Format, parts: Parts, w: Tensor) -> Tensor:
    """parts, w [N, K] -> float32 [3, N]: the sums of squares of w, of the difference and of what the parts mean."""
    n, k = w.shape
    sums = torch.empty((3, n), dtype=torch.float32, device=w.device)
    for start, stop in row_chunks(n, k, fmt.row_multiple):
        approx = decode_rows(fmt, parts, k, start, stop)
        sums[:, start:stop] = row_energies(w[start:stop].float(), approx)
    return sums
