"""Scales folded into modules in memory, before they are quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.errors import SolverError, UnsupportedError
from lowbit.formats.base import Format
from lowbit.formats.registry import as_format
from lowbit.solvers.awq import WeightRows
from lowbit.solvers.base import Statistics

from .choice import Choice, choose, held_by_norm, held_by_rows, rescaled, rescaled_outputs
from .groups import find_groups
from .norms import WEIGHT

Group = tuple[str, Sequence[str]]
"""The name of a norm or linear, and those of the linears that take its output; nothing else may take it."""

_TOLERANCE = 1e-2  # of the output: what a norm of low precision may be off; a weight used otherwise is off by far more


@dataclass(frozen=True)
class Smoothed:
    """What `smooth_` did: the factor [K] of the input of each group that gains, and the statistics after it."""

    scales: dict[str, Tensor]
    statistics: dict[str, Statistics]


def fold_scales_(before: nn.Module, linears: Sequence[nn.Linear], scale: Tensor) -> None:
    """Multiply the output of `before` by `scale` [K] and divide the columns of the linears by it, in place.

    `before`: a LayerNorm or RMSNorm with a weight, any norm that multiplies by its weight last, or a linear. Its output
    must go to these linears alone, unchanged or multiplied by something of the same shape.

    Raises `UnsupportedError`, and changes nothing, for another module, for quantized weights, for shapes that do not
    fit, and for a scale that is not positive and finite.
    """
    _check(before, linears, scale)
    with torch.no_grad():
        kept = {name: value.detach().clone() for name, value in before.named_parameters(recurse=False)}
        probe = None if isinstance(before, nn.Linear) else _output(before, scale)
        for parameter in before.parameters(recurse=False):
            factor = scale.to(parameter.device, torch.float32)
            parameter.copy_(parameter.float() * (factor if parameter.dim() == 1 else factor.unsqueeze(1)))
        if probe is not None:
            wanted, found = probe * scale.to(probe.device), _output(before, scale)
            if float((found - wanted).abs().max()) > _TOLERANCE * float(wanted.abs().max()):
                for name, parameter in before.named_parameters(recurse=False):
                    parameter.copy_(kept[name])
                raise UnsupportedError(
                    f"{type(before).__name__} does not multiply its output by its weight, so no scale can be folded in"
                )
        for linear in linears:
            factor = scale.to(linear.weight.device, torch.float32)
            linear.weight.copy_(linear.weight.float() / factor)


def smooth_(
    model: nn.Module,
    statistics: Mapping[str, Statistics],
    fmt: Format | str,
    groups: Sequence[Group] | None = None,
) -> Smoothed:
    """Choose and fold a scale for each group, so that `fmt` loses least of its linears' outputs together.

    statistics: by the name of a linear; one of each group's is enough. groups: by default `llama_groups(model)`.
    The exponent of rms(x)^rho is chosen as in the solver `awq`; a group that loses no less with it on the samples held
    out is left alone. Quantize afterwards with the statistics returned.

    Raises `SolverError` for a group without statistics, or without any group, `UnsupportedError` as `fold_scales_`;
    groups before the one that raises are folded already.
    """
    chosen = list(llama_groups(model)) if groups is None else list(groups)
    if not chosen:
        raise SolverError(f"{type(model).__name__}: no norm or linear before others is known here; give groups")
    modules, bare = dict(model.named_modules()), as_format(fmt).plain
    known = {name: next((statistics[n] for n in names if n in statistics), None) for name, names in chosen}
    missing = [name for name, found in known.items() if found is None or found.combined is None]
    if missing:
        raise SolverError(f"{missing[0]}: nothing is known of the input of the linears behind it; calibrate them")
    unknown = [name for before, names in chosen for name in (before, *names) if name not in modules]
    if unknown:
        raise UnsupportedError(f"{type(model).__name__} has no module {unknown[0]!r}; name modules of this model")
    scales, after = {}, dict(statistics)
    for before, names in chosen:
        found = known[before]
        assert found is not None
        linears = [_linear(name, modules[name]) for name in names]
        choice = _choose(modules[before], before, linears, bare, found)
        if not choice.gains:
            continue
        fold_scales_(modules[before], linears, choice.scale)
        scales[before] = choice.scale
        after |= {name: rescaled(after[name], choice.scale) for name in names if name in after}
        if isinstance(modules[before], nn.Linear) and before in after:
            after[before] = rescaled_outputs(after[before], choice.scale)
    return Smoothed(scales, after)


def llama_groups(model: nn.Module) -> Iterator[Group]:
    """The groups of blocks named as Llama's: norms before q, k, v and before gate, up; up before down; v before o.

    The last where both have the same width: with fewer key-value heads than heads, one scale would serve several. None
    where a block holds anything else, or where the names leave open what else takes a norm's output.
    """
    modules = dict(model.named_modules())
    for group in find_groups({name: tuple(value.shape) for name, value in model.named_parameters()}):
        linears = [modules[name] for name in (*group.linears, *(() if group.norm else (group.before,)))]
        if group.why_not or not all(isinstance(linear, nn.Linear) for linear in linears):
            continue
        if group.norm or modules[group.before].out_features == linears[0].in_features:
            yield group.before, list(group.linears)


def _choose(before: nn.Module, name: str, linears: Sequence[nn.Linear], fmt: Format, known: Statistics) -> Choice:
    weights = [linear.weight.detach() for linear in linears]
    for weight in weights:
        fmt.check_weight(weight, name)
    own = before.weight
    if not isinstance(own, nn.Parameter):
        raise UnsupportedError(f"{name}: has no weight to fold a scale into; use a format with pre_quant_scale=true")
    held = held_by_rows if isinstance(before, nn.Linear) else held_by_norm(own.detach().to(weights[0].device), WEIGHT)
    return choose([WeightRows.of(weight, fmt) for weight in weights], known, held, name)


def _linear(name: str, module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise UnsupportedError(f"{name}: is a {type(module).__name__}; scales are folded into nn.Linear only")
    return module


def _output(norm: nn.Module, scale: Tensor) -> Tensor:
    """What a norm makes of one fixed row, float32 [1, K]."""
    weight = next(norm.parameters(recurse=False))
    row = torch.linspace(-1.5, 2.0, scale.shape[0], dtype=torch.float32, device=weight.device)
    result: Tensor = norm(row.unsqueeze(0).to(weight.dtype))
    return result.float()


def _check(before: nn.Module, linears: Sequence[nn.Linear], scale: Tensor) -> None:
    """Refuse whatever cannot take a scale."""
    kind, k = type(before).__name__, scale.shape[0] if scale.dim() == 1 else -1
    if not linears or any(type(x.weight) is not nn.Parameter or not x.weight.is_floating_point() for x in linears):
        raise UnsupportedError("scales are folded into plain linears, at least one; fold before quantizing")
    if any(linear.in_features != k for linear in linears):
        raise UnsupportedError(f"a scale of shape {list(scale.shape)} does not fit linears with other in_features")
    if not bool((scale > 0).all() & scale.isfinite().all()):
        raise UnsupportedError("a scale must be positive and finite in every channel")
    own = dict(before.named_parameters(recurse=False))
    if "weight" not in own:
        raise UnsupportedError(f"{kind} has no weight to fold a scale into; use a format with pre_quant_scale=true")
    if set(own) - {"weight", "bias"} or any(type(value) is not nn.Parameter for value in own.values()):
        raise UnsupportedError(f"{kind}: only a plain weight and bias can take a scale; fold before quantizing")
    axes = 2 if isinstance(before, nn.Linear) else 1
    if own["weight"].dim() != axes or any(value.shape[0] != k for value in own.values()):
        raise UnsupportedError(
            f"{kind} with a weight {list(own['weight'].shape)} has no output of {k} channels to scale"
        )
