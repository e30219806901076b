"""Planning scales to fold: which norms and linears can take one, how large it is to be, and what each group gains.

Groups are found by the names of tensors (`lowbit.smoothing.find_groups`). What a norm multiplies by is told by the
model type in config.json, and proved by the statistics: what a norm gives has, before its weight, a mean square of one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lowbit.errors import PlanError
from lowbit.smoothing import FoldGroup, choose, find_groups
from lowbit.solvers import Statistics
from lowbit.solvers.awq import WeightRows

from .dialects.base import join_key
from .fold_check import contradiction
from .fold_data import ROWS, Fold, cannot_fold
from .fold_groups import norm_kind
from .folding import held_by, known_of, layer_name
from .layer_statistics import LayerStatistics
from .pipeline import Progress, Unit, run_units
from .plan_data import ComponentPlan, Plan
from .quantized_source import QuantizedComponent, look_for_layers
from .source import Source
from .tensor_plan import TensorPlan

OPTION = "--fold-scales"
_REMEDY = "leave the option out, or choose a format with pre_quant_scale=true, which stores its scales"


def plan_folds(
    source: Source,
    plan: Plan,
    statistics: LayerStatistics | None,
    *,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Plan:
    """The plan with a scale for each group of linears that loses less of its output with one.

    The scale is chosen for the formats of the plan, by the statistics of half of the samples, and judged on the others
    (`lowbit.smoothing.choose`); groups that gain nothing, or cannot take one, are listed with the reason. Layers that
    the plan leaves unquantized follow their group. Reads each weight once.

    Raises `PlanError` without statistics, where no model of the source is of a known type, where no group is found, and
    where none of those found can take a scale. That none gains by one is a note.
    """
    if statistics is None:
        raise PlanError(
            f"{source.place}: {OPTION}: scales are chosen by the inputs of layers, and there are no statistics; "
            "calibrate (lowbit calibrate) and give the file with --stats"
        )
    trials: list[_Trial] = []
    refusals: list[str] = []
    for part in plan.components:
        held = look_for_layers(source, source.component(part.name))
        why, kind = norm_kind(held)
        groups = [] if why else list(find_groups({key: spec.shape for key, spec in held.specs.items()}))
        if why or not groups:
            refusals.append(f"{held.where}: {why or 'no block of linears is named as those of Llama'}")
        trials += [_Trial(held, part, group, kind if group.norm else ROWS, statistics) for group in groups]
    if not trials:
        raise PlanError(f"{source.place}: {OPTION}: nothing to fold: {refusals[0]}; {_REMEDY}")
    run_units([Unit(t.name, t.size, t.memory, t.run) for t in trials], jobs=jobs, progress=progress)
    _refuse_untried(source, trials)
    components = tuple(
        replace(part, folds=tuple(trial.fold for trial in trials if trial.part is part)) for part in plan.components
    )
    made = replace(plan, components=components, notes=(*plan.notes, *refusals, *_notes(components)))
    made.validate()
    return made


def _refuse_untried(source: Source, trials: list[_Trial]) -> None:
    """Raise `PlanError` where no group could take a scale, whatever it would gain."""
    if any(trial.tried for trial in trials):
        return
    why = Counter(trial.fold.why for trial in trials).most_common(1)[0][0]
    first = next(trial.name for trial in trials if trial.fold.why == why)
    raise PlanError(
        f"{source.place}: {OPTION}: nothing to fold: none of {len(trials)} groups can take a scale; "
        f"{first}: {why}; {_REMEDY}"
    )


def _notes(components: tuple[ComponentPlan, ...]) -> Iterator[str]:
    """How many groups gain, how much, and why the others do not."""
    folds = [fold for part in components for fold in part.folds]
    active = [fold for fold in folds if fold.active]
    shares = [fold.error_after / fold.error_before for fold in active if fold.error_after and fold.error_before]
    gain = f", {-10 * sum(map(math.log10, shares)) / len(shares):.1f} dB less output error on average" if shares else ""
    counted = f"scales folded into {len(active)} of {len(folds)} norms and linears{gain}"
    yield counted if active else f"{counted}: {OPTION} changes nothing here"
    for why, count in Counter(fold.why for fold in folds if not fold.active).most_common():
        yield f"  {count} left alone: {why}"


@dataclass
class _Trial:
    """Choosing the scale of one group, and the fold that came of it."""

    held: QuantizedComponent
    part: ComponentPlan
    group: FoldGroup
    kind: str
    statistics: LayerStatistics

    def __post_init__(self) -> None:
        self.fold = Fold(self.group.before, self.group.linears, self.kind)
        self.tried = False
        self.name = f"scale of {layer_name(self.held.component, self.group.before)}"
        tensors = {tensor.key: tensor for tensor in self.part.tensors}
        self._all = [tensors.get(key) for key in self.fold.keys]
        self._quantized = [t for t in self._all[1:] if t is not None and t.action == "quantize"]
        self.size = sum(t.spec.nbytes for t in self._all if t is not None)
        k = self.held.specs[self.fold.keys[1]].shape[-1]
        largest = max((t.spec.nbytes for t in self._all if t is not None), default=0)
        self.memory = largest + 4 * (4 * k * k + 16 * 256 * k)

    def run(self) -> None:
        """Choose."""
        why = self.group.why_not or self._cannot()
        known = None if why else self._known()
        if known is not None:
            why = self._contradiction(known)
        elif not why:
            why = "nothing is known of the input of its linears"
        if why or known is None:
            self.fold = replace(self.fold, why=why)
            return
        component, source = self.held.component, self.held.source
        where = f"{self.held.where}: a layer behind {self.group.before!r}"
        rows = [WeightRows.of(source.read(component, tensor.key), tensor.fmt.plain) for tensor in self._quantized]
        choice = choose(rows, known, held_by(source, component, self.fold), where)
        self.tried = True
        self.fold = replace(self.fold, error_before=choice.error_before, error_after=choice.error_after)
        if choice.gains:
            self.fold = replace(self.fold, exponent=choice.exponent)
        else:
            self.fold = replace(self.fold, why="no scale lowers the error of its outputs on samples held out")

    def _cannot(self) -> str:
        """Why no scale can be folded in, or ""."""
        if why := cannot_fold(self.kind, self._all):
            return why
        if not self._quantized:
            return "none of its linears is quantized"
        if self.group.norm and join_key(self.group.before, "bias") in self.held.specs:
            return "a norm with a bias is none of the known ones"
        scaled = [tensor for tensor in self._quantized if _scales_itself(tensor)]
        return f"{scaled[0].format} stores scales of its own" if scaled else ""

    def _known(self) -> Statistics | None:
        return known_of(self.statistics, (layer_name(self.held.component, name) for name in self.group.linears))

    def _contradiction(self, known: Statistics) -> str:
        """Why the statistics say that the norm does not multiply as it is taken to, or ""."""
        return contradiction(known, self.held.read(self.fold.keys[0]), self.kind) if self.group.norm else ""


def _scales_itself(tensor: TensorPlan) -> bool:
    """Whether the format stores a factor of its input's channels."""
    return any(part.name in ("pre_quant_scale", "smooth_factor") for part in tensor.fmt.rules)
