"""How much of its output each layer loses in each format: tr(E H E^T) / tr(W H W^T), measured.

H is the second moment of the layer's input on the samples held out, or on all there are; what was made of all of them
counts by what is to be expected of others (`lowbit.solvers.unseen`). Without statistics H is the identity, and the
ratio is that of the weight. The codes come from a solver, by default the start of the pipeline that will convert the
layer. Rows of a weight are alike, so by default some of them, spread evenly, stand for all; formats whose low-rank part
depends on all rows get all of them. Of a bank of experts the one in the middle stands for all.

Where the gradient at the outputs is known, the error is that of the model's output, tr(G E H E^T) / tr(G W H W^T), of
all rows, and what a layer is divided by, times the tokens that it saw, is kept as its weight: times that, errors of
different layers can be added (a modulation sees one token where others see all of a sample's).
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.devices import enough_memory, usable_device
from lowbit.errors import PlanError
from lowbit.formats.base import Format
from lowbit.formats.parts import Dim
from lowbit.numerics.groups import row_chunks
from lowbit.solvers import DRAFT_ELEMENTS, Pipeline, Solution, Statistics, parse_pipeline, solve
from lowbit.solvers.curvature import output_error
from lowbit.text_files import write_text

from .dialects.base import name_place
from .layer_statistics import LayerStatistics
from .pipeline import MEMORY_BUDGET, Progress, Unit, budget_for, run_units
from .plan_data import TensorPlan
from .source import Component, Source
from .strict_json import parse_object

START, PLANNED = "start", "planned"
"""What to measure with, besides the names of solvers: the start of each layer's own pipeline, or all of it."""
ROWS = 512
_VERSION = 1
_SPREAD = 16  # rows of a piece of a sample
_WORKSPACE = 24 << 20  # bytes of temporaries of a worker


@dataclass(frozen=True)
class Measured:
    """The relative error of a layer's output in one format, and the solver that gave it."""

    solver: str
    error: float


@dataclass(frozen=True)
class Candidate:
    """A layer to measure: its name with its component's, and what it may become (action "quantize", different formats).

    `has_bias`: it has a bias that can take a correction.
    """

    component: str
    name: str
    plans: tuple[TensorPlan, ...]
    has_bias: bool


@dataclass
class Sensitivities:
    """Measured errors by layer and format spec, with what they hold for: source, statistics (fingerprints), rows.

    `weights`: of the layers whose gradients are known, tr(G W H W^T) times the tokens that they saw.
    """

    source: str
    statistics: str = ""
    rows: int = ROWS
    layers: dict[str, dict[str, Measured]] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def get(self, layer: str, spec: str, solver: str) -> float | None:
        """The relative error of a layer in a format by a solver, if it was measured."""
        found = self.layers.get(layer, {}).get(spec)
        return None if found is None or found.solver != solver else found.error

    def save(self, path: str | Path) -> None:
        """Write as a JSON file, one line a layer. Raises `WriteError`."""
        rows = ",\n".join(
            f"    {json.dumps(name)}: {json.dumps({spec: [m.solver, m.error] for spec, m in found.items()})}"
            for name, found in self.layers.items()
        )
        head = {"lowbit_sensitivities": _VERSION, "source": self.source, "statistics": self.statistics}
        text = json.dumps({**head, "rows": self.rows, "weights": self.weights}, indent=2).removesuffix("\n}")
        write_text(path, f'{text},\n  "layers": {{\n{rows}\n  }}\n}}\n', "the file of sensitivities")

    @classmethod
    def load(cls, path: str | Path) -> Sensitivities:
        """Read a file of `save`. Raises `PlanError` for one that cannot be read or is none."""
        try:
            data = parse_object(Path(path).read_bytes())
        except OSError as error:
            raise PlanError(f"{path}: cannot be read: {error.strerror}; check the path") from error
        except ValueError as error:
            raise PlanError(f"{path}: {error}; delete it to measure anew") from error
        if data.get("lowbit_sensitivities") != _VERSION:
            raise PlanError(f"{path}: holds no sensitivities of version {_VERSION}; give another file or none")
        try:
            layers, weights = _layers(data["layers"]), _weights(data.get("weights", {}))
            return cls(str(data["source"]), str(data["statistics"]), int(data["rows"]), layers, weights)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"{path}: is damaged ({error!r}); delete it to measure anew") from error


def _layers(data: Mapping[str, Any]) -> dict[str, dict[str, Measured]]:
    layers: dict[str, dict[str, Measured]] = {}
    for name, found in data.items():
        layers[name] = {spec: Measured(str(solver), float(error)) for spec, (solver, error) in found.items()}
        if bad := [spec for spec, m in layers[name].items() if not (math.isfinite(m.error) and m.error >= 0)]:
            raise ValueError(f"the error of {name} as {bad[0]}")
    return layers


def _weights(data: Mapping[str, Any]) -> dict[str, float]:
    weights = {name: float(weight) for name, weight in data.items()}
    if bad := [name for name, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)]:
        raise ValueError(f"the weight of {bad[0]}")
    return weights


def measure(
    source: Source,
    candidates: Sequence[Candidate],
    statistics: LayerStatistics | None = None,
    *,
    measure_with: str = START,
    rows: int = ROWS,
    known: Sensitivities | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
) -> Sensitivities:
    """Measure every candidate in every format; `known` errors are taken over and not measured again.

    `measure_with`: `START`, `PLANNED`, or a solver. `rows`: how many rows of each weight to look at, 0 for all.
    `progress(done bytes, total bytes, layer)` is called after each layer. `device`: where layers are solved.

    Raises:
        PlanError: `known` is of another source, of other statistics or of another number of rows; no such device.
        SolverError: an unknown solver, or one that needs what is not known; too little memory on the device.
        WeightError: a weight is not finite.
    """
    device = usable_device(device)
    found = Sensitivities(source.fingerprint(), "" if statistics is None else statistics.fingerprint(), rows)
    if known is not None:
        _refuse_other(known, found)
        found.layers.update({name: dict(errors) for name, errors in known.layers.items()})
        found.weights.update(known.weights)
    reader = _Reader(statistics)
    units = []
    for candidate in candidates:
        missing = [
            (plan, solver)
            for plan in candidate.plans
            if found.get(candidate.name, plan.format, solver := solver_for(plan, measure_with)) is None
        ]
        if missing:
            found.layers.setdefault(candidate.name, {})  # in the order of the candidates, whoever is measured first
            units.append(_Layer(source, candidate, missing, reader, rows, found, device).unit)
    budget = budget_for((unit.memory for unit in units), MEMORY_BUDGET, jobs, device)
    run_units(units, jobs=jobs, budget=budget, progress=progress)
    return found


def solver_for(plan: TensorPlan, measure_with: str) -> str:
    """The pipeline with which a layer is measured."""
    if measure_with == START:
        return Pipeline(plan.pipeline.start).name
    return plan.solver if measure_with == PLANNED else parse_pipeline(measure_with).name


def _refuse_other(known: Sensitivities, wanted: Sensitivities) -> None:
    for what, one, other in (
        ("another checkpoint", known.source, wanted.source),
        ("other statistics", known.statistics, wanted.statistics),
        (f"{known.rows or 'all'} rows a layer", known.rows, wanted.rows),
    ):
        if one != other:
            raise PlanError(f"the sensitivities are those of {what}; write the new ones to another file")


class _Reader:
    """Reads statistics for one thread at a time: a file keeps the last ones it has read."""

    def __init__(self, statistics: LayerStatistics | None) -> None:
        self._statistics = statistics
        self._lock = threading.Lock()

    def get(self, name: str) -> Statistics | None:
        if self._statistics is None:
            return None
        with self._lock:
            return self._statistics.get(name)

    def gradient_size(self, name: str) -> int:
        return 0 if self._statistics is None else self._statistics.gradient_size(name)

    def full(self, name: str) -> bool:
        return self._statistics is not None and self._statistics.kind(name) == "full"


class _Layer:
    """One layer to measure in the formats that are missing."""

    def __init__(
        self,
        source: Source,
        candidate: Candidate,
        missing: Sequence[tuple[TensorPlan, str]],
        reader: _Reader,
        rows: int,
        found: Sensitivities,
        device: torch.device,
    ) -> None:
        self.source, self.candidate, self.missing, self.reader = source, candidate, missing, reader
        self.plan = candidate.plans[0]
        self.shape = self.plan.weight.matrix
        self.rows, self.found, self.device = rows, found, device

    @property
    def unit(self) -> Unit:
        return Unit(self.candidate.name, self.plan.bytes_before, self._memory(), self.run)

    def _memory(self) -> int:
        n, k = self.shape
        gradients = self.reader.gradient_size(self.candidate.name)
        whole = gradients or not self.rows or any(_needs_all_rows(plan.fmt) for plan, _ in self.missing)
        looked_at = n if whole else min(n, self.rows + 2 * _step([plan.fmt for plan, _ in self.missing], self.shape))
        square = 2 * k * k if self.reader.full(self.candidate.name) else 0
        if any(parse_pipeline(solver).steps for _, solver in self.missing):
            square = 6 * k * k + 5 * min(looked_at * k, DRAFT_ELEMENTS)
        square += 6 * gradients + 4 * n * k if gradients else 0  # as in a conversion
        one = self.plan.spec.nbytes // self.plan.weight.count
        return one + 3 * looked_at * k * self.plan.spec.dtype.itemsize + 4 * square + _WORKSPACE

    def _matrix(self, component: Component) -> Tensor:
        """The weight as a matrix [N, K]; of a bank the expert in the middle, which stands for all."""
        weight = self.plan.weight
        if not weight.is_bank:
            return weight.as_matrix(self.source.read(component, self.plan.key)).contiguous()
        middle = weight.experts // 2
        return weight.as_matrix(self.source.read_rows(component, self.plan.key, middle, middle + 1)[0]).contiguous()

    def run(self) -> None:
        component = self.source.component(self.candidate.component)
        w = self._matrix(component)
        statistics = self.reader.get(self.candidate.name)
        gradients = bool(self.reader.gradient_size(self.candidate.name))
        formats = [plan.fmt for plan, _ in self.missing]
        some = sample_rows(w, self.rows, _step(formats, self.shape)) if self.rows and not gradients else w
        where = name_place(str(component.tensors[self.plan.key].path), self.plan.layer)
        errors = self.found.layers[self.candidate.name]
        for plan, solver in self.missing:
            with enough_memory(self.device, where):
                looked_at = (w if _needs_all_rows(plan.fmt) else some).to(self.device)
                solution = solve(looked_at, plan.fmt, solver, statistics, where=where, has_bias=self.candidate.has_bias)
                errors[plan.format] = Measured(solver, _error(looked_at, plan.fmt, solution))
            if gradients and statistics is not None and solution.signal is not None:
                self.found.weights[self.candidate.name] = solution.signal * statistics.total_tokens


def _error(w: Tensor, fmt: Format, solution: Solution) -> float:
    """The relative error of the output, or of the weight where nothing is known of the input."""
    known = solution.error if solution.unseen_error is None else solution.unseen_error
    if known is not None:
        return max(known, 0.0)
    lost, signal = output_error(w, fmt, solution.parts, None)
    return lost / signal if signal else float(lost > 0)


def _needs_all_rows(fmt: Format) -> bool:
    """Whether a factor of low rank ties the rows together."""
    return any(isinstance(dim, Dim) and dim.axis == "R" for rule in fmt.rules for dim in rule.dims)


def _step(formats: Sequence[Format], shape: tuple[int, int]) -> int:
    """Rows can be sampled in pieces of so many: all formats cut there, and no scale covers rows of two pieces."""
    tall = [fmt.unit(shape)[0] for fmt in formats]
    return math.lcm(_SPREAD, *(fmt.row_multiple for fmt in formats), *(rows for rows in tall if rows < shape[0]))


def sample_rows(w: Tensor, rows: int, step: int) -> Tensor:
    """About `rows` rows of a weight [N, K] in pieces of `step`, spread evenly.

    The row with the largest magnitude is among them: a scale that the whole weight shares is then the true one.
    """
    pieces = -(-w.shape[0] // step)
    count = -(-rows // step)
    if count >= pieces:
        return w
    chosen = {round(index) for index in torch.linspace(0, pieces - 1, count, dtype=torch.float64).tolist()}
    chosen.add(_largest_row(w) // step)
    return torch.cat([w[piece * step : (piece + 1) * step] for piece in sorted(chosen)])


def _largest_row(w: Tensor) -> int:
    best, row = -1.0, 0
    for start, stop in row_chunks(w.shape[0], w.shape[1]):
        amax, index = w[start:stop].abs().amax(dim=1).max(dim=0)
        if float(amax) > best:
            best, row = float(amax), start + int(index)
    return row
