"""What the nodes do beside loading: convert a file, and say in a text table what is in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lowbit.checkpoint.conversion_report import ConversionReport
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.inspection import LayerGroup, inspect
from lowbit.checkpoint.pipeline import Progress
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.checkpoint.target import check_file_target
from lowbit.errors import WriteError

_COLUMNS = ("layers", "x", "format", "shape", "bytes", "bits/weight")
_RIGHT = ("x", "bytes", "bits/weight")


def convert_file(
    source: str | Path,
    target: str | Path,
    format: str,
    *,
    solver: str = "auto",
    preset: str = "auto",
    keep: Sequence[str] = (),
    progress: Progress | None = None,
    tell: Callable[[str], object] | None = None,
) -> ConversionReport:
    """Quantize a checkpoint into a new ComfyUI file. `progress(done bytes, total bytes, layer)` after each piece.

    `tell` is called with each of the plan's notes, such as how the solver was chosen, before the work begins.
    format, solver, preset, keep: as in `lowbit.checkpoint.plan.make_plan`.

    Raises `WriteError` for a target that exists: nothing is written over. Otherwise as `make_plan` and `convert`.
    """
    target = Path(target)
    if target.exists():
        raise WriteError(f"{target}: exists already; choose another name, or remove it first")
    check_file_target(target)
    with open_source(source) as opened:
        plan = make_plan(opened, format, solver=solver, preset=preset, keep=keep, dialect="comfy")
        if tell is not None:
            for note in plan.notes:
                tell(note)
        return convert(opened, target, plan, progress=progress)


def inspect_text(path: str | Path) -> str:
    """What a checkpoint holds, as a text table: one line a group of layers, then notes and problems."""
    with open_source(path) as source:
        found = inspect(source)
    rows = [_COLUMNS, *(_row(group) for group in found.groups)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(_padded(row, widths)).rstrip() for row in rows]
    names = dict.fromkeys(found.dialects.values())
    kinds = ", ".join(f"written as {name}" if name else "not quantized" for name in names)
    layers = sum(group.count for group in found.quantized)
    lines = [f"{found.path}: {kinds}; {layers} quantized layers, {found.bytes / 2**20:.1f} MiB", "", *lines]
    lines += [f"note: {note}" for note in found.notes]
    lines += [f"problem: {problem}" for problem in found.problems] or ["no problems"]
    return "\n".join(lines)


def _row(group: LayerGroup) -> tuple[str, ...]:
    shape = "x".join(map(str, group.shape)) or "one value"
    size = f"{group.bytes / 2**20:.2f} MiB"
    return group.name, str(group.count), group.format or "-", shape, size, f"{group.bits_per_weight:.2f}"


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    cells = zip(_COLUMNS, row, widths, strict=True)
    return [cell.rjust(width) if name in _RIGHT else cell.ljust(width) for name, cell, width in cells]
