"""Compile every kernel for GPUs that need not be there; show what each costs, and fail where one cannot run.

    scripts/compile_gpu [--backend cuda|triton] [--targets sm_80,sm_90] [--kernels NAME...] [--json FILE]

compile_cuda.py and compile_triton.py say what is compiled and what fails.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
BACKENDS = ("cuda", "triton")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, help="one of them; default: both")
    parser.add_argument("--targets", default=",".join(TARGETS), help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="those whose name or entry contains one of these")
    parser.add_argument("--all-tokens", action="store_true", help="more numbers of tokens; Triton: float16, too")
    parser.add_argument("--all-configs", action="store_true", help="Triton: not those alone that come first")
    parser.add_argument(
        "--variants", type=int, help="of a kernel and target, spread over all; 0 for all. Default: CUDA all, Triton 4"
    )
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args(arguments)
    given.targets = [name.removesuffix("a") for name in given.targets.split(",")]
    if unknown := [name for name in given.targets if name not in TARGETS]:
        parser.error(f"unknown target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, show, and 1 if anything is at fault."""
    given = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 220)
    found = {}
    for name in (given.backend,) if given.backend else BACKENDS:
        found[name] = importlib.import_module(f"compile_{name}").run(console, given)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    for name, made in found.items():
        for line in (*made["faults"], *made["missing"]):
            console.print(line, style="red", markup=False)
        counts = [len(made[key]) for key in ("rows", "faults", "missing")]
        console.print("{}: {} compiled, {} at fault, {} missing".format(name, *counts))
    compiled = sum(len(made["rows"]) for made in found.values())
    return 1 if not compiled or any(made["faults"] or made["missing"] for made in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
