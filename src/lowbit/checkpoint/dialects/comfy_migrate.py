"""Comfy files between their conventions, codes untouched: from any that is read to the current one or to `scaled_fp8`.

`migrate` looks at the header only and says what the new file will hold, a step a layer, so a writer can fix all offsets
first and then stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lowbit.checkpoint.dialects.base import FoundLayers, Read, StoredLayer, TensorSpec, join_key
from lowbit.checkpoint.dialects.comfy import COMFY
from lowbit.checkpoint.dialects.comfy_legacy import FILE_MARKER, FILE_PREFIXES, SCALE_INPUT, SCALE_WEIGHT
from lowbit.checkpoint.dialects.comfy_marker import HEADER
from lowbit.errors import CheckpointError

CONVENTIONS = ("current", "legacy")
_FULL_PRECISION = "full_precision_matrix_mult"
_LEGACY_FORMATS = ("fp8_e4m3", "fp8_e5m2")


@dataclass(frozen=True)
class Step:
    """One layer of the new file, one tensor that is passed on, or the marker of the file: specs, and what makes it."""

    specs: dict[str, TensorSpec]
    make: Callable[[Read], dict[str, Tensor]]
    layer: StoredLayer | None = None
    passes_on: bool = False


@dataclass
class Migration:
    """The new file: its steps in the order of the old one, its header metadata, and what was repaired on the way."""

    steps: list[Step] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """What the new file will hold, in its order."""
        return {key: spec for step in self.steps for key, spec in step.specs.items()}

    def tensors(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        """Every key and tensor, in the order of `specs`, a step at a time; `read` gives the old file's tensors."""
        for step in self.steps:
            yield from step.make(read).items()


def migrate(
    found: FoundLayers, tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str], to: str, where: str
) -> Migration:
    """Plan the same weights in another convention: "current" (markers and header) or "legacy" (`scaled_fp8`).

    `found`: what `find_layers` found in the old file, whose header says `tensors` and `metadata`. Codes and scales keep
    their bits; only keys, descriptions and the arrangement change. Tensors that belong to no quantized layer are passed
    on. Raises `CheckpointError` for a layer that the legacy convention cannot hold.
    """
    if to not in CONVENTIONS:
        raise CheckpointError(f"unknown convention {to!r} to migrate to; known are {', '.join(CONVENTIONS)}")
    notes = [*found.notes, *(f"{layer.layer}: {note}" for layer in found.layers.values() for note in layer.notes)]
    migration = Migration(metadata=describe(metadata, found.layers.values(), to), notes=notes)
    if to == "legacy" and found.layers:
        prefix, full_precision, dtype = _legacy_file(found, where)
        marker = {prefix + FILE_MARKER: torch.zeros(2 if full_precision else 0, dtype=dtype)}
        migration.steps.append(Step({key: TensorSpec.of(tensor) for key, tensor in marker.items()}, lambda _: marker))
    migration.steps[:0] = _steps(found, tensors, _current if to == "current" else _legacy)
    return migration


def describe(metadata: Mapping[str, str], layers: Iterable[StoredLayer], to: str) -> dict[str, str]:
    """A file's header metadata with what the convention says there about these layers in place of what it said."""
    kept = {name: text for name, text in metadata.items() if name != HEADER}
    layers = list(layers)
    return {**kept, **COMFY.header_metadata(layers, {})} if layers and to == "current" else kept


def _steps(
    found: FoundLayers, tensors: Mapping[str, TensorSpec], rewrite: Callable[[StoredLayer], Step]
) -> Iterator[Step]:
    """A step for everything, in the order of the old file; a layer stands where its first tensor stood."""
    owner = {key: layer for layer in found.layers.values() for key in layer.keys.values()}
    plain, done = set(found.plain), set()
    for key, spec in tensors.items():
        if key in plain:
            yield Step({key: spec}, partial(_pass_on, key), passes_on=True)
        elif key in owner and owner[key].layer not in done:
            done.add(owner[key].layer)
            yield rewrite(owner[key])


def _pass_on(key: str, read: Read) -> dict[str, Tensor]:
    return {key: read(key)}


def _current(layer: StoredLayer) -> Step:
    """A layer under its current keys, with its marker."""

    def make(read: Read) -> dict[str, Tensor]:
        return COMFY.store_parts(layer, COMFY.load_parts(layer, read))

    return Step(COMFY.stored_specs(layer), make, layer)


def _legacy(layer: StoredLayer) -> Step:
    """A layer with the keys of a `scaled_fp8` file; `_legacy_file` has seen that it fits."""
    names = {"qdata": "weight", "scale": SCALE_WEIGHT, "input_scale": SCALE_INPUT}
    keys = {part: join_key(layer.layer, names[part]) for part in layer.format.part_names}

    def make(read: Read) -> dict[str, Tensor]:
        parts = COMFY.load_parts(layer, read)
        return {key: parts[part] for part, key in keys.items()}

    shapes, dtypes = layer.format.part_shapes(*layer.shape), layer.format.part_dtypes(layer.dtype)
    return Step({key: TensorSpec(dtypes[part], shapes[part]) for part, key in keys.items()}, make, layer)


def _legacy_file(found: FoundLayers, where: str) -> tuple[str, bool, torch.dtype]:
    """The marker's prefix, whether products are in full precision, and the codes' dtype: one each for all layers."""
    for layer in found.layers.values():
        if layer.format.name not in _LEGACY_FORMATS or layer.format.config()["granularity"] != "tensor":
            raise CheckpointError(
                f"{layer.place}: is {layer.format}, and a scaled_fp8 file holds only fp8 with one scale a weight; "
                "keep it as it is"
            )
        if layer.format.pre_quant_scale:
            raise CheckpointError(f"{layer.place}: has a pre_quant_scale, for which a scaled_fp8 file has no place")
        if extra := sorted(set(layer.options) - {_FULL_PRECISION}):
            raise CheckpointError(
                f"{layer.place}: its marker says {', '.join(extra)}, for which a scaled_fp8 file has no place; "
                "keep the current convention"
            )
    layers = list(found.layers.values())
    formats = sorted({layer.format.name for layer in layers})
    modes = {bool(layer.options.get(_FULL_PRECISION)) for layer in layers}
    prefixes = {next((p for p in FILE_PREFIXES if f"{layer.layer}.".startswith(p)), "") for layer in layers}
    for what, values in (("format", formats), (_FULL_PRECISION, modes), ("key prefix", prefixes)):
        if len(values) > 1:
            raise CheckpointError(
                f"{where}: its layers differ in {what} ({', '.join(sorted(map(repr, values)))}), which a scaled_fp8 "
                "file states once for all; keep the current convention"
            )
    dtype = torch.float8_e4m3fn if formats == ["fp8_e4m3"] else torch.float8_e5m2
    return prefixes.pop(), modes.pop(), dtype
