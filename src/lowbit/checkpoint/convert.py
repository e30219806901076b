"""Converting a checkpoint by a plan: read, solve, store, read back, decode, compare; one weight at a time a core."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, PlanError
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.numerics.groups import row_chunks
from lowbit.solvers import DRAFT_ELEMENTS, Solution, solve

from .accuracy import Accuracy, AccuracyMeter
from .conversion_report import ConversionReport, LayerReport
from .dialects import Dialect, StoredLayer, TensorSpec, get_dialect
from .dialects.base import Read, join_key, name_place
from .folder_configs import FolderConfigs, refuse_target
from .layer_statistics import LayerStatistics, knowledge
from .output import Staging
from .pipeline import MEMORY_BUDGET, Progress
from .plan_data import ComponentPlan, Plan, TensorPlan
from .quantized_source import QuantizedComponent, look_for_layers
from .respell import described
from .rewrite import Copy, Made, Piece, Rewritten, Settings, batch_copies, rewrite
from .source import Source

_CALIBRATED_MEMORY = 2 << 30  # bytes in work at a time with second moments: two layers of 3072 x 3072 take 0.8 GiB
_WORKSPACE = 24 << 20  # bytes of temporaries of a worker


def convert(
    source: Source,
    target: str | Path,
    plan: Plan,
    *,
    jobs: int | None = None,
    resume: bool = True,
    verify: bool = True,
    progress: Progress | None = None,
    seed: int | None = None,
    statistics: LayerStatistics | None = None,
) -> ConversionReport:
    """Write `source` to `target` as the plan says. The target appears when all of it is written and checked.

    `jobs`: worker threads, by default one a core. `resume`: go on with the work of an interrupted run of the same
    source, plan and options. `verify`: read every tensor back; decode every quantized layer as a loader would and
    compare it with its source. `progress(done bytes, total bytes, layer)` is called after each piece. `seed`: round
    stochastically. `statistics`: what calibration saw of the layers' inputs, for solvers that need it.

    Raises:
        PlanError: the plan quantizes nothing, is about another checkpoint, or asks for what cannot be done.
        WeightError: a weight is not finite.
        CheckpointError: reading or writing failed, or what was read back is not what was written.
    """
    began = time.perf_counter()
    plan.validate()
    plan.check_against(source)
    _refuse_pointless(plan, str(source.place), seed)
    _refuse_unknown(plan, statistics)
    staging = Staging(source, target)
    work = _Work(source, staging, get_dialect(plan.dialect), seed, statistics)
    for component in plan.components:
        work.add(component)
    fingerprint = _fingerprint(source, plan, seed, statistics, verify=verify)
    memory = MEMORY_BUDGET if statistics is None else _CALIBRATED_MEMORY
    settings = Settings(jobs, resume, verify, progress, memory)
    staging.replaced = work.configs.texts()
    done = rewrite(source, staging, work.pieces, work.metadata, fingerprint=fingerprint, settings=settings)
    return _report(target, plan, work.layers, done, time.perf_counter() - began)


def _refuse_pointless(plan: Plan, where: str, seed: int | None) -> None:
    if not plan.count("quantize"):
        reasons = sorted({tensor.why for tensor in plan.tensors()})
        why = "; ".join(reasons) or "there are no tensors"
        raise PlanError(f"{where}: the plan quantizes nothing; the reasons are: {why}. Choose another format or source")
    for tensor in plan.tensors() if seed is not None else ():
        if tensor.action == "quantize" and not tensor.fmt.stochastic:
            raise PlanError(f"{tensor.key!r}: {tensor.format} has no stochastic rounding; leave the seed out")


def _refuse_unknown(plan: Plan, statistics: LayerStatistics | None) -> None:
    """Refuse solvers and formats that need what is not known, before anything is read."""
    for component in plan.components:
        for tensor in component.tensors:
            if tensor.action != "quantize":
                continue
            name = f"{component.name}/{tensor.layer}" if component.name else tensor.layer
            known = knowledge(statistics, name)
            needs, other = "", "solver"
            if tensor.fmt.plain != tensor.fmt and not known:
                needs, other = f"{tensor.format} needs to know its input", "format"
            elif tensor.pipeline.steps and known != "full":
                needs = f"{tensor.solver} needs second moments [K, K] of its input"
            if needs:
                found = "are no statistics of it" if statistics is not None else "are no statistics"
                raise PlanError(
                    f"{name!r}: {needs}, and there {found}; calibrate (lowbit calibrate) and give the file with "
                    f"--stats, or choose another {other}"
                )


class _Work:
    """What there is to do for all models of a source: pieces, the layers among them, each file's header metadata."""

    def __init__(
        self, source: Source, staging: Staging, dialect: Dialect, seed: int | None, statistics: LayerStatistics | None
    ) -> None:
        self._source, self._staging, self._dialect, self._seed = source, staging, dialect, seed
        self._statistics = statistics
        self.pieces: list[Piece | Copy] = []
        self.layers: list[_Layer] = []
        self.metadata = staging.metadata()
        self.configs = FolderConfigs()

    def add(self, plan: ComponentPlan) -> None:
        """Add what one model needs."""
        component = self._source.component(plan.name)
        held = look_for_layers(self._source, component)
        refuse_target(held, self._dialect, single=self._staging.single)
        outputs = plan.outputs(self._dialect)
        described: dict[str, list[StoredLayer]] = {}
        folded: set[str] = set()  # biases that are written with their layer
        for tensor in plan.tensors:
            if tensor.action != "quantize":
                continue
            layer = _Layer(tensor, plan.name, self._dialect, held, outputs[tensor.key], self._seed, self._statistics)
            file = self._staging.file_of(component, tensor.key)
            self.layers.append(layer)
            self.pieces.append(Piece(layer.name, file, layer.specs, layer.size, layer.memory, layer.make))
            described.setdefault(file, []).append(layer.stored)
            folded |= layer.specs.keys()
        kept = [tensor.key for tensor in plan.tensors if tensor.action == "keep" and tensor.key not in folded]
        self.pieces += batch_copies(component, kept, partial(self._staging.file_of, component))
        for stored in held.layers.values():
            if (key := stored.keys["qdata"]) in kept:
                self._refuse_mixture(held)
                described.setdefault(self._staging.file_of(component, key), []).append(stored)
        plain = {key: held.specs[key] for key in kept}
        self._describe(held, described, plain)

    def _refuse_mixture(self, held: QuantizedComponent) -> None:
        """Layers that stay quantized as they are need the dialect that they are in."""
        if held.dialect is not self._dialect:
            name = held.dialect.name if held.dialect is not None else "plain"
            raise PlanError(
                f"{held.where}: some of its quantized layers would stay as they are, in the dialect {name}, and the "
                f"others become {self._dialect.name}: no file holds both. Convert all of them, or rewrite the "
                f"source first (lowbit migrate --to {self._dialect.name})"
            )

    def _describe(
        self, held: QuantizedComponent, described: dict[str, list[StoredLayer]], plain: dict[str, TensorSpec]
    ) -> None:
        """Describe the layers in the headers of their files and beside them, in place of old descriptions."""
        for entries in self.metadata.values():
            held.strip_description(entries)
        for file, layers in described.items():
            self.metadata.setdefault(file, {}).update(self._dialect.header_metadata(layers, plain))
        self.configs.strip(held)
        self.configs.describe(held, self._dialect, [layer for found in described.values() for layer in found], plain)


class _Layer:
    """One weight to quantize: where it comes from, what is made of it, and how that is checked."""

    def __init__(
        self,
        plan: TensorPlan,
        component: str,
        dialect: Dialect,
        held: QuantizedComponent,
        outputs: dict[str, TensorSpec],
        seed: int | None,
        statistics: LayerStatistics | None,
    ) -> None:
        self.plan, self.component, self.dialect, self._held = plan, component, dialect, held
        self.layer, self.fmt, self.layout = plan.layer, plan.fmt, plan.stored.layout
        self.shape, self.dtype = (plan.shape[0], plan.shape[1]), plan.spec.dtype
        self.name = held.full_name(plan.key)
        self.place = name_place(str(held.component.tensors[plan.key].path), self.layer)
        self._seed = None if seed is None else seed + zlib.crc32(self.name.encode())
        self._was = self._stored_before()
        self.specs = dict(outputs)
        self._statistics = statistics
        folds = self.fmt.folds_bias or (self._was is not None and self._was.format.folds_bias)
        bias_key = join_key(self.layer, "bias")
        self.has_bias = bias_key in held.specs
        corrects = plan.pipeline.bias and self.has_bias
        self.bias_key = bias_key if folds or corrects else None
        if self.bias_key is not None and self.bias_key in held.specs:
            self.specs[self.bias_key] = held.specs[self.bias_key]
        self.stored = plan.stored_layer
        self.size = plan.bytes_before
        self.bytes_after = sum(spec.nbytes for spec in self.specs.values())
        self.memory = plan.spec.nbytes + 3 * self.bytes_after + _WORKSPACE
        if plan.pipeline.steps:  # H of both halves and of one basis, its factor; the pieces of a draft
            self.memory += 4 * (6 * self.shape[1] ** 2 + 5 * min(self.shape[0] * self.shape[1], DRAFT_ELEMENTS))

    def _stored_before(self) -> StoredLayer | None:
        """The layer as the source holds it quantized, when the plan converts it again."""
        found = self._held.layers.get(self.layer)
        if not self.plan.was and found is None:
            return None
        if found is None or found.format.spec != self.plan.was or found.shape != self.shape:
            now = "plain" if found is None else f"{found.format} of shape {list(found.shape)}"
            raise PlanError(f"{self.place}: the plan takes it for {self.plan.was or 'plain'}, it is {now}; plan anew")
        return found

    def make(self) -> Made:
        """Read, solve and store."""
        began = time.perf_counter()
        share: Tensor | None = None
        if self._was is None:
            w = self._held.read(self.plan.key)
        else:
            w, share = self._held.dequantized(self._was, self.dtype)
        known = None if self._statistics is None else self._statistics.get(self._full_name)
        solution = solve(
            w, self.fmt, self.plan.solver, known, where=self.place, seed=self._seed, has_bias=self.has_bias
        )
        tensors = self.dialect.store_parts(self.stored, solution.parts)
        if self.bias_key is not None:
            tensors[self.bias_key] = self._bias(solution, share)
        record = {
            "seconds": time.perf_counter() - began,
            "solver": solution.solver,
            "note": solution.note,
            "error": solution.error,
            "rtn_error": solution.rtn_error,
        }
        return Made(tensors, record, lambda read: self._check(w, read))

    @property
    def _full_name(self) -> str:
        return f"{self.component}/{self.layer}" if self.component else self.layer

    def _bias(self, solution: Solution, share_before: Tensor | None) -> Tensor:
        """The bias to store, [N]: the true one and the solver's correction, without the share that the format adds."""
        assert self.bias_key is not None
        spec = self.specs[self.bias_key]
        true = torch.zeros(self.shape[0])
        if self.bias_key in self._held.specs:
            true = self._held.read(self.bias_key).float()
        if share_before is not None:
            true = true + share_before
        if solution.bias is not None:
            true = true + solution.bias
        share = self.fmt.bias_share(solution.parts)
        return (true if share is None else true - share).to(spec.dtype)

    def _check(self, w: Tensor, read: Read) -> dict[str, Any]:
        """Load the layer from what is in the file, as a loader would, and compare it with its source."""
        own = [key for key in self.specs if key != self.bias_key]
        specs = {key: self.specs[key] for key in own}
        alone = described(self.dialect, replace(self.stored, where=self.place), specs)
        stored = self.dialect.find_layers(alone, read).layers.get(self.layer)
        if stored is None or (stored.format, stored.shape, stored.layout) != (self.fmt, self.shape, self.layout):
            found = "nothing" if stored is None else f"{stored.format} {list(stored.shape)} {stored.layout}".rstrip()
            raise CheckpointError(
                f"{self.place}: written as {self.plan.format} {list(self.shape)}, read back as {found}; report this"
            )
        accuracy = compare_weight(self.fmt, self.dialect.load_parts(stored, read), w)
        if math.isnan(accuracy.sqnr):
            raise CheckpointError(
                f"{self.place}: what was written decodes to NaN; report this with the format {self.fmt}"
            )
        return {"accuracy": accuracy.to_json()}


def compare_weight(fmt: Format, parts: Parts, w: Tensor) -> Accuracy:
    """How close the parts decode to a weight [N, K], piece by piece."""
    meter = AccuracyMeter()
    for start, stop in row_chunks(w.shape[0], w.shape[1], fmt.row_multiple):
        meter.add(w[start:stop].float(), fmt.dequantize_rows(parts, w.shape[1], start, stop, torch.float32))
    return meter.result()


def _fingerprint(
    source: Source, plan: Plan, seed: int | None, statistics: LayerStatistics | None, *, verify: bool
) -> str:
    """Names everything that the bytes of the result depend on, and whether they are checked."""
    data = plan.to_json()
    del data["source"]  # a path, for readers
    try:
        version = importlib.metadata.version("lowbit")
    except importlib.metadata.PackageNotFoundError:  # run from the source folder
        version = "uninstalled"
    known = None if statistics is None else statistics.fingerprint()
    facts = [source.fingerprint(), data, version, torch.__version__, seed, verify, known]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _report(target: str | Path, plan: Plan, layers: list[_Layer], done: Rewritten, seconds: float) -> ConversionReport:
    return ConversionReport(
        target=str(target),
        layers=tuple(_layer_reports(layers, done)),
        kept=plan.count("keep"),
        dropped=plan.count("drop"),
        resumed=done.resumed,
        bytes_before=plan.bytes_before,
        bytes_after=plan.bytes_after,
        seconds=seconds,
    )


def _layer_reports(layers: list[_Layer], done: Rewritten) -> Iterator[LayerReport]:
    for layer in layers:
        record = done.records[layer.name]
        accuracy = record.get("accuracy")
        yield LayerReport(
            component=layer.component,
            layer=layer.layer,
            format=layer.plan.stored.spec,
            solver=record["solver"],
            shape=layer.shape,
            seconds=record["seconds"],
            bytes_before=layer.size,
            bytes_after=layer.bytes_after,
            accuracy=None if accuracy is None else Accuracy.from_json(accuracy),
            note=record["note"],
            error=record["error"],
            rtn_error=record["rtn_error"],
        )
