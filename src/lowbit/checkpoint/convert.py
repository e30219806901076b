"""Converting a checkpoint by a plan: read, solve, store, read back, decode, compare; one weight at a time a core."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from lowbit.devices import usable_device
from lowbit.errors import PlanError

from .accuracy import Accuracy
from .conversion_report import ConversionReport, LayerReport
from .convert_bank import BankWork
from .convert_group import GroupWork, record_in
from .convert_layer import LayerWork
from .dialects import Dialect, StoredLayer, TensorSpec, get_dialect
from .dialects.base import bias_orders
from .dropped import DROPPED, dropped_text
from .fold_check import check_folds_fit, check_norms
from .fold_data import FOLDED, folds_as_text
from .folder_configs import FolderConfigs, refuse_target
from .folding import folded
from .layer_statistics import LayerStatistics, knowledge
from .output import Staging
from .pipeline import MEMORY_BUDGET, Progress, budget_for
from .plan_data import ComponentPlan, Plan
from .quantized_source import QuantizedComponent, look_for_layers
from .rewrite import Copy, Piece, Rewritten, Settings, batch_copies, rewrite
from .shared_low_rank import check_inputs, groups_of
from .source import Source
from .target import check_target

_CALIBRATED_MEMORY = 2 << 30  # bytes for layers with second moments: two of 3072 x 3072 take 0.8 GiB
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
    device: str | torch.device = "cpu",
) -> ConversionReport:
    """Write `source` to `target` as the plan says. The target appears when all of it is written and checked.

    `jobs`: worker threads, by default one a core. `resume`: go on with the work of an interrupted run of the same
    source, plan and options. `verify`: read every tensor back; decode every quantized layer as a loader would and
    compare it with its source. `progress(done bytes, total bytes, layer)` is called after each piece. `seed`: round
    stochastically. `statistics`: what calibration saw of the layers' inputs, for solvers that need it. `device`: where
    weights are solved, one a worker at a time; reading, writing and checking stay in main memory.

    Raises:
        PlanError: the plan quantizes nothing, is about another checkpoint, or asks for what cannot be done; the device
            cannot be used.
        StatisticsError: they are those of the model before scales were folded into it, or after.
        SolverError: the memory of the device does not suffice for a layer.
        WeightError: a weight is not finite.
        CheckpointError: reading or writing failed, or what was read back is not what was written.
    """
    began = time.perf_counter()
    device = usable_device(device)
    plan.validate()
    plan.check_against(source)
    check_target(source, target)
    _refuse_pointless(plan, str(source.place), seed)
    _refuse_unknown(plan, statistics)
    source, statistics = _folded(source, plan, statistics)
    staging = Staging(source, target)
    work = _Work(source, staging, get_dialect(plan.dialect), seed, statistics, device)
    for component in plan.components:
        work.add(component)
    fingerprint = _fingerprint(source, plan, seed, statistics, device, verify=verify)
    least = MEMORY_BUDGET if statistics is None else _CALIBRATED_MEMORY
    memory = budget_for((piece.memory for piece in work.pieces), least, jobs, device)
    settings = Settings(jobs, resume, verify, progress, memory)
    staging.replaced = work.configs.texts()
    done = rewrite(source, staging, work.pieces, work.metadata, fingerprint=fingerprint, settings=settings)
    return _report(target, plan, work.layers, done, time.perf_counter() - began)


def _folded(source: Source, plan: Plan, statistics: LayerStatistics | None) -> tuple[Source, LayerStatistics | None]:
    """The source and its statistics with the plan's scales folded in, once they are found to fit each other."""
    if statistics is None:
        return folded(source, plan, statistics)
    check_norms(source, statistics)
    made = folded(source, plan, statistics)
    for part in plan.components:
        check_folds_fit(source, source.component(part.name), part.folds, statistics)
    return made


def _refuse_pointless(plan: Plan, where: str, seed: int | None) -> None:
    if not plan.count("quantize"):
        reasons = sorted({tensor.why for tensor in plan.tensors()})
        why = "; ".join(reasons) or "there are no tensors"
        raise PlanError(f"{where}: the plan quantizes nothing; the reasons are: {why}. Choose another format or source")
    for tensor in plan.tensors() if seed is not None else ():
        if tensor.action == "quantize" and not tensor.fmt.stochastic:
            raise PlanError(f"{tensor.key!r}: {tensor.format} has no stochastic rounding; leave the seed out")


def _refuse_unknown(plan: Plan, statistics: LayerStatistics | None) -> None:
    """Refuse solvers and formats that need what is not known, and groups with several inputs, before all reading."""
    for component in plan.components:
        check_inputs(component.name, component.tensors, statistics)
        for tensor in component.tensors:
            if tensor.action != "quantize":
                continue
            name = f"{component.name}/{tensor.layer}" if component.name else tensor.layer
            known = knowledge(statistics, name)
            needs, other = "", "solver"
            if tensor.needs_input and not known:
                needs, other = f"{tensor.format} needs to know its input", "format"
            elif tensor.pipeline.steps and known != "full":
                needs = f"{tensor.solver} needs second moments [K, K] of the layer's input"
            if needs:
                found = "are no statistics of it" if statistics is not None else "are no statistics"
                raise PlanError(
                    f"{name!r}: {needs}, and there {found}; calibrate (lowbit calibrate) and give the file with "
                    f"--stats, or choose another {other}"
                )


class _Work:
    """What there is to do for all models of a source: pieces, the layers among them, each file's header metadata."""

    def __init__(
        self,
        source: Source,
        staging: Staging,
        dialect: Dialect,
        seed: int | None,
        statistics: LayerStatistics | None,
        device: torch.device,
    ) -> None:
        self._source, self._staging, self._dialect = source, staging, dialect
        self._how = seed, statistics, device
        self.pieces: list[Piece | Copy] = []
        self.layers: list[LayerWork] = []
        self.metadata = staging.metadata()
        self.configs = FolderConfigs()

    def add(self, plan: ComponentPlan) -> None:
        """Add what one model needs."""
        component = self._source.component(plan.name)
        held = look_for_layers(self._source, component)
        refuse_target(held, self._dialect, single=self._staging.single)
        outputs = plan.outputs(self._dialect)
        described: dict[str, list[StoredLayer]] = {}
        groups = groups_of(plan.tensors)
        together: dict[str, list[LayerWork]] = {}
        folded: set[str] = set()  # biases that are written with their layer
        for tensor in plan.tensors:
            if tensor.action != "quantize":
                continue
            kind = BankWork if tensor.weight.is_bank else LayerWork
            layer = kind(tensor, plan.name, self._dialect, held, outputs[tensor.key], *self._how)
            self.layers.append(layer)
            if tensor.shares in groups:
                together.setdefault(tensor.shares, []).append(layer)
                if len(together[tensor.shares]) < len(groups[tensor.shares]):
                    continue  # the group is one piece of work, in the place of its last layer
            mine = together.get(tensor.shares, [layer])
            work = GroupWork(mine) if len(mine) > 1 else layer
            file = self._staging.file_of(component, mine[0].plan.key)
            self.pieces.append(Piece(work.name, file, work.specs, work.size, work.memory, work.make))
            described.setdefault(file, []).extend(one.stored for one in mine)
            folded |= work.specs.keys()
        kept = [tensor.key for tensor in plan.tensors if tensor.action == "keep" and tensor.key not in folded]
        self.pieces += batch_copies(component, kept, partial(self._staging.file_of, component))
        for stored in held.layers.values():
            if (key := stored.keys["qdata"]) in kept:
                self._refuse_mixture(held)
                described.setdefault(self._staging.file_of(component, key), []).append(stored)
        plain = {key: held.specs[key] for key in kept}
        self._describe(held, described, plain)
        for name, text in ((FOLDED, folds_as_text(plan.folds)), (DROPPED, dropped_text(held, plan.tensors))):
            for file in {self._staging.file_of(component, key) for key in held.specs} if text else ():
                self.metadata.setdefault(file, {})[name] = text

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
        layers = [layer for found in described.values() for layer in found]
        self._staging.reorder(held.component, bias_orders(self._dialect, layers))
        self.configs.strip(held)
        self.configs.describe(held, self._dialect, layers, plain)


def _fingerprint(
    source: Source,
    plan: Plan,
    seed: int | None,
    statistics: LayerStatistics | None,
    device: torch.device,
    *,
    verify: bool,
) -> str:
    """Names everything that the bytes of the result depend on, and whether they are checked."""
    data = plan.to_json()
    del data["source"]  # a path, for readers
    try:
        version = importlib.metadata.version("lowbit")
    except importlib.metadata.PackageNotFoundError:  # run from the source folder
        version = "uninstalled"
    known = None if statistics is None else statistics.fingerprint()
    facts = [source.fingerprint(), data, version, torch.__version__, seed, verify, known, device.type]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _report(
    target: str | Path, plan: Plan, layers: list[LayerWork], done: Rewritten, seconds: float
) -> ConversionReport:
    return ConversionReport(
        target=str(target),
        layers=tuple(_layer_reports(layers, done)),
        kept=plan.count("keep"),
        dropped=plan.count("drop"),
        resumed=done.resumed,
        bytes_before=plan.bytes_before,
        bytes_after=plan.bytes_after,
        seconds=seconds,
        folds=tuple((component.name, fold) for component in plan.components for fold in component.folds),
    )


def _layer_reports(layers: list[LayerWork], done: Rewritten) -> Iterator[LayerReport]:
    for layer in layers:
        record = record_in(done.records, layer)
        accuracy = record.get("accuracy")
        yield LayerReport(
            component=layer.component,
            layer=layer.layer,
            format=layer.plan.stored.spec,
            solver=record["solver"],
            shape=layer.plan.shape,
            seconds=record["seconds"],
            bytes_before=layer.size,
            bytes_after=layer.bytes_after,
            accuracy=None if accuracy is None else Accuracy.from_json(accuracy),
            note=record["note"],
            error=record["error"],
            rtn_error=record["rtn_error"],
            unseen_error=record.get("unseen_error"),  # a run that an earlier version began has none
            shares=record.get("shares", ""),
        )
