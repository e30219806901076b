"""The triangular factor of second moments on the CPU: by blocks (`numerics.cholesky`) beside LAPACK's.

    python -m benchmarks.cholesky [--rounds 9] [--output FILE]

Both take turns in one process, on one thread and on all; before anything is timed, both are compared with float64.
Prints, and writes to `results/cholesky.json`, the median milliseconds of both and the ratio with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.minilm_model import machine
from lowbit.numerics.cholesky import cholesky

RESULT = Path(__file__).parent / "results" / "cholesky.json"
COLUMNS = (384, 768, 1536, 3072)
WAYS = {"lowbit": cholesky, "lapack": lambda matrix: torch.linalg.cholesky_ex(matrix).L}


def moments(k: int) -> Tensor:
    """Second moments of channels that fall off, float32 [k, k]; ends the program where a factor of them is wrong."""
    x = torch.randn(2 * k, k, generator=torch.Generator().manual_seed(k)) * torch.arange(1, k + 1).rsqrt()
    found = x.t() @ x / (2 * k)
    exact = torch.linalg.cholesky(found.double())
    for name, way in WAYS.items():
        if float((way(found).double() - exact).norm() / exact.norm()) > 1e-5:
            sys.exit(f"{name}: the factor of {k} columns is wrong")
    return found


def measure(matrix: Tensor, threads: int, rounds: int) -> dict[str, object]:
    """One row of the result."""
    torch.set_num_threads(threads)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(rounds):
        for name in list(WAYS)[:: 1 - 2 * (turn % 2)]:
            began = time.perf_counter()
            WAYS[name](matrix)
            seconds[name].append(time.perf_counter() - began)
    low, middle, high = statistics.quantiles([b / a for a, b in zip(*seconds.values(), strict=True)], n=4)
    medians = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    columns = matrix.shape[0]
    return {"columns": columns, "threads": threads, "milliseconds": medians, "ratio": middle, "quartiles": [low, high]}


def main() -> None:
    """Measure, print and write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--output", type=Path, default=RESULT)
    given = arguments.parse_args()
    rows = []
    for matrix in map(moments, COLUMNS):
        for threads in sorted({1, os.cpu_count() or 1}):
            rows.append(measure(matrix, threads, given.rounds))
            print(rows[-1])
    given.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
