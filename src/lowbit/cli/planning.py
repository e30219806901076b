"""From the options of `convert` and `plan` to a plan, and how a plan is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowbit.checkpoint.dialects import written_dialect
from lowbit.checkpoint.fold_plan import plan_folds
from lowbit.checkpoint.input_scales import InputScales
from lowbit.checkpoint.layer_groups import grouped
from lowbit.checkpoint.layer_statistics import LayerStatistics
from lowbit.checkpoint.plan import Plan, TensorPlan, make_plan, with_shared_low_rank
from lowbit.checkpoint.plan_rules import INPUT_PERCENTILE
from lowbit.checkpoint.shared_low_rank import check_inputs
from lowbit.checkpoint.source import Source
from lowbit.checkpoint.stored_format import StoredFormat
from lowbit.cli.output import asking, decibels, progress, say, show, size, split_rule, table
from lowbit.errors import PlanError
from lowbit.solvers import AUTO, fraction_problem, parse_pipeline, pick_solver


@dataclass(frozen=True)
class Wishes:
    """The options that decide what becomes of each layer."""

    format: str = ""
    solver: str = AUTO
    preset: str = "auto"
    keep: Sequence[str] = ()
    only: Sequence[str] = ()
    layer: Sequence[str] = ()
    dialect: str = "comfy"
    requantize: bool = False
    convolutions: bool = False
    bank_transposed: Sequence[str] = ()
    fold_scales: bool = False
    share_low_rank: bool = False
    drop_unused: bool = False
    full_precision_matrix_mult: Sequence[str] = ()
    input_scales: Path | None = None
    input_percentile: float | None = None

    def check(self, otherwise: str) -> None:
        """Refuse what no source could make right, before any file is opened. Raises `Failure`.

        `otherwise`: what the command takes in place of a format, in words.
        """
        with asking():
            if not self.format:
                raise PlanError(
                    f"say what to convert to with --format SPEC, or {otherwise}; `lowbit formats` lists the formats"
                )
            StoredFormat.parse(self.format).check_stored()
        self.check_rules()
        with asking():
            for spec in (self.format, *(split_rule(rule)[1] for rule in self.layer)):
                pick_solver(self.solver, StoredFormat.parse(spec).format, "full")

    def check_rules(self) -> None:
        """The same of everything but the format for all weights."""
        with asking():
            for rule in self.layer:
                StoredFormat.parse(split_rule(rule)[1]).check_stored()
            if self.solver != AUTO:
                parse_pipeline(self.solver)
            written_dialect(self.dialect)
            if self.input_percentile is not None and (why := fraction_problem(self.input_percentile)):
                raise PlanError(f"--{INPUT_PERCENTILE} {why}")
            if self.input_scales is not None and self.fold_scales:
                raise PlanError(
                    "--input-scales does not go with --fold-scales: the scales in a file are of inputs without the "
                    "fold; leave one of them out, or calibrate (--stats) for both"
                )

    def plan(self, source: Source, statistics: LayerStatistics | None = None) -> Plan:
        """The plan for this source."""
        rules = [split_rule(rule) for rule in self.layer]
        made = make_plan(
            source,
            self.format,
            solver=self.solver,
            preset=self.preset,
            drop=self.drop_unused,
            keep=self.keep,
            only=self.only,
            layer_rules=rules,
            dialect=self.dialect,
            requantize=self.requantize,
            statistics=statistics,
            convolutions=self.convolutions,
            bank_transposed=self.bank_transposed,
            share_low_rank=self.share_low_rank,
            full_precision=self.full_precision_matrix_mult,
            input_scales=None if self.input_scales is None else InputScales.load(self.input_scales),
            input_percentile=self.input_percentile,
        )
        if self.drop_unused and not made.count("drop"):
            names = ", ".join(sorted({component.preset or "none" for component in made.components}))
            raise PlanError(f"--drop-unused: the preset {names} calls nothing in {source.place} unused; leave it out")
        return made

    def shared(self, plan: Plan, statistics: LayerStatistics | None) -> Plan:
        """A plan made otherwise, with a shared low rank where that is wished for."""
        return with_shared_low_rank(plan, statistics) if self.share_low_rank else plan


def plan_for(
    source: Source,
    wishes: Wishes,
    file: Path | None,
    statistics: LayerStatistics | None = None,
    jobs: int | None = None,
) -> Plan:
    """The plan in `file`, with notes on what nobody knows of an edited one, or the one that the options make."""
    if file is None:
        return with_folds(source, wishes.plan(source, statistics), wishes, statistics, jobs)
    plan = Plan.load(file)
    plan.check_against(source)
    doubts = [note for part in plan.components for note in check_inputs(part.name, part.tensors, statistics)]
    return replace(plan, notes=(*plan.notes, *doubts))


def with_folds(
    source: Source, plan: Plan, wishes: Wishes, statistics: LayerStatistics | None, jobs: int | None
) -> Plan:
    """The plan, with scales to fold where they are wished for."""
    if not wishes.fold_scales:
        return plan
    with progress("choosing scales") as update:
        return plan_folds(source, plan, statistics, jobs=jobs, progress=update)


def refuse_both(wishes: Wishes, file: Path | None) -> None:
    """Check the options, or that there are none beside a plan file, which says it all. Raises `Failure`."""
    if file is None:
        wishes.check("give a plan with --plan FILE")
        return
    given = [name for name, value in vars(wishes).items() if value != getattr(Wishes(), name)]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        with asking():
            raise PlanError(f"{names}: the plan file says this already; edit {file} or leave --plan out")


def show_plan(plan: Plan) -> None:
    """Print what becomes of each group of tensors and why, and the size."""
    rows = table("layers", "x", "shape", "becomes", "before", "after", "why", right=("x", "before", "after"))
    for component in plan.components:
        sizes = plan.sizes_after[component.name]

        def name(tensor: TensorPlan, prefix: str = component.name) -> str:
            return f"{prefix}/{tensor.layer}" if prefix else tensor.layer

        for group, found in grouped(
            component.tensors, name, lambda t: (t.action, t.format, t.solver, t.why, t.shape, t.dtype)
        ):
            first = found[0]
            rows.add_row(
                group,
                str(len(found)),
                "x".join(map(str, first.shape)) or "one value",
                becomes(first),
                size(sum(tensor.bytes_before for tensor in found)),
                size(sum(sizes[tensor.key] for tensor in found)),
                first.why,
            )
    show(rows)
    show_folds(plan)
    summarize(plan)


def show_folds(plan: Plan) -> None:
    """Print the groups that a scale is folded into, and how much less of their outputs is lost."""
    rows = table(
        "scale folded into",
        "x",
        "before",
        "after",
        "gain",
        title="\noutput error held out",
        right=("x", "before", "after", "gain"),
    )
    for component in plan.components:
        active = [fold for fold in component.folds if fold.active]
        for name, found in grouped(active, lambda fold: fold.before, lambda fold: fold.kind):
            before, after = (
                math.sqrt(sum(error or 0.0 for error in errors) / len(found))
                for errors in zip(*((fold.error_before, fold.error_after) for fold in found), strict=True)
            )
            gain = decibels(20 * math.log10(before / after)) if before and after else "-"
            rows.add_row(name, str(len(found)), f"{100 * before:.2f} %", f"{100 * after:.2f} %", gain)
    if rows.row_count:
        show(rows)


def becomes(tensor: TensorPlan) -> str:
    """What happens to a tensor, in a word or two."""
    if tensor.action == "quantize":
        return f"{tensor.format} by {tensor.solver}"
    return f"{tensor.dtype}, as it is" if tensor.action == "keep" else "left out"


def summarize(plan: Plan) -> None:
    """Print the preset, the notes and the totals of a plan."""
    for component in plan.components:
        say(
            f"preset {component.preset or 'none'}: {component.preset_why}"
            + (f" ({component.name})" if component.name else "")
        )
    for note in plan.notes:
        say(note)
    kept, dropped = plan.count("keep"), plan.count("drop")
    before, after = plan.bytes_before, plan.bytes_after
    say(
        f"{plan.count('quantize')} layers quantized, {kept} tensors kept"
        + (f", {dropped} left out" if dropped else "")
        + f": {size(before)} -> {size(after)} ({100 * after / max(before, 1):.0f} %)"
    )


def plan_totals(plan: Plan) -> dict[str, Any]:
    """The totals of a plan as JSON data."""
    actions = {action: plan.count(action) for action in ("quantize", "keep", "drop")}
    return {**actions, "bytes_before": plan.bytes_before, "bytes_after": plan.bytes_after}
