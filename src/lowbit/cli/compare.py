"""`lowbit compare`: several conversions of one model beside it, layer by layer and end to end."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.status import Status

from lowbit.calibration.statistics_file import StatisticsFile
from lowbit.checkpoint.compare import compare as compare_layers
from lowbit.checkpoint.compare_sources import layer_shapes
from lowbit.checkpoint.comparison import CandidateComparison, Comparison, absences
from lowbit.checkpoint.source import Source, open_source
from lowbit.cli import options
from lowbit.cli.beside import check_beside
from lowbit.cli.compare_page import compare_page
from lowbit.cli.compare_tables import show_layers, show_rest, show_runs
from lowbit.cli.given import refuse_idle
from lowbit.cli.known import tell_other_weights
from lowbit.cli.output import Exit, asking, command, decibels, epilog, print_json, progress, stderr
from lowbit.devices import usable_device
from lowbit.errors import PlanError
from lowbit.integrations.compare_models import SAMPLES, Step, evaluate_folder, evaluate_module
from lowbit.integrations.factories import find_factory
from lowbit.report.compare import write_compare
from lowbit.report.end_to_end import EndToEnd

EPILOG = epilog(
    "lowbit compare model.safetensors model-fp8.safetensors model-nvfp4.safetensors",
    "lowbit compare flux.safetensors flux-nvfp4.safetensors --stats flux.stats --html flux.html",
    "lowbit compare minilm/ minilm-int8.safetensors --model minilm/ --text sentences.txt --json",
    "lowbit compare dit.safetensors dit-w4a4.safetensors --module my_package.dit:make",
)


@command
def compare(
    context: typer.Context,
    ref: Annotated[
        Path,
        typer.Argument(
            readable=False, metavar="REF", help="What the others were made from; quantized or not.",
            show_default=False),
    ],
    candidates: Annotated[
        list[Path], typer.Argument(readable=False, metavar="CAND...", help="Conversions of it.", show_default=False)
    ],
    stats: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="FILE", help="Statistics of `lowbit calibrate`, for the error of each layer's output.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="DIR", help="Also run the model of this Hugging Face folder with each one's weights.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(
            readable=False, metavar="FILE", help="What --model runs on: UTF-8 text.", show_default=False)
    ] = None,
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Lines or windows of the text.")] = SAMPLES,
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            help="Where --model runs and products with --stats are taken: cpu, or a GPU such as cuda or cuda:1.",
        ),
    ] = "cpu",
    module: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE:FACTORY", help="Also run the model that this function returns, on the inputs it returns.",
            show_default=False,
        ),
    ] = None,
    rtn: Annotated[
        bool, typer.Option("--rtn/--no-rtn", help="Also round REF plainly in every layer's format, to compare with.")
    ] = True,
    worst: Annotated[int, typer.Option(min=0, metavar="N", help="Show this many layers, the worst first.")] = 10,
    html: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Also write all of it as a page to look at.", show_default=False),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict/--no-strict", help="End with 1 when only one of two files has a layer or tensor.")
    ] = False,
    jobs: options.Jobs = None,
    as_json: options.AsJson = False,
) -> None:  # fmt: skip
    """Compare conversions of a model: what each layer lost, which codes and scales are at their ends, and what it cost.

    SQNR: signal over noise in dB, 6 dB are one bit; of the weights, and with --stats of the layers' outputs,
    tr(W H W^T) / tr(E H E^T). Gain: over plain rounding in the same format. Flips: weights that decode to another value
    than after plain rounding. At ends: codes at the ends of their range.

    --model with --text runs a text model: embeddings are compared by their cosines, language models by KL divergence
    and top-1 agreement. --module runs any other: a function that returns (model, inputs), the inputs dicts of keyword
    arguments. Ends with 1 when a tensor that was kept differs from REF's, or a scale is not finite.

    Layers that only one of two files has are named, and the others compared. What --drop-unused left out is no problem
    with --strict either.
    """
    with asking():
        if text is None:
            refuse_idle(context, "is of --text, and there is none", "samples")
            if stats is None:
                refuse_idle(context, "is of --text or --stats, and there is neither", "device")
        usable_device(device)
        run = _runner(model, text, samples, module, device)
    page = check_beside(html, read=(ref, *candidates, stats, model, text))
    with contextlib.ExitStack() as stack:
        reference = stack.enter_context(open_source(ref))
        sources = [stack.enter_context(open_source(path)) for path in candidates]
        statistics = _statistics(stack, stats, reference)
        warnings = tell_other_weights(reference, statistics)
        with progress("comparing") as update:
            found = compare_layers(
                reference,
                sources,
                names=_labels(candidates),
                statistics=statistics,
                rtn=rtn,
                jobs=jobs,
                progress=update,
                device=device,
            )
    runs = _run(run, ref, candidates)
    problems = [problem for candidate in found.candidates for problem in _problems(candidate)]
    if strict:
        problems += [text for candidate in found.candidates for text in absences(candidate.name, candidate.absent)]
    if page is not None:
        write_compare(page, compare_page(found, runs, problems, " ".join(["lowbit", *map(shlex.quote, sys.argv[1:])])))
    if as_json:
        print_json({**_json(found, runs, problems), "warnings": warnings})
    else:
        show_layers(found, worst)
        if runs:
            show_runs(found, runs)
        show_rest(found, problems)
    if problems:
        raise typer.Exit(Exit.FOUND)


def _statistics(stack: contextlib.ExitStack, path: Path | None, reference: Source) -> StatisticsFile | None:
    """The statistics file, open, and checked against the reference."""
    if path is None:
        return None
    file = stack.enter_context(StatisticsFile.open(path))
    file.check(layer_shapes(reference))
    return file


Runner = Callable[[Path, Sequence[Path], Step], list[EndToEnd]]


def _runner(model: Path | None, text: Path | None, samples: int, module: str | None, device: str) -> Runner | None:
    """What runs the model end to end, if anything does. Raises `PlanError` for options that do not go together."""
    if module is not None:
        if model is not None or text is not None:
            raise PlanError("--module brings its own inputs; leave --model and --text out")
        factory = find_factory(module)
        return lambda ref, candidates, step: evaluate_module(module, ref, candidates, factory=factory, step=step)
    if (model is None) != (text is None):
        raise PlanError("--model and --text belong together: the folder of the model, and the text to run it on")
    if model is None or text is None:
        return None
    return lambda ref, candidates, step: evaluate_folder(
        model, text, ref, candidates, samples=samples, step=step, device=device
    )


def _run(run: Runner | None, ref: Path, candidates: Sequence[Path]) -> list[EndToEnd]:
    if run is None:
        return []
    with Status("loading the model", console=stderr()) as status:
        if not sys.stderr.isatty():
            status.stop()
        return run(ref, candidates, lambda name, done, count: status.update(f"running {name} ({done + 1} of {count})"))


def _json(found: Comparison, runs: Sequence[EndToEnd], problems: Sequence[str]) -> dict[str, Any]:
    data = found.to_json()
    for index, candidate in enumerate(data["candidates"]):
        candidate["end_to_end"] = runs[index].to_json() if runs else None
    return {**data, "problems": list(problems)}


def _labels(paths: Sequence[Path]) -> list[str]:
    """Short names of files that tell them apart."""
    stems = [path.name.removesuffix(".json").removesuffix(".index").removesuffix(".safetensors") for path in paths]
    return [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, paths, strict=True)]


def _problems(candidate: CandidateComparison) -> list[str]:
    """What a conversion should not have done, in words."""
    found = [f"{layer.name}: was kept, but differs ({decibels(layer.sqnr)})" for layer in candidate.altered]
    found += candidate.changed
    found += [
        f"{layer.name}: {layer.measure.scales.not_finite} values of its scales are not finite"
        for layer in candidate.quantized
        if layer.measure is not None and layer.measure.scales.not_finite
    ]
    return [f"{candidate.name}: {text}" for text in found]
