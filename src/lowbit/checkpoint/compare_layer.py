"""What one layer lost: its weight, its output, its codes and scales, beside plain rounding in the same format."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit.devices import enough_memory
from lowbit.errors import CheckpointError
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts, narrow_rows, raw_bytes
from lowbit.numerics.groups import row_chunks
from lowbit.ops.encode import decode_rows
from lowbit.solvers import solver

from .accuracy import Accuracy, AccuracyMeter

_PIECE = 1 << 21  # elements of a piece of rows: large enough for a product with H to run at full speed
_BEYOND = 1e30  # a weight that every scale clips; still finite when divided by the smallest scale
BIN = 0.1  # of a step: the width of a bin of the histogram
BINS = 41  # from -2.05 to 2.05 steps
CPU = torch.device("cpu")
_E4M3_TOP, _E8M0_TOP, _E8M0_NAN = 0x7E, 254, 255


@dataclass(frozen=True)
class ScaleHealth:
    """A layer's scales: how many; at the top of their dtype; zero; and how many values of any part are not finite.

    An nvfp4 weight has its largest group at the top (448) by construction: one there is normal, a share is not.
    """

    count: int = 0
    at_top: int = 0
    zero: int = 0
    not_finite: int = 0

    @property
    def saturated(self) -> float:
        """The share of scales that are at the top of their dtype or zero."""
        return (self.at_top + self.zero) / self.count if self.count else 0.0


@dataclass(frozen=True)
class Histogram:
    """Errors of single weights in units of the step at their code: counts in BINS bins of width BIN around zero.

    `beyond`: how many lie outside of them on either side; `largest`: the largest |error| in steps. Rounding to nearest
    stays within half a step; what is outside was clipped, or moved on purpose by a solver that looks at the output.
    """

    counts: tuple[int, ...]
    beyond: int
    largest: float
    rms: float


@dataclass(frozen=True)
class LayerMeasure:
    """One quantized layer against its reference.

    `output_sqnr`: 10 log10(tr(W H W^T) / tr(E H E^T)) in dB, None without statistics; `rtn` and `rtn_output_sqnr`: the
    same measures of plain rounding of the reference in the same format; `at_ends`: the share of codes at the ends of
    the code range; `flips`: the share of weights that decode to another value than after plain rounding.
    """

    accuracy: Accuracy
    output_sqnr: float | None
    at_ends: float
    scales: ScaleHealth
    rtn: Accuracy | None = None
    rtn_output_sqnr: float | None = None
    flips: float | None = None


@dataclass
class LayerReference:
    """The weight [N, K] that candidates stand for, the second moments of its input ([K, K], [K] or None), its name."""

    w: Tensor
    hessian: Tensor | None
    where: str
    device: torch.device = CPU
    """Where the products with second moments [K, K] are computed; codes and weights are compared in main memory."""
    _signal: float | None = None
    _rounded: dict[str, tuple[Parts, Accuracy, float | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        k = self.w.shape[1]
        h = self.hessian
        if h is not None and tuple(h.shape) not in {(k,), (k, k)}:
            raise CheckpointError(
                f"{self.where}: the statistics are of shape {list(h.shape)}, the weight has {k} columns; "
                "calibrate this model"
            )
        if h is not None and not bool(h.isfinite().all()):
            raise CheckpointError(f"{self.where}: the statistics hold NaN or infinity; calibrate again")
        if h is not None and h.dim() == 2:
            with enough_memory(self.device, self.where):
                h = h.to(self.device)
        self.hessian = None if h is None else h.float()

    def energy(self, rows: Tensor) -> float:
        """tr(R H R^T) of some rows."""
        assert self.hessian is not None
        with enough_memory(self.hessian.device, self.where):
            rows = rows.to(self.hessian.device)
            weighted = rows * self.hessian if self.hessian.dim() == 1 else rows @ self.hessian
            return float(weighted.mul_(rows).sum(dtype=torch.float64))

    def output_sqnr(self, noise: float | None) -> float | None:
        """The signal of the layer's output over `noise`, in dB."""
        if noise is None:
            return None
        if self._signal is None:
            n, k = self.w.shape
            self._signal = sum(self.energy(self.w[a:b].float()) for a, b in row_chunks(n, k, elements=_PIECE))
        return decibels(self._signal, noise)

    def rounded(self, fmt: Format) -> tuple[Parts, Accuracy, float | None]:
        """Plain rounding in a format, what it loses, and the noise of its output."""
        plain = fmt.plain
        if plain.spec not in self._rounded:
            parts = solver("rtn")(self.w, plain, None, where=self.where)
            sums = _Sums(self)
            for start, stop in _pieces(self.w, plain):
                sums.add(start, stop, decode_rows(plain, parts, self.w.shape[1], start, stop))
            self._rounded[plain.spec] = (parts, sums.meter.result(), sums.noise)
        return self._rounded[plain.spec]

    def compare_plain(self, approx: Tensor) -> tuple[Accuracy, float | None]:
        """The accuracy of another plain weight [N, K], and its output SQNR."""
        sums = _Sums(self)
        n, k = self.w.shape
        for start, stop in row_chunks(n, k, elements=_PIECE):
            sums.add(start, stop, approx[start:stop].to(torch.float32, copy=True))
        return sums.meter.result(), self.output_sqnr(sums.noise)


class _Sums:
    """The errors of a decoded weight, added up piece by piece."""

    def __init__(self, reference: LayerReference) -> None:
        self.reference, self.meter = reference, AccuracyMeter()
        self.noise: float | None = None if reference.hessian is None else 0.0

    def add(self, start: int, stop: int, decoded: Tensor) -> None:
        """Add rows [start, stop), decoded as float32, which are overwritten."""
        self.meter.add(self.reference.w[start:stop].float(), decoded)  # `decoded` is the error now
        if self.noise is not None:
            self.noise += self.reference.energy(decoded)


def measure(reference: LayerReference, fmt: Format, parts: Parts, *, rtn: bool = True) -> LayerMeasure:
    """Compare the parts of a layer with its reference, a few MiB at a time. With `rtn` also with plain rounding."""
    n, k = reference.w.shape
    rounded = reference.rounded(fmt) if rtn and fmt.encodable else None
    sums, ends, flips = _Sums(reference), 0, 0
    for start, stop in _pieces(reference.w, fmt):
        decoded = decode_rows(fmt, parts, k, start, stop)
        ends += _count_ends(fmt, narrow_rows(fmt.rules, parts, start, stop), stop - start, k)
        if rounded is not None:
            flips += int((decoded != decode_rows(fmt.plain, rounded[0], k, start, stop)).sum())
        sums.add(start, stop, decoded)
    count = max(n * k, 1)
    return LayerMeasure(
        accuracy=sums.meter.result(),
        output_sqnr=reference.output_sqnr(sums.noise),
        at_ends=ends / count,
        scales=scale_health({**parts, "scale": fmt.scales(parts)}),
        rtn=None if rounded is None else rounded[1],
        rtn_output_sqnr=None if rounded is None else reference.output_sqnr(rounded[2]),
        flips=None if rounded is None else flips / count,
    )


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise): infinite without noise, minus infinity without signal, NaN when one is NaN."""
    if math.isnan(noise) or math.isnan(signal):
        return math.nan
    if noise <= 0:  # H is positive semidefinite: below zero is rounding
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and noise < math.inf else -math.inf


def scale_health(parts: Parts) -> ScaleHealth:
    """Count the scales that are at the top of their dtype, zero, or not finite."""
    scale = parts["scale"]
    top, zero = _extremes(scale)
    others = (part for name, part in parts.items() if name not in {"qdata", "scale"} and part.is_floating_point())
    bad = sum(int((~part.float().isfinite()).sum()) for part in others)
    return ScaleHealth(scale.numel(), int(top.sum()), int(zero.sum()), bad + int(_not_finite(scale).sum()))


def _extremes(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Which scales are at the top of their dtype, and which are zero (of e8m0: 2**-127, the code 0)."""
    raw = raw_bytes(scale)
    if scale.dtype == torch.float8_e4m3fn:
        return raw == _E4M3_TOP, (raw & 0x7F) == 0
    if scale.dtype == torch.uint8:
        return raw == _E8M0_TOP, raw == 0
    return scale.float().abs() >= torch.finfo(scale.dtype).max, scale == 0


def _not_finite(scale: Tensor) -> Tensor:
    if scale.dtype == torch.uint8:
        return scale == _E8M0_NAN
    return ~scale.float().isfinite()


def _pieces(w: Tensor, fmt: Format) -> Iterator[tuple[int, int]]:
    return row_chunks(w.shape[0], w.shape[1], fmt.row_multiple, _PIECE)


def _end_codes(fmt: Format, cut: Parts, n: int, k: int) -> tuple[Tensor, Tensor]:
    """The codes that weights far above and far below the range of these rows get, as bytes [n, K]."""
    far = torch.full((n, k), _BEYOND)
    return raw_bytes(fmt.encode(far, cut))[:, :k], raw_bytes(fmt.encode(far.neg_(), cut))[:, :k]


def _count_ends(fmt: Format, cut: Parts, n: int, k: int) -> int:
    """How many codes of these rows lie at an end of the range; those of a group whose scale is zero do not count."""
    codes = raw_bytes(fmt.unpack(cut["qdata"], k))[:, :k]
    high, low = _end_codes(fmt, cut, n, k)
    return int((((codes == high) | (codes == low)) & (high != low)).sum())


def error_histogram(w: Tensor, fmt: Format, parts: Parts) -> Histogram:
    """How the errors of a weight [N, K] are distributed, in steps: the distance from each code to the next one outward.

    In the basis in which the format rounds, and before its pre-quantization scale is applied.
    """
    counts = torch.zeros(BINS, dtype=torch.int64)
    seen, beyond, squares, largest = 0, 0, 0.0, 0.0
    for start, stop in _pieces(w, fmt):
        errors = _steps_off(w[start:stop].float(), fmt, narrow_rows(fmt.rules, parts, start, stop))
        index = (errors / BIN).round_().long() + BINS // 2
        inside = (index >= 0) & (index < BINS)
        counts += torch.bincount(index[inside], minlength=BINS)
        beyond += int((~inside).sum())
        seen += errors.numel()
        squares += float(errors.square().sum(dtype=torch.float64))
        largest = max(largest, float(errors.abs().max()) if errors.numel() else 0.0)
    return Histogram(tuple(counts.tolist()), beyond, largest, math.sqrt(squares / max(seen, 1)))


def _steps_off(rows: Tensor, fmt: Format, cut: Parts) -> Tensor:
    """The errors of some rows in steps, as one vector; weights whose step is zero are left out."""
    n, k = rows.shape
    if fmt.pre_quant_scale:
        rows = (rows / cut["pre_quant_scale"].float()).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    stored = fmt.unpack(cut["qdata"], k)
    high, low = _end_codes(fmt, cut, n, k)
    beside = raw_bytes(stored).clone()
    codes = beside[:, :k]  # what fills the last group is left alone
    # One code farther; at the upper end, and at a lower one whose code is the larger number (sign and magnitude), one
    # code back.
    back = (codes == high) | ((codes == low) & (low > high))
    codes.copy_(torch.where(back, codes - 1, codes + 1))
    decoded = fmt.decode(stored, cut)[:, :k]
    steps = (fmt.decode(beside.view(stored.dtype), cut)[:, :k] - decoded).abs_()
    errors = (decoded - fmt.prepare(rows)) / steps
    return errors[(steps > 0) & errors.isfinite()]


def to_json(value: LayerMeasure | Histogram | None) -> dict[str, Any]:
    """As JSON data; infinities are strings."""
    if value is None:
        return {}
    data: dict[str, Any] = {}
    for name, entry in vars(value).items():
        if isinstance(entry, Accuracy):
            data[name] = entry.to_json()
        elif isinstance(entry, ScaleHealth):
            data[name] = {**vars(entry), "saturated": entry.saturated}
        else:
            data[name] = str(entry) if isinstance(entry, float) and not math.isfinite(entry) else entry
    return data
