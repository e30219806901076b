"""What a result is worth on inputs that are not among the samples: all of them were used to make it.

A layer is solved with H of both halves of the samples, so its error on either half is too good: at a tenth of a token a
channel by 9 dB. A trial tells by how much: some rows solved with H of one half and judged with both. What they lose
more on the other half, in dB, is twice what the whole layer will, as twice the samples halve what is noise in H:

    gain on other inputs = gain on the samples - (gain of the trial on its half - on the other) / 2

and no more than the trial gained on the other half and 1.5 dB, about what twice the samples can add where they are so
few that this halving does not hold. Of halves that are not alike, T1 tokens and T2, it is T1 / (T1 + T2) instead of a
half: what a fit to H of T tokens takes from the error on any of them falls as 1 / T.

The trial's rows do not make up for each other as all of them may (`row_coupling`).
What that fits of the noise of one half's G = L D L^T shows without rounding anything: row errors U without a part in
each other become L^-T U, so what row j costs is (L^-1 G L^-T)_jj, of either half's G.

Measured on random layers of seven formats (`benchmarks/unseen_gain.py`): from a quarter of a token a channel on the
figure is within 0.5 dB of the gain on fresh inputs on average, where that on the samples is up to 5 dB too good.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.formats.base import Format
from lowbit.numerics.block_diagonal import blocks, diagonal

from .curvature import arranged, energy, unit_lower
from .row_coupling import row_order, shrunk_outputs

_HALF = 0.5
_AT_MOST = 0.15  # what twice the samples add to the trial's gain, in powers of ten: 1.5 dB
_LEAST = 1e-6  # share of the samples; of none nothing was fitted
_PROBES = 16
_SEED = 0x5EE


@dataclass(frozen=True)
class Trial:
    """What was lost by some rows that were solved with H of one half, as a share of what rounding to nearest loses.

    `seen`: on that half; `other`: on the other one. `amount`: the shrinkage with which all rows are to be solved.
    `share`: of all samples that are in that half.
    """

    seen: float
    other: float
    amount: float = 0.0
    share: float = _HALF

    def expected(self, lost: float, plain: float) -> float:
        """What a layer loses of other inputs that loses `lost` on its samples, where rounding to nearest does `plain`.

        Never less than `lost`.
        """
        doublings = -math.log2(max(self.share, _LEAST))
        return max(lost * self.excess, plain * self.other / 10 ** (_AT_MOST * doublings))

    def along_rows(self, shares: tuple[float, float]) -> Trial:
        """The same where rows make up for each other, too, and lose `shares` of the rest by it; see `row_shares`."""
        return replace(self, seen=self.seen * shares[0], other=self.other * shares[1])

    @property
    def excess(self) -> float:
        """By what factor the error of the whole layer is too small on its own samples; 1 or more."""
        return max(self.other / self.seen, 1.0) ** self.share if self.seen > 0 else 1.0


def row_shares(w: Tensor, fmt: Format, outputs: Tensor, others: Tensor) -> tuple[float, float]:
    """What is left of the error where rows make up for each other by G of one half, `outputs`: on it, on others.

    G: [N, N] or its blocks. Rows of w [N, K] count by their squares, as their rounding errors do about. All of it for a
    G that is no second moment.
    """
    outputs, others = outputs.to(w.device), others.to(w.device)
    shrunk = shrunk_outputs(outputs)
    order = row_order(fmt, shrunk)
    generator = torch.Generator().manual_seed(_SEED)
    signs = torch.randint(2, (w.shape[0], _PROBES), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
    squares = torch.linalg.vector_norm(w, dim=1, dtype=torch.float32).square()
    probes = signs.to(w.device).float() * squares.sqrt().unsqueeze(1)
    errors = torch.empty_like(probes)
    for index, (rows, block) in enumerate(blocks(shrunk)):
        first = None if order is None else order[index]
        lower = unit_lower(block if first is None else arranged(block, first))
        if lower is None:
            return 1.0, 1.0
        some = probes[rows] if first is None else probes[rows][first]
        some = torch.linalg.solve_triangular(lower.mT, some, upper=True)
        errors[rows] = some if first is None else some[first.argsort()]
    shares = []
    for moments in (outputs, others):
        before = float((diagonal(moments).reshape(-1) * squares).sum(dtype=torch.float64)) * _PROBES
        after = energy(errors, None, moments)
        shares.append(after / before if before > 0 else 1.0)
    return shares[0], shares[1]
