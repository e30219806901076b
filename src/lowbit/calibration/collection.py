"""Statistics of many layers by name, of which those that share an input share one entry."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.layer_statistics import judging_moments
from lowbit.errors import StatisticsError
from lowbit.numerics.block_diagonal import diagonal, shape_of
from lowbit.numerics.weight_marks import same_weight
from lowbit.solvers.base import Statistics

Field = tuple[torch.dtype, tuple[int, ...]]
_SHOWN = 10
INPUT_MOMENTS = ("hessian", "held_out")
CHANNELS = ("absmax", "mean", "minimum", "maximum")
BROAD = "broad"  # the option that says that the samples are of as many kinds as what the model will meet
FEW = 1.0  # T/N below which a full second moment is singular and warned about


@dataclass(frozen=True)
class LayerInput:
    """Which input a layer has, by its key, and the shape [N, K] of the layer's weight.

    `output`: the key of the gradient's moments at its output, "" where they are not known; `blocks`: into how many they
    are divided (`lowbit.numerics.block_diagonal`). `weight`: the mark of the weight that the statistics were taken with
    (`lowbit.numerics.weight_marks`), "" where that is not known.
    """

    input: str
    shape: tuple[int, int]
    output: str = ""
    weight: str = ""
    blocks: int = 1


@dataclass(frozen=True)
class InputFacts:
    """What is known of an input without its tensors: K, the tokens of both halves, and "full" or "diagonal"."""

    k: int
    tokens: int
    held_out_tokens: int
    kind: str

    @property
    def tokens_per_channel(self) -> float:
        """T/N: tokens that H was taken from, by its order."""
        return self.tokens / self.k


@dataclass(frozen=True)
class Contents:
    """The directory of a set of statistics.

    `model`: what they are of, in words. `layers`: the layers by name; `inputs`: the inputs by key. `never_called`:
    linears that no batch reached, which have no statistics. `options`: how they were taken.
    """

    model: str
    layers: dict[str, LayerInput]
    inputs: dict[str, InputFacts]
    never_called: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the moments of outputs with gradients, by key: [N, N] or that of its blocks."""
        known = (layer for layer in self.layers.values() if layer.output)
        return {layer.output: shape_of(layer.shape[0], layer.blocks) for layer in known}

    def marked(self, marks: Mapping[str, str]) -> Contents:
        """The same with the marks of layers' weights."""
        layers = {name: replace(layer, weight=marks.get(name, "")) for name, layer in self.layers.items()}
        return replace(self, layers=layers)

    def to_json(self) -> dict[str, Any]:
        """As JSON data; marks that are not known and single blocks are left out, as older files have neither."""
        data = asdict(self)
        for layer in data["layers"].values():
            if not layer["weight"]:
                del layer["weight"]
            if layer["blocks"] == 1:
                del layer["blocks"]
        return data

    def sharing(self, key: str) -> tuple[str, ...]:
        """The layers that have this input."""
        return tuple(name for name, layer in self.layers.items() if layer.input == key)

    def first_with(self, key: str) -> str:
        """The first layer that has this input or output, for messages."""
        return self._first.get(key, key)

    @cached_property
    def _first(self) -> dict[str, str]:
        """The first layer by input and output: models with many experts have tens of thousands of them."""
        found: dict[str, str] = {}
        for name, layer in self.layers.items():
            found.setdefault(layer.input, name)
            found.setdefault(layer.output, name)
        return found


class StatisticsCollection(Mapping[str, Statistics]):
    """Statistics by the layer's name: `collection.get(name)` is None for a layer without."""

    contents: Contents

    @abstractmethod
    def load_input(self, key: str) -> Statistics:
        """The statistics of an input."""

    @abstractmethod
    def fields(self, key: str) -> dict[str, Field]:
        """The tensors of an input: dtype and shape by the field of `Statistics`."""

    @abstractmethod
    def load_output(self, key: str) -> dict[str, Tensor]:
        """The moments of the gradient at an output, by the field of `Statistics`."""

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of all layers that have statistics."""
        return tuple(self.contents.layers)

    @property
    def never_called(self) -> tuple[str, ...]:
        """Linears of the model that no batch reached."""
        return self.contents.never_called

    def shape(self, layer: str) -> tuple[int, int]:
        """The shape (N, K) of a layer's weight. Raises `StatisticsError` for a layer without statistics."""
        if layer not in self.contents.layers:
            raise StatisticsError(f"{self.place}: has no layer {layer!r}; it has {some(self.layers)}")
        return self.contents.layers[layer].shape

    def __getitem__(self, layer: str) -> Statistics:
        output, found = self.contents.layers[layer].output, self._input(layer)
        more: dict[str, Any] = dict(self.load_output(output)) if output else {}
        return replace(found, **more) if more else found

    def get_input(self, layer: str, /) -> Statistics | None:
        """The statistics of a layer's input alone: what is known of the gradient at its output is not read."""
        return self._input(layer) if layer in self.contents.layers else None

    def _input(self, layer: str) -> Statistics:
        found = self.load_input(self.contents.layers[layer].input)
        return replace(found, broad=True) if self.contents.options.get(BROAD) else found

    def judging_moments(self, layer: str, /) -> Tensor | None:
        """See `lowbit.checkpoint.layer_statistics.judging_moments`."""
        return judging_moments(self.get_input(layer))

    def __iter__(self) -> Iterator[str]:
        return iter(self.contents.layers)

    def __len__(self) -> int:
        return len(self.contents.layers)

    def __contains__(self, layer: object) -> bool:
        return layer in self.contents.layers

    @property
    def place(self) -> str:
        """What messages call it."""
        return f"the statistics of {self.contents.model}"

    def kind(self, layer: str) -> str:
        """Whether a layer has "full" or "diagonal" second moments, "" for one without; reads no tensor."""
        found = self.contents.layers.get(layer)
        if found is None or not self.contents.inputs[found.input].tokens:
            return ""
        return self.contents.inputs[found.input].kind

    def gradient_size(self, layer: str) -> int:
        """How many numbers are known of G at a layer's output, 0 for none; reads no tensor."""
        found = self.contents.layers.get(layer)
        return 0 if found is None or not found.output else found.shape[0] ** 2 // found.blocks

    def smallest(self, layer: str) -> float | None:
        """The smallest input of a layer; None where that is not known."""
        found = self.contents.layers.get(layer)
        minimum = None if found is None else self.minimum(found.input)
        return None if minimum is None else float(minimum.min())

    def input_of(self, layer: str) -> str | None:
        """The key of a layer's input, which layers that read the same have in common; None for one without."""
        found = self.contents.layers.get(layer)
        return None if found is None else found.input

    def minimum(self, key: str) -> Tensor | None:
        """The smallest value of each channel of an input, [K]."""
        return self.load_input(key).minimum

    def fingerprint(self) -> str:
        """Names the contents: the directory, and the vectors of each input and output, which differ when anything does.

        It is the same for statistics in memory and in the file that they are saved to.
        """
        digest = hashlib.sha256(json.dumps(self.contents.to_json(), sort_keys=True).encode())
        for key in self.contents.inputs:
            digest.update(digest_of(self.input_vectors(key)))
        for key in self.contents.outputs:
            digest.update(digest_of(self.output_vectors(key)))
        return digest.hexdigest()

    def input_vectors(self, key: str) -> dict[str, Tensor]:
        """The vectors [K] of an input by the field of `Statistics`; of its second moments, the diagonals."""
        known = self.load_input(key)
        fields = {name: getattr(known, name) for name in (*INPUT_MOMENTS, *CHANNELS)}
        return {name: diagonal_of(tensor) for name, tensor in fields.items() if tensor is not None}

    def output_vectors(self, key: str) -> dict[str, Tensor]:
        """The diagonals [N] of the moments of the gradient at an output, by the field of `Statistics`."""
        return {name: diagonal(tensor).reshape(-1) for name, tensor in self.load_output(key).items()}

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise `StatisticsError`, with a list, unless every layer here is among `shapes`, with its shape."""
        layers = self.contents.layers
        unknown = [name for name in layers if name not in shapes]
        wrong = [
            f"{name} is {list(shapes[name])}, the statistics are of {list(layer.shape)}"
            for name, layer in layers.items()
            if name in shapes and tuple(shapes[name]) != layer.shape
        ]
        if not unknown and not wrong:
            return
        lines = [f"not in the model: {some(unknown, _SHOWN)}"] if unknown else []
        lines += [f"other shape: {some(wrong, _SHOWN, '; ')}"] if wrong else []
        raise StatisticsError(
            f"{self.place}: are of another model, {len(unknown) + len(wrong)} of {len(layers)} layers do not fit; "
            f"{'; '.join(lines)}; calibrate this model"
        )

    def other_weights(self, marks: Mapping[str, str]) -> str:
        """The warning for a model whose layers have these marks, where some tell of other weights; else "".

        Layers without a mark, here or there, are not compared.
        """
        known = {name: layer.weight for name, layer in self.contents.layers.items() if layer.weight}
        compared = [name for name, mark in marks.items() if mark and name in known]
        other = [name for name in compared if not same_weight(known[name], marks[name])]
        if not other:
            return ""
        return (
            f"{self.place}: are of a model with other weights, such as before or after a finetune, or of another "
            f"version: {len(other)} of {len(compared)} layers compared differ ({some(other)}). What they gain will be "
            "less than is reported; calibrate this model"
        )

    def describe(self) -> dict[str, Any]:
        """As JSON data: the model, options, layers never called, and of every input its tokens, T/N and layers."""
        contents = self.contents
        inputs = {
            key: {
                "k": facts.k,
                "kind": facts.kind,
                "tokens": facts.tokens,
                "held_out_tokens": facts.held_out_tokens,
                "tokens_per_channel": facts.tokens_per_channel,
                "layers": list(contents.sharing(key)),
            }
            for key, facts in contents.inputs.items()
        }
        return {
            "model": contents.model,
            "layers": len(contents.layers),
            "gradients": sum(bool(layer.output) for layer in contents.layers.values()),
            "never_called": list(contents.never_called),
            "options": contents.options,
            "inputs": inputs,
        }

    def warnings(self) -> list[str]:
        """What a user should know before relying on these, one line each."""
        inputs = self.contents.inputs
        found = []
        thin = [key for key, facts in inputs.items() if facts.kind == "full" and facts.tokens_per_channel < FEW]
        if thin:
            lowest = min(thin, key=lambda key: inputs[key].tokens_per_channel)
            facts = inputs[lowest]
            found.append(
                f"few tokens: {len(thin)} of {len(inputs)} inputs have fewer tokens than channels, the lowest "
                f"{self.contents.sharing(lowest)[0]} with T/N = {facts.tokens}/{facts.k} = "
                f"{facts.tokens_per_channel:.2f}; give several times as much data, T/N of 4 and more"
            )
        one_sided = [key for key, facts in inputs.items() if not facts.held_out_tokens or not facts.tokens]
        if one_sided:
            found.append(
                f"nothing held out: {len(one_sided)} inputs were seen in one half of the samples only, "
                "so results cannot be judged on the other; give at least two samples"
            )
        if crowded := self._without_room():
            widest = max(crowded, key=lambda key: inputs[key].k)
            found.append(
                f"only the diagonal: {len(crowded)} of {len(inputs)} inputs, the widest "
                f"{self.contents.sharing(widest)[0]} with K = {inputs[widest].k}, have no room for H in "
                f"{self.contents.options['memory']} bytes of memory, and gptq needs it; give more memory"
            )
        if self.never_called:
            found.append(f"never called, so without statistics: {some(self.never_called)}")
        return found

    def _without_room(self) -> list[str]:
        """The inputs that have only the diagonal because of the bound on memory, not because they were asked to."""
        options = self.contents.options
        if options.get("memory") is None:
            return []
        widest = options.get("full_up_to")
        diagonal = {key: facts.k for key, facts in self.contents.inputs.items() if facts.kind == "diagonal"}
        return [key for key, k in diagonal.items() if widest is None or k <= widest]


def some(names: Iterable[str], count: int = 3, mark: str = ", ") -> str:
    """The first few of a list, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return mark.join(names[:count]) + more


def diagonal_of(moment: Tensor) -> Tensor:
    """The diagonal [N] of a second moment [N, N]; vectors as they are."""
    return moment.diagonal() if moment.dim() == 2 else moment


def digest_of(vectors: Mapping[str, Tensor]) -> bytes:
    """A digest of vectors by name, in any order. Diagonals and ranges change whenever the samples do."""
    digest = hashlib.sha256()
    for name in sorted(vectors):
        data = vectors[name].float().cpu().contiguous().numpy().tobytes()
        digest.update(f"{name} {len(data)} ".encode() + data)
    return digest.digest()
