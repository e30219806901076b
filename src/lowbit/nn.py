"""Quantize the layers of a module in place, by one format or by rules.

A layer here is an `nn.Linear`, an `nn.Embedding`, an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, or the `Conv1D` of
transformers; its `weight` becomes a frozen parameter that is a `QuantizedTensor` of the same shape, so the layer's
class, name and forward stay as they are and adapters that look for `nn.Linear` still find it.

Formats store matrices [N, K] (`weight_matrix`): a kernel [O, I / groups, ...] is one with a row for each output
channel, the weight [K, N] of a `Conv1D` is the transpose of one. Convolutions are weight-only: the kernel is decoded in
bounded pieces, the input is never rounded.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from lowbit.errors import PlanError, WeightError
from lowbit.formats.base import Format, check_finite
from lowbit.formats.parts import FLOATS
from lowbit.formats.registry import as_format
from lowbit.numerics.groups import row_chunks
from lowbit.numerics.weight_marks import MarkedWeights, mark_of
from lowbit.solvers import AUTO, Solution, solve
from lowbit.solvers.base import Statistics
from lowbit.tensor import AUTO as AUTO_LAYOUT, QuantizedTensor, check_layout, choose_layout, repacked

Policy = Format | str | Mapping[str, Format | str | None]
_log = logging.getLogger("lowbit")
_UNNAMED = "no rule names it"
_CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d
_TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Layer = nn.Linear | nn.Embedding | _CONVOLUTIONS | _TRANSPOSED  # what `is_layer` accepts; Conv1D counts as linear
# Weights met before, by identity and spec; the original is held so that its identity is not given to another.
Shared = dict[tuple[int, str], tuple[Tensor, nn.Parameter, Solution]]


@dataclass(frozen=True)
class LayerChange:
    """What `quantize_` did with one layer: its format, or why it was kept."""

    name: str
    format: Format | None
    why: str


@dataclass(frozen=True)
class LayoutChange:
    """What `repack_` did with one weight: the layout it is in now ("" for plain parts), and why."""

    name: str
    layout: str
    why: str


def quantize_(
    module: nn.Module,
    policy: Policy,
    *,
    solver: str = AUTO,
    statistics: Mapping[str, Statistics] | None = None,
    layout: str = AUTO_LAYOUT,
) -> list[LayerChange]:
    """Quantize every linear, embedding and convolution of `module` (or `module` itself) in place.

    `policy` is a format or spec for all layers, or a mapping of regular expressions on the layer's name to a spec or
    None (keep); the first match wins and layers without one are kept; a pattern that matches none is an error. Under a
    single format, layers that it cannot hold are kept and reported; a rule that names a layer outright raises instead.
    `solver` and `statistics` (by layer name) as in `convert`, where a layer's smallest input also chooses between
    variants of a format (unsigned activations of svdquant_w4a4); `layout` as in `repack_`.

    Returns one `LayerChange` a layer. All weights are quantized before the first one is put in place: raises
    `FormatError`, `PlanError`, `SolverError` or `WeightError`, the last naming the layer, and leaves the module as it
    was. Layers that share a weight share the quantized one. Where one of them is kept, all are; rules that give them
    different formats, or name only some of them, are an error.

    >>> import torch, lowbit
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    >>> [change.name for change in lowbit.quantize_(model, "fp8_e4m3(granularity=row)")]
    ['0', '2']
    """
    check_layout(layout)
    layers = list(quantizable_layers(module))
    if not layers:
        raise PlanError(_nothing_to_quantize(module))
    if isinstance(policy, Mapping):
        _refuse_unused(module, policy, [name for name, _ in layers])
    decided = [(layer, _decide(name, layer, policy)) for name, layer in layers]
    decided = _keep_ties(module, decided, by_rules=isinstance(policy, Mapping))
    for layer, change in decided:
        if change.format is not None:
            _check_values(weight_matrix(layer), change.name)
    _warn_of_other_weights(decided, statistics)
    changes, made = _solve_all(decided, solver, statistics or {})
    for layer, weight, solution in made:
        _put(layer, weight, solution)
    for _ in repack_weights(module, layout, only={id(weight) for _, weight, _ in made}):
        pass
    return changes


def repack_(module: nn.Module, layout: str = AUTO_LAYOUT) -> list[LayoutChange]:
    """Repack every quantized weight of `module` in place, one at a time, for the kernels on the device it is on.

    `layout`: "auto" for what the kernels there prefer, "" or "plain" to undo it, or a layout's name, for the weights
    that fit it. Weights of convolutions have plain parts always. The parameters stay the same objects. Values do not
    change: a weight that a layout cannot hold exactly keeps its plain parts.

    `lowbit.load` and `quantize_` do this already. Call it after a module has been moved to another device, where
    weights arrive with plain parts if no kernel there reads the old layout.

    Returns one `LayoutChange` a weight. Raises `FormatError` for an unknown layout.
    """
    check_layout(layout)
    return list(repack_weights(module, layout))


def repack_weights(module: nn.Module, layout: str, only: Container[int] | None = None) -> Iterator[LayoutChange]:
    """As `repack_`, one weight each time the next change is asked for; `only`: the ids of the parameters to take."""
    owners: dict[int, list[nn.Module]] = {}
    names: dict[int, tuple[str, QuantizedTensor]] = {}
    for prefix, owner in module.named_modules():
        for attribute, weight in owner.named_parameters(recurse=False):
            if isinstance(weight, QuantizedTensor) and (only is None or id(weight) in only):
                owners.setdefault(id(weight), []).append(owner)
                names.setdefault(id(weight), (f"{prefix}.{attribute}".removeprefix("."), weight))
    for key, (name, weight) in names.items():
        op = repacked_op(owners[key])
        if op is None or not weight.is_matrix:
            found, why = "", "only a matrix for nn.Linear or nn.Embedding is packed"
        else:
            found, why = choose_layout(layout, weight.format, weight.matrix, weight.device.type, op)
        made, refusal = repacked(weight, found)
        if made is not weight:
            weight.data = made
        yield LayoutChange(name, weight.kernel_layout, refusal or why)


def repacked_op(owners: Iterable[nn.Module]) -> str | None:
    """The op that a weight of these layers is packed for, or None where it is to keep its plain parts.

    A table that is the head of a model as well is multiplied with as a whole at each token, and only looked up in once.
    """
    owners = list(owners)
    if any(isinstance(owner, _CONVOLUTIONS | _TRANSPOSED) for owner in owners):
        return None
    return "embedding" if all(isinstance(owner, nn.Embedding) for owner in owners) else "linear"


def is_layer(module: nn.Module) -> TypeGuard[Layer]:
    """Whether `quantize_` knows this kind of module."""
    return isinstance(module, Layer) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the `Conv1D` of transformers (GPT-2): a linear whose weight is [K, N]."""
    kinds = ((kind.__module__, kind.__name__) for kind in type(module).__mro__)
    return ("transformers.pytorch_utils", "Conv1D") in kinds


def weight_matrix(layer: Layer) -> Tensor:
    """A layer's plain weight as formats store it, [N, K]."""
    weight = layer.weight.detach()
    return weight.t() if is_conv1d(layer) else weight.flatten(1) if weight.dim() > 2 else weight


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """(N, K) of a layer's weight, plain or quantized."""
    first, *rest = layer.weight.shape
    return (rest[0], first) if is_conv1d(layer) else (first, torch.Size(rest).numel())


def kind_refusal(layer: Layer, fmt: Format) -> str | None:
    """Why no weight of this format can serve this kind of layer, or None."""
    if isinstance(layer, _TRANSPOSED):
        return "a transposed convolution: the rows of its kernel are input channels"
    if isinstance(layer, _CONVOLUTIONS) and fmt.folds_bias:
        return f"a convolution, and {fmt} shifts the activations, which a convolution pads and slides over"
    if isinstance(layer, nn.Embedding) and not fmt.supports_embedding:
        return f"an embedding table, and {fmt.name} has no lookup"
    return None


def quantizable_layers(module: nn.Module) -> Iterator[tuple[str, Layer]]:
    """The layers of a module by name ("weight" for a bare layer), those not quantized yet."""
    for name, layer in module.named_modules():
        if is_layer(layer) and not isinstance(layer.weight, QuantizedTensor):
            yield name or "weight", layer


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, Layer]]:
    """The layers of a module whose weight is quantized, by name ("" for a bare layer).

    Of layers that share a weight, only the first.
    """
    seen: set[int] = set()
    for name, layer in module.named_modules():
        if is_layer(layer) and isinstance(layer.weight, QuantizedTensor):
            if id(layer.weight) not in seen:
                yield name, layer
            seen.add(id(layer.weight))


def quantize_layer_(
    layer: Layer,
    fmt: Format,
    solver_name: str = AUTO,
    statistics: Statistics | None = None,
    *,
    where: str = "weight",
    shared: Shared | None = None,
) -> None:
    """Replace one layer's weight by its quantized form, and fold what the format moves into the bias.

    `shared` remembers weights by identity so that tied layers get the same parameter.
    """
    _put(layer, *_quantized(layer, fmt, solver_name, statistics, where, {} if shared is None else shared))


def _solve_all(
    decided: Sequence[tuple[Layer, LayerChange]], solver: str, statistics: Mapping[str, Statistics]
) -> tuple[list[LayerChange], list[tuple[Layer, nn.Parameter, Solution]]]:
    """The changes as they are made, with the variants of formats that inputs ask for; and the weights of all layers."""
    shared: Shared = {}
    uses = Counter(id(layer.weight) for layer, _ in decided)
    changes: list[LayerChange] = []
    made: list[tuple[Layer, nn.Parameter, Solution]] = []
    for layer, change in decided:
        fmt, why = change.format, change.why
        if fmt is not None:
            known = statistics.get(change.name)
            if uses[id(layer.weight)] == 1:  # a weight that several layers read stays one for all of them
                fmt, more = _suited(fmt, known)
                why += more
            made.append((layer, *_quantized(layer, fmt, solver, known, change.name, shared)))
        changes.append(LayerChange(change.name, fmt, why))
    return changes, made


def _warn_of_other_weights(decided: Sequence[tuple[Layer, LayerChange]], statistics: object) -> None:
    """Warn of statistics that were taken with other weights, where they tell."""
    if isinstance(statistics, MarkedWeights):
        linears = [(layer, change) for layer, change in decided if change.format and isinstance(layer, nn.Linear)]
        marks = {change.name: mark_of(layer.weight, matrix_shape(layer)) for layer, change in linears}
        if said := statistics.other_weights(marks):
            _log.warning("%s", said)


def _suited(fmt: Format, known: Statistics | None) -> tuple[Format, str]:
    """The variant of a format that suits a layer's input, and the reason to add where it is another one."""
    if known is None or known.minimum is None:
        return fmt, ""
    smallest = float(known.minimum.min())
    fitted = fmt.fitted_to(smallest)
    return fitted, "" if fitted == fmt else f"; its input is never below {smallest:.3g}"


def _quantized(
    layer: Layer, fmt: Format, solver_name: str, statistics: Statistics | None, where: str, shared: Shared
) -> tuple[nn.Parameter, Solution]:
    """The quantized form of a layer's weight, made once for all layers that share it."""
    weight, key = layer.weight, (id(layer.weight), fmt.spec)
    if key not in shared:
        has_bias = getattr(layer, "bias", None) is not None
        try:
            matrix = weight_matrix(layer)
            solution = solve(matrix, fmt, solver_name, statistics, where=where, has_bias=has_bias)
        except WeightError as error:
            raise error if str(error).startswith(where) else WeightError(f"{where}: {error}") from error
        quantized = shaped_weight(layer, solution.parts, fmt, weight.dtype)
        shared[key] = weight, nn.Parameter(quantized, requires_grad=False), solution
    return shared[key][1:]


def shaped_weight(layer: Layer, parts: Mapping[str, Tensor], fmt: Format, dtype: torch.dtype) -> QuantizedTensor:
    """The parts of a matrix [N, K] as a weight of the layer's shape."""
    return QuantizedTensor(
        parts, fmt, tuple(layer.weight.shape), dtype, matrix=matrix_shape(layer), transposed=is_conv1d(layer)
    )


def _put(layer: Layer, weight: nn.Parameter, solution: Solution) -> None:
    """Give a layer its quantized weight, and its bias what the solver and the format move into it."""
    layer.weight = weight
    bias = getattr(layer, "bias", None)
    if solution.bias is not None and bias is not None:
        with torch.no_grad():
            moved = (bias.detach().float() + solution.bias).to(bias.dtype)
        layer.bias = nn.Parameter(moved, requires_grad=bias.requires_grad)
    fold_bias_(layer)


def fold_bias_(layer: Layer) -> None:
    """Move the constant that the format's activation shift adds out of the layer's bias, creating a bias if need be."""
    weight = layer.weight
    share = weight.format.bias_share(weight.in_layout("").parts) if isinstance(weight, QuantizedTensor) else None
    if share is None or not (isinstance(layer, nn.Linear) or is_conv1d(layer)):
        return
    bias = getattr(layer, "bias", None)
    folded = (-share if bias is None else bias.detach().float() - share).to(
        weight.dtype if bias is None else bias.dtype
    )
    layer.bias = nn.Parameter(folded, requires_grad=False if bias is None else bias.requires_grad)


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


def _check_values(weight: Tensor, where: str) -> None:
    if weight.is_meta:
        raise WeightError(f"{where}: is on the meta device, without values; load a checkpoint into the module first")
    for start, stop in row_chunks(weight.shape[0], weight.shape[1]):
        check_finite(weight[start:stop], where)
