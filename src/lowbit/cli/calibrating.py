"""The ways in which `lowbit calibrate` comes to statistics: of a text, a module, other files, or a time MLP."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lowbit.calibration import StatisticsFile, calibrate as run, save_statistics
from lowbit.calibration.imatrix import import_imatrix
from lowbit.calibration.merge import Merged, refuse_same_samples
from lowbit.calibration.names import checkpoint_names, layer_shapes
from lowbit.calibration.source_weights import source_marks
from lowbit.calibration.time_embedding import modulation_statistics
from lowbit.checkpoint.source import open_source
from lowbit.cli.output import stderr
from lowbit.integrations.factories import call_factory
from lowbit.integrations.text_batches import BATCH_SIZE, SAMPLES, VARIED, builtin_text, read_text, text_batches
from lowbit.integrations.text_models import calibration_dtype, load_text_model
from lowbit.integrations.text_objectives import objective_of


@dataclass(frozen=True)
class Wishes:
    """What was asked for, apart from what to do it on."""

    output: Path
    samples: int | None
    max_tokens: int
    batch_size: int | None
    vary: float | None
    gradients: bool | None
    device: str
    dtype: torch.dtype | None  # None: what suits the device
    options: dict[str, Any]  # of lowbit.calibrate


def from_text(folder: Path, files: list[Path], wishes: Wishes, *, with_builtin: bool) -> StatisticsFile:
    """Run the model of a folder on texts, also the built-in one."""
    texts = [read_text(file) for file in files]
    if with_builtin:
        texts.append(builtin_text())
        if not files:
            stderr().print("note: no --text, so the built-in one; text like what the model will see is better still")
    model = load_text_model(folder, device=wishes.device, dtype=wishes.dtype or calibration_dtype(wishes.device))
    usual = 0.0 if with_builtin or model.causal else VARIED
    vary = usual if wishes.vary is None else wishes.vary
    backward = wishes.gradients is not False
    usual_size = 1 if model.causal and backward else BATCH_SIZE  # what runs backward keeps all layers' activations
    batches = text_batches(
        model,
        texts,
        samples=wishes.samples or (2 * SAMPLES if with_builtin else SAMPLES),
        max_tokens=wishes.max_tokens,
        batch_size=wishes.batch_size or usual_size,
        vary=vary,
    )
    names = [file.name for file in files] + ["the built-in text"] * with_builtin
    with _counting() as update:
        found = run(
            model.model,
            batches,
            path=wishes.output,
            names=model.names(),
            description=f"{folder.resolve().name} on {', '.join(names)}" + (f", varied {vary:g}" if vary else ""),
            progress=update,
            gradients=objective_of(model) if backward else False,
            **{**wishes.options, "broad": wishes.options["broad"] or with_builtin},
        )
    assert isinstance(found, StatisticsFile)
    return found


def from_factory(checkpoint: Path | None, spec: str, wishes: Wishes) -> StatisticsFile:
    """Run what a function of the user returns; the names are those of the checkpoint, if there is one."""
    model, batches = call_factory(spec)
    names: dict[str, str | None] = {}
    if checkpoint is not None:
        with open_source(checkpoint) as source:
            names = checkpoint_names(model, layer_shapes(source))
    with _counting() as update:
        found = run(
            model,
            batches,
            path=wishes.output,
            names=names,
            description=spec,
            progress=update,
            gradients=bool(wishes.gradients),
            **wishes.options,
        )
    assert isinstance(found, StatisticsFile)
    return found


def imported(checkpoint: Path, imatrix: Path, output: Path) -> StatisticsFile:
    """Take over an importance matrix of llama.cpp."""
    with open_source(checkpoint) as source:
        shapes = layer_shapes(source)
        found = import_imatrix(imatrix, shapes, f"{checkpoint.name} by {imatrix.name}")
        found.contents = found.contents.marked(source_marks(source, {name: shapes[name] for name in found.layers}))
    return StatisticsFile(save_statistics(found, output))


def modulation(checkpoint: Path, output: Path, guidance: float) -> StatisticsFile:
    """Compute the inputs of modulation layers."""
    with open_source(checkpoint) as source:
        return StatisticsFile(save_statistics(modulation_statistics(source, guidance=guidance), output))


def merged(paths: list[Path], output: Path) -> StatisticsFile:
    """Join files."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(StatisticsFile(path)) for path in paths]
        refuse_same_samples(files)
        return StatisticsFile(save_statistics(Merged(files), output))


@contextlib.contextmanager
def _counting() -> Iterator[Callable[[int, int | None, str], None] | None]:
    """A line with the batches done and the time left on stderr, gone at the end; none where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (
        TextColumn("calibrating, {task.description}"),
        BarColumn(None),
        MofNCompleteColumn(),
        TextColumn("batches"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr(), transient=True, expand=True) as line:
        task = line.add_task("pass 1", total=None)

        def update(done: int, total: int | None, what: str) -> None:
            if done == 1:  # of another pass: the clock and the estimate begin anew
                line.reset(task)
            line.update(task, completed=done, total=total, description=what)

        yield update
