"""One weight that a conversion quantizes: read, solve, store; and compare what the file gives back with its source."""

from __future__ import annotations

import math
import time
import zlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.devices import enough_memory
from lowbit.errors import CheckpointError, PlanError
from lowbit.formats.base import Format
from lowbit.ops.encode import row_errors
from lowbit.solvers import DRAFT_ELEMENTS, Solution, Statistics, solve
from lowbit.solvers.input_scale import FRACTION

from .accuracy import AccuracyMeter
from .dialects import Dialect, StoredLayer, TensorSpec
from .dialects.base import Read, join_key, name_place
from .layer_statistics import LayerStatistics, knowledge
from .quantized_source import QuantizedComponent
from .respell import described
from .rewrite import Made
from .tensor_plan import TensorPlan
from .weight_shape import plain_shape, shape_options, value_dtype, weight_shape

_WORKSPACE = 24 << 20  # bytes of temporaries of a worker
CPU = torch.device("cpu")


class LayerWork:
    """One weight to quantize: where it comes from, what is made of it, and how that is checked.

    It is worked on as the matrix [N, K] that it is stored as (`shape`); `plan.weight` is what it is in the module.
    """

    def __init__(
        self,
        plan: TensorPlan,
        component: str,
        dialect: Dialect,
        held: QuantizedComponent,
        outputs: dict[str, TensorSpec],
        seed: int | None,
        statistics: LayerStatistics | None,
        device: torch.device = CPU,
    ) -> None:
        self.plan, self.component, self.dialect, self.held = plan, component, dialect, held
        self.device = device  # where it is solved
        self.group = ""  # the piece of work that it is part of, if it is not one itself
        self.layer, self.fmt, self.layout = plan.layer, plan.fmt, plan.stored.layout
        self.shape, self.dtype = plan.weight.matrix, value_dtype(plan.spec.dtype)
        self.name = held.full_name(plan.key)
        self.where = str(held.component.tensors[plan.key].path)
        self.place = name_place(self.where, self.layer)
        self.seed = None if seed is None else seed + zlib.crc32(self.name.encode())
        self.was = self._stored_before()
        self.specs = dict(outputs)
        self.statistics = statistics
        folds = self.fmt.folds_bias or (self.was is not None and self.was.format.folds_bias)
        bias_key = join_key(self.layer, "bias")
        self.has_bias = bias_key in held.specs and not plan.weight.is_bank
        corrects = plan.pipeline.bias and self.has_bias
        self.bias_key = bias_key if folds or corrects else None
        if self.bias_key is not None and self.bias_key in held.specs:
            self.specs[self.bias_key] = held.specs[self.bias_key]
        self.stored = plan.stored_layer
        self.size = plan.bytes_before
        self.bytes_after = sum(spec.nbytes for spec in self.specs.values())
        self.own_memory = (plan.spec.nbytes + 3 * self.bytes_after) // plan.weight.count
        self.solving_memory = _WORKSPACE
        if plan.pipeline.steps or knowledge(statistics, self.known_as) == "full":
            # H of both halves and of one basis, its factor, which some starts and all steps make; the pieces of a draft
            self.solving_memory += 4 * (6 * self.shape[1] ** 2 + 5 * min(self.shape[0] * self.shape[1], DRAFT_ELEMENTS))
        if statistics is not None and (size := statistics.gradient_size(self.known_as)):
            n, k = self.shape  # G of both halves and together, shrunk, in order, its factor; errors, and judging them
            self.solving_memory += 4 * (6 * size + 4 * n * k)
        self.memory = self.own_memory + self.solving_memory

    def _stored_before(self) -> StoredLayer | None:
        """The layer as the source holds it quantized, when the plan converts it again."""
        found = self.held.layers.get(self.layer)
        if not self.plan.was and found is None:
            return None
        if found is None or found.format.spec != self.plan.was or weight_shape(found) != self.plan.weight:
            now = "plain" if found is None else f"{found.format} of shape {list(plain_shape(found))}"
            raise PlanError(f"{self.place}: the plan takes it for {self.plan.was or 'plain'}, it is {now}; plan anew")
        return found

    def make(self) -> Made:
        """Read, solve and store."""
        began = time.perf_counter()
        w, share = self.read()
        solution = self.solved(w, self.known(), self.place, self.seed)
        tensors = self.tensors(solution, share)
        record = record_of(solution, time.perf_counter() - began)
        return Made(tensors, record, lambda read: self.check(w, read))

    def read(self) -> tuple[Tensor, Tensor | None]:
        """The weight as a matrix [N, K], and what its stored bias lacks ([N] float32) or None."""
        if self.was is not None:
            return self.held.dequantized(self.was, self.dtype)
        return self.plan.weight.as_matrix(self.held.read(self.plan.key)).contiguous(), None

    def solved(self, w: Tensor, known: Statistics | None, where: str, seed: int | None) -> Solution:
        """What a weight [N, K] becomes, in main memory."""
        with enough_memory(self.device, where):
            there = w.to(self.device)
            covered = self.plan.input_percentile
            found = solve(
                there,
                self.fmt,
                self.plan.solver,
                known,
                where=where,
                seed=seed,
                has_bias=self.has_bias,
                given_scale=self.plan.input_scale,
                fraction=FRACTION if covered is None else covered,
            )
            return found.on(CPU)

    def tensors(self, solution: Solution, share_before: Tensor | None) -> dict[str, Tensor]:
        """What is written of a solution, by key."""
        made = self.dialect.store_parts(self.stored, solution.parts)
        if self.bias_key is not None:
            made[self.bias_key] = self._bias(solution, share_before)
        return made

    @property
    def known_as(self) -> str:
        """Its name in statistics."""
        return f"{self.component}/{self.layer}" if self.component else self.layer

    def known(self) -> Statistics | None:
        """What calibration saw of its input."""
        return None if self.statistics is None else self.statistics.get(self.known_as)

    def _bias(self, solution: Solution, share_before: Tensor | None) -> Tensor:
        """The bias to store, [N]: the true one and the solver's correction, without the share that the format adds."""
        assert self.bias_key is not None
        spec = self.specs[self.bias_key]
        true = torch.zeros(self.shape[0])
        if self.bias_key in self.held.specs:
            true = self.held.read(self.bias_key).float()
        if share_before is not None:
            true = true + share_before
        if solution.bias is not None:
            true = true + solution.bias
        share = self.fmt.bias_share(solution.parts)
        return (true if share is None else true - share).to(spec.dtype)

    def check(self, w: Tensor, read: Read) -> dict[str, Any]:
        """Compare what the file gives back with the weight [N, K] that it was made of. Raises `CheckpointError`."""
        meter = AccuracyMeter()
        self.compare(self.found(read), w, read, meter)
        return {"accuracy": meter.result().to_json()}

    def found(self, read: Read) -> StoredLayer:
        """The layer as a loader finds it in what is in the file. Raises `CheckpointError` where that is another one."""
        specs = {key: spec for key, spec in self.specs.items() if key != self.bias_key}
        alone = described(self.dialect, replace(self.stored, where=self.where), specs)
        stored = self.dialect.find_layers(alone, read).layers.get(self.layer)
        found = "nothing"
        if stored is not None:
            told = shape_options(stored.options) == shape_options(self.stored.options)
            same = _with_whole_rows(stored.format, self.shape[1]) == _with_whole_rows(self.fmt, self.shape[1])
            if told and same and (stored.shape, stored.layout) == (self.shape, self.layout):
                return stored
            found = f"{stored.format} {list(weight_shape(stored).shape)} {stored.layout}".rstrip()
        raise CheckpointError(
            f"{self.place}: written as {self.plan.format} {list(self.plan.shape)}, read back as {found}; report this"
        )

    def compare(self, stored: StoredLayer, w: Tensor, read: Read, meter: AccuracyMeter) -> None:
        """Add what is in the file and its source, a matrix [N, K], to a meter. Raises `CheckpointError` for NaN."""
        parts = self.dialect.load_parts(stored, read)
        meter.add_sums(row_errors(self.fmt, parts, w))
        if math.isnan(meter.result().sqnr):
            raise CheckpointError(
                f"{self.place}: what was written decodes to NaN; report this with the format {self.fmt}"
            )


def _with_whole_rows(fmt: Format, k: int) -> dict[str, Any]:
    """The options of a format for K columns: not all conventions tell a group of K columns from a whole row (0)."""
    options = fmt.config()
    return {**options, "group_size": 0} if options.get("group_size") == k else options


def record_of(solution: Solution, seconds: float) -> dict[str, Any]:
    """What a report says of a layer, as JSON data."""
    return {
        "seconds": seconds,
        "solver": solution.solver,
        "note": solution.note,
        "error": solution.error,
        "rtn_error": solution.rtn_error,
        "unseen_error": solution.unseen_error,
    }
