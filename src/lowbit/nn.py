"""Quantize the layers of a module in place, by one format or by rules.

Layers are of the kinds that `lowbit.layer_kinds` knows. A layer's `weight` becomes a frozen parameter that is a
`QuantizedTensor` of the same shape, so the layer's class, name and forward stay as they are and adapters that look for
`nn.Linear` still find it. Convolutions are weight-only: the kernel is decoded in bounded pieces, the input is never
rounded.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.errors import WeightError
from lowbit.formats.base import Format, check_finite
from lowbit.layer_kinds import Layer, is_conv1d, matrix_shape, repacked_op, shaped_weight, weight_matrix
from lowbit.layer_policy import LayerChange, Policy, decide_formats
from lowbit.numerics.groups import row_chunks
from lowbit.numerics.weight_marks import MarkedWeights, mark_of
from lowbit.solvers import AUTO, Solution, solve
from lowbit.solvers.base import Statistics
from lowbit.tensor import AUTO as AUTO_LAYOUT, QuantizedTensor, check_layout, choose_layout, repacked

__all__ = [
    "LayerChange",
    "LayoutChange",
    "Policy",
    "fold_bias_",
    "quantize_",
    "repack_",
    "repack_weights",
]

_log = logging.getLogger("lowbit")
# Weights met before, by identity and spec; the original is held so that its identity is not given to another.
Shared = dict[tuple[int, str], tuple[Tensor, nn.Parameter, Solution]]


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
    decided = decide_formats(module, policy)
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


def _check_values(weight: Tensor, where: str) -> None:
    if weight.is_meta:
        raise WeightError(f"{where}: is on the meta device, without values; load a checkpoint into the module first")
    for start, stop in row_chunks(weight.shape[0], weight.shape[1]):
        check_finite(weight[start:stop], where)
