"""The same quantized layers in another dialect, or in the older spelling of ComfyUI's; codes and scales stay.

Which layers the older spelling can hold `dialects/comfy_migrate.py` says, which a dialect can, that dialect does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError, PlanError

from .banks import experts_of
from .dialects import Container, Dialect, dialects, get_dialect
from .dialects.base import Read, StoredLayer, bias_orders
from .dialects.comfy import COMFY
from .dialects.comfy_migrate import CONVENTIONS, Migration, Step, describe, migrate as migrate_file
from .folder_configs import FolderConfigs, changed_dtype, refuse_target
from .marked import Marked
from .output import Staging
from .pipeline import Progress
from .presets import GENERIC, detect_preset
from .quantized_source import QuantizedComponent, look_for_layers
from .respell import Respelled, refuse_changed
from .rewrite import Copy, Made, Piece, Settings, batch_copies, rewrite
from .source import Component, Source
from .weight_shape import lacks_lookup


@dataclass(frozen=True)
class MigrateReport:
    """What was rewritten: the layers with their formats, and what was inferred or repaired on the way, in words."""

    target: str
    layers: dict[str, str]
    notes: tuple[str, ...]
    resumed: int

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {**vars(self), "notes": list(self.notes)}


def migrate(
    source: Source,
    target: str | Path,
    to: str = "current",
    *,
    full_precision: Sequence[str] = (),
    no_full_precision: Sequence[str] = (),
    jobs: int | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> MigrateReport:
    """Write the same quantized layers in another convention.

    `to` is the name of a dialect, or "legacy" for the `scaled_fp8` files of ComfyUI; "current" means comfy.
    `full_precision`, `no_full_precision`: patterns of layers whose markers say full_precision_matrix_mult, as in
    `make_plan`, or no longer do. Other options as in `convert`.

    Raises:
        CheckpointError: nothing in the source is quantized, a layer is not sound, the new convention has no place for
            a layer, or reading or writing failed.
        PlanError: the dialect is only read, needs a model folder, or is not the one of which `to` is a spelling; a
            pattern is wrong or matches nothing.
    """
    refuse_unknown(to)
    staging = Staging(source, target)
    work = _Work(staging, to)
    marked = Marked.by(full_precision, no_full_precision, COMFY if to in CONVENTIONS else get_dialect(to))
    for component in source.components:
        held = marked.applied(look_for_layers(source, component))
        if to in CONVENTIONS and (held.dialect is None or held.dialect is COMFY):
            work.respell(component, held)
        elif to == "legacy" and held.dialect is not None:
            raise PlanError(
                f"{held.where}: is in the dialect {held.dialect.name}, and legacy is a spelling of comfy alone; "
                "migrate it to comfy first, and what that writes to legacy"
            )
        else:
            work.translate(component, held)
    if not work.layers:
        raise CheckpointError(f"{source.place}: holds no quantized layer; there is nothing to migrate")
    marked.refuse_unused(list(work.layers))
    work.notes += marked.notes
    staging.replaced = work.configs.texts()
    asked = ["migrate", to, *full_precision, "", *no_full_precision]
    fingerprint = hashlib.sha256(json.dumps([*asked, source.fingerprint()]).encode()).hexdigest()
    settings = Settings(jobs, resume, verify=True, progress=progress)
    done = rewrite(source, staging, work.pieces, work.described(), fingerprint=fingerprint, settings=settings)
    return MigrateReport(str(target), work.layers, tuple(work.notes), done.resumed)


def refuse_unknown(to: str) -> None:
    """Raise `CheckpointError` unless `to` names a convention to migrate to."""
    known = [*CONVENTIONS, *(name for name, dialect in dialects().items() if dialect.writes)]
    if to not in known:
        raise CheckpointError(f"unknown convention {to!r} to migrate to; known are {', '.join(known)}")


class _Work:
    """What there is to do for all models of a source."""

    def __init__(self, staging: Staging, to: str) -> None:
        self._staging, self._to = staging, to
        self._metadata = staging.metadata()
        self._stored: dict[str, list[StoredLayer]] = {file: [] for file in self._metadata}
        self._respelled = False
        self.pieces: list[Piece | Copy] = []
        self.layers: dict[str, str] = {}
        self.notes: list[str] = []
        self.configs = FolderConfigs()

    def respell(self, component: Component, held: QuantizedComponent) -> None:
        """Add a ComfyUI model in another spelling of the same dialect."""
        self._respelled = True
        migration = migrate_file(held.found, held.specs, held.metadata, self._to, held.where)
        self.pieces += _pieces(held, migration, self._staging)
        self.pieces += batch_copies(component, held.found.plain, partial(self._staging.file_of, component))
        for name, layer in held.layers.items():
            self._add(held, name, layer, layer)
        self.notes += migration.notes

    def translate(self, component: Component, held: QuantizedComponent) -> None:
        """Add a model in another dialect."""
        dialect = get_dialect("comfy" if self._to == "current" else self._to)
        if held.layers:
            refuse_target(held, dialect, single=self._staging.single)
        plans = [Respelled.plan(held, layer, dialect) for layer in held.layers.values()]
        for plan in plans:
            size = sum(held.specs[key].nbytes for key in plan.old.keys.values())
            file = self._add(held, plan.old.layer, plan.old, plan.new)
            self.pieces.append(Piece(held.full_name(plan.old.layer), file, plan.specs, size, plan.memory, plan))
        self.pieces += batch_copies(component, held.found.plain, partial(self._staging.file_of, component))
        self.notes += [*held.found.notes, *(f"{plan.old.layer}: {note}" for plan in plans for note in plan.old.notes)]
        self.notes += [plan.note for plan in plans if plan.note]
        self.notes += dict.fromkeys(note for plan in plans if (note := changed_dtype(dialect, plan.new)))
        self.notes += _tables(held, dialect)
        plain = {key: held.specs[key] for key in held.found.plain}
        self._staging.reorder(component, bias_orders(dialect, [plan.new for plan in plans]))
        for file in {self._staging.file_of(component, key) for key in held.specs}:
            held.strip_description(self._metadata[file])
            if self._stored[file]:
                self._metadata[file].update(dialect.header_metadata(self._stored[file], plain))
        self.configs.strip(held)
        if plans:
            self.configs.describe(held, dialect, [plan.new for plan in plans], plain)

    def _add(self, held: QuantizedComponent, name: str, old: StoredLayer, new: StoredLayer) -> str:
        file = self._staging.file_of(held.component, old.keys["qdata"])
        self._stored[file].append(new)
        self.layers[held.full_name(name)] = new.format.spec
        return file

    def described(self) -> dict[str, dict[str, str]]:
        """The header metadata of every output file."""
        if not self._respelled:
            return self._metadata
        return {file: describe(entries, self._stored[file], self._to) for file, entries in self._metadata.items()}


def _tables(held: QuantizedComponent, dialect: Dialect) -> list[str]:
    """What to know of the quantized tables of embeddings in a dialect whose other readers look plain ones up."""
    why = lacks_lookup(dialect)
    keys = list(held.component.tensors)
    names = (detect_preset(keys) or GENERIC).bind(keys)
    found = [layer for layer in held.layers if names.is_embedding(layer)]
    return [f"{held.full_name(layer)}: is a quantized {why}" for layer in found] if why else []


def _pieces(held: QuantizedComponent, migration: Migration, staging: Staging) -> Iterator[Piece]:
    """One piece a layer, and one for what describes the whole: it stands with the first layer."""
    first = next((layer.keys["qdata"] for layer in held.layers.values()), "")
    for step in migration.steps:
        if step.passes_on:
            continue
        key, name, size = first, next(iter(step.specs)), 0
        if step.layer is not None:
            key, name = step.layer.keys["qdata"], step.layer.layer
            size = sum(held.specs[key].nbytes for key in step.layer.keys.values())
        file = staging.file_of(held.component, key)
        if step.layer is not None and experts_of(step.layer):  # expert by expert
            plan = Respelled.plan(held, step.layer, COMFY)
            yield Piece(held.full_name(name), file, plan.specs, size, plan.memory, plan)
        else:
            yield Piece(held.full_name(name), file, step.specs, size, 6 * size, _OtherSpelling(held, step))


@dataclass(frozen=True)
class _OtherSpelling:
    """Makes one layer in its new spelling, and checks that its parts come back with the same bits."""

    held: QuantizedComponent
    step: Step

    def __call__(self) -> Made:
        check = None if self.step.layer is None else partial(self._check, self.step.layer)
        return Made(self.step.make(self.held.read), check=check)

    def _check(self, layer: StoredLayer, read: Read) -> dict[str, Any]:
        again = COMFY.find_layers(Container(self.step.specs, where=layer.where), read).layers[layer.layer]
        refuse_changed(layer, self.held.load(layer), COMFY.load_parts(again, read))
        return {}
