"""row_errors for every format, in pieces: how far each row of a weight is from what its parts mean."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.dispatch import kernel
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.numerics.groups import row_chunks
from lowbit.ops.encode import decode_rows


@kernel("row_errors", backend="eager")
def row_errors(fmt: Format, parts: Parts, w: Tensor) -> Tensor:
    """parts, w [N, K] -> float32 [3, N]: the sums of squares of w, of the difference and of what the parts mean."""
    n, k = w.shape
    sums = torch.empty((3, n), dtype=torch.float32, device=w.device)
    for start, stop in row_chunks(n, k, fmt.row_multiple):
        approx = decode_rows(fmt, parts, k, start, stop)
        rows = w[start:stop].float()
        sums[2, start:stop] = _energy(approx)
        sums[1, start:stop] = _energy(approx.sub_(rows))
        sums[0, start:stop] = _energy(rows)
    return sums


def _energy(rows: Tensor) -> Tensor:
    """The sum of squares of each row [n]; the norm is the quickest way there."""
    return torch.linalg.vector_norm(rows, dim=1).square_()
