"""Which tensor of a checkpoint is the weight of which linear of a module, where the two name them differently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from lowbit.checkpoint.quantized_source import look_for_layers
from lowbit.checkpoint.source import Source


def layer_shapes(source: Source) -> dict[str, tuple[int, int]]:
    """The shapes [N, K] of a checkpoint's two-dimensional weights, decoded where quantized, by the layer's name."""
    plain = {
        name.removesuffix(".weight"): (info.shape[0], info.shape[1])
        for name, info in source.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2
    }
    held = [look_for_layers(source, component, strict=False) for component in source.components]
    return plain | {one.full_name(name): layer.shape for one in held for name, layer in one.layers.items()}


def checkpoint_names(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str | None]:
    """The checkpoint's layer name of each linear, by the module's name, where they differ; None where it has none.

    `shapes` are those of the checkpoint's weights, by layer name. A linear that has not the name of a weight of its
    shape takes the one of its shape with the most trailing components in common, if there is but one such and no other
    linear takes it too. A head tied to the embedding, for instance, has no weight of its own in the file.
    """
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear)
    }
    exact = {name for name, shape in linears.items() if tuple(shapes.get(name, ())) == shape}
    by_end: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for key, shape in shapes.items():
        if key not in exact:
            by_end.setdefault((key.rpartition(".")[2], tuple(shape)), []).append(key)
    found: dict[str, str | None] = {}
    for name, shape in linears.items():
        candidates = by_end.get((name.rpartition(".")[2], shape), [])
        if name not in exact:
            found[name] = _closest(name, candidates)
    claims = Counter(key for key in found.values() if key is not None)
    return {name: key if key is not None and claims[key] == 1 else None for name, key in found.items()}


def _closest(name: str, keys: Iterable[str]) -> str | None:
    ranked = sorted(((_common(name, key), key) for key in keys), reverse=True)
    if not ranked or (len(ranked) > 1 and ranked[0][0] == ranked[1][0]):
        return None
    return ranked[0][1]


def _common(a: str, b: str) -> int:
    """How many trailing components two dotted names share."""
    count = 0
    for x, y in zip(reversed(a.split(".")), reversed(b.split(".")), strict=False):
        if x != y:
            break
        count += 1
    return count
