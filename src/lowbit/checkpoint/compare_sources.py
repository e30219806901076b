"""What is compared with what: the weights of a reference, and the checked files of the candidates beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import CheckpointError

from .comparison import CandidateComparison, LayerComparison
from .dialects import StoredLayer
from .dialects.base import join_key, layer_of
from .quantized_source import QuantizedComponent, look_for_layers
from .source import Source

_PADDING = 32  # a file that pads, and does not tell the shape, adds less than this to rows and columns
_SHOWN = 5


def layer_shapes(source: Source) -> dict[str, tuple[int, int]]:
    """The name and logical shape [N, K] of every weight matrix of a source, quantized or plain."""
    return {
        content.full_name(layer): shape
        for content in contents_of(source).values()
        for layer, shape in matrices(content)
    }


def contents_of(source: Source) -> dict[str, QuantizedComponent]:
    """The models of a source by name; a single one has the name ""."""
    if len(source.components) == 1:
        return {"": look_for_layers(source, source.components[0])}
    return {component.name: look_for_layers(source, component) for component in source.components}


def matrices(content: QuantizedComponent) -> list[tuple[str, tuple[int, int]]]:
    """Every layer with a weight matrix, in the order of the file's data where it is plain, quantized ones first."""
    found = [(layer, stored.shape) for layer, stored in content.layers.items()]
    for key in content.found.plain:
        spec, layer = content.specs[key], layer_of(key)
        if layer is not None and len(spec.shape) == 2 and spec.dtype.is_floating_point:
            found.append((layer, (spec.shape[0], spec.shape[1])))
    return found


class Candidate:
    """One candidate beside the reference: checked, and what its layers and tensors came out as."""

    def __init__(self, label: str, source: Source, held: dict[str, QuantizedComponent], reference: Source) -> None:
        self.label, self.source = label, source
        self.contents = contents_of(source)
        if self.contents.keys() != held.keys():
            raise CheckpointError(
                f"{source.place}: holds the models {sorted(self.contents)}, {reference.place} holds {sorted(held)}; "
                "compare a checkpoint with the one it was made from"
            )
        self.layers: dict[str, LayerComparison] = {}
        self.identical: list[str] = []
        self.changed: dict[str, str] = {}
        self.biases: dict[str, str] = {}
        self.missing: list[str] = []
        self.extra: list[str] = []
        for name, content in self.contents.items():
            _check_layers(held[name], content, str(source.place), str(reference.place))
            self._check_others(held[name], content)
        self.order: list[str] = []

    def _check_others(self, held: QuantizedComponent, made: QuantizedComponent) -> None:
        weights = {join_key(layer, "weight") for layer, _ in (*matrices(held), *matrices(made))}
        made_biases = {join_key(x, "bias") for x, stored in made.layers.items() if stored.format.folds_bias}
        before, after = set(held.found.plain) - weights, set(made.found.plain) - weights
        self.missing += [held.full_name(key) for key in sorted(before - after)]
        self.extra += [made.full_name(key) for key in sorted(after - before - made_biases)]

    def stored(self, component: str, layer: str, shape: tuple[int, int]) -> StoredLayer | None:
        """The quantized layer at its true shape (a padded file may not tell it), or None where it is plain."""
        found = self.contents[component].layers.get(layer)
        return None if found is None else dataclasses.replace(found, shape=shape)

    def result(self) -> CandidateComparison:
        """All that was found, in the order of the reference."""
        return CandidateComparison(
            name=self.label,
            path=str(self.source.place),
            bytes=sum(file.size for file in self.source.files.values()),
            layers=tuple(self.layers[name] for name in self.order),
            identical=len(self.identical),
            changed=tuple(f"{name}: {what}" for name, what in sorted(self.changed.items())),
            biases=tuple(f"{name}: {what}" for name, what in sorted(self.biases.items())),
            missing=tuple(self.missing),
            extra=tuple(self.extra),
        )


def _check_layers(held: QuantizedComponent, made: QuantizedComponent, where: str, source: str) -> None:
    """Raise `CheckpointError` naming layers that only one of the two has, or that differ in shape."""
    before, after = dict(matrices(held)), dict(matrices(made))
    missing = [layer for layer in before if layer not in after]
    extra = [layer for layer in made.layers if layer not in before]
    misshapen = [
        f"{layer} {list(after[layer])} for {list(shape)}"
        for layer, shape in before.items()
        if layer in after and not _fits(shape, after[layer], padded=layer in made.layers)
    ]
    wrong = [
        f"{what} {_some(which)}"
        for what, which in (("lacks", missing), ("has in addition", extra), ("has other shapes:", misshapen))
        if which
    ]
    if wrong:
        raise CheckpointError(
            f"{where}: {'; '.join(wrong)}, compared with {source}; compare a checkpoint with the one it was made from"
        )


def _fits(shape: tuple[int, int], found: tuple[int, int], *, padded: bool) -> bool:
    if not padded:
        return shape == found
    return all(a <= b < a + _PADDING for a, b in zip(shape, found, strict=True))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@dataclass(frozen=True)
class Layer:
    """A weight matrix of the reference."""

    component: str
    held: QuantizedComponent
    layer: str
    shape: tuple[int, int]

    @property
    def name(self) -> str:
        """With the model's in front, where that has one."""
        return self.held.full_name(self.layer)

    @property
    def key(self) -> str:
        """The key of its weight where that is plain."""
        return join_key(self.layer, "weight")

    @property
    def stored(self) -> StoredLayer | None:
        """As the reference holds it quantized, or None."""
        return self.held.layers.get(self.layer)

    def weight(self) -> Tensor:
        """[N, K], decoded to float32 where it is quantized."""
        if self.stored is None:
            return self.held.read(self.key)
        return self.held.dequantized(self.stored, torch.float32)[0]

    def bytes(self, content: QuantizedComponent) -> int:
        """The bytes of the weight in one of the files, with its scales and other parts."""
        stored = content.layers.get(self.layer)
        keys = [self.key] if stored is None else [key for role, key in stored.keys.items() if role != "marker"]
        return sum(content.specs[key].nbytes for key in keys)

    def format(self, content: QuantizedComponent) -> str:
        """Its spec in one of the files, or its dtype."""
        stored = content.layers.get(self.layer)
        return str(content.specs[self.key].dtype).removeprefix("torch.") if stored is None else stored.format.spec
