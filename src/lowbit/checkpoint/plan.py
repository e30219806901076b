"""Making a plan: which format every weight gets, and for the rest the reason why it stays.

The first that applies decides: what a preset drops; what no format can hold; a `keep` pattern; a layer rule; `only`;
the preset; the size. A layer rule therefore overrides the preset and the size, and nothing overrides what cannot be
stored. Patterns are regular expressions searched for in the layer's name (in a pipeline of several models,
"<model>/<layer>").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from lowbit.errors import PlanError
from lowbit.formats.base import Format
from lowbit.solvers import AUTO, parse_pipeline, pick_solver

from .dialects import Dialect, StoredLayer, TensorSpec, get_dialect
from .dialects.base import join_key, layer_of
from .eligibility import better_left, cannot_hold, cannot_store, dtype_name
from .layer_statistics import LayerStatistics, knowledge
from .plan_data import ComponentPlan, Plan, TensorPlan
from .presets import GENERIC, BoundPreset, Preset, detect_preset, get_preset
from .quantized_source import QuantizedComponent, look_for_layers
from .source import Component, Source
from .stored_format import StoredFormat

__all__ = ["ComponentPlan", "Plan", "TensorPlan", "make_plan"]

LayerRule = tuple[str, "Format | str"]


def make_plan(
    source: Source,
    format: Format | str,
    *,
    solver: str = AUTO,
    preset: str = "auto",
    drop: bool = False,
    keep: Sequence[str] = (),
    only: Sequence[str] = (),
    layer_rules: Sequence[LayerRule] = (),
    dialect: str = "comfy",
    requantize: bool = False,
    statistics: LayerStatistics | None = None,
) -> Plan:
    """Decide what becomes of every tensor of `source`; reads headers and markers only.

    `format`: a format or spec for all weights that nothing below excepts; behind the spec may stand "@" and a layout.
    `solver`: a solver's name, or "auto". `preset`: a model family's name, "auto" to detect it by the names of the
    tensors, "none" for no exceptions by name. `drop`: leave out what the preset says is not needed (a text encoder's
    decoder), instead of keeping or converting it. `keep`, `only`: patterns of layers to leave alone, and of the only
    ones to consider. `layer_rules`: (pattern, format) pairs, the first match wins. `requantize`: convert quantized
    layers again, with the loss of both. `statistics`: what calibration saw; "auto" then takes calibrated solvers.

    Raises:
        PlanError: a pattern is wrong or matches nothing, the source is quantized already, the preset is unknown.
        FormatError, SolverError: the format, a rule's format or the solver is wrong.
    """
    by_layer = [(_Pattern("layer", text), StoredFormat.parse(spec)) for text, spec in layer_rules]
    kept, chosen = [_Pattern("keep", text) for text in keep], [_Pattern("only", text) for text in only]
    rules = _Rules(StoredFormat.parse(format), solver, kept, chosen, by_layer, get_dialect(dialect), statistics)
    rules.check()
    components = []
    for component in source.components:
        held = look_for_layers(source, component)
        if held.layers and not requantize:
            _refuse_quantized(held)
        components.append(_plan_component(component, held, rules, preset, drop=drop))
    rules.refuse_unused(components)
    place = source.place
    plan = Plan(tuple(components), dialect, str(place), tuple(rules.notes()))
    plan.validate()
    return plan


@dataclass
class _Pattern:
    """A regular expression that a user gave, and whether any layer matched it."""

    option: str
    text: str
    used: bool = False

    def __post_init__(self) -> None:
        try:
            self._expression = re.compile(self.text)
        except re.error as error:
            raise PlanError(f"--{self.option} {self.text!r} is no regular expression: {error}; correct it") from error

    def matches(self, name: str) -> bool:
        found = self._expression.search(name) is not None
        self.used |= found
        return found


@dataclass
class _Rules:
    """What the user asked for."""

    stored: StoredFormat
    solver: str
    keep: list[_Pattern]
    only: list[_Pattern]
    by_layer: list[tuple[_Pattern, StoredFormat]]
    dialect: Dialect
    statistics: LayerStatistics | None = None
    picked: dict[tuple[str, str], str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise for a layout that no file holds, a format that needs calibration, and an unknown solver."""
        for wanted in (self.stored, *(stored for _, stored in self.by_layer)):
            wanted.check_stored()
            fmt = wanted.format
            if fmt.plain != fmt and self.statistics is None:
                raise PlanError(
                    f"{fmt}: has a pre_quant_scale or input_scale, which needs calibration; calibrate (lowbit "
                    "calibrate) and give the file with --stats, or leave it out"
                )
            pick_solver(self.solver, fmt, "full")

    def match(self, name: str) -> tuple[_Pattern | None, _Pattern | None, tuple[_Pattern, StoredFormat] | None]:
        """The keep and only patterns and the layer rule that hold for a name; all are tried, to learn which match."""
        kept = [pattern for pattern in self.keep if pattern.matches(name)]
        only = [pattern for pattern in self.only if pattern.matches(name)]
        rules = [(pattern, stored) for pattern, stored in self.by_layer if pattern.matches(name)]
        return kept[0] if kept else None, only[0] if only else None, rules[0] if rules else None

    def pick(self, fmt: Format, layer: str, *, has_bias: bool) -> str:
        """The solver for a layer in a format, noted for the plan."""
        known = knowledge(self.statistics, layer)
        if fmt.plain != fmt and not known:
            raise PlanError(
                f"{layer!r}: {fmt} needs to know the layer's input, and there are no statistics of it; calibrate it, "
                "or keep it (--keep) or give it another format (--layer)"
            )
        name, why = pick_solver(self.solver, fmt, known, has_bias=has_bias)
        if self.statistics is not None and known != "full" and parse_pipeline(name).steps:
            # A table of embeddings has no input to measure; refusing it would make the solver useless for the rest.
            name, why = pick_solver(AUTO, fmt, known, has_bias=has_bias)
            why = f"{self.solver} needs second moments, which are not known of some layers; {why}"
        self.picked[fmt.spec, name] = f"{fmt}: solver {name} ({why})"
        return name

    def fit(self, stored: StoredFormat, layer: str) -> tuple[StoredFormat, str]:
        """The variant of a format that suits a layer's input, and the reason to add where it is another one."""
        smallest = None if self.statistics is None else self.statistics.smallest(layer)
        if smallest is None or (fitted := stored.format.fitted_to(smallest)) == stored.format:
            return stored, ""
        return replace(stored, format=fitted), f"; its input is never below {smallest:.3g}"

    def spelled(self, stored: StoredFormat, layer: str, spec: TensorSpec) -> StoredFormat:
        """The form of a format that the dialect writes, where it holds the same codes in several."""
        shape = (spec.shape[0], spec.shape[1])
        for fmt in (stored.format, *stored.format.equivalents()):
            if self.dialect.refuses(StoredLayer(layer, fmt, shape, spec.dtype, layout=stored.layout)) is None:
                return replace(stored, format=fmt)
        return stored

    def notes(self) -> Iterable[str]:
        """Which solver was taken for which format."""
        return self.picked.values()

    def refuse_unused(self, components: Iterable[ComponentPlan]) -> None:
        """A pattern that matches nothing is a typing error until shown otherwise."""
        for pattern in (*self.keep, *self.only, *(pattern for pattern, _ in self.by_layer)):
            if not pattern.used:
                names = [
                    _full_name(part.name, t.layer) for part in components for t in part.tensors if len(t.shape) == 2
                ]
                example = f"; a layer's name is, for example, {names[len(names) // 2]!r}" if names else ""
                raise PlanError(f"--{pattern.option} {pattern.text!r} matches no layer{example}; correct the pattern")


def _refuse_quantized(held: QuantizedComponent) -> None:
    layer = next(iter(held.layers.values()))
    raise PlanError(
        f"{layer.place}: is quantized already ({layer.format}), with {len(held.layers) - 1} more layers of this file; "
        "converting it again would add a second loss. Start from the 16-bit file, or ask for it with "
        "requantize (--requantize)"
    )


def _plan_component(
    component: Component, held: QuantizedComponent, rules: _Rules, preset: str, *, drop: bool
) -> ComponentPlan:
    chosen, why = _choose_preset(preset, list(component.tensors))
    bound = chosen.bind(list(component.tensors), allow_drop=drop)
    owner = {key: stored for stored in held.layers.values() for key in stored.keys.values()}
    container = set(held.found.container)
    biases = frozenset(key for key, spec in held.specs.items() if key.endswith(".bias") and len(spec.shape) == 1)
    names = _Naming(component.name, bound, biases, by_name=preset != "none")
    weights = {
        stored.layer: _decide(
            join_key(stored.layer, "weight"),
            TensorSpec(stored.dtype, stored.shape),
            names,
            rules,
            was=stored.format.spec,
            key=stored.keys["qdata"],
        )
        for stored in held.layers.values()
    }
    stays = any(weight.action == "keep" for weight in weights.values())
    tensors = []
    for key, spec in held.specs.items():
        if key in container and not stays:
            tensors.append(_tensor(key, spec, "drop", "describes the old format, which no layer has any more"))
        elif key in owner:
            tensors.append(_part_of(key, spec, owner[key], weights[owner[key].layer]))
        else:
            tensors.append(_decide(key, spec, names, rules))
    return ComponentPlan(component.name, tuple(tensors), chosen.name, why)


@dataclass(frozen=True)
class _Naming:
    """What names say: the component, its biases, and the preset's opinion unless the user wants none."""

    component: str
    preset: BoundPreset
    biases: frozenset[str]
    by_name: bool


def _choose_preset(preset: str, keys: list[str]) -> tuple[Preset, str]:
    if preset == "none":
        return GENERIC, "none: no layer is kept for its name"
    if preset == "auto":
        found = detect_preset(keys)
        if found is None:
            return GENERIC, "no model family is recognized by the names of the tensors"
        return found, f"{found.title}, by the names of the tensors"
    return get_preset(preset), "as asked"


def _part_of(key: str, spec: TensorSpec, stored: StoredLayer, weight: TensorPlan) -> TensorPlan:
    """The plan for a tensor of a layer that is quantized already: all of its tensors go one way."""
    if weight.action != "quantize":
        return _tensor(key, spec, weight.action, f"already quantized ({stored.format}); {weight.why}")
    if key == stored.keys["qdata"]:
        return weight
    return _tensor(key, spec, "drop", f"belongs to {stored.layer!r} as {stored.format}, which is converted again")


def _decide(name: str, spec: TensorSpec, names: _Naming, rules: _Rules, was: str = "", key: str = "") -> TensorPlan:
    """The plan for one tensor, by the order in this module's docstring. `key`: its own, where that is not its name."""
    weight, key = name, key or name
    layer = layer_of(weight)
    name = _full_name(names.component, weight if layer is None else layer)
    keep, only, rule = rules.match(name)
    opinion = names.preset.decide(weight if layer is None else layer) if names.by_name else None
    if opinion is not None and opinion.action == "drop":
        return _tensor(key, spec, "drop", opinion.why)
    why = cannot_hold(weight, spec)
    if why is None and keep is not None:
        why = f"matches --keep {keep.text!r}"
    if why is None and rule is None:
        if rules.only and only is None:
            why = "matches no --only pattern"
        elif opinion is not None and opinion.action == "keep":
            why = opinion.why
        else:
            why = better_left(spec.shape)
    stored = rules.stored if rule is None else rule[1]
    if why is None:
        why = cannot_store(stored, spec.shape, embedding=names.preset.is_embedding(layer or ""))
    if why is not None:
        return _tensor(key, spec, "keep", why)
    because = "the format for all weights" if rule is None else f"matches --layer {rule[0].text!r}"
    stored, also = rules.fit(stored, name)
    stored = rules.spelled(stored, layer or "", spec)
    has_bias = join_key(layer or "", "bias") in names.biases
    solver = rules.pick(stored.format, name, has_bias=has_bias)
    foreign = {} if key == weight else {"name": layer or ""}
    return _tensor(key, spec, "quantize", because + also, format=stored.spec, solver=solver, was=was, **foreign)


def _tensor(key: str, spec: TensorSpec, action: str, why: str, **more: str) -> TensorPlan:
    return TensorPlan(key, action, why, spec.shape, dtype_name(spec.dtype), **more)


def _full_name(component: str, layer: str) -> str:
    return f"{component}/{layer}" if component else layer
