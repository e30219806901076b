"""`lowbit plan`: what a conversion would do, without doing it; and which formats serve a size or a quality best."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from lowbit.checkpoint.sensitivity import PLANNED, ROWS, START
from lowbit.cli import options
from lowbit.cli.beside import check_beside
from lowbit.cli.budgeting import Target, mixed_data, show_mixed
from lowbit.cli.known import statistics_of, tell_other_weights
from lowbit.cli.output import asking, command, epilog, print_json, say
from lowbit.cli.planning import Wishes, plan_for, plan_totals, show_folds, show_plan, with_folds
from lowbit.cli.whole import open_whole
from lowbit.devices import usable_device
from lowbit.errors import PlanError

EPILOG = epilog(
    "lowbit plan flux.safetensors --format nvfp4",
    "lowbit plan flux.safetensors --format nvfp4 --layer 'img_mod=fp8_e4m3' -o plan.json",
    "lowbit plan flux.safetensors --target-size 0.3x --stats flux.stats -o plan.json",
    "lowbit plan flux.safetensors --target-sqnr 30 --formats 'nvfp4; fp8_e4m3(granularity=row)' -o plan.json",
    "lowbit convert flux.safetensors -o flux-mixed.safetensors --plan plan.json --stats flux.stats",
)


@command
def plan(
    src: options.SourcePath,
    format: options.FormatSpec = "",
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", metavar="FILE.json", help="Write the plan here, to be edited.", show_default=False
        ),
    ] = None,
    target_size: options.TargetSize = None,
    target_sqnr: options.TargetSqnr = None,
    formats: options.Formats = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=NUMBER",
            help="Count the errors of layers whose name matches so often; the first match wins.",
            show_default=False,
        ),
    ] = None,
    solver: options.Solver = "auto",
    preset: options.Preset = "auto",
    keep: options.Keep = None,
    only: options.Only = None,
    layer: options.LayerRules = None,
    convolutions: options.Convolutions = False,
    bank_transposed: options.BankTransposed = None,
    dialect: options.Dialect = "comfy",
    requantize: options.Requantize = False,
    drop_unused: options.DropUnused = False,
    full_precision_matrix_mult: options.FullPrecision = None,
    stats: options.Stats = None,
    input_scales: options.InputScales = None,
    input_percentile: options.InputPercentile = None,
    fold_scales: options.FoldScales = False,
    share_low_rank: options.ShareLowRank = False,
    measure_with: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"Measure layers with a solver, with the {START} of the pipeline that will convert them, or with all "
            rf"of it ({PLANNED}: slow). \[default: {START}; {PLANNED} with gradients]",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        int, typer.Option(min=0, metavar="N", help="Measure so many rows of each weight, spread evenly; 0 for all.")
    ] = ROWS,
    sensitivities: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.json",
            help="Keep what is measured here; what it holds is not measured again.",
            show_default=False,
        ),
    ] = None,
    device: options.Device = "cpu",
    jobs: options.Jobs = None,
    source_dialect: options.SourceDialect = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what a conversion would do: what becomes of each layer and why, and the final size.

    With --target-size or --target-sqnr, measure what each layer's output loses in each of some formats, and choose for
    every layer so that all of them together lose least in that size, or take least for that quality.
    """
    wishes = Wishes(
        format=format,
        solver=solver,
        preset=preset,
        keep=keep or (),
        only=only or (),
        layer=layer or (),
        dialect=dialect,
        requantize=requantize,
        convolutions=convolutions,
        bank_transposed=bank_transposed or (),
        fold_scales=fold_scales,
        share_low_rank=share_low_rank,
        drop_unused=drop_unused,
        full_precision_matrix_mult=full_precision_matrix_mult or (),
        input_scales=input_scales,
        input_percentile=input_percentile,
    )
    target = Target(
        size=target_size,
        sqnr=target_sqnr,
        formats=formats or (),
        weights=weight or (),
        measure_with=measure_with,
        rows=rows,
        sensitivities=sensitivities,
        jobs=jobs,
        device=device,
    )
    mixed = None
    if target_size is None and target_sqnr is None:
        _refuse_targets_options(target)
        wishes.check("what to reach with --target-size or --target-sqnr")
    else:
        target.check(wishes)
        usable_device(device)
        wishes.check_rules()
    read = (src, stats, input_scales)
    written = check_beside(output, read=(*read, sensitivities))
    check_beside(sensitivities, read=read)
    with open_whole(src, source_dialect) as source, statistics_of(source, stats) as known:
        warnings = tell_other_weights(source, known)
        if target_size is None and target_sqnr is None:
            made = plan_for(source, wishes, None, known, jobs)
        else:
            mixed = target.reach(source, wishes, known)
            made = with_folds(source, wishes.shared(mixed.plan(target.note(mixed)), known), wishes, known, jobs)
    if written is not None:
        made.save(written)
    if as_json:
        more = {} if mixed is None else {"mixed": mixed_data(mixed, target.note(mixed))}
        print_json({**made.to_json(), "totals": plan_totals(made), **more, "warnings": warnings})
        return
    if mixed is None:
        show_plan(made)
    else:
        show_mixed(mixed, made, target.note(mixed))
        show_folds(made)
    if written is not None:
        following = {"--plan": written, "--stats": stats, "--source-dialect": source_dialect}
        again = " ".join(f"{name} {shlex.quote(str(value))}" for name, value in following.items() if value is not None)
        say(f"written to {written}; edit it, then: lowbit convert {shlex.quote(str(src))} -o OUT {again}")


def _refuse_targets_options(target: Target) -> None:
    """Options that mean something only with a target."""
    given = {
        "--formats": bool(target.formats),
        "--weight": bool(target.weights),
        "--sensitivities": target.sensitivities is not None,
        "--measure-with": target.measure_with is not None,
        "--rows": target.rows != ROWS,
        "--device": target.device != "cpu",
    }
    if names := [name for name, wrong in given.items() if wrong]:
        with asking():
            raise PlanError(f"{', '.join(names)}: give --target-size or --target-sqnr with it, or --format alone")
