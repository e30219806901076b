"""Comfy files between their conventions, codes untouched: from any that is read to the current one or to `scaled_fp8`.

`migrate` looks at the header only and says what the new file will hold; `Migration.tensors` then gives it, a layer at a
time, in the order of the specs, so a writer can fix all offsets first and stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.checkpoint.dialects.base import FoundLayers, Read, StoredLayer, TensorSpec, join_key
from lowbit.checkpoint.dialects.comfy import COMFY
from lowbit.checkpoint.dialects.comfy_legacy import FILE_MARKER, FILE_PREFIXES, SCALE_INPUT, SCALE_WEIGHT
from lowbit.checkpoint.dialects.comfy_marker import HEADER
from lowbit.errors import CheckpointError

TARGETS = ("current", "legacy")
_LEGACY_FORMATS = ("fp8_e4m3", "fp8_e5m2")


@dataclass
class Migration:
    """The new file: what it will hold, its header metadata, what was repaired on the way, and the data on demand."""

    specs: dict[str, TensorSpec] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    steps: list[Callable[[Read], dict[str, Tensor]]] = field(default_factory=list)
    """Each gives the next keys of `specs` and their tensors."""

    def tensors(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        """Every key and tensor, in the order of `specs`; `read` gives the tensors of the old file."""
        for step in self.steps:
            yield from step(read).items()

    def add(self, specs: Mapping[str, TensorSpec], step: Callable[[Read], dict[str, Tensor]], where: str) -> None:
        """Append tensors. Raises `CheckpointError` for a key that is there already."""
        if twice := sorted(set(specs) & set(self.specs)):
            raise CheckpointError(f"{where}: two tensors would be named {twice[0]!r}; rename one of them in the source")
        self.specs.update(specs)
        self.steps.append(step)


def migrate(
    tensors: Mapping[str, TensorSpec],
    metadata: Mapping[str, str],
    read: Read,
    to: str = "current",
    *,
    where: str = "the file",
    infer_act_unsigned: bool = True,
) -> Migration:
    """Plan the same weights in another convention: "current" (markers and header) or "legacy" (`scaled_fp8`).

    Codes and scales keep their bits; only keys, descriptions and the arrangement change. Tensors that belong to no
    quantized layer are passed on. `read` is called for small tensors only. Raises what `find_layers` raises, and
    `CheckpointError` for a layer that the legacy convention cannot hold, and for a file without quantized layers.
    """
    if to not in TARGETS:
        raise CheckpointError(f"unknown convention {to!r} to migrate to; known are {', '.join(TARGETS)}")
    found = COMFY.find_layers(tensors, metadata, read, where, infer_act_unsigned=infer_act_unsigned)
    if not found.layers:
        raise CheckpointError(f"{where}: holds no quantized layer; there is nothing to migrate")
    migration = Migration(
        metadata={name: text for name, text in metadata.items() if name != HEADER}, notes=list(found.notes)
    )
    for layer in found.layers.values():
        migration.notes += [f"{layer.layer}: {note}" for note in layer.notes]
    if to == "current":
        migration.metadata |= COMFY.header_metadata(found.layers.values())
        _walk(migration, found, tensors, where, _current)
    else:
        prefix, full_precision, dtype = _legacy_file(found, where)
        _walk(migration, found, tensors, where, _legacy)
        marker = torch.zeros(2 if full_precision else 0, dtype=dtype)
        key = prefix + FILE_MARKER
        migration.add({key: TensorSpec.of(marker)}, lambda _read: {key: marker}, where)
    return migration


Rewrite = Callable[[StoredLayer], tuple[dict[str, TensorSpec], Callable[[Read], dict[str, Tensor]]]]


def _walk(
    migration: Migration, found: FoundLayers, tensors: Mapping[str, TensorSpec], where: str, rewrite: Rewrite
) -> None:
    """Add everything in the order of the old file, a layer where its first tensor stood."""
    owner = {key: layer for layer in found.layers.values() for key in layer.keys.values()}
    plain, done = set(found.plain), set()
    for key, spec in tensors.items():
        if key in plain:
            migration.add({key: spec}, lambda read, key=key: {key: read(key)}, where)  # type: ignore[misc]
        elif key in owner and (layer := owner[key]).layer not in done:
            done.add(layer.layer)
            migration.add(*rewrite(layer), where)


def _current(layer: StoredLayer) -> tuple[dict[str, TensorSpec], Callable[[Read], dict[str, Tensor]]]:
    """A layer under its current keys, with its marker."""
    name, fmt, shape, dtype, options, layout = (
        layer.layer, layer.format, layer.shape, layer.dtype, layer.options, layer.layout
    )  # fmt: skip

    def step(read: Read) -> dict[str, Tensor]:
        return COMFY.store_parts(name, fmt, COMFY.load_parts(layer, read), shape, dtype, options, layout)

    return COMFY.stored_specs(name, fmt, shape, dtype, options, layout, layer.dtypes), step


def _legacy(layer: StoredLayer) -> tuple[dict[str, TensorSpec], Callable[[Read], dict[str, Tensor]]]:
    """A layer with the keys of a `scaled_fp8` file; `_legacy_file` has seen that it fits."""
    names = {"qdata": "weight", "scale": SCALE_WEIGHT, "input_scale": SCALE_INPUT}
    keys = {part: join_key(layer.layer, names[part]) for part in layer.format.part_names}

    def step(read: Read) -> dict[str, Tensor]:
        parts = COMFY.load_parts(layer, read)
        return {key: parts[part] for part, key in keys.items()}

    shapes, dtypes = layer.format.part_shapes(*layer.shape), layer.format.part_dtypes(layer.dtype)
    return {key: TensorSpec(dtypes[part], shapes[part]) for part, key in keys.items()}, step


def _legacy_file(found: FoundLayers, where: str) -> tuple[str, bool, torch.dtype]:
    """The marker's prefix, whether products are in full precision, and the codes' dtype: one each for all layers."""
    for layer in found.layers.values():
        if layer.format.name not in _LEGACY_FORMATS or layer.format.config()["granularity"] != "tensor":
            raise CheckpointError(
                f"{layer.place}: is {layer.format}, and a scaled_fp8 file holds only fp8 with one scale a weight; "
                "convert the original to fp8_e4m3 instead"
            )
        if layer.format.pre_quant_scale:
            raise CheckpointError(f"{layer.place}: has a pre_quant_scale, for which a scaled_fp8 file has no place")
    layers = list(found.layers.values())
    formats = sorted({layer.format.name for layer in layers})
    modes = {bool(layer.options.get("full_precision_matrix_mult")) for layer in layers}
    prefixes = {next((p for p in FILE_PREFIXES if f"{layer.layer}.".startswith(p)), "") for layer in layers}
    for what, values in (("format", formats), ("full_precision_matrix_mult", modes), ("key prefix", prefixes)):
        if len(values) > 1:
            raise CheckpointError(
                f"{where}: its layers differ in {what} ({', '.join(sorted(map(repr, values)))}), which a scaled_fp8 "
                "file states "
                "once for all; keep the current convention"
            )
    dtype = torch.float8_e4m3fn if formats == ["fp8_e4m3"] else torch.float8_e5m2
    return prefixes.pop(), modes.pop(), dtype
