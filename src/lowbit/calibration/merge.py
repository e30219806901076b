"""Several sets of statistics of one model as one, each weighted by its tokens."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import StatisticsError
from lowbit.numerics.block_diagonal import count_of, divided
from lowbit.numerics.weight_marks import same_weight
from lowbit.solvers.base import Statistics

from .accumulate import ROWS_KEPT
from .collection import BROAD, Contents, Field, InputFacts, LayerInput, StatisticsCollection, digest_of, some

_log = logging.getLogger("lowbit")
_MOMENTS = {"hessian": "tokens", "held_out": "held_out_tokens"}


class Merged(StatisticsCollection):
    """The statistics of several collections together; an input is merged when it is asked for.

    Second moments and means are averaged by tokens, ranges and histograms joined, and of the kept rows of each as many
    are taken as its tokens are worth. A layer that some lack is taken from the others. Where one has only the diagonal,
    so has the result. What not all have of an input (the ranges, say, when one is an importance matrix) is left out.

    Statistics of models with other weights are merged with a warning, and their marks of weights left out.

    Raises `StatisticsError` when a layer's shape differs between them. That two are of the same samples, which then
    count twice, is the caller's affair: `refuse_same_samples`.
    """

    def __init__(self, collections: Sequence[StatisticsCollection]) -> None:
        if not collections:
            raise StatisticsError("there is nothing to merge; name two statistics files")
        self._collections = list(collections)
        layers: dict[str, LayerInput] = {}
        keys: dict[tuple[str | None, ...], str] = {}
        outputs: dict[tuple[str | None, ...], str] = {}
        for name in dict.fromkeys(name for collection in collections for name in collection.layers):
            parts = tuple(self._input_in(collection, name) for collection in collections)
            key = keys.setdefault(parts, str(len(keys)))
            gradients = tuple(self._output_in(collection, name) for collection in collections)
            output = outputs.setdefault(gradients, f"g{len(outputs)}") if any(gradients) else ""
            layers[name] = LayerInput(key, self._shape_in_all(name), output, self._mark(name), self._blocks(name))
        self._sources = {key: parts for parts, key in keys.items()}
        self._outputs = {key: parts for parts, key in outputs.items()}
        first = self._collections[0].contents
        options = [collection.contents.options for collection in collections]
        never = [name for collection in collections for name in collection.never_called if name not in layers]
        contents = Contents(
            first.model,
            layers,
            {key: self._facts(key) for key in self._sources},
            tuple(dict.fromkeys(never)),
            {"merged": options, BROAD: _mostly_broad(self._collections)},
        )
        self.contents = self._without_disagreed(contents)

    @staticmethod
    def _input_in(collection: StatisticsCollection, name: str) -> str | None:
        layer = collection.contents.layers.get(name)
        return None if layer is None else layer.input

    @staticmethod
    def _output_in(collection: StatisticsCollection, name: str) -> str | None:
        layer = collection.contents.layers.get(name)
        return None if layer is None else layer.output or None

    def _blocks(self, name: str) -> int:
        """Into how many blocks the moments at a layer's output are divided: of those that know them, the most."""
        known = (other.contents.layers[name] for other in self._collections if name in other)
        return max((layer.blocks for layer in known if layer.output), default=1)

    def _mark(self, name: str) -> str:
        """The mark of a layer's weight; that of the first which knows it."""
        marks = (other.contents.layers[name].weight for other in self._collections if name in other)
        return next(filter(None, marks), "")

    def _without_disagreed(self, contents: Contents) -> Contents:
        """The contents without the marks that not all agree on, with a warning: nobody would notice it later."""
        marks = {name: layer.weight for name, layer in contents.layers.items()}
        other = [name for name in marks if any(self._differs(part, name, marks[name]) for part in self._collections)]
        if not other:
            return contents
        _log.warning(
            "%s: are of models with other weights, %d of %d layers differ (%s); what the result gains will be less "
            "than is reported; merge statistics of one model",
            " and ".join(part.place for part in self._collections),
            len(other),
            len(marks),
            some(other),
        )
        return contents.marked({name: mark for name, mark in marks.items() if name not in other})

    @staticmethod
    def _differs(part: StatisticsCollection, name: str, mark: str) -> bool:
        layer = part.contents.layers.get(name)
        return layer is not None and bool(layer.weight) and not same_weight(layer.weight, mark)

    def _shape_in_all(self, name: str) -> tuple[int, int]:
        shapes = {other.shape(name): other.place for other in self._collections if name in other}
        if len(shapes) > 1:
            said = ", ".join(f"{list(shape)} in {place}" for shape, place in shapes.items())
            raise StatisticsError(f"{name}: has the shapes {said}; merge statistics of one model")
        return next(iter(shapes))

    def _parts(self, key: str) -> list[tuple[StatisticsCollection, str]]:
        """The collections that have an input, with its key there."""
        pairs = zip(self._collections, self._sources[key], strict=True)
        return [(collection, other) for collection, other in pairs if other is not None]

    def _facts(self, key: str) -> InputFacts:
        facts = [collection.contents.inputs[other] for collection, other in self._parts(key)]
        kind = "full" if all(fact.kind == "full" for fact in facts) else "diagonal"
        return InputFacts(
            facts[0].k, sum(fact.tokens for fact in facts), sum(fact.held_out_tokens for fact in facts), kind
        )

    def load_output(self, key: str) -> dict[str, Tensor]:
        """The moments of the gradient at an output: of those that have them, the mean by the tokens of the input.

        Only what all of these know of them, where some hold them in blocks.
        """
        pairs = [
            (collection, other)
            for collection, other in zip(self._collections, self._outputs[key], strict=True)
            if other is not None
        ]
        parts = [collection.load_output(other) for collection, other in pairs]
        tokens = [_tokens_of(collection, other) for collection, other in pairs]
        shares = torch.tensor(tokens, dtype=torch.float64)
        shares = (shares / shares.sum()).float()
        count = max(count_of(moment) for part in parts for moment in part.values())
        return {name: _mean([divided(part[name], count) for part in parts], shares) for name in parts[0]}

    def fields(self, key: str) -> dict[str, Field]:
        """The tensors of an input: dtype and shape by field."""
        facts = self.contents.inputs[key]
        parts = [
            (collection.fields(other), collection.contents.inputs[other]) for collection, other in self._parts(key)
        ]
        found: dict[str, Field] = {}
        for name, (dtype, shape) in parts[0][0].items() if len(parts) == 1 else _union(parts).items():
            found[name] = dtype, shape
            if name in _MOMENTS:
                found[name] = dtype, (facts.k, facts.k) if facts.kind == "full" else (facts.k,)
        if "samples" in found:
            rows = [fields["samples"][1][0] for fields, _ in parts]
            found["samples"] = torch.float32, (sum(quotas(rows, [fact.tokens for _, fact in parts])), facts.k)
        return found

    def load_input(self, key: str) -> Statistics:
        """The statistics of an input."""
        facts, names = self.contents.inputs[key], self.fields(key)
        parts = [collection.load_input(other) for collection, other in self._parts(key)]
        tensors: dict[str, Any] = {name: _JOIN[name](parts, name, facts) for name in names}
        return Statistics(tokens=facts.tokens, held_out_tokens=facts.held_out_tokens, **tensors)


def refuse_same_samples(collections: Sequence[StatisticsCollection]) -> None:
    """Raise `StatisticsError` where two of them are of the same samples: their tokens would count twice."""
    for one, other in itertools.combinations(collections, 2):
        if _same_samples(one, other):
            raise StatisticsError(
                f"{one.place} and {other.place} are of the same samples, which would count twice; name each file once"
            )


def _same_samples(one: StatisticsCollection, other: StatisticsCollection) -> bool:
    """Whether all layers that both know had the same input, to the bit; of others the first layer mostly tells."""
    common = [name for name in one.layers if name in other]
    digests = (
        [digest_of(which.input_vectors(which.contents.layers[name].input)) for which in (one, other)] for name in common
    )
    return bool(common) and all(first == second for first, second in digests)


def _tokens_of(collection: StatisticsCollection, output: str) -> int:
    """The tokens of the layer that has this output."""
    contents = collection.contents
    facts = next(contents.inputs[layer.input] for layer in contents.layers.values() if layer.output == output)
    return facts.tokens + facts.held_out_tokens


def _mostly_broad(collections: Sequence[StatisticsCollection]) -> bool:
    """Whether half or more of the tokens are of broad statistics: they decide what is empty in the sum."""
    tokens = [0, 0]
    for collection in collections:
        contents = collection.contents
        most = max((facts.tokens + facts.held_out_tokens for facts in contents.inputs.values()), default=0)
        tokens[bool(contents.options.get(BROAD))] += most
    return tokens[True] >= max(tokens[False], 1)


def _union(parts: Sequence[tuple[dict[str, Field], InputFacts]]) -> dict[str, Field]:
    """Moments that any of the parts has, and what else all of them have."""
    every = set.intersection(*(set(fields) for fields, _ in parts))
    return {name: field for fields, _ in parts for name, field in fields.items() if name in _MOMENTS or name in every}


def quotas(rows: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """How many of the rows that each part has kept of its `tokens` go into a set of at most `ROWS_KEPT`."""
    if sum(rows) <= ROWS_KEPT:
        return list(rows)
    total = max(sum(tokens), 1)
    return [min(count, ROWS_KEPT * share // total) for count, share in zip(rows, tokens, strict=True)]


def _joined_moment(parts: Sequence[Statistics], name: str, facts: InputFacts) -> Tensor:
    total = getattr(facts, _MOMENTS[name])
    found: Tensor | None = None
    for part in parts:
        value, share = getattr(part, name), getattr(part, _MOMENTS[name]) / total
        if value is None:
            continue
        if facts.kind == "diagonal" and value.dim() == 2:
            value = value.diagonal()
        found = value * share if found is None else found.add_(value, alpha=share)
    assert found is not None
    return found


def _joined_mean(parts: Sequence[Statistics], name: str, facts: InputFacts) -> Tensor:
    shares = torch.tensor([part.total_tokens for part in parts], dtype=torch.float64)
    return (_stacked(parts, name).double() * (shares / shares.sum())[:, None]).sum(0).float()


def _joined_samples(parts: Sequence[Statistics], name: str, facts: InputFacts) -> Tensor:
    rows = [part.samples for part in parts if part.samples is not None]
    random = torch.Generator().manual_seed(0)
    chosen = zip(rows, quotas([len(x) for x in rows], [part.tokens for part in parts]), strict=True)
    return torch.cat([x[torch.randperm(len(x), generator=random)[:count].sort().values] for x, count in chosen])


def _joined_largest(parts: Sequence[Statistics], name: str, facts: InputFacts) -> Tensor:
    return _stacked(parts, name).amax(0)


def _joined_least(parts: Sequence[Statistics], name: str, facts: InputFacts) -> Tensor:
    return _stacked(parts, name).amin(0)


def _joined_counts(parts: Sequence[Statistics], name: str, facts: InputFacts) -> Tensor:
    return _stacked(parts, name).sum(0)


def _mean(moments: Sequence[Tensor], shares: Tensor) -> Tensor:
    found = moments[0] * shares[0]
    for moment, share in zip(moments[1:], shares[1:], strict=True):
        found.add_(moment * share)
    return found


def _stacked(parts: Sequence[Statistics], name: str) -> Tensor:
    return torch.stack([getattr(part, name) for part in parts])


_JOIN: dict[str, Callable[[Sequence[Statistics], str, InputFacts], Tensor]] = {
    "hessian": _joined_moment,
    "held_out": _joined_moment,
    "mean": _joined_mean,
    "samples": _joined_samples,
    "absmax": _joined_largest,
    "maximum": _joined_largest,
    "minimum": _joined_least,
    "magnitudes": _joined_counts,
}
