"""Which norms and linears of a model can take a scale: what plans choose from, and what edited ones are held to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lowbit.errors import PlanError
from lowbit.smoothing import NORMS, WEIGHT, find_groups

from .fold_data import ROWS, Fold
from .quantized_source import QuantizedComponent


def norm_kind(held: QuantizedComponent) -> tuple[str, str]:
    """Why a model is refused, or "", and what its norms multiply by. Without a model type: by their weight."""
    model_type = _model_type(held)
    if model_type is None:
        return "", WEIGHT
    if model_type in NORMS:
        return "", NORMS[model_type]
    return f"what the norms of the model type {model_type!r} multiply by is not known ({', '.join(NORMS)} are)", ""


def refuse_other_groups(held: QuantizedComponent, folds: Iterable[Fold]) -> None:
    """Raise `PlanError` for a scale that would change what the model computes, as an edited plan may have it."""
    groups = {group.before: group for group in find_groups({key: spec.shape for key, spec in held.specs.items()})}
    unknown, kind = norm_kind(held)
    for fold in folds:
        if not fold.active:
            continue
        group = groups.get(fold.before)
        if group is None or set(group.linears) != set(fold.linears):
            wanted = "is none that takes a scale" if group is None else f"goes before {', '.join(group.linears)}"
            why = f"{fold.before!r} {wanted}, and the plan has it before {', '.join(fold.linears)}"
        elif not group.norm:
            why = group.why_not or ("" if fold.kind == ROWS else f"is a linear, its kind must be {ROWS}")
        else:
            other = f"is a norm that multiplies by its {kind}" if _model_type(held) is not None else ""
            why = group.why_not or unknown or (other if fold.kind != kind else "")
            why = why or ("is a norm, and has no rows" if fold.kind == ROWS else "")
        if why:
            raise PlanError(f"{held.where}: the fold {fold.before!r}: {why}; set its exponent to 0, or plan anew")


def _model_type(held: QuantizedComponent) -> Any:
    return held.configs.get("config.json", {}).get("model_type")
