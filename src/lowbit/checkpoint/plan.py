"""Making a plan: which format every weight gets, and for the rest the reason why it stays.

The first that applies decides: what a preset drops; what no format can hold; a `keep` pattern; a layer rule; `only`;
the preset; the size. A layer rule therefore overrides the preset and the size, and nothing overrides what cannot be
stored. Patterns are regular expressions searched for in the layer's name (in a pipeline of several models,
"<model>/<layer>").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lowbit.errors import PlanError
from lowbit.formats.base import Format
from lowbit.solvers import AUTO

from . import shared_low_rank as shared
from .cast_weights import not_to_be_had, unknown_scales
from .dialects import StoredLayer, TensorSpec, written_dialect
from .dialects.base import join_key, layer_of
from .eligibility import axes_of, better_left, cannot_hold, cannot_store, dtype_name, not_by_default
from .input_scales import InputScales
from .layer_statistics import LayerStatistics
from .plan_data import ComponentPlan, Plan, TensorPlan
from .plan_rules import FULL_PRECISION, TURNED_BANKS, Pattern, Rules, full_name, patterns
from .presets import GENERIC, BoundPreset, Preset, detect_preset, get_preset
from .quantized_source import QuantizedComponent, look_for_layers
from .source import Component, Source
from .stored_format import StoredFormat
from .weight_shape import (
    WeightShape,
    lacks_lookup,
    lacks_place,
    plain_key,
    plain_shape,
    value_dtype,
    weight_shape,
)

__all__ = ["ComponentPlan", "Plan", "TensorPlan", "choose_preset", "make_plan", "with_shared_low_rank"]

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
    convolutions: bool = False,
    bank_transposed: Sequence[str] = (),
    share_low_rank: bool = False,
    full_precision: Sequence[str] = (),
    input_scales: InputScales | None = None,
    input_percentile: float | None = None,
) -> Plan:
    """Decide what becomes of every tensor of `source`; reads headers and markers only.

    `format`: a format or spec for all weights that nothing below excepts; behind the spec may stand "@" and a layout.
    `solver`: a solver's name, or "auto". `preset`: a model family's name, "auto" to detect it by the names of the
    tensors, "none" for no exceptions by name. `drop`: leave out what the preset says is not needed (a text encoder's
    decoder), instead of keeping or converting it. `keep`, `only`: patterns of layers to leave alone, and of the only
    ones to consider. `layer_rules`: (pattern, format) pairs, the first match wins. `requantize`: convert quantized
    layers again, with the loss of both. `statistics`: what calibration saw; "auto" then takes calibrated solvers.
    `convolutions`: quantize their kernels, too, which otherwise only a layer rule does. `bank_transposed`: patterns of
    banks of experts that are [E, K, N]; all others are taken for [E, N, K], as transformers documents.
    `share_low_rank`: layers of svdquant_w4a4 that read the same input get one smooth_factor and one proj_down.
    `full_precision`: patterns of layers whose marker says full_precision_matrix_mult: no runtime may quantize their
    activations (comfy; fp8, mxfp8 and nvfp4). `input_scales`: the static scales of inputs that formats with
    `input_scale=true` store, as they are; those of other layers are found from the statistics and cover
    `input_percentile` of the input's elements, a fraction (by default 0.9999).

    Raises:
        PlanError: a pattern is wrong or matches nothing, the source is quantized already, the preset is unknown.
        FormatError, SolverError: the format, a rule's format or the solver is wrong.
    """
    rules = Rules(
        by_layer=[(Pattern("layer", text), StoredFormat.parse(spec)) for text, spec in layer_rules],
        keep=patterns("keep", keep),
        only=patterns("only", only),
        turned_banks=patterns(TURNED_BANKS, bank_transposed),
        stored=StoredFormat.parse(format),
        dialect=written_dialect(dialect),
        full_precision=patterns(FULL_PRECISION, full_precision),
        solver=solver,
        statistics=statistics,
        convolutions=convolutions,
        requantize=requantize,
        input_scales=input_scales,
        input_percentile=input_percentile,
    )
    rules.check()
    components = []
    for component in source.components:
        held = look_for_layers(source, component)
        if held.layers and not requantize:
            _refuse_quantized(held)
        components.append(_plan_component(component, held, rules, preset, drop=drop))
    rules.refuse_unused(components)
    rules.refuse_unused_scales(components)
    place = source.place
    plan = Plan(tuple(components), dialect, str(place), tuple(rules.notes()))
    return with_shared_low_rank(plan, statistics) if share_low_rank else _valid(plan)


def with_shared_low_rank(plan: Plan, statistics: LayerStatistics | None = None) -> Plan:
    """The plan in which layers with the same input share (`shared_low_rank`). Raises `PlanError` when none do."""
    components = tuple(
        replace(component, tensors=shared.share_low_rank(component.name, component.tensors, statistics))
        for component in plan.components
    )
    groups = {
        full_name(component.name, name): group
        for component in components
        for name, group in shared.groups_of(component.tensors).items()
    }
    return _valid(replace(plan, components=components, notes=(*plan.notes, *shared.notes(groups))))


def _valid(plan: Plan) -> Plan:
    plan.validate()
    return plan


def _refuse_quantized(held: QuantizedComponent) -> None:
    layer = next(iter(held.layers.values()))
    raise PlanError(
        f"{layer.place}: is quantized already ({layer.format}), with {len(held.layers) - 1} more layers of this file; "
        "converting it again would add a second loss. Start from the 16-bit file, or ask for it with "
        "requantize (--requantize)"
    )


def _plan_component(
    component: Component, held: QuantizedComponent, rules: Rules, preset: str, *, drop: bool
) -> ComponentPlan:
    chosen, why = choose_preset(preset, list(component.tensors))
    bound = chosen.bind(list(component.tensors), allow_drop=drop)
    owner = {key: stored for stored in held.layers.values() for key in stored.keys.values()}
    container = set(held.found.container)
    biases = frozenset(key for key, spec in held.specs.items() if key.endswith(".bias") and len(spec.shape) == 1)
    scales = unknown_scales(held.found.plain, held.specs)
    names = _Naming(component.name, bound, biases, scales, by_name=preset != "none")
    weights = {
        stored.layer: _decide(plain_key(stored), TensorSpec(stored.dtype, plain_shape(stored)), names, rules, stored)
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
    """What names say: the component, its biases, and the preset's opinion unless the user wants none.

    `scales`: by layer the key of what may be the scale of a weight of 8-bit floats, in a spelling that no dialect has.
    """

    component: str
    preset: BoundPreset
    biases: frozenset[str]
    scales: Mapping[str, str]
    by_name: bool


def choose_preset(preset: str, keys: list[str]) -> tuple[Preset, str]:
    """The family of a name, or the one that "auto" finds by the names of the tensors, and why that one.

    Raises `PlanError` for an unknown name.
    """
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


def _decide(name: str, spec: TensorSpec, names: _Naming, rules: Rules, was: StoredLayer | None = None) -> TensorPlan:
    """The plan for one tensor, by the order in this module's docstring. `was`: as the source holds it quantized."""
    key = name if was is None else was.keys["qdata"]
    layer = layer_of(name)
    full = full_name(names.component, name if layer is None else layer)
    weight = weight_shape(was) if was is not None else WeightShape(spec.shape, axes_of(name, spec.shape))
    family = names.preset.preset.name if names.by_name and names.preset.is_transposed_bank(layer or name) else ""
    weight, said = rules.oriented(weight, full, family) if was is None else (weight, "")
    keep, only, rule = rules.match(full)
    opinion = names.preset.decide(name if layer is None else layer) if names.by_name else None
    is_table = names.preset.is_embedding(layer or "")
    if opinion is not None and opinion.action == "drop":
        return _tensor(key, spec, "drop", opinion.why)
    unfit = not_to_be_had(spec, names.scales.get(name) if was is None else None)
    unfit = unfit or cannot_hold(name, spec, requantize=rules.requantize)
    why = unfit
    if why is None and keep is not None:
        why = f"matches --keep {keep.text!r}"
    if why is None and rule is None:
        if rules.only and only is None:
            why = "matches no --only pattern"
        elif opinion is not None and opinion.action == "keep":
            why = opinion.why
        else:
            why = _better_left(name, weight, rules, was)
        if why is None and is_table and was is None:
            why = lacks_lookup(rules.dialect)
    stored = rules.stored if rule is None else rule[1]
    if why is None:
        why = cannot_store(stored, weight, embedding=is_table)
    if why is not None:
        return _tensor(key, spec, "keep", why, axes=weight.axes if unfit is None else "")
    because = "the format for all weights" if rule is None else f"matches --layer {rule[0].text!r}"
    plan = _tensor(key, spec, "quantize", because + said, axes=weight.axes)
    if was is not None:
        if is_table and rule is None and (misread := lacks_lookup(rules.dialect)):
            rules.doubts.append(
                f"{full}: is a quantized {misread}; a --layer rule for it, or the 16-bit file, settles it"
            )
        plan = replace(plan, was=was.format.spec, name="" if key == name else was.layer)
    has_bias = join_key(layer or "", "bias") in names.biases
    family = names.preset.preset.name if has_bias and names.by_name and names.preset.follows_gelu(layer or "") else ""
    return _as_wanted(plan, stored, full, rules, was, has_bias=has_bias, is_table=is_table, after_gelu=family)


def _as_wanted(
    plan: TensorPlan,
    stored: StoredFormat,
    name: str,
    rules: Rules,
    was: StoredLayer | None,
    *,
    has_bias: bool,
    is_table: bool,
    after_gelu: str,
) -> TensorPlan:
    """The plan of a weight with its format and its solver.

    `was`: as the source holds it quantized. `after_gelu`: the preset by which its input is what a GELU gave, or "".
    """
    layer = StoredLayer(
        plan.layer, stored.format, plan.weight.matrix, value_dtype(plan.spec.dtype), layout=stored.layout,
        options=plan.weight.options(),
    )  # fmt: skip
    rotation = ""
    if stored.is_name and not is_table:
        turned, rotation = rules.rotated(layer, plan.weight, was)
        layer = replace(layer, format=turned)
    fitted, also = rules.fit(layer, name, stored.given, after_gelu)
    also = rotation + also
    stored = rules.spelled(replace(stored, format=fitted), layer)
    rules.note_dtype(replace(layer, format=stored.format))
    solver = rules.pick(stored.format, name, has_bias=has_bias)
    options = rules.options(stored.format, name, was)
    also += f"; {options}" if options else ""
    scale, covered = rules.static_scale(stored.format, name)
    plan = replace(plan, input_scale=scale, input_percentile=covered)
    return replace(plan, why=plan.why + also, format=stored.spec, solver=solver, options=options)


def _better_left(name: str, weight: WeightShape, rules: Rules, was: StoredLayer | None) -> str | None:
    """Why a weight that could be stored is left alone unless a rule names it, or None."""
    if was is not None:  # somebody wanted it quantized
        return better_left(weight.shape)
    why = not_by_default(name, weight, convolutions=rules.convolutions)
    return why or (lacks_place(rules.dialect, weight) if weight.is_bank else None)


def _tensor(key: str, spec: TensorSpec, action: str, why: str, *, axes: str = "") -> TensorPlan:
    return TensorPlan(key, action, why, spec.shape, dtype_name(spec.dtype), axes=axes)
