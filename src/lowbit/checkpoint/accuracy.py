"""How close a weight came out: measures that can be added up piece by piece."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.numerics.row_energies import beyond_float32, exact_row_energies, row_energies


@dataclass(frozen=True)
class Accuracy:
    """The error of a weight `a` that stands for `r`.

    `sqnr`: signal-to-quantization-noise ratio, 10 log10(sum r^2 / sum (r - a)^2) in dB; infinite when nothing was
    lost, minus infinity when noise was made out of nothing. `cosine`: of the two as vectors; 1 when both are zero.
    `max_row_error`: the largest |r_n - a_n| / |r_n| of a row n, which shows a single ruined row that the other two
    hide.
    """

    sqnr: float
    cosine: float
    max_row_error: float

    def to_json(self) -> dict[str, Any]:
        """As JSON data. JSON has no infinity and no NaN: the strings "inf", "-inf" and "nan" stand for them."""
        return {name: value if math.isfinite(value) else str(value) for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Accuracy:
        """The inverse of `to_json`."""
        return cls(**{name: float(data[name]) for name in ("sqnr", "cosine", "max_row_error")})


class AccuracyMeter:
    """Adds up rows of a weight and of what became of it.

    Sums within a row are float32, or float64 where its values need that; over rows they are float64.
    """

    def __init__(self) -> None:
        self._signal = self._noise = self._approx = 0.0
        self._worst = 0.0

    def add(self, rows: Tensor, approx: Tensor) -> None:
        """Add some rows: the true ones and the approximate ones, both float32 [n, K]. `approx` is overwritten."""
        sums = row_energies(rows, approx)
        if bool((lost := beyond_float32(sums, rows)).any()):
            sums = sums.double()
            sums[:, lost] = exact_row_energies(rows[lost], approx[lost] + rows[lost])  # approx is the difference now
        self.add_sums(sums)

    def add_sums(self, sums: Tensor) -> None:
        """Add rows by their sums of squares [3, n]: of the true ones, of the difference, of the others."""
        signal, noise, _ = sums
        totals: list[float] = sums.sum(dim=1, dtype=torch.float64).tolist()
        self._signal += totals[0]
        self._noise += totals[1]
        self._approx += totals[2]
        if sums.shape[1]:
            ratio = noise / signal  # NaN for 0 / 0: a row of zeros that stayed zero
            self._worst = max(self._worst, float(ratio.nan_to_num_(nan=0.0, posinf=math.inf).max()))

    def result(self) -> Accuracy:
        """The measures over all rows added; NaN when a NaN was among them, the worst when an infinity was."""
        if math.isnan(self._noise):
            return Accuracy(math.nan, math.nan, math.nan)
        if math.isinf(self._noise):  # an infinite scale
            return Accuracy(-math.inf, math.nan, math.inf)
        if self._noise == 0:
            sqnr = math.inf
        else:
            sqnr = 10 * math.log10(self._signal / self._noise) if self._signal else -math.inf
        lengths = math.sqrt(self._signal * self._approx)
        dot = (self._signal + self._approx - self._noise) / 2  # |r - a|^2 = |r|^2 + |a|^2 - 2 r.a
        same = 1.0 if self._noise == 0 else 0.0  # where one of the two is zero
        cosine = max(-1.0, min(1.0, dot / lengths)) if lengths else same
        return Accuracy(sqnr, cosine, math.sqrt(self._worst))
