"""Marks of a checkpoint's weights, and whether statistics are of a model with these weights."""

from __future__ import annotations

from collections.abc import Mapping

from lowbit.checkpoint.safetensors_header import DTYPES as STORED
from lowbit.checkpoint.source import Component, Source
from lowbit.numerics.weight_marks import DTYPES, mark_of_elements, places

from .collection import StatisticsCollection

_COMPARED = 32  # layers of a model: 64 reads of an element each, which take no time on any disk


def source_marks(source: Source, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """The marks of a checkpoint's layers of these shapes; without those that it does not hold as plain matrices."""
    keys: dict[str, tuple[Component, str]] = {}
    for component in source.components:
        prefix = f"{component.name}/" if component.name and len(source.components) > 1 else ""
        keys |= {prefix + key: (component, key) for key in component.tensors}
    found = {}
    for name, shape in shapes.items():
        if f"{name}.weight" not in keys:
            continue
        component, key = keys[f"{name}.weight"]
        info = component.tensors[key]
        if STORED.get(info.dtype_name) in DTYPES and info.shape == tuple(shape) and 0 not in shape:
            found[name] = mark_of_elements(source.read_elements(component, key, places(info.numel)))
    return found


def other_weights(source: Source, statistics: StatisticsCollection) -> str:
    """The warning for statistics of a model whose weights are others than this checkpoint's; "" where none is due.

    Of a large model, layers at even distances are compared.
    """
    marked = [name for name, layer in statistics.contents.layers.items() if layer.weight]
    count = min(len(marked), _COMPARED)
    chosen = [marked[index * len(marked) // count] for index in range(count)]
    return statistics.other_weights(source_marks(source, {name: statistics.shape(name) for name in chosen}))
