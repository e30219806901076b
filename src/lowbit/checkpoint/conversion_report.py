"""What a conversion did, layer by layer: data that prints as a table or as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .accuracy import Accuracy
from .fold_data import Fold


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer. `seconds`: reading, solving and storing, on one core. `accuracy`: None without verifying.

    `solver`: what made it, which is less than the plan's where that lost; `note`: why. `error`, `rtn_error`: relative
    errors of its output on the samples held out, its own and that of rounding to nearest; None without statistics.
    `unseen_error`: what to expect instead of `error` on inputs that are not among the samples; None where no samples
    were held out.
    `shares`: the group of layers with which it has one smooth_factor and one proj_down.
    """

    component: str
    layer: str
    format: str
    solver: str
    shape: tuple[int, ...]
    seconds: float
    bytes_before: int
    bytes_after: int
    accuracy: Accuracy | None
    note: str = ""
    error: float | None = None
    rtn_error: float | None = None
    unseen_error: float | None = None
    shares: str = ""

    @property
    def name(self) -> str:
        """The layer with its component in front, where there is one."""
        return f"{self.component}/{self.layer}" if self.component else self.layer


@dataclass(frozen=True)
class ConversionReport:
    """A whole conversion. `resumed`: how many pieces an interrupted run had done. Bytes are those of all tensors.

    `folds`: the groups of the plan that scales were folded into, or not, each with the name of its model.
    """

    target: str
    layers: tuple[LayerReport, ...]
    kept: int
    dropped: int
    resumed: int
    bytes_before: int
    bytes_after: int
    seconds: float
    folds: tuple[tuple[str, Fold], ...] = ()

    def worst(self, count: int = 5) -> list[LayerReport]:
        """The verified layers with the lowest SQNR, the worst first."""
        measured = [layer for layer in self.layers if layer.accuracy is not None]
        return sorted(measured, key=lambda layer: layer.accuracy.sqnr if layer.accuracy else 0.0)[:count]

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        data = dataclasses.asdict(self)
        for entry, layer in zip(data["layers"], self.layers, strict=True):
            entry["shape"] = list(layer.shape)
            entry["accuracy"] = None if layer.accuracy is None else layer.accuracy.to_json()
        data["layers"] = list(data["layers"])
        data["folds"] = [{"component": component, **fold.to_json()} for component, fold in self.folds]
        return data
