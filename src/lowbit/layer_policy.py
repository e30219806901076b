"""Which format each layer of a module gets: one for all that can hold it, or by rules on the layers' names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lowbit.errors import PlanError, WeightError
from lowbit.formats.base import Format
from lowbit.formats.parts import FLOATS
from lowbit.formats.registry import as_format
from lowbit.layer_kinds import Layer, kind_refusal, matrix_shape, quantizable_layers, quantized_layers
from lowbit.tensor import QuantizedTensor

Policy = Format | str | Mapping[str, Format | str | None]
_UNNAMED = "no rule names it"


@dataclass(frozen=True)
class LayerChange:
    """What `quantize_` did with one layer: its format, or why it was kept."""

    name: str
    format: Format | None
    why: str


def decide_formats(module: nn.Module, policy: Policy) -> list[tuple[Layer, LayerChange]]:
    """What `quantize_` is to do with each layer of `module` (or with `module` itself) that is not quantized yet.

    Raises `FormatError`, `PlanError` or `WeightError` where there is no such layer, or where a rule cannot be followed.
    """
    layers = list(quantizable_layers(module))
    if not layers:
        raise PlanError(_nothing_to_quantize(module))
    if isinstance(policy, Mapping):
        _refuse_unused(module, policy, [name for name, _ in layers])
    decided = [(layer, _decide(name, layer, policy)) for name, layer in layers]
    return _keep_ties(module, decided, by_rules=isinstance(policy, Mapping))


def _nothing_to_quantize(module: nn.Module) -> str:
    kind = type(module).__name__
    done = next(quantized_layers(module), None)
    if done is None:
        return f"{kind} has no nn.Linear or nn.Embedding, nor a convolution, to quantize; pass a module that has"
    name, layer = done
    assert isinstance(layer.weight, QuantizedTensor)  # `quantized_layers` gave it
    return (
        f"{kind}: every layer that can be is quantized already ({name or 'weight'}: {layer.weight.format}), and doing "
        "it again would add a second loss; start from the module with plain weights"
    )


def _refuse_unused(module: nn.Module, policy: Mapping[str, object], names: Sequence[str]) -> None:
    """A pattern that matches nothing is a typing error until shown otherwise."""
    done = [name or "weight" for name, _ in quantized_layers(module)]
    for pattern, spec in policy.items():
        if any(_matches(pattern, name) for name in names):
            continue
        if not any(_matches(pattern, name) for name in done):
            raise PlanError(
                f"the rule {pattern!r} matches no layer; correct it (a layer's name is, for example, "
                f"{names[len(names) // 2]!r})"
            )
        if spec is not None:  # to keep what is quantized already is no contradiction
            raise PlanError(f"the rule {pattern!r} matches only layers that are quantized already; leave it out")


def _decide(name: str, layer: Layer, policy: Policy) -> LayerChange:
    if isinstance(policy, Mapping):
        for pattern, spec in policy.items():
            if _matches(pattern, name):
                if spec is None:
                    return LayerChange(name, None, f"kept by the rule {pattern!r}")
                fmt = as_format(spec)
                why = _refusal(layer, fmt)
                if why:
                    raise WeightError(
                        f"{name}: {why}; the rule {pattern!r} asks for {fmt}: change it or keep the layer"
                    )
                return LayerChange(name, fmt, f"rule {pattern!r}")
        return LayerChange(name, None, _UNNAMED)
    fmt = as_format(policy)
    why = _refusal(layer, fmt)
    return LayerChange(name, None if why else fmt, why or "all layers")


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise PlanError(f"the rule {pattern!r} is no regular expression: {error}; correct it") from error


def _keep_ties(
    module: nn.Module, decided: list[tuple[Layer, LayerChange]], *, by_rules: bool
) -> list[tuple[Layer, LayerChange]]:
    """The changes without those that would part what shares a weight. Raises `PlanError` where rules ask for that."""
    changes = {id(layer): change for layer, change in decided}
    owners: dict[int, list[tuple[str, LayerChange | None]]] = {}
    for name, owner in module.named_modules():
        for attribute, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            change = changes.get(id(owner)) if attribute == "weight" else None
            full = change.name if change else f"{name}.{attribute}".removeprefix(".")
            owners.setdefault(id(parameter), []).append((full, change))
    return [(layer, _kept_for_ties(layer, change, owners, by_rules=by_rules)) for layer, change in decided]


def _kept_for_ties(
    layer: Layer, change: LayerChange, owners: Mapping[int, list[tuple[str, LayerChange | None]]], *, by_rules: bool
) -> LayerChange:
    """The change of a layer, or that it is kept as others that share its weight cannot follow it."""
    if change.format is None:
        return change
    others = [(name, other) for name, other in owners[id(layer.weight)] if other is not change]
    apart = [(name, other) for name, other in others if other is None or other.format != change.format]
    if not apart:
        return change
    name, other = apart[0]
    why = "which is not the weight of a layer" if other is None else other.why
    if by_rules and (other is None or other.format is not None or other.why == _UNNAMED):
        raise PlanError(
            f"{change.name}: shares its weight with {name} ({why}), and would be parted from it by the {change.why}; "
            "give both one format, or untie them first"
        )
    return LayerChange(change.name, None, f"shares its weight with {name}: {why}")


def _refusal(layer: Layer, fmt: Format) -> str | None:
    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    if weight is None:
        return "its weight is computed from other parameters (a parametrization); remove that first"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight has no shape yet (a lazy module); run the module once first"
    if weight.dtype not in (*FLOATS, torch.float64):
        kind = str(weight.dtype).removeprefix("torch.")
        return f"its weight is {kind}, not float of 16 bits or more"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "it renormalizes its rows in place at every lookup (max_norm)"
    unsuited = kind_refusal(layer, fmt)
    if unsuited is not None:
        return unsuited
    if not fmt.encodable:
        return f"{fmt} is only read: nothing is rounded to it here"
    n, k = matrix_shape(layer)
    why = fmt.check_shape(n, k)
    return f"[{n}, {k}] {why}" if why else None
