"""How long the first use of a CUDA kernel takes: compiled, and in a later process from the cache on disk.

    python -m benchmarks.gpu_first_use        prints the seconds of one launch in this process, as JSON

Processes of their own are started, with a cache folder that is empty at first. A process times one linear of few
tokens, after torch has made its context and the backend is imported, until the result is there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_linears import drawn_on, packed
from lowbit import dispatch

# Formats, and the tokens that the backend has a kernel for.
CALLS = {"awq_w4a16": (1, 64), "nvfp4": (1, 64), "svdquant_w4a4": (1, 64), "int8": (1, 8)}
SHAPE = (256, 512)
LATER = 2  # processes that find the kernels in the cache; the fastest counts


def seconds_here(device: torch.device) -> dict[str, float]:
    """The seconds of each format's first linear in this process."""
    dispatch.load("cuda")
    found = {}
    for spec, tokens in CALLS.items():
        weight = packed(drawn_on(device, spec, *SHAPE).weight)
        for m in tokens:
            x = torch.ones(m, SHAPE[1], device=device, dtype=torch.bfloat16)
            torch.cuda.synchronize()
            began = time.perf_counter()
            with dispatch.use_backend("cuda"):
                torch.nn.functional.linear(x, weight)
            torch.cuda.synchronize()
            found[f"{spec} M={m}"] = time.perf_counter() - began
    return found


def measure() -> list[dict[str, Any]]:
    """A row for each linear: seconds of the first process, and of later ones."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [_process(folder) for _ in range(1 + LATER)]
    return [
        {"section": "start", "name": name, "first_seconds": first, "later_seconds": min(run[name] for run in runs[1:])}
        for name, first in runs[0].items()
    ]


def show(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """First uses, in milliseconds."""
    done = [row for row in rows if "first_seconds" in row]
    if not done:
        return
    table = Table(title="first use of a CUDA kernel")
    for head in ("linear", "compiled, ms", "from the cache, ms"):
        table.add_column(head, justify="left" if head == "linear" else "right")
    for row in done:
        table.add_row(row["name"], f"{1e3 * row['first_seconds']:.0f}", f"{1e3 * row['later_seconds']:.1f}")
    console.print(table)


def _process(folder: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.gpu_first_use"]
    environment = {**os.environ, "LOWBIT_CACHE": folder}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(seconds_here(torch.device("cuda", torch.cuda.current_device()))))
