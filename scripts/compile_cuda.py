"""The CUDA part of scripts/compile_gpu: every kernel for GPUs that need not be there.

Every variant that launchers ask for over formats, shapes, numbers of tokens and dtypes is compiled. It fails if the
compiler does or warns, if a kernel that a forward runs spills registers, if a block wants more shared memory than the
architecture has, and if nothing launches a function.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from lowbit.backends.cuda import compiler
from tests.support.cuda_launches import SHARED, Noted, all_noted, distinct, judge, nowhere
from tests.support.kernel_examples import spread


@dataclass(frozen=True)
class Row:
    """What became of one variant on one architecture. `shared`: bytes of a block, its own and the launch's."""

    kernel: str
    variant: str
    what: str
    target: str
    registers: int
    spills: int
    shared: int
    seconds: float
    fault: str


def compile_job(job: tuple[Noted, str]) -> Row:
    """Compile one variant for one architecture."""
    one, architecture = job
    began = time.perf_counter()
    verdict = judge(one, architecture)
    seconds, made = time.perf_counter() - began, verdict.made
    cost = (made.registers, made.spills) if made else (0, 0)
    variant = one.launch.name.partition("<")[2].rpartition(">")[0].replace("lowbit::", "")
    what = one.by if one.what in one.by else f"{one.by}: {one.what}"
    return Row(one.function, variant, what, architecture, *cost, verdict.shared, seconds, verdict.fault)


def show(console: Console, rows: Sequence[Row]) -> None:
    """The table."""
    table = Table(title=compiler.versions())
    for head in ("kernel", "variant", "for", "target"):
        table.add_column(head, overflow="fold")
    for head in ("registers", "spills", "shared", "seconds"):
        table.add_column(head, justify="right")
    table.add_column("")
    for row in rows:
        numbers = (row.registers, row.spills, row.shared, f"{row.seconds:.2f}")
        said = "at fault" if row.fault else "ok" if not row.spills else "not hot"
        style = "red" if row.fault else "yellow" if row.spills else ""
        table.add_row(row.kernel, row.variant, row.what, row.target, *map(str, numbers), said, style=style)
    console.print(table)


def _named(one: Noted) -> str:
    return one.function


def run(console: Console, given: argparse.Namespace) -> dict[str, Any]:
    """Compile and show; the rows, those at fault, and what is missing."""
    targets = [name for name in SHARED if name.removesuffix("a") in given.targets]
    jobs = []
    for target in targets:
        for one in spread(distinct(all_noted(target, not given.all_tokens)[0]), given.variants or 0, _named):
            names = (one.function, one.launch.name, one.by, one.what)
            if not given.kernels or any(wanted in name for wanted in given.kernels for name in names):
                jobs.append((one, target))
    rows: list[Row] = []
    if jobs:
        with multiprocessing.get_context("spawn").Pool(min(given.jobs, len(jobs))) as pool:
            made = pool.imap_unordered(compile_job, jobs)
            shown = sys.stderr.isatty()
            rows += track(made, "compiling CUDA", len(jobs), console=Console(stderr=True), disable=not shown)
    rows.sort(key=lambda row: (row.kernel, row.variant, targets.index(row.target)))
    show(console, rows)
    faults = [f"{row.kernel} <{row.variant}> ({row.what}) {row.target}: {row.fault}" for row in rows if row.fault]
    missing = nowhere(list(SHARED), not given.all_tokens)
    return {"version": compiler.versions(), "rows": [asdict(row) for row in rows], "faults": faults, "missing": missing}
