"""What is compared with what: the weights of a reference, and the checked files of the candidates beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.formats.parts import Parts

from .banks import decoded_expert, expert_parts
from .comparison import Absent, CandidateComparison, LayerComparison
from .dialects import StoredLayer
from .dialects.base import join_key, layer_of
from .dropped import dropped_keys
from .quantized_source import QuantizedComponent, look_for_layers
from .source import Source
from .weight_shape import KERNEL_AXES, WeightShape, may_pad, weight_shape

_SHOWN = 5


def layer_shapes(source: Source) -> dict[str, tuple[int, int]]:
    """The name and logical shape [N, K] of every weight matrix of a source, quantized or plain."""
    return {
        content.full_name(layer): weight.matrix
        for content in contents_of(source).values()
        for layer, weight in weights(content, axes_of([content]))
        if not weight.is_bank
    }


def contents_of(source: Source) -> dict[str, QuantizedComponent]:
    """The models of a source by name; a single one has the name ""."""
    if len(source.components) == 1:
        return {"": look_for_layers(source, source.components[0])}
    return {component.name: look_for_layers(source, component) for component in source.components}


def axes_of(contents: Iterable[QuantizedComponent]) -> dict[str, str]:
    """The axes of the layers that are no matrices [N, K], by name: kernels and banks that one of the files quantizes.

    Where none does, they are compared as the tensors that they are.
    """
    stored = (stored for content in contents for stored in content.layers.values())
    return {layer.layer: axes for layer in stored if (axes := weight_shape(layer).axes)}


def weights(content: QuantizedComponent, axes: Mapping[str, str]) -> list[tuple[str, WeightShape]]:
    """Every layer with a weight, in the order of the file's data where it is plain, quantized ones first."""
    found = [(layer, weight_shape(stored)) for layer, stored in content.layers.items()]
    for key in content.found.plain:
        spec, layer = content.specs[key], key if key in axes else layer_of(key)
        if layer is not None and spec.dtype.is_floating_point:
            weight = WeightShape(spec.shape, axes.get(layer, ""))
            found += [(layer, weight)] if weight.problem is None else []
    return found


class Candidate:
    """One candidate beside the reference: checked, and what its layers and tensors came out as."""

    def __init__(
        self,
        label: str,
        source: Source,
        contents: dict[str, QuantizedComponent],
        held: dict[str, QuantizedComponent],
        reference: Source,
        axes: Mapping[str, Mapping[str, str]],
    ) -> None:
        self.label, self.source, self.contents = label, source, contents
        if self.contents.keys() != held.keys():
            raise CheckpointError(
                f"{source.place}: holds the models {sorted(self.contents)}, {reference.place} holds {sorted(held)}; "
                "compare a checkpoint with the one it was made from"
            )
        self.layers: dict[str, LayerComparison] = {}
        self.identical: list[str] = []
        self.changed: dict[str, str] = {}
        self.biases: dict[str, str] = {}
        self.absent = Absent()
        self._common: set[tuple[str, str]] = set()
        for name, content in self.contents.items():
            self._check_layers(held[name], content, axes[name], name, str(reference.place))
            self._check_others(held[name], content, axes[name])
        if not self._common and (missing := (*self.absent.missing_layers, *self.absent.dropped)):
            raise CheckpointError(
                f"{source.place}: lacks {_some(missing)}: has no layer of {reference.place} by its name; compare a "
                "checkpoint with the one it was made from, under the same names"
            )
        self.order: list[str] = []

    def has(self, component: str, layer: str) -> bool:
        """Whether a layer of the reference is in it."""
        return (component, layer) in self._common

    def _check_layers(
        self, held: QuantizedComponent, made: QuantizedComponent, axes: Mapping[str, str], component: str, source: str
    ) -> None:
        """Sort the layers by which of the two has them. Raises `CheckpointError` naming those of another shape."""
        before, after = dict(weights(held, axes)), dict(weights(made, axes))
        misshapen = [
            f"{layer} {list(after[layer].shape)} for {list(weight.shape)}"
            for layer, weight in before.items()
            if layer in after and not _fits(weight, after[layer], padded=layer in made.layers)
        ]
        # There, but no weight: of one axis, or codes without what would say what they are of.
        misshapen += [
            f"{layer} {list(made.specs[key].shape)} of {made.specs[key].dtype} for {list(before[layer].shape)}"
            for layer in before
            for key in (layer, join_key(layer, "weight"))
            if layer not in after and key in made.specs
        ]
        if misshapen:
            raise CheckpointError(
                f"{self.source.place}: has other shapes: {_some(misshapen)}, compared with {source}; compare a "
                "checkpoint with the one it was made from"
            )
        gone = dropped_keys(made.component)
        self._common |= {(component, layer) for layer in before if layer in after}
        for layer in (layer for layer in before if layer not in after):
            left_out = [held.full_name(key) for key in (layer, join_key(layer, "weight")) if key in gone]
            self.absent.dropped.extend(left_out)
            self.absent.missing_layers.extend([] if left_out else [held.full_name(layer)])
        self.absent.extra_layers.extend(made.full_name(layer) for layer in after if layer not in before)

    def _check_others(self, held: QuantizedComponent, made: QuantizedComponent, axes: Mapping[str, str]) -> None:
        layers = {layer for layer, _ in (*weights(held, axes), *weights(made, axes))}
        known = {join_key(layer, "weight") for layer in layers} | axes.keys()
        made_biases = {join_key(x, "bias") for x, stored in made.layers.items() if stored.format.folds_bias}
        before, after = set(held.found.plain) - known, set(made.found.plain) - known
        gone = dropped_keys(made.component)
        self.absent.dropped.extend(held.full_name(key) for key in sorted((before - after) & gone))
        self.absent.missing.extend(held.full_name(key) for key in sorted(before - after - gone))
        self.absent.extra.extend(made.full_name(key) for key in sorted(after - before - made_biases))

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
            absent=self.absent,
        )


def _fits(weight: WeightShape, found: WeightShape, *, padded: bool) -> bool:
    if not padded or weight.axes == KERNEL_AXES:
        return weight == found
    near = may_pad(found.matrix, weight.matrix)
    return near and (weight.axes, weight.experts) == (found.axes, found.experts)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@dataclass(frozen=True)
class Layer:
    """A weight matrix of the reference: that of a layer, or of one `expert` of a bank."""

    component: str
    held: QuantizedComponent
    layer: str
    whole: WeightShape
    expert: int | None = None

    @property
    def name(self) -> str:
        """With the model's in front, where that has one."""
        return self.held.full_name(self.layer if self.expert is None else f"{self.layer}[{self.expert}]")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.whole.matrix

    def key(self, content: QuantizedComponent) -> str:
        """The key of its weight in a file where that is plain."""
        return self.layer if self.layer in content.specs else join_key(self.layer, "weight")

    @property
    def stored(self) -> StoredLayer | None:
        """As the reference holds it quantized, or None."""
        return self.held.layers.get(self.layer)

    def weight(self) -> Tensor:
        """[N, K], decoded to float32 where it is quantized."""
        if self.stored is None:
            return self.plain(self.held)
        return decoded_expert(self.held, self.stored, self.expert or 0, torch.float32)

    def plain(self, content: QuantizedComponent) -> Tensor:
        """[N, K] in one of the files, where it is plain."""
        key, index = self.key(content), self.expert
        if index is None:
            return self.whole.as_matrix(content.read(key)).contiguous()
        rows = content.source.read_rows(content.component, key, index, index + 1)
        return self.whole.as_matrix(rows[0]).contiguous()

    def parts(self, content: QuantizedComponent, stored: StoredLayer) -> Parts:
        """Its parts in one of the files, where it is quantized."""
        return content.load(stored) if self.expert is None else expert_parts(content, stored, self.expert)

    def bytes(self, content: QuantizedComponent) -> int:
        """The bytes of the weight in one of the files, with its scales and other parts."""
        stored = content.layers.get(self.layer)
        coded = [] if stored is None else [key for role, key in stored.keys.items() if role != "marker"]
        keys = coded or [self.key(content)]
        return sum(content.specs[key].nbytes for key in keys) // self.whole.count

    def format(self, content: QuantizedComponent) -> str:
        """Its spec in one of the files, or its dtype."""
        stored = content.layers.get(self.layer)
        if stored is not None:
            return stored.format.spec
        return str(content.specs[self.key(content)].dtype).removeprefix("torch.")


def layers_of(component: str, content: QuantizedComponent, axes: Mapping[str, str]) -> list[Layer]:
    """All there is to compare in a model of the reference, each expert of a bank for itself."""
    found = []
    for layer, weight in weights(content, axes):
        experts: Sequence[int | None] = range(weight.experts) if weight.is_bank else [None]
        found += [Layer(component, content, layer, weight, expert) for expert in experts]
    return found
