"""Old and current conventions of quantized ComfyUI files, streamed from file to file; no code changes.

What the conventions are, and which layers they can hold, `dialects/comfy_migrate.py` says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowbit.errors import CheckpointError
from lowbit.formats.parts import raw_bytes

from .dialects.base import Read, StoredLayer
from .dialects.comfy import COMFY
from .dialects.comfy_migrate import Migration, Step, describe, migrate as migrate_file
from .output import Staging
from .pipeline import Progress
from .quantized_source import QuantizedComponent, look_for_layers
from .rewrite import Copy, Made, Piece, Settings, batch_copies, rewrite
from .source import Component, Source


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
    jobs: int | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> MigrateReport:
    """Write the same quantized layers in another convention: `to` is "current" or "legacy".

    Other options as in `convert`.

    Raises:
        CheckpointError: nothing in the source is quantized, a layer is not sound, the legacy convention cannot say what
            a layer is, or reading or writing failed.
    """
    staging = Staging(source, target)
    metadata = staging.metadata()
    stored: dict[str, list[StoredLayer]] = {file: [] for file in metadata}
    pieces: list[Piece | Copy] = []
    layers: dict[str, str] = {}
    notes: list[str] = []
    for component in source.components:
        held = _look(source, component)
        migration = migrate_file(held.found, held.specs, held.metadata, to, held.where)
        pieces += _pieces(held, migration, staging)
        pieces += batch_copies(component, held.found.plain, partial(staging.file_of, component))
        for name, layer in held.layers.items():
            stored[staging.file_of(component, layer.keys["qdata"])].append(layer)
            layers[held.full_name(name)] = layer.format.spec
        notes += migration.notes
    if not layers:
        raise CheckpointError(f"{source.place}: holds no quantized layer; there is nothing to migrate")
    metadata = {file: describe(entries, stored[file], to) for file, entries in metadata.items()}
    fingerprint = hashlib.sha256(json.dumps(["migrate", to, source.fingerprint()]).encode()).hexdigest()
    settings = Settings(jobs, resume, verify=True, progress=progress)
    done = rewrite(source, staging, pieces, metadata, fingerprint=fingerprint, settings=settings)
    return MigrateReport(str(target), layers, tuple(notes), done.resumed)


def _look(source: Source, component: Component) -> QuantizedComponent:
    held = look_for_layers(source, component)
    if held.dialect not in (None, COMFY):
        raise CheckpointError(f"{held.where}: is not a ComfyUI file, so it has no other convention; keep it as it is")
    return held


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
        yield Piece(held.full_name(name), file, step.specs, size, 6 * size, _Respelled(held, step))


@dataclass(frozen=True)
class _Respelled:
    """Makes one layer in its new spelling, and checks that its parts come back with the same bits."""

    held: QuantizedComponent
    step: Step

    def __call__(self) -> Made:
        check = None if self.step.layer is None else partial(self._check, self.step.layer)
        return Made(self.step.make(self.held.read), check=check)

    def _check(self, layer: StoredLayer, read: Read) -> dict[str, Any]:
        again = COMFY.find_layers(self.step.specs, {}, read, layer.place).layers[layer.layer]
        parts, back = self.held.load(layer), COMFY.load_parts(again, read)
        for name, part in parts.items():
            if name not in back or not torch.equal(raw_bytes(back[name]), raw_bytes(part)):
                raise CheckpointError(
                    f"{layer.place}: its {name} does not come back from the new spelling; keep the file as it is"
                )
        return {}
