"""wna16: integers of 2 to 8 bits, a scale for every group along K or for each row, activations left alone.

    w = (code - zero_point) * scale          code: 0 .. 2**bits - 1; without zero points 2**(bits - 1) stands for 0

part         shape                   meaning
qdata        [N, ceil(K/8) * bits]   uint8; element i of a row in bits [i bits, (i + 1) bits), the lowest bit first
scale        [N, G]                  bfloat16, float16 or float32, as the weight was; files may hold negative ones
zero_point   [N, G]                  uint8, with zero_point=true: the code that stands for 0; may be 2**bits (GPTQ)
g_idx        [K]                     int32, with act_order=true: the group of each column

G is ceil(K / group_size), the last group being as long as it is; group_size 0 is one group for a whole row. Columns
beyond K hold the code of 0. These are the values of compressed-tensors (`pack-quantized`), GPTQ, AutoAWQ, torchao's
and ExecuTorch's int4 tensors with integer zeros; where those keep their bits is a dialect's business.

Without zero points 4 bits and more are encoded in [-(2**(bits - 1) - 1), 2**(bits - 1) - 1] by absmax; 2 and 3 bits
have no code to spare and take the lowest one, too. With zero points the range of a group is widened to hold 0. No fit
clips anything: a second one finds the same scale, and stochastic rounding is right on average. What clips is the
search for scales, and at 2 and 3 bits that is worth more than everything else. Scales are rounded to their stored dtype
before zero points and codes are chosen.

>>> import torch
>>> from lowbit.formats import parse_spec
>>> fmt = parse_spec("wna16(group_size=4,zero_point=true)")
>>> parts = fmt.quantize(torch.tensor([[-3.0, 0.0, 4.5, 1.5]]))
>>> parts["scale"].tolist(), parts["zero_point"].tolist(), parts["qdata"].tolist()
([[0.5]], [[6]], [[96, 159, 102, 102]])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.errors import FormatError, PartsError
from lowbit.formats.base import Candidate, Format
from lowbit.formats.grid import Grid
from lowbit.formats.parts import Dim, K, N, Part, Parts
from lowbit.formats.registry import one_of, register
from lowbit.formats.stored_steps import FloatSteps
from lowbit.numerics.bit_packing import CODES, pack_bits, unpack_bits
from lowbit.numerics.floats import divisor
from lowbit.numerics.groups import ceil_div, group_amax, pad_to, round_up
from lowbit.numerics.integers import round_clamp_
from lowbit.numerics.levels import IntegerLevels

_SMALLEST = 2.0**-24  # the smallest positive float16: no stored dtype rounds it to zero
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What a search multiplies the fitted scale by, by bits (the last entry holds from there on): found greedily on Gaussian
# weights and on ones with outliers, in groups of 32, 128 and 1024. They reach what a fine sweep finds but for 0.2 dB.
_FACTORS = {
    2: (0.39, 0.24, 0.55, 0.32, 0.15, 0.69, 0.46),
    3: (0.64, 0.81, 0.44, 0.55, 0.29, 0.72, 0.89),
    4: (0.76, 0.91, 0.58, 0.85, 0.95, 0.69, 0.51),
    5: (0.84, 0.97, 0.94, 0.77, 1.02, 0.99, 0.9),
    6: (0.982, 0.934, 1.008, 0.994, 0.97, 0.904),
}
# With zero points: the parts of the range to give up below and above 0.
_TRIMS = {
    2: ((0.4, 0.4), (0.6, 0.6), (0.24, 0.24), (0.56, 0.48), (0.08, 0.64), (0.64, 0.08), (0.16, 0.16)),
    3: ((0.3, 0.3), (0.15, 0.1), (0.4, 0.4), (0.2, 0.2), (0.05, 0.1), (0.2, 0.3)),
    4: ((0.24, 0.24), (0.06, 0.06), (0.03, 0.03), (0.12, 0.09), (0.2, 0.16), (0.06, 0.03)),
    5: ((0.105, 0.105), (0.03, 0.015), (0.03, 0.045), (0.015, 0.015), (0.06, 0.06), (0.0, 0.015)),
    6: ((0.008, 0.012), (0.04, 0.04), (0.004, 0.002), (0.02, 0.016), (0.014, 0.012)),
}
_LAST = 6


@register
@dataclass(frozen=True)
class WNA16(Format):
    """Integer codes of 2 to 8 bits with a scale, and if wanted a zero point, per group: 4.125 bits a weight at 4."""

    bits: int = 4
    group_size: int = 128
    zero_point: bool = False
    act_order: bool = False

    name: ClassVar[str] = "wna16"
    stochastic: ClassVar[bool] = True
    keys: ClassVar = {
        "comfy": {
            "qdata": "weight",
            "scale": "weight_scale",
            "zero_point": "weight_zero_point",
            "g_idx": "weight_g_idx",
        }
    }
    golden_sqnr: ClassVar = {
        "wna16": 18.61,
        "wna16(act_order=True)": 18.61,
        "wna16(group_size=32,zero_point=True)": 21.84,
        "wna16(bits=2,zero_point=True)": 5.97,
        "wna16(bits=3,group_size=32)": 13.68,
        "wna16(bits=8,group_size=0)": 42.07,
    }
    data_free_solver: ClassVar[str] = "scale_search"

    def __post_init__(self) -> None:
        one_of(self, "bits", range(2, 9))
        one_of(self, "zero_point", (False, True))
        one_of(self, "act_order", (False, True))
        size: object = self.group_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise FormatError(
                f"{self.name}: group_size is {size!r}, expected a positive number of columns such as 128, or 0 for "
                "one scale a row"
            )
        if self.act_order and not size:
            raise FormatError(f"{self.name}: act_order goes with groups; group_size=0 has one a row and no order")

    @property
    def levels(self) -> IntegerLevels:
        """What codes stand for before the scale when this format encodes; files may use all 2**bits."""
        if self.zero_point:
            return IntegerLevels(0, 2**self.bits - 1)
        half = 2 ** (self.bits - 1)
        return IntegerLevels(-half if self.bits < 4 else 1 - half, half - 1)

    def part_rules(self) -> tuple[Part, ...]:
        by_group = (N, Dim("K", self.group_size) if self.group_size else 1)
        rules = [Part("qdata", (N, Dim("K", CODES, self.bits)), (torch.uint8,)), Part("scale", by_group, _DTYPES)]
        rules += [Part("zero_point", by_group, (torch.uint8,))] if self.zero_point else []
        rules += [Part("g_idx", (K,), (torch.int32,))] if self.act_order else []
        return tuple(rules)

    def check(self, parts: Mapping[str, Tensor], shape: tuple[int, int], where: str = "weight") -> None:
        """See `Format.check`; with act_order every column must name a group that exists, too."""
        super().check(parts, shape, where)
        if not self.act_order or parts["g_idx"].is_meta or not shape[1]:
            return
        low, high = map(int, torch.aminmax(parts["g_idx"]))
        groups = ceil_div(shape[1], self.group_size)
        if low < 0 or high >= groups:
            raise PartsError(
                f"{where}: g_idx holds groups from {low} to {high}, expected 0 to {groups - 1} for K = {shape[1]} and "
                f"group_size = {self.group_size}; the file does not fit this layer"
            )

    def fit(self, rows: Tensor, shared: Parts) -> Parts:
        return self._fit(rows, torch.float32)

    def fit_stored(self, rows: Tensor, shared: Parts, source: torch.dtype, where: str = "weight") -> Parts:
        return self._fit(rows, self.part_dtypes(source)["scale"])

    def encode(self, rows: Tensor, params: Parts, noise: Tensor | None = None) -> Tensor:
        """uint8 codes [n, 8 * ceil(K / 8)]."""
        n, columns = rows.shape[0], round_up(rows.shape[1], CODES)
        noise = None if noise is None else pad_to(noise, n, columns)
        return self._codes(pad_to(rows, n, columns), params, noise).to(torch.uint8).flatten(1)

    def decode(self, codes: Tensor, params: Parts) -> Tensor:
        """float32 [n, K], or as many columns as there are codes."""
        return self._values(self._split(codes.float(), params), codes.shape[1], params)

    def pack(self, codes: Tensor) -> Tensor:
        return pack_bits(codes, self.bits)

    def unpack(self, qdata: Tensor, columns: int) -> Tensor:
        return unpack_bits(qdata, self.bits, columns)

    def project(self, rows: Tensor, params: Parts) -> Tensor:
        return self._values(self._codes(rows, params), rows.shape[1], params)

    def unit(self, shape: tuple[int, int]) -> tuple[int, int]:
        return 1, self._columns(shape[1])

    def candidates(self, rows: Tensor, params: Parts) -> Iterator[Candidate]:
        """Narrower ranges: clipping a few weights costs less than coarser steps for all the others."""
        self._check_order(params, rows.shape[1])
        dtype = params["scale"].dtype
        if not self.zero_point:
            amax = self._widest(*self._extremes(rows))
            for factor, _ in self.narrowings:
                yield Candidate({**params, "scale": self._stored(amax * factor, dtype)})
            return
        low, high = self._extremes(rows)
        for below, above in self.narrowings:
            yield Candidate({**params, **self._affine(low * below, high * above, dtype)})

    def grid(self, rows: Tensor, params: Parts) -> Grid:
        self._check_order(params, rows.shape[1])
        dtype, step = params["scale"].dtype, params["scale"].float().t().contiguous()

        def snap(step: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
            assert zero is not None
            step, _ = plain(step, None)
            return step, -self._zero_points(step, zero) * step

        plain = FloatSteps(_SMALLEST, self.largest_scale(dtype), dtype)
        columns, target = self._columns(rows.shape[1]), rows.t().contiguous()
        if not self.zero_point:
            return Grid(target, step, self.levels, columns=columns, snap=plain)
        zero = -params["zero_point"].t().float() * step
        return Grid(target, step, self.levels, columns=columns, zero=zero, snap=snap)

    def with_steps(self, params: Parts, grid: Grid) -> Parts:
        found = {**params, "scale": grid.step.t().contiguous().to(params["scale"].dtype)}
        if grid.zero is not None:
            found["zero_point"] = self._zero_points(grid.step, grid.zero).t().contiguous().to(torch.uint8)
        return found

    @property
    def narrowings(self) -> tuple[tuple[float, float], ...]:
        """What a search multiplies the lower and the upper end of a group by, or without zero points its scale."""
        bits = min(self.bits, _LAST)
        if self.zero_point:
            return tuple((1 - below, 1 - above) for below, above in _TRIMS[bits])
        return tuple((factor, factor) for factor in _FACTORS[bits])

    def largest_scale(self, dtype: torch.dtype) -> float:
        """The largest scale of a dtype with which no code decodes to infinity."""
        return min(2.0 ** (128 - self.bits), torch.finfo(dtype).max)

    def _stored(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Scales in `dtype`, none of them zero, tiny, negative or so large that a code could decode to infinity."""
        return scale.clamp(_SMALLEST, self.largest_scale(dtype)).to(dtype)

    def _columns(self, k: int) -> int:
        """Columns of a whole group of a weight with so many."""
        return min(self.group_size or k, k)

    def _fit(self, rows: Tensor, dtype: torch.dtype) -> Parts:
        """Parameters that clip nothing, the scale in `dtype`."""
        if self.zero_point:
            params = self._affine(*self._extremes(rows), dtype)
        elif self.levels.low == -self.levels.high:
            amax = group_amax(rows, self._columns(rows.shape[1]))
            params = {"scale": self._stored(amax / divisor(self.levels.high, amax), dtype)}
        else:
            params = {"scale": self._stored(self._widest(*self._extremes(rows)), dtype)}
        if self.act_order:
            index = torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device)
            params["g_idx"] = index // self.group_size
        return params

    def _extremes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest weight of each group, or 0 where that lies beyond: float32 [n, G] each."""
        size = self._columns(rows.shape[1])
        groups = ceil_div(rows.shape[1], size)
        padded = pad_to(rows, rows.shape[0], groups * size).unflatten(1, (groups, size))
        return padded.amin(dim=-1).clamp_(max=0.0), padded.amax(dim=-1).clamp_(min=0.0)

    def _widest(self, low: Tensor, high: Tensor) -> Tensor:
        """The smallest symmetric scale with which neither end is clipped."""
        return torch.maximum(low / divisor(self.levels.low, low), high / divisor(self.levels.high, high))

    def _affine(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> Parts:
        """Scale and zero point [n, G] of the range from `low` <= 0 to `high` >= 0."""
        most = divisor(self.levels.high, high)
        scale = self._stored(high / most - low / most, dtype)  # high - low could overflow
        return {"scale": scale, "zero_point": self._zero_points(scale.float(), low).to(torch.uint8)}

    def _zero_points(self, step: Tensor, zero: Tensor) -> Tensor:
        """The zero points nearest to offsets, as float32: which code stands for 0 when code 0 stands for `zero`."""
        return round_clamp_(-zero / step, 0, self.levels.high)

    def _codes(self, rows: Tensor, params: Parts, noise: Tensor | None = None) -> Tensor:
        """Codes as float32, in the shape of `_split`."""
        scaled = self._split(rows, params) / self._spread(params["scale"], rows.shape[1], params)
        noise = None if noise is None else self._split(noise, params)
        if self.zero_point:
            scaled.add_(self._spread(params["zero_point"], rows.shape[1], params))
        codes = round_clamp_(scaled, self.levels.low, self.levels.high, noise)
        return codes if self.zero_point else codes.add_(2 ** (self.bits - 1))

    def _values(self, codes: Tensor, columns: int, params: Parts) -> Tensor:
        """float32 codes in the shape of `_split`, overwritten -> [n, columns]: exact but for one rounding."""
        zero = self._spread(params["zero_point"], columns, params) if self.zero_point else 2 ** (self.bits - 1)
        return codes.sub_(zero).mul_(self._spread(params["scale"], columns, params)).flatten(1)

    def _split(self, x: Tensor, params: Parts) -> Tensor:
        """[n, columns] as [n, A, B] such that `_spread` gives one value for each of the A."""
        whole = self._group_of(x.shape[1], params) is None
        return x.unflatten(1, (params["scale"].shape[1], -1)) if whole else x.unsqueeze(-1)

    def _spread(self, by_group: Tensor, columns: int, params: Parts) -> Tensor:
        """Values [n, G] as float32 [n, A, 1], see `_split`."""
        index = self._group_of(columns, params)
        return (by_group if index is None else by_group.index_select(1, index)).float().unsqueeze(-1)

    def _group_of(self, columns: int, params: Parts) -> Tensor | None:
        """The group of each column, padding included, or None where groups are runs of one length."""
        groups = params["scale"].shape[1]
        if self.act_order:
            index = params["g_idx"].long()
            return torch.cat([index, index[-1:].expand(columns - index.shape[0])])
        if groups == 1 or columns == groups * self.group_size:
            return None
        return (torch.arange(columns, device=params["scale"].device) // self.group_size).clamp_(max=groups - 1)

    def _check_order(self, params: Parts, k: int) -> None:
        """Raise `FormatError` where columns of one group are not neighbours, which solvers take for granted."""
        if not self.act_order:
            return
        index = params["g_idx"]
        if not torch.equal(index, torch.arange(k, dtype=index.dtype, device=index.device) // self.group_size):
            raise FormatError(
                f"{self.name}: the columns of a group are scattered by g_idx; solvers work on groups of neighbours. "
                "Quantize the weight anew, or permute its columns first"
            )
