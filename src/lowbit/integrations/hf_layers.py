"""What the integrations of Hugging Face libraries share: choosing formats by rules, and quantized weights as tensors.

Those libraries make a module first, without values, and then bring its weights one at a time. So what becomes of each
layer is decided on the empty module (`choose_formats`), a weight is quantized when it arrives (`quantized_parameter`),
and a module's state is written as a dialect stores it (`flat_state`). `hf_files.py` is the way back.

Only the weights of `nn.Linear`, `nn.Embedding` and the `Conv1D` of transformers (a linear whose weight is [K, N]) are
quantized here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lowbit.checkpoint.dialects import StoredLayer, TensorSpec, get_dialect
from lowbit.checkpoint.dialects.base import join_key
from lowbit.checkpoint.eligibility import better_left, cannot_hold, cannot_store
from lowbit.checkpoint.load import OPTIONS
from lowbit.checkpoint.presets import GENERIC, BoundPreset, detect_preset, get_preset
from lowbit.checkpoint.stored_format import StoredFormat
from lowbit.checkpoint.weight_shape import TURNED, WeightShape
from lowbit.errors import CheckpointError, PlanError, WeightError
from lowbit.experts.bank import QuantizedBank
from lowbit.formats import Format
from lowbit.layer_kinds import is_conv1d, matrix_shape
from lowbit.nn import repack_weights
from lowbit.solvers import AUTO, solve
from lowbit.tensor import AUTO as AUTO_LAYOUT, QuantizedTensor

KEEP = "keep"
Matrix = nn.Linear | nn.Embedding  # or a Conv1D, which need not be installed
KINDS = "nn.Linear, nn.Embedding or Conv1D"


@dataclass(frozen=True)
class LayerRules:
    """What a user asks for.

    format: for every layer that nothing below excepts. rules: (pattern, format or None to keep), the first whose
    regular expression is found in a layer's name wins. keep: names of modules to leave alone, whole or from a dot to a
    dot ("lm_head", "layers.0"). preset: as in `lowbit convert`: a model family, "auto" or "none".
    """

    format: Format
    rules: tuple[tuple[str, Format | None], ...] = ()
    keep: tuple[str, ...] = ()
    preset: str = "auto"


@dataclass(frozen=True)
class LayerChoice:
    """What becomes of one layer: its format, or None and why it is kept. `asked`: a rule says so, or `keep`."""

    name: str
    format: Format | None
    why: str
    asked: bool = False


# ---- choosing -------------------------------------------------------------------------------------------------------


def choose_formats(
    module: nn.Module, rules: LayerRules, *, ties: Mapping[str, str] | None = None, heads: Collection[str] = ()
) -> dict[str, LayerChoice]:
    """Decide what becomes of every linear and embedding of a module, which may be on the meta device, by name.

    The first that applies decides: `rules.keep`; a rule; a head (`heads`: names that are kept like the layers a preset
    names); the preset; fewer than 4096 weights. `ties`: layer -> the layer whose weight it shares; where one is kept,
    both are, and a rule for one holds for both.

    Raises `PlanError` for a pattern that is none or matches no layer, and for rules that would part a shared weight;
    `WeightError` for a rule whose format cannot hold the layer.
    """
    bound = _bind(rules.preset, [join_key(name, "weight") for name in _weights(module)])
    patterns = [(_compiled(pattern), fmt) for pattern, fmt in rules.rules]
    names = [re.compile(rf"(?:^|\.){re.escape(name)}(?:\.|$)") for name in rules.keep]
    chosen = {}
    for name, layer in _layers(module):
        kept = next((entry for entry, found in zip(rules.keep, names, strict=True) if found.search(name)), None)
        rule = next(((found, fmt) for found, fmt in patterns if found.search(name)), None)
        if kept is not None:
            chosen[name] = LayerChoice(name, None, f"modules_to_not_convert names {kept!r}", asked=True)
        elif rule is not None:
            chosen[name] = _by_rule(name, layer, *rule)
        else:
            chosen[name] = _by_default(name, layer, rules.format, bound, heads)
    _refuse_unused(rules, patterns, names, list(chosen))
    return _with_ties(chosen, ties or {})


def need_chosen(module: nn.Module, choices: Mapping[str, LayerChoice]) -> None:
    """Raise `PlanError` unless a layer of a module is to be quantized."""
    if not any(choice.format for choice in choices.values()):
        first = next(iter(choices.values()))
        raise PlanError(
            f"{type(module).__name__}: no layer of the model is to be quantized ({first.name}: {first.why}); choose "
            "another format, or load it without a quantization config"
        )


def _layers(module: nn.Module) -> Iterator[tuple[str, Matrix]]:
    """The linears and embeddings that have a weight of their own, by name."""
    for name, layer in module.named_modules():
        if is_matrix_layer(layer) and "weight" in layer._parameters:  # noqa: SLF001  (a parametrized one has none)
            yield name, layer


def is_matrix_layer(module: nn.Module) -> TypeGuard[Matrix]:
    """Whether a module's weight is one of those that are quantized here."""
    return isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module)


def _weights(module: nn.Module) -> list[str]:
    """The names of all modules with a weight: what presets recognize a family by."""
    return [name for name, owner in module.named_modules() if isinstance(getattr(owner, "weight", None), Tensor)]


def _bind(preset: str, keys: Sequence[str]) -> BoundPreset | None:
    if preset == "none":
        return None
    found = detect_preset(keys) or GENERIC if preset == AUTO else get_preset(preset)
    return found.bind(keys)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise PlanError(f"the rule {pattern!r} is no regular expression: {error}; correct it") from error


def _refusal(name: str, layer: Matrix, fmt: Format) -> str | None:
    """Why a format cannot hold a layer's weight, or None."""
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "it renormalizes its rows in place at every lookup (max_norm)"
    spec = TensorSpec(layer.weight.dtype, matrix_shape(layer))
    return cannot_hold(join_key(name, "weight"), spec) or cannot_store(
        StoredFormat(fmt), WeightShape(spec.shape), embedding=isinstance(layer, nn.Embedding)
    )


def _by_rule(name: str, layer: Matrix, pattern: re.Pattern[str], fmt: Format | None) -> LayerChoice:
    if fmt is None:
        return LayerChoice(name, None, f"kept by the rule {pattern.pattern!r}", asked=True)
    if why := _refusal(name, layer, fmt):
        raise WeightError(f"{name}: {why}; the rule {pattern.pattern!r} asks for {fmt}: change it or keep the layer")
    return LayerChoice(name, fmt, f"rule {pattern.pattern!r}", asked=True)


def _by_default(
    name: str, layer: Matrix, fmt: Format, bound: BoundPreset | None, heads: Collection[str]
) -> LayerChoice:
    if bound is not None and name in heads:
        return LayerChoice(name, None, "It is the head of the model, where an error changes the answer.")
    opinion = bound.decide(name) if bound is not None else None
    if opinion is not None and opinion.action == "keep":
        return LayerChoice(name, None, opinion.why)
    why = better_left(matrix_shape(layer)) or _refusal(name, layer, fmt)
    return LayerChoice(name, None, why) if why else LayerChoice(name, fmt, "the format for all weights")


def _refuse_unused(
    rules: LayerRules,
    patterns: Sequence[tuple[re.Pattern[str], Format | None]],
    names: Sequence[re.Pattern[str]],
    layers: Sequence[str],
) -> None:
    """A pattern that matches nothing is a typing error until shown otherwise; a module to keep may be of any kind."""
    if not layers:
        raise PlanError(
            "the model has no nn.Linear, nn.Embedding or Conv1D to quantize; load it without a quantization config"
        )
    for pattern, _ in patterns:
        if not any(map(pattern.search, layers)):
            raise PlanError(
                f"the rule {pattern.pattern!r} matches no layer; correct it (a layer's name is, for example, "
                f"{layers[len(layers) // 2]!r})"
            )


def _with_ties(chosen: dict[str, LayerChoice], ties: Mapping[str, str]) -> dict[str, LayerChoice]:
    """The choices with one for all layers that share a weight."""
    groups: dict[str, list[LayerChoice]] = {}
    for name, choice in chosen.items():
        groups.setdefault(ties.get(name, name), []).append(choice)
    made = dict(chosen)
    for group in groups.values():
        asked = [choice for choice in group if choice.asked]
        if len({choice.format for choice in asked}) > 1:
            raise PlanError(
                f"{asked[0].name} ({asked[0].why}) and {asked[1].name} ({asked[1].why}) share one weight; give both "
                "one format, or untie them (tie_word_embeddings) first"
            )
        decisive = asked[0] if asked else next((c for c in group if c.format is None), group[0])
        for choice in group:
            if choice.format != decisive.format:
                why = f"shares its weight with {decisive.name}: {decisive.why}"
                made[choice.name] = LayerChoice(choice.name, decisive.format, why)
    return made


# ---- weights --------------------------------------------------------------------------------------------------------


def quantized_parameter(
    weight: Tensor, fmt: Format, solver: str = AUTO, *, where: str = "weight", transposed: bool = False
) -> nn.Parameter:
    """A weight [N, K] as a frozen parameter that is a `QuantizedTensor`, of its shape and dtype, on its device.

    `transposed`: the weight is [K, N], that of a `Conv1D`. Raises `WeightError` naming `where`, or `SolverError` for a
    solver that needs statistics.
    """
    matrix = weight.detach().t() if transposed else weight.detach()
    try:
        solution = solve(matrix, fmt, solver, where=where)
    except WeightError as error:
        raise error if str(error).startswith(where) else WeightError(f"{where}: {error}") from error
    n, k = matrix.shape
    shape = tuple(weight.shape)
    quantized = QuantizedTensor(solution.parts, fmt, shape, weight.dtype, matrix=(n, k), transposed=transposed)
    return nn.Parameter(quantized, requires_grad=False)


def repack_loaded_(module: nn.Module) -> None:
    """Pack the weights of a model that has been loaded for the kernels on their devices, one at a time.

    Weights on the CPU that are to be used elsewhere stay plain: those of a model that is spread over several devices,
    where they are offloaded, and those of one for which nobody named a device on a machine with an accelerator. There
    `lowbit.repack_` packs them.
    """
    places = {str(place) for place in getattr(module, "hf_device_map", {}).values()}
    stay = places == {"cpu"} if places else not torch.accelerator.is_available()
    weights = [weight for weight in module.parameters() if isinstance(weight, QuantizedTensor)]
    chosen = {id(weight) for weight in weights if stay or weight.device.type != "cpu"}
    for _ in repack_weights(module, AUTO_LAYOUT, chosen):
        pass


def flat_state(
    module: nn.Module, dialect: str = "comfy", *, ties: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """A module's state dict with every quantized weight as the tensors that a dialect stores for it.

    A weight that layers share is stored once, under the name that is no key of `ties` (parameter -> the parameter it
    takes its value from). Raises `CheckpointError` for a quantized tensor that cannot be stored: a view, or no layer's
    weight.
    """
    chosen, state, shared = get_dialect(dialect), module.state_dict(keep_vars=True), ties or {}
    flat: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in sorted(state, key=lambda name: name in shared):  # owners first, otherwise in order
        value: Any = state[name]  # what a module returns as its extra state may be anything
        if isinstance(value, QuantizedBank):
            raise CheckpointError(f"{name}: is a quantized bank of experts; save the model with lowbit.save")
        if not isinstance(value, QuantizedTensor):
            flat[name] = value.detach() if isinstance(value, Tensor) else value
        elif id(value) not in seen:
            seen.add(id(value))
            flat |= chosen.store_parts(_stored_layer(module, name, value), value.in_layout("").parts)
    return flat


def _stored_layer(module: nn.Module, name: str, weight: QuantizedTensor) -> StoredLayer:
    layer_name, _, attribute = name.rpartition(".")
    layer = module.get_submodule(layer_name)
    if attribute != "weight" or not is_matrix_layer(layer):
        raise CheckpointError(f"{name}: only the weight of an {KINDS} is saved quantized; use lowbit.save")
    if weight.matrix != matrix_shape(layer) or weight.transposed != is_conv1d(layer):
        raise CheckpointError(f"{name}: is a view of a quantized matrix; save the whole matrix")
    loaded_as, options = getattr(layer, OPTIONS, ("", {}))
    dtypes = {key: part.dtype for key, part in weight.in_layout("").parts.items()}
    kept: dict[str, Any] = options if loaded_as == weight.format.name else {}  # else it was quantized anew since
    turned = {TURNED: True} if weight.transposed else {}  # files hold matrices [N, K]
    return StoredLayer(
        layer_name, weight.format, weight.matrix, weight.dtype, options={**kept, **turned}, dtypes=dtypes
    )


def dequantize_module_(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Put plain weights in place of the quantized ones, in `dtype` or each in its own; shared ones stay shared.

    A bias that contains the share of a format's activation shift gets that share back.
    """
    made: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if isinstance(parameter, QuantizedBank):
                setattr(owner, name, nn.Parameter(parameter.dequantize(dtype)))
        weight: Any = owner._parameters.get("weight")  # noqa: SLF001  (of every kind of module)
        if not isinstance(weight, QuantizedTensor):
            continue
        share, bias = weight.format.bias_share(weight.in_layout("").parts), getattr(owner, "bias", None)
        if share is not None and isinstance(bias, Tensor):
            restored = (bias.detach().float() + share).to(bias.dtype)
            owner.bias = nn.Parameter(restored, requires_grad=bias.requires_grad)
        if id(weight) not in made:
            made[id(weight)] = nn.Parameter(weight.dequantize(dtype))
        owner.weight = made[id(weight)]
        if hasattr(owner, OPTIONS):
            delattr(owner, OPTIONS)
    return module


def stored_bytes(module: nn.Module, *, buffers: bool = True) -> int:
    """Bytes that a module's parameters take, quantized ones through their parts; with its buffers or without."""
    held = [*module.parameters(), *(module.buffers() if buffers else ())]
    coded = QuantizedTensor | QuantizedBank
    return sum(t.nbytes_stored() if isinstance(t, coded) else t.numel() * t.element_size() for t in held)
