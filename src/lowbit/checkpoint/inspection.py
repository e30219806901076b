"""Looking into a checkpoint: which layers are stored how, what that costs, and what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, LowbitError

from .cast_weights import unknown_scales
from .dialects import StoredLayer, TensorSpec
from .layer_groups import grouped
from .quantized_source import QuantizedComponent, look_for_layers
from .safetensors_header import TensorInfo
from .source import Component, Source
from .weight_shape import plain_shape

_SMALL = 64 << 20  # bytes: scales beyond this are not read


@dataclass(frozen=True)
class LayerGroup:
    """Layers, or plain tensors, of one folded name, one format and one shape.

    `format`: the spec, or "" for plain tensors. `tensors`: role (plain: "") -> dtype and shape as stored, of the first.
    `bytes`: of all of them together. `weights`: how many numbers they stand for.
    """

    name: str
    count: int
    format: str
    shape: tuple[int, ...]
    tensors: dict[str, str]
    bytes: int
    weights: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales included, for each number."""
        return 8 * self.bytes / self.weights if self.weights else 0.0

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {**vars(self), "shape": list(self.shape), "bits_per_weight": round(self.bits_per_weight, 4)}


@dataclass(frozen=True)
class Inspection:
    """What is in a checkpoint. `dialects`: how quantized layers are written, by component ("": none)."""

    path: str
    dialects: dict[str, str]
    groups: tuple[LayerGroup, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    bytes: int

    @property
    def quantized(self) -> tuple[LayerGroup, ...]:
        """The groups of quantized layers."""
        return tuple(group for group in self.groups if group.format)

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {**vars(self), "groups": [group.to_json() for group in self.groups]}


def inspect(source: Source) -> Inspection:
    """Describe every layer of a checkpoint from its headers, markers and scales; the codes are not read.

    What is wrong with a layer is a result, not an error.
    """
    groups: list[LayerGroup] = []
    problems: list[str] = []
    notes: list[str] = []
    dialects: dict[str, str] = {}
    for component in source.components:
        try:
            held = look_for_layers(source, component, strict=False)
        except LowbitError as error:
            problems.append(str(error))
            dialects[component.name] = "unknown"
            groups += _plain_groups(component, component.tensors)
            continue
        dialects[component.name] = held.dialect.name if held.dialect is not None else ""
        problems += [problem.message for problem in held.found.problems]
        problems += [problem for stored in held.layers.values() for problem in _bad_values(held, stored)]
        notes += [*held.found.notes, *(f"{s.layer}: {note}" for s in held.layers.values() for note in s.notes)]
        notes += _bare_codes(held)
        groups += [
            *_layer_groups(held),
            *_plain_groups(component, {key: component.tensors[key] for key in _others(held)}),
        ]
    total = sum(info.nbytes for component in source.components for info in component.tensors.values())
    path = source.place
    return Inspection(str(path), dialects, tuple(groups), tuple(problems), tuple(notes), total)


def _others(held: QuantizedComponent) -> list[str]:
    owned = {key for stored in held.layers.values() for key in stored.keys.values()}
    return [key for key in held.component.tensors if key not in owned]


def _bare_codes(held: QuantizedComponent) -> Iterator[str]:
    """Notes on 8-bit floats that are stored without a marker: plain values to every reader, unless there is a scale."""
    others, scales = held.component.tensors, unknown_scales(held.found.plain, held.specs)
    bare = [key for key in _others(held) if others[key].dtype_name.startswith("F8_E") and len(others[key].shape) > 1]
    values = [key for key in bare if key not in scales]
    if values:
        yield (
            f"{_some(values)}: 8-bit floats without a scale; they are read as plain values, whatever made them "
            "(lowbit dequantize writes them in 16 bits)"
        )
    if scaled := [key for key in bare if key not in values]:
        scale = scales[scaled[0]]
        yield f"{_some(scaled)}: 8-bit floats, and how {scale!r} scales them is not known; take the 16-bit file"


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"{keys[0]!r}{more}"


def _prefixed(component: Component, name: str) -> str:
    return f"{component.name}/{name}" if component.name else name


def _layer_groups(held: QuantizedComponent) -> Iterator[LayerGroup]:
    layers = held.layers.values()
    for name, found in grouped(
        layers, lambda s: _prefixed(held.component, s.layer), lambda s: (s.format, _shape(s), s.layout)
    ):
        first = found[0]
        tensors = {role: str(held.specs[key]) for role, key in first.keys.items()}
        count = sum(held.specs[key].nbytes for stored in found for key in stored.keys.values())
        spec = f"{first.format}@{first.layout}" if first.layout else first.format.spec
        shape = _shape(first)
        yield LayerGroup(name, len(found), spec, shape, tensors, count, len(found) * math.prod(shape))


def _shape(stored: StoredLayer) -> tuple[int, ...]:
    """That of the weight; of the matrix, where the marker cannot be true (`_bad_values` tells)."""
    try:
        return plain_shape(stored)
    except CheckpointError:
        return stored.shape


def _plain_groups(component: Component, tensors: Mapping[str, TensorInfo]) -> Iterator[LayerGroup]:
    def kind(key: str) -> tuple[str, tuple[int, ...]]:
        return tensors[key].dtype_name, tensors[key].shape

    for name, keys in grouped(tensors, lambda key: _prefixed(component, key), kind):
        info = tensors[keys[0]]
        spec = f"{info.dtype_name} {list(info.shape)}"
        count = sum(tensors[key].nbytes for key in keys)
        weights = len(keys) * torch.Size(info.shape).numel()
        yield LayerGroup(name, len(keys), "", tuple(info.shape), {"": spec}, count, weights)


def _bad_values(held: QuantizedComponent, stored: StoredLayer) -> Iterator[str]:
    """What is wrong with the shape and the scales of a layer, in words."""
    try:
        plain_shape(stored)
    except CheckpointError as error:
        yield str(error)
    for role, key in stored.keys.items():
        if role in ("qdata", "marker") or held.specs[key].nbytes > _SMALL:
            continue
        if (what := _bad_number(held.read(key), held.specs[key])) is not None:
            yield f"{stored.place}: {key} holds {what}; this layer decodes to it. Convert the 16-bit file again"


def _bad_number(tensor: Tensor, spec: TensorSpec) -> str | None:
    if not spec.dtype.is_floating_point or not tensor.numel():
        return None
    numbers = tensor.float()
    return None if bool(torch.isfinite(numbers).all()) else "NaN or infinity"
