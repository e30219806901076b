"""gguf: the blocks of GGUF files as they are, each with its scales among its codes.

    w = level * step + zero [* global_scale]        what these are made of is stated by the type

part           shape              meaning
qdata          [N, K / c * b]     uint8; c columns in b bytes, row after row, as ggml lays them out
global_scale   []                 float32, with `global_scale`: what lies beside NVFP4 weights, usually

type    c    b    bits a weight        type    c    b    bits a weight
Q4_0    32   18   4.5                  Q2_K    256  84   2.625
Q4_1    32   20   5                    Q3_K    256  110  3.4375
Q5_0    32   22   5.5                  Q4_K    256  144  4.5
Q5_1    32   24   6                    Q5_K    256  176  5.5
Q8_0    32   34   8.5                  Q6_K    256  210  6.5625
MXFP4   32   17   4.25                 NVFP4   64   36   4.5

Values are those of ggml bit for bit. Blocks are searched for the least squared error, which is less than that of
ggml's; by plain rounding (`rtn`) those of the types on the left are ggml's as well. The steps and zeros of a K-quant
are whole multiples of two float16 of the block: `grid` keeps to those.

The codes of a row, which `unpack` gives, are its K codes, one a byte, and behind them the headers of its blocks (what
is no code). The parameters of a row are blocks of which only the headers count.

>>> import torch
>>> from lowbit.formats import parse_spec
>>> fmt = parse_spec("gguf(type=Q8_0)")
>>> parts = fmt.quantize(torch.arange(32.0).unsqueeze(0))
>>> parts["qdata"].shape, fmt.dequantize(parts, (1, 32), torch.float32)[0, -1].item()
(torch.Size([1, 34]), 31.005859375)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.formats.base import Format
from lowbit.formats.gguf_recast import SAME_CODES, take_apart
from lowbit.formats.global_scale import GlobalScale
from lowbit.formats.grid import Grid, Snap
from lowbit.formats.parts import Dim, N, Part, Parts
from lowbit.formats.registry import one_of, parse_spec, register
from lowbit.formats.stored_steps import E4m3Steps, Multiples
from lowbit.numerics.floats import divisor
from lowbit.numerics.gguf_blocks import READABLE, BlockType, block_type
from lowbit.numerics.gguf_encode import AS_GGML, WRITABLE, encode_blocks, set_steps, snap_steps
from lowbit.numerics.gguf_step_search import search_blocks
from lowbit.numerics.levels import IntegerLevels

# For weights whose columns the blocks do not divide: about as many bits in blocks of 32.
_OF_32_COLUMNS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q4_0", "Q5_K": "Q5_0", "Q6_K": "Q8_0", "NVFP4": "MXFP4"}


@register
@dataclass(frozen=True)
class GgufBlock(Format):
    """GGUF blocks (llama.cpp's), 2.6 to 8.5 bits a weight, the K-quants among them."""

    type: str = "Q8_0"
    global_scale: bool = False

    name: ClassVar[str] = "gguf"
    keys: ClassVar = {"comfy": {"qdata": "weight", "global_scale": "weight_scale_2"}}
    golden_sqnr: ClassVar = {
        "gguf(type=Q4_0)": 21.31,
        "gguf(type=Q4_1)": 22.13,
        "gguf(type=Q5_0)": 27.4,
        "gguf(type=Q5_1)": 28.44,
        "gguf(type=Q8_0)": 45.43,
        "gguf(type=Q2_K)": 11.74,
        "gguf(type=Q3_K)": 16.86,
        "gguf(type=Q4_K)": 23.11,
        "gguf(type=Q5_K)": 29.24,
        "gguf(type=Q6_K)": 35.62,
        "gguf(type=MXFP4)": 18.78,
        "gguf(type=NVFP4)": 21.77,
    }
    data_free_solver: ClassVar[str] = "scale_search"
    instead: ClassVar[str] = f"gguf(type=...) of {', '.join(WRITABLE)}, or to nvfp4, mxfp4 or int8"

    def __post_init__(self) -> None:
        one_of(self, "type", READABLE)
        one_of(self, "global_scale", (False, True))

    @property
    def encodable(self) -> bool:
        """Not with a global scale: weights get one as nvfp4, and become these blocks with the codes that they have."""
        return self.type in WRITABLE and not self.global_scale

    @cached_property
    def spec(self) -> str:
        """As every format's, but with the type always named."""
        short = super().spec
        if self.type != type(self).type:
            return short
        return short.replace("(", f"(type={self.type},", 1) if "(" in short else f"{short}(type={self.type})"

    @cached_property
    def block(self) -> BlockType:
        """The type of the blocks."""
        return block_type(self.type)

    @property
    def smaller(self) -> str:
        """The type of about as many bits whose blocks have 32 columns, where these have more; else ""."""
        return _OF_32_COLUMNS.get(self.type, "")

    def part_rules(self) -> tuple[Part, ...]:
        blocks = Part("qdata", (N, Dim("K", self.block.columns, self.block.size)), (torch.uint8,))
        return (blocks, Part("global_scale", (), (torch.float32,))) if self.global_scale else (blocks,)

    @cached_property
    def param_rules(self) -> tuple[Part, ...]:
        """All own parts: the scales lie in `qdata`."""
        return self.part_rules()

    def check_shape(self, n: int, k: int) -> str | None:
        if k % self.block.columns:
            instead = f"; those of {self.smaller} have 32" if self.smaller and k % 32 == 0 else ""
            return f"has {k} columns, not a multiple of the {self.block.columns} of a {self.type} block{instead}"
        return None

    def quantize(
        self, w: Tensor, *, params: Parts | None = None, seed: int | None = None, where: str = "weight"
    ) -> Parts:
        """See `Format.quantize`. Where nothing is chosen beforehand, codes are chosen together with their steps."""
        if params is not None or seed is not None:
            return super().quantize(w, params=params, seed=seed, where=where)
        self.check_encodable(where)
        self.check_weight(w, where)
        shape = (w.shape[0], w.shape[1])
        out = torch.empty(self.part_shapes(*shape)["qdata"], dtype=torch.uint8, device=w.device)
        for start, stop in self.row_ranges(*shape):
            out[start:stop] = self.fit(self.prepared(w, start, stop, where), {})["qdata"]
        return {"qdata": out}

    def fit(self, rows: Tensor, shared: Parts) -> Parts:
        """Whole blocks, as ggml makes them, or searched for the least squared error."""
        return self._encoded(rows, None)

    def searched(self, rows: Tensor, weights: Tensor | None) -> Parts | None:
        """Whole blocks of the least squared error that is found."""
        return self._encoded(rows, weights, search=True)

    def _encoded(self, rows: Tensor, weights: Tensor | None, *, search: bool = False) -> Parts:
        """Blocks of some rows; weights: of columns [K]."""
        self.check_encodable("weight")
        columns = self.block.columns
        x, count = _blocks(rows, columns), None
        if weights is not None:
            count = _blocks(weights.float().expand_as(rows), columns)
        made = encode_blocks(self.block, x, count)
        if search and self.type in AS_GGML:
            made = search_blocks(self.block, x, count, made)
        return {"qdata": _rows(made, rows, columns)}

    def encode(self, rows: Tensor, params: Parts, noise: Tensor | None = None) -> Tensor:
        """uint8 [n, K + headers]: the nearest codes under the headers of `params`, and these."""
        headers = self.block.headers(_blocks(params["qdata"], self.block.size))
        step, zero = self._steps(params)
        levels = rows.unflatten(1, (step.shape[1], self.block.unit))
        levels = (levels if zero is None else levels - zero.unsqueeze(-1)) / _divisor(step).unsqueeze(-1)
        return torch.cat([self.block.nearest(levels).flatten(1), _rows(headers, rows, self.block.columns)], dim=1)

    def decode(self, codes: Tensor, params: Parts) -> Tensor:
        out = _rows(self.block.decode(*self._split(codes)), codes, self._code_bytes)
        return out.mul_(params["global_scale"]) if self.global_scale else out

    def pack(self, codes: Tensor) -> Tensor:
        return _rows(self.block.join(*self._split(codes)), codes, self._code_bytes)

    def unpack(self, qdata: Tensor, columns: int) -> Tensor:
        blocks = _blocks(qdata, self.block.size)
        pieces = (self.block.codes(blocks), self.block.headers(blocks))
        return torch.cat([_rows(piece, qdata, self.block.size) for piece in pieces], dim=1)

    def unit(self, shape: tuple[int, int]) -> tuple[int, int]:
        return 1, self.block.unit

    def grid(self, rows: Tensor, params: Parts) -> Grid:
        step, zero = (None if x is None else x.t().contiguous() for x in self._steps(params))
        assert step is not None
        kind = self.block
        snap = self._snap(rows, params)
        return Grid(rows.t().contiguous(), step, kind.levels, columns=kind.unit, zero=zero, snap=snap)

    def _snap(self, rows: Tensor, params: Parts) -> Snap:
        """What steps can be stored: of K-quants, multiples of the float16 of their blocks, or of ones for the rows."""
        kind = self.block
        if self.type == "NVFP4":
            half = torch.full((), 0.5, device=params["qdata"].device)
            return E4m3Steps(GlobalScale(divides=False, by_row=False), params.get("global_scale", half * 2) * half)
        if kind.shared is None:
            return partial(snap_steps, kind)
        found = kind.shared.split(kind.headers(_blocks(params["qdata"], kind.size)))
        if bool((found.factor == 0).any()):
            found = found.holding(*_fitting(kind, _blocks(rows, kind.columns)), kind.shared.high)
        factor, zero_factor = (
            None if x is None else _rows(x.expand(-1, self._units), params["qdata"], kind.size).t().contiguous()
            for x in (found.factor, found.zero_factor)
        )
        assert factor is not None
        return Multiples(factor, kind.shared.low, kind.shared.high, zero_factor)

    def with_steps(self, params: Parts, grid: Grid) -> Parts:
        self.check_encodable("weight")
        kind = self.block
        step, zero = (None if x is None else x.t().reshape(-1, self._units) for x in (grid.step, grid.zero))
        assert step is not None
        blocks = _blocks(params["qdata"], kind.size).clone()
        if kind.shared is None:
            headers = set_steps(kind, step, zero)
        else:
            assert isinstance(grid.snap, Multiples)
            factor, zero_factor = (
                None if x is None else x.t().reshape(-1, self._units)[:, :1]
                for x in (grid.snap.factor, grid.snap.zero_factor)
            )
            assert factor is not None
            found = kind.shared.split(kind.headers(blocks))
            holding = found._replace(factor=factor, zero_factor=zero_factor)
            headers = kind.shared.join(found.with_steps(step, zero, holding))
        kind.put_headers(blocks, headers)
        return {"qdata": _rows(blocks, params["qdata"], kind.size)}

    @property
    def _units(self) -> int:
        """Of a block."""
        return self.block.columns // self.block.unit

    def equivalents(self) -> tuple[Format, ...]:
        """The format of the same codes, where there is one (see `gguf_recast`), and those that are its own equals."""
        if self.type not in SAME_CODES or (self.global_scale and self.type != "NVFP4"):
            return ()
        same = parse_spec(SAME_CODES[self.type])
        same = replace(same, pre_quant_scale=self.pre_quant_scale, input_scale=self.input_scale)
        return (same, *same.equivalents())

    def recast(self, parts: Mapping[str, Tensor], other: Format) -> Parts:
        """See `Format.recast`."""
        if other not in self.equivalents():
            return super().recast(parts, other)
        same = self.equivalents()[0]
        beside = {name: part for name, part in parts.items() if name in ("pre_quant_scale", "input_scale")}
        found = {**take_apart(self.block, parts, same), **beside}
        return found if other == same else same.recast(found, other)

    def scales(self, parts: Mapping[str, Tensor]) -> Tensor:
        """As stored where there is one a block; of the K-quants the products [N, K / unit]."""
        if self.type == "MXFP4":
            return self.block.headers(_blocks(parts["qdata"], self.block.size))
        step = self._steps(parts)[0]
        return step.to(torch.float16) if self.block.unit == self.block.columns else step

    def _steps(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Steps and zeros of stored rows, float32 [n, K / unit]."""
        found = self.block.steps(self.block.headers(_blocks(parts["qdata"], self.block.size)))
        step, zero = (None if x is None else _rows(x, parts["qdata"], self.block.size) for x in found)
        assert step is not None
        return step * parts["global_scale"] if self.global_scale else step, zero

    def _split(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and headers by block: [B, columns] and [B, header_size]."""
        k = codes.shape[1] // self._code_bytes * self.block.columns
        return _blocks(codes[:, :k], self.block.columns), _blocks(codes[:, k:], self.block.header_size)

    @property
    def _code_bytes(self) -> int:
        """The bytes that the codes and the header of a block take, one code a byte."""
        return self.block.columns + self.block.header_size


def _blocks(rows: Tensor, width: int) -> Tensor:
    """[n, blocks * width] -> [n * blocks, width]."""
    return rows.reshape(rows.shape[0] * (rows.shape[1] // width), width)


def _rows(blocks: Tensor, like: Tensor, width: int) -> Tensor:
    """[n * blocks, w] -> [n, blocks * w], as many as `like` [n, blocks * width] has."""
    return blocks.reshape(like.shape[0], like.shape[1] // width * blocks.shape[1])


def _fitting(kind: BlockType, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
    """The steps, and zeros where the lowest level is 0, at which the units of blocks [B, columns] fit: [B, U]."""
    assert isinstance(kind.levels, IntegerLevels)
    low, high = blocks.unflatten(1, (-1, kind.unit)).aminmax(dim=2)
    if kind.levels.low:
        return torch.maximum(high / divisor(kind.levels.high, high), low / divisor(kind.levels.low, low)), None
    zero = low.clamp_max(0.0)
    return (high.clamp_min(0.0) - zero) / divisor(kind.levels.high, high), zero


def _divisor(step: Tensor) -> Tensor:
    return step.masked_fill(step == 0, torch.inf)
