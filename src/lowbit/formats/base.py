"""What a format is, and everything that follows from it.

A format is one frozen dataclass in one file. Its fields are its JSON config; its string form is its spec, such as
`fp8_e4m3(granularity=row)`. A subclass states

- `name`, and `keys`: the checkpoint key of each part in each dialect;
- `part_rules()`: the stored tensors with their dtypes and shapes (`parts.Part`), `qdata` first;
- `fit_shared(w)`: what the whole weight shares, found in one pass over it (a tensor-wide scale), and
  `fit(rows, shared)`: the other parameters of some rows;
- `encode(rows, params)` -> codes, `decode(codes, params)` -> float32, `pack(codes)` -> qdata, `unpack(qdata)` -> codes;
- where it rounds in another basis (a rotation): `prepare(rows)` and its inverse, `restore(rows)`. All other hooks that
  take or give rows mean prepared ones;
- `unit(shape)`: the tile (rows, columns) of weights that share one scale, and `candidates(rows, params)`: other
  scales worth trying, or, where units cannot choose theirs alone, `searched(rows, weights)`: the best ones;
  `grid(rows, params)`: the values that the rows may take (`grid.py`), with its inverses `with_steps` and `from_grid`.
  The solvers work on these and on the hooks above, so each is written once for all formats;
- `golden_sqnr`: the signal-to-noise ratio in dB on the shared Gaussian, by spec, which the tests hold to both sides.

`Format` supplies quantize and dequantize in bounded pieces and the reference linear; its base, `Stored`, what follows
from the fields and the part rules alone: validation, byte counts, row operations, spec and JSON forms. `registry.py`
finds formats by name. All arithmetic is float32 and is rounded once, at the end.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.errors import FormatError, WeightError
from lowbit.formats.grid import Grid
from lowbit.formats.parts import FLOATS, Parts, gather_rows, narrow_rows
from lowbit.formats.stored import Stored
from lowbit.numerics.floats import all_finite
from lowbit.numerics.groups import reduce_tiles, row_chunks
from lowbit.numerics.integers import uniform_noise

MIN_SCALE = 1e-8
DECODE_ELEMENTS = 1 << 22  # the largest piece of a weight that a matmul decodes at once: 16 MiB as float32


@dataclass(frozen=True)
class Candidate:
    """Other parameters for some rows, and per unit a lower bound of the squared error they can reach (or None)."""

    params: Parts
    bound: Tensor | None = None


@dataclass(frozen=True)
class Format(Stored):
    """A way to store a weight [N, K] in few bits. See the module's docstring for what a subclass states."""

    keys: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    golden_sqnr: ClassVar[Mapping[str, float]] = {}
    stochastic: ClassVar[bool] = False
    supports_embedding: ClassVar[bool] = True
    data_free_solver: ClassVar[str] = "rtn"
    """What `--solver auto` takes when nothing is known about the activations."""
    instead: ClassVar[str] = "another format"
    """What to convert to where a variant can only be read."""
    largest_activation: ClassVar[float] = 0.0
    """The largest code that a static activation scale is for; 0 where there is no such scale."""

    @property
    def calibrated_start(self) -> str:
        """What `--solver auto` starts from when the second moments of the activations are known."""
        return "scale_search"

    # ---- what a subclass states -------------------------------------------------------------------------------------

    def prepare(self, rows: Tensor) -> Tensor:
        """float32 rows in the basis in which they are rounded: a linear map along K that keeps the sum of squares."""
        return rows

    def restore(self, rows: Tensor) -> Tensor:
        """The inverse of `prepare`; it may work in place."""
        return rows

    def fit_shared(self, w: Tensor) -> Parts:
        """Parameters that all rows share, from the whole weight [N, K] (any float dtype)."""
        return {}

    @abstractmethod
    def fit(self, rows: Tensor, shared: Parts) -> Parts:
        """All parameters of some rows (float32 [n, K]), the shared ones included, in float32 or as stored."""

    @abstractmethod
    def encode(self, rows: Tensor, params: Parts, noise: Tensor | None = None) -> Tensor:
        """Codes of float32 rows; with uniform `noise` in [0, 1) rounded stochastically."""

    @abstractmethod
    def decode(self, codes: Tensor, params: Parts) -> Tensor:
        """float32 rows of codes."""

    def pack(self, codes: Tensor) -> Tensor:
        """Codes as they are stored."""
        return codes

    def unpack(self, qdata: Tensor, columns: int) -> Tensor:
        """The codes [n, columns] (or padded further) of stored rows."""
        return qdata

    def rotated_for(self, k: int) -> Format | None:
        """The variant that rounds weight and input in a rotated basis where that loses less; None where there is none.

        `k`: the columns of the weight. `--solver auto` takes it where the name alone was asked for.
        """
        return None

    def fitted_to(self, smallest_input: float) -> Format:
        """This format, or a variant of the same size that suits a layer whose input is never below a value."""
        return self

    @abstractmethod
    def unit(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The tile (rows, columns) of a weight of this shape that shares one scale."""

    def candidates(self, rows: Tensor, params: Parts) -> Iterator[Candidate]:
        """Other parameters worth trying for these rows, most promising first."""
        return iter(())

    def searched(self, rows: Tensor, weights: Tensor | None) -> Parts | None:
        """The parameters of some rows by a search of the format's own; None where `candidates` are all there is.

        weights: float32 [K], how much the squared error of each column counts; None: all the same.
        """
        return None

    @abstractmethod
    def grid(self, rows: Tensor, params: Parts) -> Grid:
        """What the rows may become with these parameters: for solvers that choose codes column by column."""

    @abstractmethod
    def with_steps(self, params: Parts, grid: Grid) -> Parts:
        """The parameters with the steps and zeros of a grid, which must be ones that can be stored."""

    def from_grid(self, values: Tensor, params: Parts) -> Tensor:
        """The rows [n, K] that grid values [K, n] stand for; `encode` finds the codes of these values in them."""
        return values.t().contiguous()

    def check_shape(self, n: int, k: int) -> str | None:
        """Why a weight of this shape cannot be stored, in words that follow its shape, or None."""
        return None

    # ---- quantize and dequantize ------------------------------------------------------------------------------------

    def prepared(self, w: Tensor, start: int, stop: int, where: str) -> Tensor:
        """Rows of a weight [N, K] for the hooks: float32, prepared. Raises `WeightError` on a NaN or an infinity."""
        rows = w[start:stop].float()
        check_finite(rows, where)
        return self.prepare(rows)

    def fit_stored(self, rows: Tensor, shared: Parts, source: torch.dtype, where: str = "weight") -> Parts:
        """`fit`, each parameter in the dtype in which a `source` weight stores it; its "weight: .." names `where`."""
        dtypes = self.part_dtypes(source)
        try:
            return {name: value.to(dtypes[name]) for name, value in self.fit(rows, shared).items()}
        except WeightError as error:
            raise WeightError(f"{where}: {str(error).removeprefix('weight: ')}") from None

    def project(self, rows: Tensor, params: Parts) -> Tensor:
        """What the rows become: encoded and decoded again, float32. A format may have a shorter way."""
        return self.decode(self.encode(rows, params), params)

    def check_weight(self, w: Tensor, where: str = "weight") -> None:
        """Raise `WeightError`, naming `where`, for a weight that cannot be stored in this format."""
        if w.dim() != 2 or w.dtype not in (*FLOATS, torch.float64):
            kind = f"{w.dim()}-D {str(w.dtype).removeprefix('torch.')}"
            raise WeightError(f"{where}: {self.name} stores a 2-D floating-point weight, not a {kind} tensor; keep it")
        why = self.check_shape(w.shape[0], w.shape[1]) if w.shape[1] else "has no columns"
        if why:
            raise WeightError(f"{where}: {list(w.shape)} {why}; keep this layer or choose another format")

    def quantize(
        self, w: Tensor, *, params: Parts | None = None, seed: int | None = None, where: str = "weight"
    ) -> Parts:
        """The parts of a weight [N, K], by rounding to nearest or, with a `seed`, stochastically.

        `params`: parameters chosen beforehand (by a solver); by default they are fitted. Works in pieces, with
        temporaries of a few MiB. Raises `WeightError`, naming `where`, on a wrong shape, a NaN or an infinity.
        """
        self.check_encodable(where)
        self.check_weight(w, where)
        if seed is not None and not self.stochastic:
            raise FormatError(f"{self.name} has no stochastic rounding; leave the seed out")
        shared = self.fit_shared(w) if params is None else {}
        out: Parts = {}
        for start, stop in self.row_ranges(w.shape[0], w.shape[1]):
            rows = self.prepared(w, start, stop, where)
            if params is None:
                chosen = self.fit_stored(rows, shared, w.dtype, where)
            else:
                chosen = narrow_rows(self.param_rules, params, start, stop)
            noise = None if seed is None else uniform_noise(tuple(rows.shape), seed, start, w.device)
            piece = {**chosen, "qdata": self.pack(self.encode(rows, chosen, noise))}
            self.store_rows(out, piece, tuple(w.shape), start)
        return out

    def dequantize(self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The weight [N, K] that the parts mean, in `dtype`; with a pre-quant scale, the effective weight."""
        return self.dequantize_rows(parts, shape[1], 0, shape[0], dtype)

    def dequantize_rows(self, parts: Mapping[str, Tensor], k: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) of `dequantize`; `start` is a multiple of the rows that share a scale."""
        out = torch.empty((stop - start, k), dtype=dtype, device=parts["qdata"].device)
        for first, last in self.row_ranges(stop - start, k):
            cut = narrow_rows(self.rules, parts, start + first, start + last)
            rows = self.restore(self.decode(self.unpack(cut["qdata"], k), cut)[:, :k])
            out[first:last] = rows * cut["pre_quant_scale"].float() if self.pre_quant_scale else rows
        return out

    def linear(self, x: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """The reference linear: x [..., K] -> [..., N] in the dtype of x, decoding a bounded piece at a time."""
        n, k = self.rows_of(parts), x.shape[-1]
        if n * k <= DECODE_ELEMENTS:
            return F.linear(x, self.dequantize_rows(parts, k, 0, n, x.dtype), bias)
        out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
        for a, b in row_chunks(n, k, self.row_multiple, DECODE_ELEMENTS):
            part_bias = None if bias is None else bias[a:b]
            out[..., a:b] = F.linear(x, self.dequantize_rows(parts, k, a, b, x.dtype), part_bias)
        return out

    def embedding(self, indices: Tensor, parts: Mapping[str, Tensor], k: int, dtype: torch.dtype) -> Tensor:
        """Rows of the weight by index: [...] int -> [..., K] in `dtype`. Only those rows are decoded."""
        picked = gather_rows(self.rules, parts, indices.reshape(-1).long())
        rows = self.single_rows.dequantize_rows(picked, k, 0, indices.numel(), dtype)
        return rows.reshape(*indices.shape, k)

    def equivalents(self) -> tuple[Format, ...]:
        """Other formats that hold the same codes with other parameters: `recast` makes their parts."""
        return ()

    def recast(self, parts: Mapping[str, Tensor], other: Format) -> Parts:
        """The parts in a format of `equivalents`. Raises `FormatError` for any other."""
        raise FormatError(f"{self}: its codes mean nothing in {other}; quantize again")

    def joined(self, weights: Sequence[Mapping[str, Tensor]]) -> tuple[Format, list[Parts]]:
        """The format of weights of this one joined along N, and the parts of each in it, with the same values."""
        return self, [dict(parts) for parts in weights]

    @property
    def encodable(self) -> bool:
        """Whether a weight can be converted to it; if not, it is for reading only."""
        return True

    @property
    def rounds_input(self) -> bool:
        """Whether `linear` rounds its input to few bits, too."""
        return False

    @property
    def folds_bias(self) -> bool:
        """Whether the stored bias of a layer contains a constant of the weight's own: `bias_share` is not None."""
        return False

    def bias_share(self, parts: Mapping[str, Tensor]) -> Tensor | None:
        """What the stored bias of the layer lacks ([N] float32) where the format `folds_bias`, else None."""
        return None

    # ---- variants and judging ---------------------------------------------------------------------------------------

    @cached_property
    def plain(self) -> Format:
        """The same format without the optional parts."""
        return dataclasses.replace(self, pre_quant_scale=False, input_scale=False)

    @property
    def single_rows(self) -> Format:
        """The format of rows gathered one by one."""
        return self

    def scales(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The scales of the units, as they are stored: for judging them."""
        return parts["scale"]

    def check_encodable(self, where: str = "weight") -> None:
        """Raise `FormatError`, naming `where`, for a format that can only be read."""
        if not self.encodable:
            raise FormatError(f"{where}: {self} can only be read, not made; convert to {self.instead}")

    def unit_errors(self, squared: Tensor) -> Tensor:
        """Sums of an error [n, K] over the units of these rows -> [units along N, units along K]."""
        return reduce_tiles(squared, self.unit((squared.shape[0], squared.shape[1])), "sum")


def check_finite(rows: Tensor, where: str) -> None:
    """Raise `WeightError` when any value is NaN or infinite."""
    if not all_finite(rows):
        raise WeightError(f"{where}: holds NaN or infinity; repair the source or keep this layer")


def whole_amax(w: Tensor) -> Tensor:
    """The largest magnitude of a matrix as a float32 scalar tensor, in pieces; 0 for an empty one. NaN propagates."""
    best = torch.zeros((), dtype=torch.float32, device=w.device)
    for start, stop in row_chunks(w.shape[0], w.shape[1]) if w.numel() else ():
        low, high = torch.aminmax(w[start:stop])
        best = torch.maximum(best, torch.maximum(high.float(), -low.float()))
    return best
