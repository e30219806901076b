"""The quantized layers that a source holds already, in one model, and their weights as plain floats."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.formats.parts import Parts

from .dialects import (
    CONFIG_FILES,
    Container,
    Dialect,
    FoundLayers,
    StoredLayer,
    TensorSpec,
    detect_dialect,
    get_dialect,
)
from .dialects.base import join_key
from .source import Component, Source
from .strict_json import parse_object

_log = logging.getLogger("lowbit")


@dataclass(frozen=True)
class QuantizedComponent:
    """One model of a source: its place in messages, what its headers and JSON files say, its dialect, its layers.

    `dialect` is None for a plain model.
    """

    source: Source
    component: Component
    where: str
    specs: dict[str, TensorSpec]
    metadata: dict[str, str]
    configs: dict[str, dict[str, Any]]
    dialect: Dialect | None
    found: FoundLayers

    @property
    def layers(self) -> dict[str, StoredLayer]:
        """The quantized layers by name."""
        return self.found.layers

    def full_name(self, name: str) -> str:
        """A layer's or tensor's name with the model's in front, where that has one."""
        return f"{self.component.name}/{name}" if self.component.name else name

    def strip_description(self, metadata: dict[str, str]) -> None:
        """Remove from a file's header metadata what the dialect says there about its layers."""
        owned = self.dialect.owned_metadata if self.dialect is not None else ()
        for name in (*owned, *self.found.entries):
            metadata.pop(name, None)

    def read(self, key: str) -> Tensor:
        """A tensor as it is stored."""
        return self.source.read(self.component, key)

    def load(self, layer: StoredLayer) -> Parts:
        """The canonical parts of a layer. Raises `PartsError`."""
        assert self.dialect is not None  # a layer was found, so there is one
        return self.dialect.load_parts(layer, self.read)

    def dequantized(self, layer: StoredLayer, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The weight [N, K] of a layer in `dtype`, and what its stored bias lacks ([N] float32) or None."""
        parts = self.load(layer)
        return layer.format.dequantize(parts, layer.shape, dtype), layer.format.bias_share(parts)

    def bias_key(self, layer: str) -> str | None:
        """The key of a layer's bias, if it has one."""
        key = join_key(layer, "bias")
        return key if key in self.specs else None


def look_for_layers(source: Source, component: Component, *, strict: bool = True) -> QuantizedComponent:
    """Find the quantized layers of a model from its headers and small tensors.

    Raises:
        CheckpointError: quantized weights that no dialect describes; with `strict` also any layer that is not sound
            (`CheckpointError`, `PartsError`, `FormatError` or `UnknownFormatError`).
    """
    specs = {key: TensorSpec(info.dtype, info.shape) for key, info in component.tensors.items()}
    metadata: dict[str, str] = {}
    for file in component.files.values():
        for name, value in file.metadata.items():
            metadata.setdefault(name, value)
    where = str(component.shards[0].path if len(component.shards) == 1 else source.root / component.name)
    configs = read_configs(source, component)
    held = Container(specs, metadata, configs, where)
    dialect = detect_dialect(held) if source.dialect is None else get_dialect(source.dialect)
    found = FoundLayers(plain=list(specs))
    if dialect is not None:
        found = dialect.find_layers(held, lambda key: source.read(component, key), strict=strict)
        for key, places in found.orders.items():
            source.reorder(component, key, places)
    return QuantizedComponent(source, component, where, specs, metadata, configs, dialect, found)


def read_configs(source: Source, component: Component) -> dict[str, dict[str, Any]]:
    """The JSON files that dialects know and that lie beside a model's weights, by file name.

    Raises `CheckpointError` for one in a model folder that is no JSON object. Beside a single file it may be anybody's,
    and is passed over.
    """
    found = {}
    for name in CONFIG_FILES:
        path = source.root / component.name / name
        if not path.is_file():
            continue
        try:
            found[name] = parse_object(path.read_bytes())
        except (OSError, ValueError) as error:
            if source.kind == "file":
                _log.warning("%s: is no JSON object (%s); passed over", path, error)
                continue
            raise CheckpointError(f"{path}: cannot be read: {error}; download it again") from error
    return found
