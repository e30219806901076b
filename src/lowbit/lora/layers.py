"""The layers of a module that an adapter may change, and an adapter as callers may give it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lowbit.errors import CheckpointError
from lowbit.lora.adapter import Adapter, Matched
from lowbit.lora.adapter_delta import Delta
from lowbit.lora.adapter_file import read_adapter

AnyAdapter = Adapter | Mapping[str, Delta] | str | Path
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Adaptable = nn.Linear | nn.Embedding | Convolution


def adaptable_layers(module: nn.Module) -> dict[str, Adaptable]:
    """Linears, embeddings and convolutions by name ("" for a bare layer), quantized or not."""
    return {
        name: layer
        for name, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }


def match_module(
    module: nn.Module, adapter: AnyAdapter, *, strict: bool
) -> tuple[list[tuple[str, Adaptable, Delta]], Matched]:
    """(name, layer, change) for each layer that an adapter changes. Raises as `Adapter.match` and `read_adapter`."""
    found = adaptable_layers(module)
    adapter = as_adapter(adapter)
    matched = adapter.match({name: tuple(layer.weight.shape) for name, layer in found.items()}, strict=strict)
    return [(name, found[name], delta) for name, delta in matched.layers.items()], matched


def as_adapter(adapter: AnyAdapter) -> Adapter:
    """An adapter from its file, or from changes by layer."""
    if isinstance(adapter, Adapter):
        return adapter
    if isinstance(adapter, str | Path):
        return read_adapter(adapter)
    return Adapter(dict(adapter), "the adapter")


def check_strength(strength: float) -> None:
    """Raise `CheckpointError` for a strength that is no finite number."""
    if not math.isfinite(strength):
        raise CheckpointError(f"a strength of {strength!r} is no finite number; give one such as 1.0")


def weight_of(layer: nn.Module) -> Tensor:
    """A layer's weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
