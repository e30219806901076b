"""w4a8_codebook: 4- or 6-bit codes of the rotated weight that stand for int8 values, times int8 activations.

    v = clamp(round(level[code] * s_rel), -127, 127)          the int8 weight that the matrix product sees
    w = R (v * s_channel [+ correction])                      R turns groups of `rotation` columns (regular Hadamard)

part         shape       meaning
qdata        [N, K/2]    int8 bytes, unsigned codes, the even column in the low nibble; with 6 bits [N, 3K/4]: first
                         the low nibbles of all codes so, then their upper two bits, column c in byte c/4 at bit 2(c%4)
s_rel        [N, K/g]    float8_e4m3fn (float32 is read too): the scale of a group in units of the row's
s_channel    [N]         float32
codebook     [16]        float32, sorted levels, about [-1, 1]; without one level = code - 8, with 6 bits code - 32
correction   [K/g, N]    what is added to a group, as the weight was; rules out the integer product

This is comfy-kitchen's asym_w4a8_int8. Its 6-bit weights have neither codebook nor correction, and use no code 0.

The scale of each group is chosen among its e4m3 neighbours by the error after all roundings, so a scale search could
add nothing; s_channel leaves the largest weight of a row at 127. Unless another table is clearly better for a weight,
the codebook is the one that kitchen's kernels have built in.

>>> import torch
>>> from lowbit.formats import parse_spec
>>> parts = parse_spec("w4a8_codebook(rotation=16)").quantize(torch.eye(16))
>>> {name: list(part.shape) for name, part in parts.items()}
{'qdata': [16, 8], 's_rel': [16, 1], 's_channel': [16], 'codebook': [16]}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.errors import FormatError, WeightError
from lowbit.formats.base import MIN_SCALE, Format
from lowbit.formats.grid import Grid
from lowbit.formats.parts import HALVES, Dim, N, Part, Parts
from lowbit.formats.registry import one_of, register
from lowbit.formats.stored_steps import FloatSteps
from lowbit.numerics.codebooks import IntegerCodebook, codebook_error, fitted_codebook, gaussian_codebook
from lowbit.numerics.floats import divisor, to_fp8
from lowbit.numerics.int8_matmul import INT8_MAX, coded_linear
from lowbit.numerics.levels import IntegerLevels
from lowbit.numerics.packing import pack_nibbles, unpack_nibbles
from lowbit.numerics.rotations import REGULAR_SIZES, rotate_groups

UNIFORM = {4: (-8, 7), 6: (-31, 31)}  # levels that are used without a codebook
_LARGEST = 0x7E  # the e4m3 code of 448; those of positive values are ordered as the values are
_NEIGHBOURS = (0, -1, 1, -2, 2)  # e4m3 codes to try, from that of the scale that just fits
_SAMPLE = 1 << 16  # elements that the choice of a codebook looks at
_WORTH = 0.9  # of the error with the built-in codebook: what another one has to reach
_INTEGERS = IntegerLevels(-INT8_MAX, INT8_MAX)


@register
@dataclass(frozen=True)
class W4A8Codebook(Format):
    """Codes that expand to int8 by a codebook and a scale a group: 4.5 or 6.5 bits a weight at group 16."""

    bits: int = 4
    group_size: int = 16
    rotation: int = 256
    codebook: bool = True
    correction: bool = False

    name: ClassVar[str] = "w4a8_codebook"
    stochastic: ClassVar[bool] = True
    keys: ClassVar = {
        "comfy": {
            "qdata": "weight",
            "s_rel": "weight_s_rel",
            "s_channel": "weight_s_channel",
            "codebook": "weight_codebook",
            "correction": "weight_correction",
        }
    }
    golden_sqnr: ClassVar = {
        "w4a8_codebook": 22.95,
        "w4a8_codebook(bits=6,rotation=64,codebook=False)": 33.92,
        "w4a8_codebook(rotation=16,codebook=False,correction=True)": 24.13,
    }

    def __post_init__(self) -> None:
        one_of(self, "bits", (4, 6))
        one_of(self, "rotation", REGULAR_SIZES)
        one_of(self, "codebook", (True, False))
        one_of(self, "correction", (True, False))
        size: object = self.group_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 4 or (16 % size and size % 16):
            raise FormatError(f"{self.name}: group_size is {size!r}, expected 4, 8, 16 or a multiple of 16")
        if self.bits == 6 and (self.codebook or self.correction or size < 16):
            raise FormatError(
                f"{self.name}: bits=6 goes with codebook=false, correction=false and a group_size of 16 or more"
            )

    def part_rules(self) -> tuple[Part, ...]:
        packed = Dim("K", 2) if self.bits == 4 else Dim("K", 4, 3)
        parts = [
            Part("qdata", (N, packed), (torch.int8,)),
            Part("s_rel", (N, Dim("K", self.group_size)), (torch.float8_e4m3fn, torch.float32)),
            Part("s_channel", (N,), (torch.float32,)),
        ]
        if self.codebook:
            parts.append(Part("codebook", (16,), (torch.float32,)))
        if self.correction:
            parts.append(Part("correction", (Dim("K", self.group_size), N), (torch.float32, *HALVES)))
        return tuple(parts)

    def check_shape(self, n: int, k: int) -> str | None:
        for size in (self.rotation, self.group_size, 32 if self.bits == 6 else 16):
            if k % size:
                return f"has {k} columns, not a multiple of {size}"
        return None

    def prepare(self, rows: Tensor) -> Tensor:
        return rotate_groups(rows, self.rotation)

    def restore(self, rows: Tensor) -> Tensor:
        return self.prepare(rows)  # the rotation is its own inverse

    # ---- choosing parameters ----------------------------------------------------------------------------------------

    def fit_shared(self, w: Tensor) -> Parts:
        """The codebook: that of the kernels, or one fitted to rows spread over the weight where that is worth it."""
        if not self.codebook:
            return {}
        usual, (n, k) = gaussian_codebook(w.device), w.shape
        count = min(n, max(1, _SAMPLE // k))
        rows = self.prepare(w[torch.arange(count, device=w.device) * n // max(count, 1)].contiguous().float())
        groups = self._groups(rows)
        size = groups.abs().amax(dim=-1, keepdim=True)
        samples = (groups / size)[(size > 0).expand_as(groups)]
        if not samples.numel() or not bool(samples.isfinite().all()):  # a NaN becomes an error when its row is read
            return {"codebook": usual}
        fitted = fitted_codebook(samples, usual)
        better = codebook_error(samples, fitted) < _WORTH * codebook_error(samples, usual)
        return {"codebook": fitted if better else usual}

    def fit(self, rows: Tensor, shared: Parts) -> Parts:
        groups = self._groups(rows)
        codebook = self._codebook(shared)
        low, high = codebook.ends
        if self.correction:
            least = groups.amin(dim=-1)
            step = groups.amax(dim=-1) * 0.5 - least * 0.5  # the whole range could overflow
            step = step / divisor(0.5 * (high - low), step)
            shift = least - low * step
        else:
            step, shift = groups.abs().amax(dim=-1) / divisor(min(high, -low), groups), groups.new_zeros(())
        share = divisor(max(high, -low), step) / divisor(INT8_MAX, step)
        s_channel = (step.amax(dim=1) * share).clamp_min(MIN_SCALE)
        if not bool(torch.isfinite(s_channel).all()):
            raise WeightError("weight: its rotated values exceed float32; repair the source or keep this layer")
        target = (groups - shift.unsqueeze(-1)) / s_channel.view(-1, 1, 1)
        s_rel = _best_scales(target, step / s_channel.unsqueeze(1), codebook)
        params = {"s_rel": s_rel, "s_channel": s_channel, **shared}
        if self.correction:
            left = target - codebook.round(target, s_rel.float().unsqueeze(-1))[1]
            params["correction"] = (shift + left.mean(dim=-1) * s_channel.unsqueeze(1)).t().contiguous()
        return params

    def scales(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Those of the groups."""
        return parts["s_rel"]

    def unit(self, shape: tuple[int, int]) -> tuple[int, int]:
        """A row: the values of a group follow from integers, so `s_channel` is the only scale to refit by."""
        return 1, shape[1]

    def grid(self, rows: Tensor, params: Parts) -> Grid:
        """In integers, of which each group has its own few; the correction is taken off."""
        step = params["s_channel"].reshape(1, -1).clone()
        target = (self._groups(rows) - _by_group(params, rows.device)).flatten(1).t().contiguous()
        grid = _IntegerGrid(target, step, _INTEGERS, columns=rows.shape[1], snap=FloatSteps(MIN_SCALE))
        grid.group_size, grid.codebook = self.group_size, self._codebook(params)
        grid.scales = params["s_rel"].float().t().contiguous().unbind(0)
        return grid

    def with_steps(self, params: Parts, grid: Grid) -> Parts:
        return {**params, "s_channel": grid.step.reshape(-1).clone()}

    def from_grid(self, values: Tensor, params: Parts) -> Tensor:
        return (self._groups(values.t().contiguous()) + _by_group(params, values.device)).flatten(1)

    # ---- codes ------------------------------------------------------------------------------------------------------

    def encode(self, rows: Tensor, params: Parts, noise: Tensor | None = None) -> Tensor:
        target = self._groups(rows) - _by_group(params, rows.device)
        target = target / params["s_channel"].masked_fill(params["s_channel"] == 0, torch.inf).view(-1, 1, 1)
        spread = None if noise is None else self._groups(noise)
        codes, _ = self._codebook(params).round(target, params["s_rel"].float().unsqueeze(-1), spread)
        return codes.to(torch.uint8).flatten(1)

    def decode(self, codes: Tensor, params: Parts) -> Tensor:
        values = self._codebook(params).integers(self._groups(codes), params["s_rel"].float())
        values = values.mul_(params["s_channel"].view(-1, 1, 1))
        return values.add_(_by_group(params, codes.device)).flatten(1)

    def pack(self, codes: Tensor) -> Tensor:
        low = pack_nibbles(codes)
        if self.bits == 4:
            return low.view(torch.int8)
        upper = (codes >> 4).unflatten(-1, (codes.shape[-1] // 4, 4))
        first = upper[..., 0] | (upper[..., 1] << 2) | (upper[..., 2] << 4) | (upper[..., 3] << 6)
        return torch.cat([low, first], dim=-1).view(torch.int8)

    def unpack(self, qdata: Tensor, columns: int) -> Tensor:
        if self.bits == 4:
            return unpack_nibbles(qdata)
        raw = qdata.view(torch.uint8)
        four = raw[:, columns // 2 :].unsqueeze(-1)
        upper = torch.cat([(four >> bit) & 3 for bit in (0, 2, 4, 6)], dim=-1).flatten(1)
        return unpack_nibbles(raw[:, : columns // 2]) | (upper << 4)

    def _groups(self, x: Tensor) -> Tensor:
        """[n, K] -> [n, K/g, g]."""
        return x.unflatten(1, (x.shape[1] // self.group_size, self.group_size))

    def _codebook(self, params: Mapping[str, Tensor]) -> IntegerCodebook:
        """What the codes stand for under a scale."""
        if self.codebook:
            return IntegerCodebook(params["codebook"], INT8_MAX)
        return IntegerCodebook(None, INT8_MAX, *UNIFORM[self.bits], zero=1 << (self.bits - 1))

    # ---- linear -----------------------------------------------------------------------------------------------------

    @property
    def rounds_input(self) -> bool:
        """Without a correction, which leaves no integer product."""
        return not self.correction

    def linear(self, x: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x; every row of the rotated input is quantized to 8 bits."""
        if self.correction:
            return super().linear(x, parts, bias)

        codebook = self._codebook(parts)

        def rows(start: int, stop: int) -> Tensor:
            codes = self._groups(self.unpack(parts["qdata"][start:stop], x.shape[-1]))
            return codebook.integers(codes, parts["s_rel"][start:stop].float()).to(torch.int8).flatten(1)

        return coded_linear(x, rows, parts["s_channel"], bias, self.rotation)


class _IntegerGrid(Grid):
    """A grid of integers times `s_channel`, of which the columns of each group use those that its codes stand for."""

    group_size: int
    codebook: IntegerCodebook
    scales: tuple[Tensor, ...]
    """float32 [n] a group."""

    def nearest(self, x: Tensor, column: int) -> Tensor:
        """See `Grid`."""
        _, integers = self.codebook.round(x / self._divided[0], self.scales[column // self.group_size])
        return integers.mul_(self._steps[0])

    def narrow(self, start: int, stop: int) -> Grid:
        """See `Grid`."""
        piece = super().narrow(start, stop)
        assert isinstance(piece, _IntegerGrid)
        piece.group_size, piece.codebook = self.group_size, self.codebook
        piece.scales = tuple(scale[start:stop] for scale in self.scales)
        return piece


def _best_scales(target: Tensor, wanted: Tensor, codebook: IntegerCodebook) -> Tensor:
    """Of the e4m3 neighbours of `wanted` [n, G], the one with the least error on the target [n, G, g]."""
    nearest = to_fp8(wanted, torch.float8_e4m3fn).view(torch.uint8).to(torch.int16)
    best, least = nearest, torch.full_like(wanted, torch.inf)
    for offset in _NEIGHBOURS:
        codes = (nearest + offset).clamp_(1, _LARGEST)
        scale = codes.to(torch.uint8).view(torch.float8_e4m3fn).float().unsqueeze(-1)
        error = codebook.squared_error(target, scale)
        best = torch.where(error < least, codes, best)
        least = torch.minimum(least, error)
    return best.to(torch.uint8).view(torch.float8_e4m3fn)


def _by_group(params: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """The correction as float32 [n, K/g, 1], or 0."""
    if "correction" not in params:
        return torch.zeros((), device=device)
    return params["correction"].t().float().contiguous().unsqueeze(-1)
