"""The quantized layers that a source holds already, in one model, and their weights as plain floats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.formats.parts import Parts

from .dialects import Dialect, FoundLayers, StoredLayer, TensorSpec, detect_dialect
from .dialects.base import join_key
from .source import Component, Source


@dataclass(frozen=True)
class QuantizedComponent:
    """One model of a source: its place in messages, tensors' specs, header metadata, dialect (None: plain), layers."""

    source: Source
    component: Component
    where: str
    specs: dict[str, TensorSpec]
    metadata: dict[str, str]
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
        for name in self.dialect.header_metadata(()) if self.dialect is not None else ():
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
    dialect = detect_dialect(specs, metadata, where)
    found = FoundLayers(plain=list(specs))
    if dialect is not None:
        found = dialect.find_layers(specs, metadata, lambda key: source.read(component, key), where, strict=strict)
    return QuantizedComponent(source, component, where, specs, metadata, dialect, found)
