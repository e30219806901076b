"""The Triton part of scripts/compile_gpu: every kernel for GPUs that need not be there.

A kernel is compiled for some (--variants 0: all) of the sets of dtypes and constants that the dispatch table calls it
with, in the configs that come first for some number of tokens or in all that are left for any. It fails if the compiler
does, if nothing is left of a kernel, and if a config that comes first spills registers or wants more shared memory than
the target has; later configs that do are passed over when they are timed, and marked here.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lowbit.backends.triton.tuning import Config
from tests.support.kernel_examples import spread
from tests.support.triton_launches import TARGETS, Noted, all_noted, distinct, judge, qualified, unlaunched

FULL = "sm_90"  # takes everything
_VARIANTS = 4  # of a kernel and target; a Triton kernel takes seconds to compile


@dataclass(frozen=True)
class Row:
    """What became of one config of one kernel on one target."""

    kernel: str
    what: str
    config: str
    target: str
    registers: int
    spills: int
    shared: int
    seconds: float
    fault: str
    note: str


JOBS: list[tuple[Noted, Config, str]] = []  # the workers inherit it: jitted functions do not travel


def compile_job(index: int) -> Row:
    """Compile one job of JOBS."""
    one, config, target = JOBS[index]
    began = time.perf_counter()
    verdict = judge(one, config, target)
    seconds, made = time.perf_counter() - began, verdict.made
    cost = (made.registers, made.spills, made.shared) if made else (0, 0, 0)
    what = f"{one.by}: {one.what}"
    return Row(qualified(one.kernel), what, str(config), target, *cost, seconds, verdict.fault, verdict.note)


def _named(one: Noted) -> str:
    return qualified(one.kernel)


def collect(given: argparse.Namespace, targets: Sequence[str]) -> list[str]:
    """Fill JOBS; returns what is compiled for no target, for lack of an example that Hopper takes."""
    found, without = all_noted(FULL, not given.all_tokens)  # what is refused elsewhere alone is not missing
    missing = [*without.values(), *(f"no entry launches {name}" for name in unlaunched(found))]
    for target in targets:
        found, _ = all_noted(target, not given.all_tokens)
        for one in spread(distinct(found), _VARIANTS if given.variants is None else given.variants, _named):
            names = (qualified(one.kernel), one.by, one.what)
            if given.kernels and not any(wanted in name for wanted in given.kernels for name in names):
                continue
            configs = one.configs if given.all_configs else one.first
            JOBS.extend((one, config, target) for config in configs)
    return missing


def show(console: Console, rows: Sequence[Row]) -> None:
    """The table."""
    table = Table(title=f"Triton {triton.__version__}")
    left = ("kernel", "for", "config", "target", "")
    for head in ("kernel", "for", "config", "target", "registers", "spills", "shared", "seconds", ""):
        table.add_column(head, justify="left" if head in left else "right")
    for row in rows:
        numbers = (row.registers, row.spills, row.shared, f"{row.seconds:.1f}")
        said = row.fault or row.note or "ok"
        style = "red" if row.fault else "yellow" if row.note else ""
        table.add_row(row.kernel, row.what, row.config, row.target, *map(str, numbers), said, style=style)
    console.print(table)


def run(console: Console, given: argparse.Namespace) -> dict[str, Any]:
    """Compile and show; the rows, those at fault, and what is missing."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return {"rows": [], "faults": [], "missing": ["TRITON_INTERPRET=1 leaves nothing to compile; unset it"]}
    targets = [name for name in TARGETS if name in given.targets]
    missing = collect(given, targets)
    rows: list[Row] = []
    if JOBS:
        with multiprocessing.get_context("fork").Pool(min(given.jobs, len(JOBS))) as pool:
            made = pool.imap_unordered(compile_job, range(len(JOBS)))
            shown = sys.stderr.isatty()
            rows += track(made, "compiling Triton", len(JOBS), console=Console(stderr=True), disable=not shown)
    rows.sort(key=lambda row: (row.kernel, row.what, row.config, targets.index(row.target)))
    show(console, rows)
    faults = [f"{row.kernel} ({row.what}) {row.config} {row.target}: {row.fault}" for row in rows if row.fault]
    return {"version": triton.__version__, "rows": [asdict(row) for row in rows], "faults": faults, "missing": missing}
