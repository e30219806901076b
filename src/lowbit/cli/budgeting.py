"""From --target-size or --target-sqnr to a plan: measuring, choosing, and showing what was chosen."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.calibration.collection import some
from lowbit.checkpoint.layer_groups import grouped
from lowbit.checkpoint.layer_statistics import LayerStatistics
from lowbit.checkpoint.mixed_precision import (
    FORMATS,
    Choice,
    LayerChoices,
    MixedPlan,
    decibels_of,
    find_choices,
    for_size,
    for_sqnr,
)
from lowbit.checkpoint.plan import Plan
from lowbit.checkpoint.sensitivity import PLANNED, START, Candidate, Sensitivities, measure
from lowbit.checkpoint.source import Source
from lowbit.checkpoint.stored_format import StoredFormat
from lowbit.cli.output import asking, decibels, progress, say, show, size, split_rule, table, warn
from lowbit.cli.planning import Wishes, becomes
from lowbit.errors import PlanError
from lowbit.solvers import parse_pipeline

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Target:
    """What a mixed plan has to reach, and how layers are measured for it."""

    size: str | None
    sqnr: float | None
    formats: Sequence[str]
    weights: Sequence[str]
    measure_with: str | None
    rows: int
    sensitivities: str | None  # the file, as it was written on the command line
    jobs: int | None
    device: str

    @property
    def specs(self) -> list[str]:
        """The formats to choose from."""
        return [spec.strip() for text in self.formats for spec in text.split(";") if spec.strip()] or list(FORMATS)

    @property
    def weight_rules(self) -> list[tuple[str, float]]:
        """Patterns and how often the error of layers that match counts. Raises `PlanError`."""
        rules = []
        for text in self.weights:
            pattern, _, number = text.rpartition("=")
            try:
                rules.append((pattern, float(number)))
            except ValueError:
                raise PlanError(f"--weight {text!r}: write it as REGEX=NUMBER, such as 'proj_out=4'") from None
        return rules

    def check(self, wishes: Wishes) -> None:
        """Refuse what no source could make right, before any file is opened. Raises `Failure`."""
        with asking():
            if self.size is not None and self.sqnr is not None:
                raise PlanError("--target-size and --target-sqnr: give one of them; the other is what comes of it")
            if wishes.format:
                raise PlanError("--format is one format for all weights; to choose among some, give --formats")
            if wishes.requantize:
                raise PlanError("--requantize does not go with a target: the formats are chosen for the 16-bit weights")
            if wishes.drop_unused:
                raise PlanError(
                    "--drop-unused does not go with a target; set the action of those tensors to drop in the plan"
                )
            if wishes.input_scales is not None or wishes.input_percentile is not None:
                raise PlanError(
                    "--input-scales and --input-percentile do not go with a target; set input_scale or "
                    "input_percentile of those layers in the plan"
                )
            for spec in self.specs:
                StoredFormat.parse(spec)
            if self.size is not None:
                parse_size(self.size, 1 << 40)
            if self.sqnr is not None and not 0 <= self.sqnr < math.inf:
                raise PlanError(f"--target-sqnr {self.sqnr}: write a positive number of dB, such as 30")
            _ = self.weight_rules
            if self.measure_with not in (None, START, PLANNED):
                parse_pipeline(self.measure_with)

    def reach(self, source: Source, wishes: Wishes, statistics: LayerStatistics | None) -> MixedPlan:
        """Measure what is not measured yet, save it where asked to, and choose."""
        selection = find_choices(
            source,
            self.specs,
            solver=wishes.solver,
            preset=wishes.preset,
            keep=wishes.keep,
            only=wishes.only,
            layer_rules=[split_rule(rule) for rule in wishes.layer],
            dialect=wishes.dialect,
            statistics=statistics,
            convolutions=wishes.convolutions,
            bank_transposed=wishes.bank_transposed,
            full_precision=wishes.full_precision_matrix_mult,
        ).weighted(self.weight_rules)
        how = self.how(selection.candidates, statistics)
        if statistics is not None:
            _warn_of_missing_gradients(selection.candidates, statistics)
        file = None if self.sensitivities is None else Path(self.sensitivities)
        known = Sensitivities.load(file) if file is not None and file.exists() else None
        with progress("measuring") as update:
            found = measure(
                source,
                selection.candidates,
                statistics,
                measure_with=how,
                rows=self.rows,
                known=known,
                jobs=self.jobs,
                progress=update,
                device=self.device,
            )
        if file is not None:
            found.save(file)
        selection = selection.with_errors(found, how)
        if self.sqnr is not None:
            return for_sqnr(selection, self.sqnr)
        assert self.size is not None
        return for_size(selection, parse_size(self.size, selection.base.bytes_before))

    def how(self, candidates: Sequence[Candidate], statistics: LayerStatistics | None) -> str:
        """What to measure with: gradients tell layers apart well enough to be worth the whole pipeline."""
        if self.measure_with is not None:
            return self.measure_with
        known = statistics is not None and all(statistics.gradient_size(one.name) for one in candidates)
        return PLANNED if known else START

    def note(self, mixed: MixedPlan) -> str:
        """What the plan was made for, for its readers."""
        wanted = f"--target-size {self.size}" if self.sqnr is None else f"--target-sqnr {self.sqnr:g}"
        selection = mixed.selection
        rows = f"{self.rows} rows" if self.rows and not selection.by_gradients else "all rows"
        weights = "".join(f", --weight {text}" for text in self.weights)
        of = "output SQNR" if not selection.by_gradients else "SQNR of the model's output, by gradients,"
        return (
            f"mixed precision: {wanted} among {'; '.join(self.specs)}{weights}, measured with "
            f"{selection.measured_with} on {rows} a layer: {of} {decibels(mixed.sqnr)} in {size(mixed.nbytes)}"
        )


def _warn_of_missing_gradients(candidates: Sequence[Candidate], statistics: LayerStatistics) -> None:
    """Say that gradients, known of some layers, count for nothing where others lack them."""
    lacking = [one.name for one in candidates if not statistics.gradient_size(one.name)]
    if 0 < len(lacking) < len(candidates):
        line = (
            f"{len(lacking)} of {len(candidates)} layers with a choice have no gradients ({some(lacking)}), "
            "so all layers count the same; with --keep for these the rest counts by what it does to the model's output"
        )
        warn(line)


def parse_size(text: str, whole: int) -> int:
    """Bytes of a size such as 0.3x (of `whole`), 1.2GB, 800MiB or 123456. Raises `PlanError`."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(x|(?:[KMG]I?)?B)?", text.strip(), re.IGNORECASE)
    unit = (found[2] or "").upper() if found else ""
    nbytes = float(found[1]) * (whole if unit == "X" else _UNITS[unit]) if found else 0.0
    if not 1 <= nbytes < math.inf:
        raise PlanError(
            f"--target-size {text!r}: write it as a share of the source such as 0.3x, or as bytes such as 1.2GB"
        )
    return int(nbytes)


def show_mixed(mixed: MixedPlan, made: Plan, note: str) -> None:
    """Print which layers got which format, the formats with their shares, and what was reached."""
    layers = table(
        "layers",
        "x",
        "shape",
        "becomes",
        "before",
        "after",
        "output SQNR",
        right=("x", "before", "after", "output SQNR"),
    )
    for name, found in grouped(mixed.picked, lambda pair: pair[0].name, lambda pair: _kind(pair[1])):
        first = found[0][1].plan
        layers.add_row(
            name,
            str(len(found)),
            "x".join(map(str, first.shape)),
            becomes(first),
            size(sum(choice.plan.bytes_before for _, choice in found)),
            size(sum(choice.nbytes for _, choice in found)),
            decibels(_mean(found)),
        )
    show(layers)
    formats = table(
        "format", "layers", "before", "after", "output SQNR", right=("layers", "before", "after", "output SQNR")
    )
    for row in by_format(mixed):
        formats.add_row(
            row["format"], str(row["layers"]), size(row["bytes_before"]), size(row["bytes"]), decibels(row["sqnr"])
        )
    fixed = mixed.selection.fixed_bytes
    formats.add_row("other tensors", "", "", size(fixed), "exact")
    show(formats)
    say(note)
    say(
        f"{size(made.bytes_before)} -> {size(made.bytes_after)} ({made.bytes_after / max(made.bytes_before, 1):.3f}x)",
        "bold",
    )


def by_format(mixed: MixedPlan) -> list[dict[str, Any]]:
    """Layers, bytes and mean error of each format in use, as JSON data, the largest first."""
    groups: dict[str, list[tuple[LayerChoices, Choice]]] = {}
    for layer, choice in mixed.picked:
        groups.setdefault(choice.name, []).append((layer, choice))
    rows = [
        {
            "format": name,
            "layers": len(found),
            "bytes_before": sum(choice.plan.bytes_before for _, choice in found),
            "bytes": sum(choice.nbytes for _, choice in found),
            "sqnr": _mean(found),
        }
        for name, found in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def mixed_data(mixed: MixedPlan, note: str) -> dict[str, Any]:
    """What was chosen and what was measured, as JSON data."""
    return {
        "note": note,
        "sqnr": mixed.sqnr,
        "bytes": mixed.nbytes,
        "fixed_bytes": mixed.selection.fixed_bytes,
        "formats": by_format(mixed),
        "layers": {
            layer.name: {
                "chosen": chosen.name,
                "choices": {c.name: {"bytes": c.nbytes, "error": c.error} for c in layer.choices},
            }
            for layer, chosen in mixed.picked
        },
    }


def _kind(choice: Choice) -> tuple[object, ...]:
    return choice.plan.action, choice.plan.format, choice.plan.solver, choice.plan.shape, choice.plan.dtype


def _mean(found: Sequence[tuple[LayerChoices, Choice]]) -> float:
    return decibels_of(sum(choice.error for _, choice in found) / len(found))
