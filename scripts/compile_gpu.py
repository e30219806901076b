"""Compile every Triton kernel for GPUs that need not be there; show what each costs, and fail where one cannot run.

    scripts/compile_gpu [--targets sm_80,sm_90] [--kernels NAME...] [--all-configs] [--all-tokens] [--json FILE]

A kernel is compiled for some (--variants 0: all) of the sets of dtypes and constants that the dispatch table calls it
with, in its first config or in all. It fails if the compiler does, if nothing is left of a kernel, and if the first
config spills registers or wants more shared memory than the target has; later configs that do are passed over when they
are timed, and marked here.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lowbit.backends.triton.tuning import Config
from tests.support.triton_launches import TARGETS, Noted, all_noted, distinct, judge, qualified, unlaunched

DEFAULT = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


FULL = "sm_90"  # takes everything


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


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(DEFAULT), help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="those whose name or entry contains one of these")
    parser.add_argument("--all-configs", action="store_true", help="not the first alone")
    parser.add_argument("--all-tokens", action="store_true", help="more numbers of tokens, and float16 beside bfloat16")
    parser.add_argument("--variants", type=int, default=4, help="of a kernel and target, spread over all; 0 for all")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args(arguments)
    given.targets = given.targets.split(",")
    if unknown := [name for name in given.targets if name not in TARGETS]:
        parser.error(f"unknown target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    return given


def spread(found: Sequence[Noted], count: int) -> list[Noted]:
    """Of each kernel at most so many variants, the first and the last among them; 0 for all."""
    by: dict[str, list[Noted]] = {}
    for one in found:
        by.setdefault(qualified(one.kernel), []).append(one)
    if not count:
        return list(found)
    chosen = []
    for many in by.values():
        last = len(many) - 1
        places = dict.fromkeys(round(index * last / max(1, count - 1)) for index in range(count))
        chosen += [many[place] for place in places]
    return chosen


def collect(given: argparse.Namespace) -> list[str]:
    """Fill JOBS; returns what is compiled for no target, for lack of an example that Hopper takes."""
    found, without = all_noted(FULL, not given.all_tokens)  # what is refused elsewhere alone is not missing
    missing = [*without.values(), *(f"no entry launches {name}" for name in unlaunched(found))]
    for target in given.targets:
        found, _ = all_noted(target, not given.all_tokens)
        for one in spread(distinct(found), given.variants):
            names = (qualified(one.kernel), one.by, one.what)
            if given.kernels and not any(wanted in name for wanted in given.kernels for name in names):
                continue
            configs = one.launch.configs if given.all_configs else one.launch.configs[:1]
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, show, and 1 if anything is at fault."""
    given = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 220)
    if os.environ.get("TRITON_INTERPRET") == "1":
        console.print("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
        return 3
    missing = collect(given)
    rows: list[Row] = []
    if JOBS:
        with multiprocessing.get_context("fork").Pool(min(given.jobs, len(JOBS))) as pool:
            made = pool.imap_unordered(compile_job, range(len(JOBS)))
            shown = sys.stderr.isatty()
            rows += track(made, "compiling", len(JOBS), console=Console(stderr=True), disable=not shown)
    rows.sort(key=lambda row: (row.kernel, row.what, row.config, given.targets.index(row.target)))
    show(console, rows)
    if given.json:
        result = {"triton": triton.__version__, "rows": [asdict(row) for row in rows], "missing": missing}
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    faults = [row for row in rows if row.fault]
    for row in faults:
        console.print(f"{row.kernel} ({row.what}) {row.config} {row.target}: {row.fault}", style="red", markup=False)
    for why in missing:
        console.print(why, style="red", markup=False)
    console.print(f"{len(rows)} compiled, {len(faults)} at fault, {len(missing)} missing")
    return 1 if faults or missing or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
