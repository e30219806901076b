"""Scales that a conversion folds into a norm or linear, as a plan has them. Data only; it can be written and edited."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.errors import PlanError
from lowbit.smoothing import ONE_PLUS, WEIGHT

from .dialects.base import join_key
from .tensor_plan import TensorPlan, known_fields

ROWS = "rows"
KINDS = (WEIGHT, ONE_PLUS, ROWS)
FOLDED = "lowbit_folded_scales"
"""The header metadata of an output that names the groups, so that `lowbit verify` finds the scales again."""


@dataclass(frozen=True)
class Fold:
    """A norm or linear, and the linears behind it, whose input is multiplied by rms(x)^-exponent; 0 leaves them alone.

    `kind`: what takes the scale, the norm's weight, one and the norm's weight, or the last rows of a linear.
    `error_before`, `error_after`: of the outputs of the linears together, relative and squared, on samples held out.
    `why`: for readers, why a group is left alone.
    """

    before: str
    linears: tuple[str, ...]
    kind: str
    exponent: float = 0.0
    error_before: float | None = None
    error_after: float | None = None
    why: str = ""

    @property
    def active(self) -> bool:
        """Whether a scale is folded in."""
        return self.exponent > 0

    @property
    def keys(self) -> list[str]:
        """The weights of all, that of `before` first."""
        return [join_key(name, "weight") for name in (self.before, *self.linears)]

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        found = {name: value for name, value in dataclasses.asdict(self).items() if value is not None and value != ""}
        return {**found, "linears": list(self.linears)}

    @classmethod
    def from_json(cls, entry: Any) -> Fold:
        """The inverse of `to_json`. Raises `PlanError`."""
        if not isinstance(entry, dict):
            raise PlanError("an entry of 'folds' must be an object")
        known_fields(entry, {item.name for item in dataclasses.fields(cls)}, "an entry of 'folds'")
        before, linears, kind = (entry.get(name) for name in ("before", "linears", "kind"))
        exponent = entry.get("exponent", 0.0)
        if not isinstance(before, str) or not isinstance(linears, list) or kind not in KINDS:
            raise PlanError(
                f"the fold {before!r}: needs 'before', a list of 'linears' and a 'kind' of {', '.join(KINDS)}"
            )
        if isinstance(exponent, bool) or not isinstance(exponent, int | float) or not 0 <= exponent <= 1:
            raise PlanError(f"the fold {before!r}: exponent is {exponent!r}, expected a number from 0 to 1")
        errors = {name: entry.get(name) for name in ("error_before", "error_after")}
        for name, error in errors.items():
            wrong = isinstance(error, bool) or not isinstance(error, int | float) or not 0 <= error < math.inf
            if error is not None and wrong:
                raise PlanError(f"the fold {before!r}: {name} is {error!r}, expected a number from 0 on, or nothing")
        return cls(before, tuple(map(str, linears)), kind, float(exponent), **errors, why=str(entry.get("why", "")))


def check_folds(folds: Iterable[Fold], tensors: Iterable[TensorPlan]) -> None:
    """Raise `PlanError` for a fold whose shapes do not fit, a second one of a tensor, and tensors that are not there.

    Whether the model has such a group is checked with the source (`fold_groups`).
    """
    by_key = {tensor.key: tensor for tensor in tensors}
    taken: set[str] = set()
    for fold in folds:
        if not fold.active:
            continue
        found = [by_key.get(key) for key in fold.keys]
        if why := cannot_fold(fold.kind, found):
            raise PlanError(f"plan: the fold {fold.before!r}: {why}; set its exponent to 0")
        scaled = [tensor.key for tensor in found[1:] if tensor is not None and tensor.input_scale is not None]
        if scaled:
            raise PlanError(
                f"plan: the fold {fold.before!r}: the input_scale that is given for {scaled[0]!r} is of its input "
                "without the fold; set its exponent to 0, or remove the input_scale"
            )
        places = {f"rows {fold.before}", *fold.linears}
        if again := sorted(places & taken):
            raise PlanError(f"plan: the fold {fold.before!r}: {again[0]!r} takes a scale twice; remove one of them")
        taken |= places


def cannot_fold(kind: str, tensors: list[TensorPlan | None]) -> str:
    """Why no scale can go from the first of these weights into the others, or ""."""
    for tensor in tensors:
        if tensor is None:
            return "names a weight that is not there"
        if tensor.action == "drop":
            return f"{tensor.key!r} is left out"
        if tensor.was or not tensor.spec.dtype.is_floating_point or tensor.spec.dtype.itemsize < 2:
            return f"{tensor.key!r} is quantized already"
    return misfit(kind, [tensor.shape for tensor in tensors if tensor is not None])


def misfit(kind: str, shapes: list[tuple[int, ...]]) -> str:
    """Why weights of these shapes, that which takes the scale first, are no group, or ""."""
    first, *linears = shapes
    if not linears or any(len(shape) != 2 or shape[1] != linears[0][1] for shape in linears):
        return "its linears do not share an input"
    k, rows = linears[0][1], first[0] if first else 0
    fits = len(first) == 2 and rows >= k if kind == ROWS else first == (k,)
    return "" if fits else f"{list(first)} does not give the {k} channels that its linears take"


def folds_as_text(folds: Iterable[Fold]) -> str:
    """The groups that a scale was folded into, for a file's header; "" without any."""
    active = [{"before": f.before, "linears": list(f.linears), "kind": f.kind} for f in folds if f.active]
    return json.dumps(active) if active else ""


def folds_from_text(text: str, where: str) -> list[Fold]:
    """The inverse of `folds_as_text`; all are active. Raises `PlanError`, naming `where`."""
    try:
        entries = json.loads(text)
        if not isinstance(entries, list):
            raise PlanError("is no list")
        return [dataclasses.replace(Fold.from_json(entry), exponent=1.0) for entry in entries]
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{where}: the header's {FOLDED} cannot be read: {error}; convert anew") from error


def folds_from_json(data: Mapping[str, Any]) -> tuple[Fold, ...]:
    """Those of a component's entry in a plan file. Raises `PlanError`."""
    entries = data.get("folds", [])
    if not isinstance(entries, list):
        raise PlanError("'folds' must be a list")
    return tuple(Fold.from_json(entry) for entry in entries)
