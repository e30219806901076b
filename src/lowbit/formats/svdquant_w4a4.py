"""svdquant_w4a4: 4-bit weights times 4-bit activations, beside a low-rank branch in high precision (arXiv 2411.05007).

    y = deq(quant(x / smooth)) deq(W4)^T + (x proj_down) proj_up^T + bias
    w = deq(W4) / smooth + proj_up proj_down^T               the effective weight

part           shape      meaning
qdata          [N, K/2]   int8 bytes, the even column in the low nibble; two's complement, [-7, 7] by default
scale          [K/64, N]  bfloat16, float16 or float32, as the weight was (so are all below); may be negative
smooth_factor  [K]        divides the input of the 4-bit branch
proj_down      [K, R]     acts on the input as it is
proj_up        [N, R]

Activations are quantized at run time by groups of 64: signed, absmax / 7, or with `act_unsigned` (after a GELU)
unsigned, (x + 0.171875) / smooth by max / 15; the stored bias of such a layer contains the shift's share (see
`bias_share`).

Made from a weight alone: smoothing factors by a small search (`numerics.smoothing`), the low rank by subspace
iteration refined against the rounding of the residual (`numerics.low_rank`), then proj_up for each row by least
squares, alternating with its rounding. A scale search may choose negative scales and then uses code -8 as well: worth
1 dB, and exact in every runtime that reads the four bits as the integer they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.errors import FormatError, WeightError
from lowbit.formats.base import Candidate, Format
from lowbit.formats.grid import Grid
from lowbit.formats.parts import Dim, K, N, Part, Parts, R
from lowbit.formats.registry import register
from lowbit.formats.stored_steps import FloatSteps
from lowbit.numerics import w4a4_search
from lowbit.numerics.floats import divisor
from lowbit.numerics.groups import group_amax, row_chunks
from lowbit.numerics.int4_matmul import (
    GELU_SHIFT,
    GROUP,
    SIGNED_MAX,
    grouped_linear_,
    quantize_groups,
    round_groups,
    smoothed,
    unpack_codes,
)
from lowbit.numerics.integers import round_clamp_
from lowbit.numerics.levels import IntegerLevels
from lowbit.numerics.low_rank import leading_basis_of, refined_basis, refined_rows
from lowbit.numerics.packing import pack_nibbles
from lowbit.numerics.smoothing import choose_smoothing, column_amax

LOWEST = -8
_LEVELS = IntegerLevels(LOWEST, SIGNED_MAX)
MIN_STORED_SCALE = 2.0**-24  # the smallest positive float16: no stored dtype rounds it to zero
PASSES = 3  # of subspace iteration
REFINEMENTS = 8  # of the basis: +1.5 to 2 dB on trained weights, of which the first three give three quarters
TURNS = 3  # of proj_up and rounding at the final basis
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = 1 << 20  # elements of a piece of rows
_ACTIVATIONS = 1 << 22  # elements of a piece of activations or results
_SAMPLE = 1 << 16  # elements of the rows that the smoothing search looks at
# Scales that put the largest weight of a group beyond or short of code -8, times these; found greedily on Gaussian
# groups. Each in turn lowers the squared error most: from 19.36 dB at absmax / 7 by 20.63, 20.75, 20.84, .. to 20.89
# of 20.93.
FACTORS = (0.95, 1.0, 0.9, 1.03, 0.97, 0.93)


@register
@dataclass(frozen=True)
class SvdquantW4A4(Format):
    """4-bit weights and activations in groups of 64 with smoothing factors and a low-rank branch."""

    rank: int = 32
    act_unsigned: bool = False

    name: ClassVar[str] = "svdquant_w4a4"
    stochastic: ClassVar[bool] = True
    keys: ClassVar = {
        "comfy": {
            "qdata": "weight",
            "scale": "weight_scale",
            "smooth_factor": "smooth_factor",
            "proj_down": "proj_down",
            "proj_up": "proj_up",
        }
    }
    golden_sqnr: ClassVar = {"svdquant_w4a4": 20.79, "svdquant_w4a4(rank=16,act_unsigned=True)": 20.19}
    data_free_solver: ClassVar[str] = "scale_search"

    def __post_init__(self) -> None:
        rank: object = self.rank
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise FormatError(f"{self.name}: rank is {rank!r}, expected a positive number such as 32")
        if not isinstance(self.act_unsigned, bool):
            raise FormatError(f"{self.name}: act_unsigned is {self.act_unsigned!r}, expected true or false")

    @property
    def calibrated_start(self) -> str:
        """See `Format`."""
        return "svdquant"

    def part_rules(self) -> tuple[Part, ...]:
        return (
            Part("qdata", (N, Dim("K", 2)), (torch.int8,)),
            Part("scale", (Dim("K", GROUP), N), _DTYPES),
            Part("smooth_factor", (K,), _DTYPES),
            Part("proj_down", (K, R), _DTYPES),
            Part("proj_up", (N, R), _DTYPES),
        )

    def sizes(self, n: int, k: int) -> dict[str, int]:
        return {"N": n, "K": k, "R": self.rank}

    def rows_of(self, parts: Mapping[str, Tensor]) -> int:
        return parts["qdata"].numel() * 2 // parts["smooth_factor"].shape[0]  # in every layout

    def row_ranges(self, n: int, k: int) -> Iterator[tuple[int, int]]:
        return row_chunks(n, k, elements=_ROWS)  # each piece costs a few products with proj_down

    def check_shape(self, n: int, k: int) -> str | None:
        if k % GROUP:
            return f"has {k} columns, not a multiple of the group size {GROUP}"
        return f"has less than {self.rank} rows or columns, the rank" if self.rank > min(n, k) else None

    def fitted_to(self, smallest_input: float) -> Format:
        """Unsigned activations after a GELU: all 16 codes for what is nearly all positive."""
        return replace(self, act_unsigned=True) if smallest_input >= -GELU_SHIFT else self

    # ---- choosing parameters ----------------------------------------------------------------------------------------

    def fit_shared(self, w: Tensor) -> Parts:
        n, k = w.shape
        dtype = w.dtype if w.dtype in _DTYPES else torch.float32
        amax = column_amax((w[a:b] for a, b in self.row_ranges(n, k)), k, w.device)
        return self.shared(w, amax, dtype, w4a4_search.PLAIN)

    def shared(self, w: Tensor, amax: Tensor, dtype: torch.dtype, steps: w4a4_search.Steps) -> Parts:
        """smooth_factor and proj_down of a weight [N, K] with these largest magnitudes of columns [K], in `dtype`."""
        n, k = w.shape
        if not bool(amax.isfinite().all()):  # an error that names the layer follows, when the rows are read
            return {
                "smooth_factor": amax.new_ones(k, dtype=dtype),
                "proj_down": amax.new_zeros((k, self.rank), dtype=dtype),
            }
        size = amax.max().clamp_min(torch.finfo(torch.float32).tiny)  # divided away, so that squares fit into float32
        count = min(n, max(_SAMPLE // k, 8 * self.rank))
        sample = w[torch.arange(count, device=w.device) * n // count].contiguous().float() / size
        smooth = choose_smoothing(sample, amax, self.rank, self.act_unsigned, dtype, steps)
        factor = smooth.float()
        through = steps.passes(w, factor / size, factor.square().reciprocal(), None)
        basis = leading_basis_of(through.step, k, self.rank, PASSES, w.device)
        basis = refined_basis(through, basis, self.rank, REFINEMENTS)
        return {"smooth_factor": smooth, "proj_down": (basis / factor.unsqueeze(1)).to(dtype)}

    def fit(self, rows: Tensor, shared: Parts) -> Parts:
        smooth, down = shared["smooth_factor"].float(), shared["proj_down"].float()
        weights = smooth.square().reciprocal()
        scaled = rows.contiguous() * smooth  # contiguous: the last bits of a matrix product depend on strides
        up = refined_rows(scaled, down * smooth.unsqueeze(1), round_groups, weights, TURNS, shared["proj_down"].dtype)
        params = {**shared, "proj_up": up}
        scale = self.plain_scale(rows, params)
        if not bool(scale.isfinite().all() & up.isfinite().all()):
            kind = str(up.dtype).removeprefix("torch.")
            raise WeightError(f"weight: its low-rank factors exceed {kind}; repair the source or keep this layer")
        return {"scale": scale, **params}

    def plain_scale(self, rows: Tensor, params: Parts) -> Tensor:
        """The scale of rounding to nearest beside the low rank of `params`: absmax / 7, float32 [K/64, n]."""
        amax = group_amax(self._residual(rows, params), GROUP)
        scale = amax.div_(divisor(SIGNED_MAX, amax)).clamp_min_(MIN_STORED_SCALE)
        return scale.t().contiguous()

    def unit(self, shape: tuple[int, int]) -> tuple[int, int]:
        return 1, GROUP

    def candidates(self, rows: Tensor, params: Parts) -> Iterator[Candidate]:
        """Scales of the sign that gives the largest weight of a group the code -8."""
        groups = _groups(self._residual(rows, params))
        low, high = groups.amin(dim=-1), groups.amax(dim=-1)
        to_lowest = torch.where(high > -low, high, low) / LOWEST
        floor = torch.full_like(to_lowest, MIN_STORED_SCALE)
        for factor in FACTORS:
            scale = to_lowest * factor
            scale = torch.where(scale.abs() < floor, floor, scale)
            yield Candidate({**params, "scale": scale.t().contiguous().to(params["scale"].dtype)})

    def grid(self, rows: Tensor, params: Parts) -> Grid:
        """Of the residual, in its smoothed units; the low rank and the smoothing factors stay."""
        factor = params["smooth_factor"].float()
        return Grid(
            self._residual(rows, params).t().contiguous(),
            params["scale"].float().clone(),
            _LEVELS,
            columns=GROUP,
            factor=smoothed(torch.ones_like(factor), factor),
            snap=FloatSteps(MIN_STORED_SCALE, dtype=params["scale"].dtype, with_sign=True),
        )

    def with_steps(self, params: Parts, grid: Grid) -> Parts:
        return {**params, "scale": grid.step.to(params["scale"].dtype)}

    def from_grid(self, values: Tensor, params: Parts) -> Tensor:
        rows = smoothed(values.t(), params["smooth_factor"])
        return rows.addmm_(params["proj_up"].float(), params["proj_down"].float().t())

    # ---- codes ------------------------------------------------------------------------------------------------------

    def encode(self, rows: Tensor, params: Parts, noise: Tensor | None = None) -> Tensor:
        return self._codes(rows, params, noise).to(torch.int8).flatten(1)

    def decode(self, codes: Tensor, params: Parts) -> Tensor:
        return self._values(_groups(codes).float(), params)

    def pack(self, codes: Tensor) -> Tensor:
        return pack_nibbles(codes).view(torch.int8)

    def unpack(self, qdata: Tensor, columns: int) -> Tensor:
        return unpack_codes(qdata, unsigned=False)

    def project(self, rows: Tensor, params: Parts) -> Tensor:
        return self._values(self._codes(rows, params), params)

    def _residual(self, rows: Tensor, params: Parts) -> Tensor:
        """What is left for the 4-bit branch, in its smoothed units: float32 [n, K]."""
        low_rank = params["proj_up"].float() @ params["proj_down"].float().t()
        return (rows - low_rank).mul_(params["smooth_factor"].float())

    def _codes(self, rows: Tensor, params: Parts, noise: Tensor | None = None) -> Tensor:
        """Codes as float32 [n, K/64, 64]."""
        steps = _groups(self._residual(rows, params)).div_(_spread(params["scale"]))
        return round_clamp_(steps, LOWEST, SIGNED_MAX, None if noise is None else _groups(noise))

    def _values(self, codes: Tensor, params: Parts) -> Tensor:
        """float32 codes [n, K/64, 64], overwritten -> effective rows [n, K]."""
        residual = smoothed(codes.mul_(_spread(params["scale"])).flatten(1), params["smooth_factor"])
        return residual.addmm_(params["proj_up"].float(), params["proj_down"].float().t())

    # ---- linear -----------------------------------------------------------------------------------------------------

    def linear(self, x: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x, with quantized activations. `bias` is the stored one."""
        rows, n = x.reshape(-1, x.shape[-1]), self.rows_of(parts)
        out = torch.empty((rows.shape[0], n), dtype=x.dtype, device=x.device)
        down = parts["proj_down"].float()
        for start, stop in row_chunks(rows.shape[0], max(rows.shape[1], n), elements=_ACTIVATIONS):
            piece = rows[start:stop].float()
            shifted = piece + GELU_SHIFT if self.act_unsigned else piece
            codes, scale = quantize_groups(shifted, parts["smooth_factor"], self.act_unsigned)
            grouped_linear_(
                out[start:stop], codes, scale, piece @ down, parts["qdata"], parts["scale"], parts["proj_up"], bias
            )
        return out.reshape(*x.shape[:-1], n)

    @property
    def rounds_input(self) -> bool:
        """Always."""
        return True

    @property
    def folds_bias(self) -> bool:
        """With `act_unsigned` the stored bias makes up for the shift of the activations."""
        return self.act_unsigned

    def bias_share(self, parts: Mapping[str, Tensor]) -> Tensor | None:
        """With `act_unsigned`, 0.171875 times the row sums of deq(W4) / smooth: what the stored bias lacks.

        `stored = true - bias_share`; a product with the dequantized weight needs `stored + bias_share`. float32 [N].
        """
        if not self.act_unsigned:
            return None
        n, k = self.rows_of(parts), parts["smooth_factor"].shape[0]
        share = torch.empty(n, dtype=torch.float32, device=parts["qdata"].device)
        ones = smoothed(torch.ones(k, dtype=torch.float32, device=share.device), parts["smooth_factor"])
        for start, stop in self.row_ranges(n, k):
            codes = _groups(self.unpack(parts["qdata"][start:stop], k)).float()
            share[start:stop] = codes.mul_(_spread(parts["scale"][:, start:stop])).flatten(1) @ ones
        return share.mul_(GELU_SHIFT)


def _groups(x: Tensor) -> Tensor:
    """[n, K] -> [n, K/64, 64]."""
    return x.unflatten(1, (x.shape[1] // GROUP, GROUP))


def _spread(scale: Tensor) -> Tensor:
    """[K/64, n] -> float32 [n, K/64, 1], which broadcasts over groups."""
    return scale.t().float().contiguous().unsqueeze(-1)
