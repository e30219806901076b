"""Mixed precision by measurement: each layer gets the format in which the whole checkpoint loses least for its size.

Every rule of `make_plan` holds: presets, `keep`, `only`, layer rules. What they leave open is chosen among the formats
given and staying as it is. A layer's loss is its relative output error, tr(E H E^T) / tr(W H W^T); the loss of the
checkpoint is the mean of them over all layers that could be quantized, so that a layer counts by what it does to its
own output and not by how large that is, unless it is given a weight. Its SQNR is that mean in dB.

Where the gradients at the outputs of all of these layers are known, each counts by what its output does to the model's:
the mean is weighted by tr(G W H W^T) of all tokens, and is the error of the model's output as far as those of layers
just add up.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lowbit.errors import PlanError

from .budget import Option, assign
from .dialects.base import join_key
from .layer_statistics import LayerStatistics
from .plan import LayerRule, make_plan
from .plan_data import Plan, TensorPlan
from .plan_rules import ROTATED, rotation_note
from .sensitivity import Candidate, Sensitivities, solver_for
from .source import Source

FORMATS = ("nvfp4", "awq_w4a16", "fp8_e4m3(granularity=row)", "int8(activations=none)")
"""The formats to choose from by default."""
_KEPT = "as it is"
_SPARE = 1e-3


@dataclass(frozen=True)
class Choice:
    """What a layer may become, its bytes, and its relative output error."""

    plan: TensorPlan
    nbytes: int
    error: float = 0.0

    @property
    def name(self) -> str:
        """The format's spec, or that it stays."""
        return self.plan.format if self.plan.action == "quantize" else _KEPT


@dataclass(frozen=True)
class LayerChoices:
    """A layer and what it may become. `weight`: how often its error counts."""

    component: str
    name: str
    has_bias: bool
    choices: tuple[Choice, ...]
    weight: float = 1.0

    @property
    def options(self) -> list[Option]:
        """Bytes and weighted error of each choice."""
        return [(float(choice.nbytes), self.weight * choice.error) for choice in self.choices]

    @property
    def candidate(self) -> Candidate:
        """What there is to measure of it."""
        plans = tuple(choice.plan for choice in self.choices if choice.plan.action == "quantize")
        return Candidate(self.component, self.name, plans, self.has_bias)


@dataclass(frozen=True)
class Selection:
    """The layers of a source that have a choice, and the plan of everything else.

    `measured_with`: what their errors were measured with, "" before. `by_gradients`: layers count by those.
    """

    base: Plan
    layers: tuple[LayerChoices, ...]
    fixed_bytes: int
    measured_with: str = ""
    by_gradients: bool = False

    @property
    def candidates(self) -> list[Candidate]:
        """What there is to measure."""
        return [layer.candidate for layer in self.layers]

    @property
    def weight(self) -> float:
        """Of all layers together."""
        return sum(layer.weight for layer in self.layers)

    def weighted(self, rules: Sequence[tuple[str, float]]) -> Selection:
        """The same with the error of layers whose name matches a pattern counted so often; the first match wins.

        Raises `PlanError` for a pattern that is none or matches nothing, and for a weight that is not positive.
        """
        layers, used = list(self.layers), set()
        for index, layer in enumerate(layers):
            for pattern, weight in rules:
                if _compiled(pattern, weight).search(layer.name):
                    layers[index] = dataclasses.replace(layer, weight=weight)
                    used.add(pattern)
                    break
        if unused := [pattern for pattern, _ in rules if pattern not in used]:
            raise PlanError(f"--weight {unused[0]!r}: matches no layer that has a choice; correct the pattern")
        return dataclasses.replace(self, layers=tuple(layers))

    def with_errors(self, found: Sensitivities, measure_with: str) -> Selection:
        """The same with measured errors, and with weights by gradients where all layers have them."""
        weights = [found.weights.get(layer.name, 0.0) for layer in self.layers]
        mean = sum(weights) / len(weights) if all(weights) else 0.0

        def measured(layer: LayerChoices, choice: Choice) -> Choice:
            if choice.plan.action != "quantize":
                return choice
            error = found.get(layer.name, choice.plan.format, solver_for(choice.plan, measure_with))
            if error is None:
                raise PlanError(f"{layer.name!r} has not been measured as {choice.plan.format}; measure it first")
            return dataclasses.replace(choice, error=error)

        layers = tuple(
            dataclasses.replace(
                layer,
                choices=tuple(measured(layer, choice) for choice in layer.choices),
                weight=layer.weight * (weight / mean if mean else 1.0),
            )
            for layer, weight in zip(self.layers, weights, strict=True)
        )
        return dataclasses.replace(self, layers=layers, measured_with=measure_with, by_gradients=bool(mean))


def find_choices(
    source: Source,
    formats: Sequence[str] = FORMATS,
    *,
    layer_rules: Sequence[LayerRule] = (),
    statistics: LayerStatistics | None = None,
    **options: Any,
) -> Selection:
    """What each layer of `source` may become; reads headers only. `options`: those of `make_plan`.

    A layer that a rule names has that format and no other. Raises what `make_plan` raises, and `PlanError` when no
    layer can be quantized or a format is given twice.
    """
    if not formats:
        raise PlanError("there are no formats to choose from; give one or more")
    plans = [make_plan(source, spec, layer_rules=layer_rules, statistics=statistics, **options) for spec in formats]
    rules = [re.compile(pattern) for pattern, _ in layer_rules]
    layers, fixed = [], 0
    for index, component in enumerate(plans[0].components):
        keys = {tensor.key for tensor in component.tensors}
        for position, tensor in enumerate(component.tensors):
            found: dict[str, Choice] = {}
            for plan in plans:
                other = plan.components[index].tensors[position]
                if other.action == "quantize":
                    found.setdefault(other.format, Choice(other, plan.sizes_after[component.name][other.key]))
            if not found:
                fixed += plans[0].sizes_after[component.name][tensor.key]
                continue
            name = f"{component.name}/{tensor.layer}" if component.name else tensor.layer
            choices = list(found.values())
            if not any(rule.search(name) for rule in rules):
                kept = TensorPlan(tensor.key, "keep", "", tensor.shape, tensor.dtype, axes=tensor.axes)
                choices.append(Choice(kept, kept.bytes_before))
            layers.append(LayerChoices(component.name, name, join_key(tensor.layer, "bias") in keys, tuple(choices)))
    if not layers:
        reasons = sorted({tensor.why for tensor in plans[0].tensors()})
        raise PlanError(f"{source.place}: no layer can be quantized; the reasons are: {'; '.join(reasons)}")
    return Selection(plans[0], tuple(layers), fixed)


@dataclass(frozen=True)
class MixedPlan:
    """The choice for every layer that had one."""

    selection: Selection
    chosen: tuple[int, ...]

    @cached_property
    def picked(self) -> list[tuple[LayerChoices, Choice]]:
        """Each layer with what it becomes."""
        return [(layer, layer.choices[index]) for layer, index in zip(self.selection.layers, self.chosen, strict=True)]

    @property
    def nbytes(self) -> int:
        """Of all tensors of the checkpoint."""
        return self.selection.fixed_bytes + sum(choice.nbytes for _, choice in self.picked)

    @property
    def error(self) -> float:
        """The mean relative output error, by weight."""
        total = sum(layer.weight * choice.error for layer, choice in self.picked)
        return total / self.selection.weight

    @property
    def sqnr(self) -> float:
        """The same in dB."""
        return decibels_of(self.error)

    def plan(self, *notes: str) -> Plan:
        """The plan that `convert` runs; each layer's reason is what its choice costs and what another would."""
        chosen = {
            (layer.component, choice.plan.key): dataclasses.replace(choice.plan, why=_why(layer, choice))
            for layer, choice in self.picked
        }
        base = self.selection.base
        components = tuple(
            dataclasses.replace(
                component,
                tensors=tuple(chosen.get((component.name, tensor.key), tensor) for tensor in component.tensors),
            )
            for component in base.components
        )
        quantized = [choice.plan for _, choice in self.picked if choice.plan.action == "quantize"]
        solvers = sorted({f"{plan.format}: solver {plan.solver}" for plan in quantized})
        turned = sorted({rotation_note(plan.fmt.name) for plan in quantized if ROTATED in plan.why})
        made = dataclasses.replace(base, components=components, notes=(*notes, *solvers, *turned))
        made.validate()
        return made


def for_size(selection: Selection, nbytes: int) -> MixedPlan:
    """The choice with the least error among those of at most `nbytes` bytes in all tensors together.

    Raises `PlanError`, with the smallest size, when there is none.
    """
    smallest = selection.fixed_bytes + sum(min(c.nbytes for c in layer.choices) for layer in selection.layers)
    if smallest > nbytes:
        whole = max(selection.base.bytes_before, 1)
        raise PlanError(
            f"{_size(nbytes)} ({nbytes / whole:.3f}x) cannot be reached: with these formats the smallest size is "
            f"{smallest} bytes, {smallest / whole:.3f}x, of which {selection.fixed_bytes} are tensors that stay; allow "
            "smaller formats (--formats), more layers (--preset) or more bytes"
        )
    found = assign([layer.options for layer in selection.layers], nbytes - selection.fixed_bytes)
    return MixedPlan(selection, found.chosen)


def for_sqnr(selection: Selection, sqnr: float) -> MixedPlan:
    """The smallest choice whose mean relative output error is at least `sqnr` dB below the output.

    It may be larger by `_SPARE` of its size where that lessens the error: the smallest one takes a worse format for the
    sake of single bytes, such as those of a shorter marker.

    Raises `PlanError`, with the best that can be reached, when there is none.
    """
    least = sum(min(error for _, error in layer.options) for layer in selection.layers)
    allowed = 10 ** (-sqnr / 10) * selection.weight
    if least > allowed:
        raise PlanError(
            f"{sqnr:g} dB cannot be reached: with these formats and rules the best is "
            f"{decibels_of(least / selection.weight):.2f} dB; take rules away (--layer) or ask for less"
        )
    found = assign([[option[::-1] for option in layer.options] for layer in selection.layers], allowed)
    made = MixedPlan(selection, found.chosen)
    roomier = for_size(selection, int(made.nbytes * (1 + _SPARE)))
    return roomier if roomier.error < made.error else made


def _compiled(pattern: str, weight: float) -> re.Pattern[str]:
    if not 0 < weight < math.inf:
        raise PlanError(f"--weight {pattern}={weight:g}: write a positive number")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise PlanError(f"--weight {pattern!r} is no regular expression: {error}; correct it") from error


def decibels_of(error: float) -> float:
    """A relative error as an SQNR."""
    return -10 * math.log10(error) if error > 0 else math.inf


def _why(layer: LayerChoices, chosen: Choice) -> str:
    """What the choice loses and what another would, and that it is rotated where `auto` did that."""
    return _compared(layer, chosen) + (ROTATED if ROTATED in chosen.plan.why else "")


def _compared(layer: LayerChoices, chosen: Choice) -> str:
    """What the choice loses, and what the next better one would cost or, for the best, what the next smaller saves."""
    words = f"output SQNR {_level(chosen)}"
    better = [c for c in layer.choices if c.error < chosen.error and c.nbytes > chosen.nbytes]
    if better:
        best = max(better, key=lambda c: (chosen.error - c.error) / (c.nbytes - chosen.nbytes))
        return f"{words}; {best.name} would be {_level(best)} for {_size(best.nbytes - chosen.nbytes)} more"
    smaller = [c for c in layer.choices if c.nbytes < chosen.nbytes]
    if smaller:
        near = min(smaller, key=lambda c: (c.error - chosen.error) / (chosen.nbytes - c.nbytes))
        return f"{words}; {near.name} would be {_level(near)} and save {_size(chosen.nbytes - near.nbytes)}"
    return words


def _level(choice: Choice) -> str:
    return "exact" if choice.error == 0 else f"{decibels_of(choice.error):.1f} dB"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.2f} MB" if nbytes >= 10_000 else f"{nbytes / 1e3:.2f} kB"
