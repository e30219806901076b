"""Old and current spellings of quantized layers in ComfyUI files, exactly, in both directions; no code changes.

- current: `<layer>.comfy_quant` markers, the header's description, canonical keys.
- legacy: a tensor `scaled_fp8` marks the file; `<layer>.scale_weight` and `<layer>.scale_input` are the scales. It can
  only say float8 with one scale a weight, one float8 dtype in a file, and full-precision products for all or none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats.parts import raw_bytes

from .dialects import StoredLayer, TensorSpec, get_dialect
from .dialects.base import Read, join_key
from .output import Staging
from .pipeline import Progress
from .quantized_source import QuantizedComponent, look_for_layers
from .rewrite import Copy, Made, Piece, Settings, batch_copies, rewrite
from .source import Source

DIALECT = "comfy"
STYLES = ("current", "legacy")
_MARKER = "scaled_fp8"
_PREFIX = "model.diffusion_model."
_LEGACY_KEYS = {"qdata": "weight", "scale": "scale_weight", "input_scale": "scale_input"}
_FULL_PRECISION = "full_precision_matrix_mult"


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
    style: str = "current",
    *,
    jobs: int | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> MigrateReport:
    """Write the same quantized layers in another spelling: `style` is "current" or "legacy".

    Other options as in `convert`.

    Raises:
        CheckpointError: nothing in the source is quantized, a layer is not sound, or writing failed.
        UnsupportedError: the legacy spelling cannot say what a layer is.
    """
    if style not in STYLES:
        raise CheckpointError(f"unknown style {style!r}; it is one of {', '.join(STYLES)}")
    staging = Staging(source, target)
    metadata = staging.metadata()
    pieces: list[Piece | Copy] = []
    layers: dict[str, str] = {}
    notes: list[str] = []
    for component in source.components:
        held = look_for_layers(source, component)
        pieces += _current(held, staging, metadata) if style == "current" else _legacy(held, staging, metadata)
        pieces += batch_copies(component, held.found.plain, partial(staging.file_of, component))
        layers |= {held.full_name(name): stored.format.spec for name, stored in held.layers.items()}
        notes += [*held.found.notes, *(f"{s.layer}: {note}" for s in held.layers.values() for note in s.notes)]
    if not layers:
        raise CheckpointError(f"{source.root}: holds no quantized layer; there is nothing to migrate")
    fingerprint = hashlib.sha256(json.dumps(["migrate", style, source.fingerprint()]).encode()).hexdigest()
    settings = Settings(jobs, resume, verify=True, progress=progress)
    done = rewrite(source, staging, pieces, metadata, fingerprint=fingerprint, settings=settings)
    return MigrateReport(str(target), layers, tuple(notes), done.resumed)


Metadata = dict[str, dict[str, str]]


def _current(held: QuantizedComponent, staging: Staging, metadata: Metadata) -> list[Piece | Copy]:
    """One piece a layer in the dialect's canonical spelling; the description goes into the header."""
    dialect = get_dialect(DIALECT)
    pieces: list[Piece | Copy] = []
    described: dict[str, list[StoredLayer]] = {}
    for layer, stored in held.layers.items():
        file = staging.file_of(held.component, stored.keys["qdata"])
        described.setdefault(file, []).append(stored)
        specs = dialect.stored_specs(
            layer, stored.format, stored.shape, stored.dtype, stored.options, stored.layout, stored.dtypes
        )
        pieces.append(_piece(held, stored, file, specs, _Respell(held, stored, specs)))
    for file, entries in metadata.items():
        held.strip_description(entries)
        if file in described:
            entries.update(dialect.header_metadata(described[file]))
    return pieces


def _legacy(held: QuantizedComponent, staging: Staging, metadata: Metadata) -> list[Piece | Copy]:
    """One piece a layer in the legacy spelling, and one for the marker of the file."""
    pieces: list[Piece | Copy] = []
    full, dtypes = set(), set()
    for stored in held.layers.values():
        _refuse_legacy(stored)
        full.add(bool(stored.options.get(_FULL_PRECISION)))
        dtypes.add(held.specs[stored.keys["qdata"]].dtype)
        keys = {part: join_key(stored.layer, _LEGACY_KEYS[part]) for part in stored.format.part_names}
        specs = {
            key: TensorSpec(stored.format.part_dtypes(stored.dtype)[part], _shape(stored, part))
            for part, key in keys.items()
        }
        file = staging.file_of(held.component, stored.keys["qdata"])
        pieces.append(_piece(held, stored, file, specs, _RespellLegacy(held, stored, keys)))
    if len(full) > 1 or len(dtypes) > 1:
        what = "full-precision products for some layers only" if len(full) > 1 else "both float8 dtypes"
        raise UnsupportedError(
            f"{held.source.root}: has {what}, which a legacy file cannot say; keep the current spelling"
        )
    if pieces:
        prefix = _PREFIX if all(layer.startswith(_PREFIX) for layer in held.layers) else ""
        marker = torch.zeros(2 if full.pop() else 0).to(dtypes.pop())
        specs = {prefix + _MARKER: TensorSpec.of(marker)}
        pieces.append(Piece("marker", pieces[0].file, specs, 0, 0, _Constant({prefix + _MARKER: marker})))
    for entries in metadata.values():
        held.strip_description(entries)
    return pieces


def _shape(stored: StoredLayer, part: str) -> tuple[int, ...]:
    return stored.format.part_shapes(*stored.shape)[part]


def _refuse_legacy(stored: StoredLayer) -> None:
    fmt = stored.format
    plain = fmt.name in ("fp8_e4m3", "fp8_e5m2") and fmt.config()["granularity"] == "tensor" and not fmt.pre_quant_scale
    if not plain:
        raise UnsupportedError(
            f"{stored.place}: is {fmt}; a legacy file holds only float8 with one scale a weight. Keep it as it is"
        )
    extra = sorted(set(stored.options) - {_FULL_PRECISION})
    if extra:
        raise UnsupportedError(
            f"{stored.place}: its marker says {', '.join(extra)}, which a legacy file cannot; keep it as it is"
        )


def _piece(held: QuantizedComponent, stored: StoredLayer, file: str, specs: dict[str, TensorSpec], make: Any) -> Piece:
    size = sum(held.specs[key].nbytes for key in stored.keys.values())
    return Piece(held.full_name(stored.layer), file, specs, size, 6 * size, make)


@dataclass(frozen=True)
class _Constant:
    """Makes tensors that are there already."""

    tensors: Mapping[str, Tensor]

    def __call__(self) -> Made:
        return Made(dict(self.tensors))


@dataclass(frozen=True)
class _Respell:
    """Makes one layer in the dialect's own spelling, and checks that its parts come back with the same bits."""

    held: QuantizedComponent
    stored: StoredLayer
    specs: dict[str, TensorSpec] = field(default_factory=dict)

    def __call__(self) -> Made:
        s, dialect = self.stored, get_dialect(DIALECT)
        parts = self.held.load(s)
        tensors = dialect.store_parts(s.layer, s.format, parts, s.shape, s.dtype, s.options, s.layout)
        return Made(tensors, check=lambda read: self._check(parts, read))

    def _check(self, parts: Mapping[str, Tensor], read: Read) -> dict[str, Any]:
        dialect = get_dialect(DIALECT)
        again = dialect.find_layers(self.specs, {}, read, self.stored.place).layers[self.stored.layer]
        loaded = dialect.load_parts(again, read)
        for name, part in parts.items():
            if again.format != self.stored.format or not torch.equal(raw_bytes(loaded[name]), raw_bytes(part)):
                raise CheckpointError(f"{self.stored.place}: {name} changed when it was written again; report this")
        return {}


@dataclass(frozen=True)
class _RespellLegacy:
    """Makes one layer in the legacy spelling."""

    held: QuantizedComponent
    stored: StoredLayer
    keys: dict[str, str]

    def __call__(self) -> Made:
        parts = self.held.load(self.stored)
        return Made({key: parts[part] for part, key in self.keys.items()})
