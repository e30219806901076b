"""`lowbit convert`: 16 bits in, 8 or 4 out, every layer checked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.checkpoint.conversion_report import ConversionReport
from lowbit.checkpoint.convert import convert as run
from lowbit.checkpoint.error_lora import (
    LoraLayer,
    check_error_lora,
    check_lora_layers,
    embedding_tables,
    write_error_lora,
)
from lowbit.checkpoint.folding import folded
from lowbit.checkpoint.layer_groups import grouped
from lowbit.checkpoint.layer_statistics import LayerStatistics
from lowbit.checkpoint.plan import Plan
from lowbit.checkpoint.source import Source, open_source
from lowbit.checkpoint.target import check_target, is_single, refuse_inputs
from lowbit.cli import options
from lowbit.cli.beside import check_beside, files_of
from lowbit.cli.given import refuse_idle
from lowbit.cli.known import statistics_of, tell_other_weights
from lowbit.cli.output import command, decibels, epilog, print_json, progress, say, show, size, table
from lowbit.cli.planning import Wishes, becomes, plan_for, plan_totals, refuse_both, show_folds, summarize
from lowbit.cli.whole import open_whole
from lowbit.devices import usable_device
from lowbit.report import ConversionPage, KeptGroup, LayerRow, write_conversion
from lowbit.solvers import BIAS

_NO_LORA = "is of the LoRA that --error-lora writes, and that was not asked for"
_NOTED = 5  # layers with a note that are shown

EPILOG = epilog(
    "lowbit convert flux.safetensors -o flux-fp8.safetensors --format 'fp8_e4m3(granularity=row)'",
    "lowbit convert qwen-image/ -o qwen-image-nvfp4/ --format nvfp4 --report report.html",
    "lowbit convert m.safetensors -o out.safetensors --format awq_w4a16 --keep 'lm_head' --layer 'down_proj=int8'",
    "lowbit convert m.safetensors -o out.safetensors --plan plan.json",
    "lowbit convert llama/ -o llama-int4/ --format awq_w4a16 --stats stats.safetensors --fold-scales",
)


@command
def convert(
    context: typer.Context,
    src: options.SourcePath,
    output: options.OutputText,
    format: options.FormatSpec = "",
    solver: options.Solver = "auto",
    preset: options.Preset = "auto",
    plan: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="FILE",
            help="Do what this file says, written by `lowbit plan -o`.",
            show_default=False,
        ),
    ] = None,
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
    device: options.Device = "cpu",
    jobs: options.Jobs = None,
    resume: options.Resume = True,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read every layer back, decode it and compare it.")
    ] = True,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Round stochastically, reproducibly; for merging small updates.", show_default=False
        ),
    ] = None,
    report: Annotated[
        str | None,
        typer.Option(metavar="FILE.html", help="Write what happened as a page with pictures.", show_default=False),
    ] = None,
    error_lora: options.ErrorLora = None,
    lora_rank: options.LoraRank = 32,
    lora_layers: options.LoraLayers = None,
    lora_prefix: options.LoraPrefix = "",
    source_dialect: options.SourceDialect = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Convert a checkpoint: quantize its weights, write it, and prove layer by layer what was lost.

    The output appears under its name when all of it is written and checked. An interrupted run goes on where it stopped
    when the same command is given again.
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
    refuse_both(wishes, plan)
    usable_device(device)
    if error_lora is None:
        refuse_idle(context, _NO_LORA, "lora_rank", "lora_layers", "lora_prefix")
    with open_whole(src, source_dialect) as source, statistics_of(source, stats) as known:
        to = _targets(source, output, report, error_lora, lora_rank, read=(src, plan, stats, input_scales))
        warnings = tell_other_weights(source, known)
        made = plan_for(source, wishes, plan, known, jobs)
        check_lora_layers(made, lora_layers or ())
        if not as_json:
            show_folds(made)
            summarize(made)
        with progress("converting") as update:
            done = run(
                source,
                to.checkpoint,
                made,
                jobs=jobs,
                resume=resume,
                verify=verify,
                seed=seed,
                progress=update,
                statistics=known,
                device=device,
            )
        correction = _Correction()
        if to.lora is not None:
            before, seen = folded(source, made, known)
            correction = _correct(before, seen, done, to.lora, lora_rank, lora_layers or (), lora_prefix, device)
    if to.page is not None:
        write_conversion(to.page, _page(str(src), made, done))
    if as_json:
        more = {"plan": plan_totals(made), "report": None if to.page is None else str(to.page)}
        print_json({**done.to_json(), **more, **correction.to_json(), "warnings": warnings})
    else:
        _show(done, to.page)
        _show_lora(correction, to.lora)


@dataclass(frozen=True)
class _Targets:
    """Where the checkpoint goes, and the page and the LoRA that were asked for."""

    checkpoint: Path
    page: Path | None
    lora: Path | None


def _targets(
    source: Source, output: str, report: str | None, error_lora: str | None, rank: int, *, read: Sequence[Path | None]
) -> _Targets:
    """The targets, as they stand on the command line, when each can be written. Raises `WriteError` or `PlanError`.

    `read`: what the command reads, the source first.
    """
    check_target(source, output)
    target = Path(output)
    refuse_inputs([target], files_of(read[1:]))
    made_folder = None if is_single(source, target) else target
    page = check_beside(report, read=read, others=(target, error_lora), made=made_folder)
    if error_lora is not None:
        check_error_lora(source, error_lora, rank)
    return _Targets(target, page, check_beside(error_lora, read=read, others=(target,)))


@dataclass(frozen=True)
class _Correction:
    """The LoRA that makes up for what was lost: its layers, and the tables that it leaves out."""

    layers: Sequence[LoraLayer] = ()
    left_out: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {"error_lora": [vars(layer) for layer in self.layers], "error_lora_left_out": list(self.left_out)}


def _correct(
    source: Source,
    known: LayerStatistics | None,
    done: ConversionReport,
    target: Path,
    rank: int,
    only: Sequence[str],
    prefix: str,
    device: str,
) -> _Correction:
    """Write the LoRA that makes up for what was lost."""
    biased = {layer.name for layer in done.layers if layer.solver.endswith(f"+{BIAS}")}
    with open_source(done.target) as converted, progress("correcting") as update:
        left_out = embedding_tables(source, converted, only)
        made = write_error_lora(
            source,
            converted,
            target,
            rank,
            statistics=known,
            bias_corrected=biased,
            only=only,
            prefix=prefix,
            progress=update,
            device=device,
        )
    return _Correction(made, left_out)


def _show_lora(correction: _Correction, target: Path | None) -> None:
    if target is not None and (layers := correction.layers):
        left = sum(layer.error_after for layer in layers) / max(sum(layer.error_before for layer in layers), 1e-30)
        say(f"{target}: corrections of {len(layers)} layers leave {100 * left:.0f} % of their squared error")
    if left_out := ", ".join(correction.left_out):
        say(f"{target}: none of {left_out}: tables of embeddings, whose LoRA not every loader takes")


def _show(done: ConversionReport, report: Path | None) -> None:
    if worst := done.worst():
        rows = table("layer", "format", "SQNR", "cosine", title="\nlayers that lost most", right=("SQNR", "cosine"))
        for found in worst:
            assert found.accuracy is not None
            rows.add_row(found.name, found.format, decibels(found.accuracy.sqnr), f"{found.accuracy.cosine:.6f}")
        show(rows)
    elif done.layers:
        say("nothing was read back: --no-verify")
    for line in _calibrated(done):
        say(line)
    if done.resumed:
        say(f"went on with an interrupted run: {done.resumed} pieces of work were done already")
    speed = size(done.bytes_before / done.seconds) + "/s" if done.seconds else "-"
    say(f"{done.target}: {size(done.bytes_after)} in {done.seconds:.1f} s ({speed})", "bold")
    if report is not None:
        say(f"report: {report}")


def _calibrated(done: ConversionReport) -> Iterator[str]:
    """What statistics were worth, and the layers where they were of no use."""
    judged = [layer for layer in done.layers if layer.error is not None]
    if not judged:
        return
    exact = sum(layer.error == 0 and bool(layer.rtn_error) for layer in judged)
    line = f"calibrated: {len(judged)} layers"
    known = [(layer.unseen_error, layer.error, layer.rtn_error) for layer in judged]
    if gains := [(_gain(unseen, rtn), _gain(error, rtn)) for unseen, error, rtn in known if unseen and error and rtn]:
        unseen, seen = (sum(column) / len(gains) for column in zip(*gains, strict=True))
        line += (
            f", {unseen:.1f} dB less output error than rounding to nearest on average, to be expected on other inputs"
        )
        line += f" of the same kind ({seen:.1f} dB on the calibration's own)"
    if exact:
        line += f", {exact} without any"
    yield line
    if alone := [_gain(error, rtn) for unseen, error, rtn in known if unseen is None and error and rtn]:
        yield (
            f"  {len(alone)} layers, {sum(alone) / len(alone):.1f} dB on average, are judged on the samples that they "
            "were made from: the statistics hold none out"
        )
    noted = [layer for layer in judged if layer.note]
    for layer in noted[:_NOTED]:
        yield f"  {layer.name}: {layer.solver}, {layer.note}"
    if len(noted) > _NOTED:
        yield f"  and {len(noted) - _NOTED} more, see --json"


def _gain(error: float, rtn_error: float) -> float:
    """In dB."""
    return 10 * math.log10(rtn_error / error)


def _page(src: str, plan: Plan, done: ConversionReport) -> ConversionPage:
    """The conversion as the report takes it."""
    layers = [
        LayerRow(
            name=layer.name,
            format=layer.format,
            solver=layer.solver,
            shape=layer.shape,
            bytes_before=layer.bytes_before,
            bytes_after=layer.bytes_after,
            seconds=layer.seconds,
            sqnr=None if layer.accuracy is None else layer.accuracy.sqnr,
            cosine=None if layer.accuracy is None else layer.accuracy.cosine,
        )
        for layer in done.layers
    ]
    kept = [
        KeptGroup(name, len(found), becomes(found[0]), found[0].shape, sum(t.bytes_before for t in found), found[0].why)
        for component in plan.components
        for name, found in grouped(
            (tensor for tensor in component.tensors if tensor.action != "quantize"),
            lambda tensor, prefix=component.name: f"{prefix}/{tensor.key}" if prefix else tensor.key,  # type: ignore[misc]
            lambda tensor: (tensor.action, tensor.why, tensor.shape, tensor.dtype),
        )
    ]
    groups = [(name, found) for name, found in grouped(layers, lambda row: row.name, lambda row: row.format)]
    presets = "; ".join(f"{c.preset or 'none'}: {c.preset_why}" for c in plan.components)
    return ConversionPage(
        src, done.target, groups, kept, presets, list(plan.notes), done.bytes_before, done.bytes_after, done.seconds
    )
