"""The JSON that describes a layer in a comfy file: the marker tensor `<layer>.comfy_quant` and the header's entry.

Both hold the same object, `{"format": "float8_e4m3fn", ...}`: the marker as the UTF-8 bytes of a 1-D uint8 tensor, the
header metadata under `_quantization_metadata` as the string `{"format_version": "1.0", "layers": {"<layer>": {...}}}`.
Where both exist, ComfyUI lets the header's entry win; here its fields win, and fields that only the marker has stay
(convert_to_quant leaves some out of the header).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.dialects.base import (
    FoundLayers,
    Problem,
    Read,
    StoredLayer,
    TensorSpec,
    join_key,
    layer_of,
    name_place,
)
from lowbit.checkpoint.strict_json import parse_object
from lowbit.errors import CheckpointError, LowbitError, PartsError

MARKER = "comfy_quant"
HEADER = "_quantization_metadata"
_DTYPES = {str(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}


@dataclass
class Description:
    """What a file says about one layer: its JSON fields, and the tensors beside its weight."""

    layer: str
    fields: dict[str, Any]
    where: str
    marker: str | None = None
    """The key of the marker tensor, when there is one."""
    legacy: bool = False
    """From a `scaled_fp8` file."""
    hybrid: bool = False
    """Marked hybrid_mxfp8."""
    notes: list[str] = field(default_factory=list)
    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    """Part name -> what the file's header says of it (filled when the format is known)."""

    def note(self, text: str) -> None:
        """Record that something was inferred or repaired."""
        self.notes.append(text)

    def error(self, message: str) -> PartsError:
        """The error to raise about this layer's tensors."""
        return PartsError(f"{name_place(self.where, self.layer)}: {message}")

    def tensor(self, part: str) -> TensorSpec:
        """The spec of a part; `PartsError` when the file lacks it."""
        if part not in self.tensors:
            raise self.error(f"{part} is missing; the file is incomplete, get or convert it again")
        return self.tensors[part]

    def integer(self, name: str, default: int | None = None) -> int | None:
        """A positive integer field, or the default when it is absent or null."""
        value = self.fields.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(f"{name} is {value!r} in the marker, expected a positive whole number")
        return value

    def flag(self, name: str) -> bool | None:
        """A true/false field (0 and 1 count), or None when it is absent or null."""
        value = self.fields.get(name)
        if value is not None and value not in (0, 1):
            raise self.error(f"{name} is {value!r} in the marker, expected true or false")
        return None if value is None else bool(value)

    def dtype(self) -> torch.dtype | None:
        """`orig_dtype`, or None when it is absent."""
        value = self.fields.get("orig_dtype")
        if value is None:
            return None
        name = f"torch.{str(value).removeprefix('torch.')}"
        if name not in _DTYPES:
            raise self.error(f"orig_dtype is {value!r} in the marker, expected one of {', '.join(sorted(_DTYPES))}")
        return _DTYPES[name]

    def shape(self) -> tuple[int, int] | None:
        """`orig_shape`, or None when it is absent."""
        value = self.fields.get("orig_shape")
        if value is None:
            return None
        whole = isinstance(value, list) and all(
            isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value
        )
        if not whole or len(value) != 2:
            raise self.error(f"orig_shape is {value!r} in the marker, expected [rows, columns]")
        return value[0], value[1]


def read_descriptions(
    tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str], read: Read, where: str, found: FoundLayers
) -> dict[str, Description]:
    """The description of every layer that a marker or the header names, in the file's order.

    A layer whose marker cannot be read is left out and becomes a problem in `found`.
    """
    descriptions: dict[str, Description] = {}
    for key, spec in tensors.items():
        if key == MARKER or key.endswith(f".{MARKER}"):
            layer = key.removesuffix(MARKER).removesuffix(".")
            try:
                fields = _flat(read_marker(spec, read, key, where), name_place(where, layer))
                descriptions[layer] = Description(layer, fields, where, marker=key)
            except LowbitError as error:
                found.problems.append(Problem(layer, error))
    try:
        entries = _header_entries(metadata, where, found)
    except LowbitError as error:
        found.problems.append(Problem("", error))
        return descriptions
    for layer, entry in entries.items():
        try:
            fields = _flat(entry, f"{name_place(where, layer)} in the header")
        except LowbitError as error:
            found.problems.append(Problem(layer, error))
            continue
        if layer in descriptions:
            _merge(descriptions[layer], fields)
        else:
            descriptions[layer] = Description(layer, fields, where)
    return descriptions


def read_marker(spec: TensorSpec, read: Read, key: str, where: str) -> dict[str, Any]:
    """The JSON object in a marker tensor. Raises `CheckpointError`."""
    place = name_place(where, key.removesuffix(MARKER).removesuffix("."))
    if spec.dtype != torch.uint8 or len(spec.shape) != 1:
        raise CheckpointError(
            f"{place}: the marker {key!r} is {spec}, expected a 1-D uint8 tensor of JSON bytes; a program has cast or "
            "reshaped it (a marker must never follow the model's dtype). Get the original file, or convert again"
        )
    try:
        return parse_object(read(key).cpu().numpy().tobytes())
    except ValueError as error:
        raise CheckpointError(f"{place}: the marker {key!r} cannot be read: {error}; convert the file again") from None


def marker_tensor(fields: Mapping[str, Any]) -> Tensor:
    """The marker tensor of a JSON object: 1-D uint8, the separators that ComfyUI writes."""
    return torch.frombuffer(bytearray(json.dumps(fields).encode()), dtype=torch.uint8)


def header_entry(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The header metadata of the given JSON objects by layer."""
    return {HEADER: json.dumps({"format_version": "1.0", "layers": {name: dict(f) for name, f in layers.items()}})}


def stored_layer(description: Description, **known: Any) -> StoredLayer:
    """A `StoredLayer` with what the description already knows."""
    return StoredLayer(description.layer, notes=description.notes, where=description.where, **known)


def require_weight(description: Description, tensors: Mapping[str, TensorSpec]) -> TensorSpec:
    """The spec of the described layer's weight. Raises `CheckpointError` when there is none."""
    layer, key = description.layer, join_key(description.layer, "weight")
    if key in tensors:
        return tensors[key]
    longer = [name for other in tensors if (name := layer_of(other)) and layer and name.endswith(f".{layer}")]
    hint = f"; there is a layer {longer[0]!r}: the description must carry the full key prefix" if longer else ""
    source = f"the marker {description.marker!r}" if description.marker else f"the header's {HEADER}"
    raise CheckpointError(
        f"{name_place(description.where, layer)}: {source} describes a layer, but there is no tensor {key!r}{hint}. "
        "Get the complete file, or remove the description"
    )


def _flat(fields: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Fields nested under "params" (some writers do that) lifted to the top level, where a field of that name wins."""
    nested = fields.get("params")
    if nested is not None and not isinstance(nested, dict):
        raise CheckpointError(f'{place}: "params" is {nested!r}, expected a JSON object; convert the file again')
    return {**(nested or {}), **{name: value for name, value in fields.items() if name != "params"}}


def _header_entries(metadata: Mapping[str, str], where: str, found: FoundLayers) -> dict[str, dict[str, Any]]:
    """Layer -> fields from the header; empty without one. Raises `CheckpointError` when it cannot be read."""
    text = metadata.get(HEADER)
    if text is None:
        return {}
    try:
        layers = parse_object(text.encode("utf-8", "surrogatepass")).get("layers")
    except ValueError as error:
        raise CheckpointError(
            f"{where}: the header's {HEADER} cannot be read: {error}; convert the file again"
        ) from None
    if layers is None:
        found.notes.append(f'the header\'s {HEADER} has no "layers": only marker tensors count')
        return {}
    if not isinstance(layers, dict) or not all(isinstance(entry, dict) for entry in layers.values()):
        raise CheckpointError(
            f'{where}: "layers" in the header\'s {HEADER} is not an object of objects, one a layer; '
            "convert the file again"
        )
    return layers


def _merge(description: Description, header: Mapping[str, Any]) -> None:
    """Let the header's fields win over the marker's, and say where they differ."""
    mine = description.fields
    if "format" in header and "format" in mine and header["format"] != mine["format"]:
        description.note(f"the header says {header['format']!r}, the marker {mine['format']!r}: the header counts")
        description.fields = dict(header)
        return
    for name in sorted(set(header) & set(mine)):
        if header[name] != mine[name]:
            description.note(
                f"{name} is {header[name]!r} in the header, {mine[name]!r} in the marker: the header counts"
            )
    description.fields = {**mine, **header}
