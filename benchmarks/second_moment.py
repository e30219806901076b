"""x^T x of calibration's blocks of rows: the kernel of this processor beside PyTorch's product of panels (eager).

    python -m benchmarks.second_moment [--rounds 15] [--output FILE]

Both take turns in one process; before anything is timed, each is compared with float64. Prints, and writes to
`results/second_moment.json`, the median milliseconds of both and the ratio with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks.minilm_model import machine
from lowbit.calibration.accumulate import FLUSH
from lowbit.dispatch import select, use_backend
from lowbit.ops.second_moment import add_second_moment

RESULT = Path(__file__).parent / "results" / "second_moment.json"
COLUMNS = (384, 1536, 3072, 4096)
BACKENDS = ("cpu", "eager")


def checked(x: torch.Tensor) -> None:
    """End the program where a sum is off by more than float32 rounds."""
    exact = (x.double().t() @ x.double()).triu()
    size = exact.diagonal().sqrt()
    for backend in BACKENDS:
        with use_backend(backend):
            total = torch.zeros(x.shape[1], x.shape[1])
            add_second_moment(total, x)
        if float(((total.triu() - exact) / (size[:, None] * size)).abs().max()) > 1e-6:
            sys.exit(f"{backend}: x^T x of {list(x.shape)} is wrong")


def measure(k: int, rounds: int) -> dict[str, object]:
    """One row of the result."""
    x = torch.randn(FLUSH, k, generator=torch.Generator().manual_seed(k))
    checked(x)
    seconds: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    total = torch.zeros(k, k)
    for turn in range(rounds):
        for backend in BACKENDS[:: 1 - 2 * (turn % 2)]:
            with use_backend(backend):
                began = time.perf_counter()
                add_second_moment(total, x)
                seconds[backend].append(time.perf_counter() - began)
    ratios = [old / new for new, old in zip(*(seconds[backend] for backend in BACKENDS), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = {backend: 1e3 * statistics.median(values) for backend, values in seconds.items()}
    return {"rows": FLUSH, "columns": k, "milliseconds": medians, "ratio": middle, "quartiles": [low, high]}


def main() -> None:
    """Measure, print and write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--output", type=Path, default=RESULT)
    given = arguments.parse_args()
    args = torch.zeros(64, 64), torch.zeros(64, 64)
    if select("add_second_moment", "*", "", "cpu", args).backend != "cpu":
        sys.exit("no kernel for second moments runs on this processor: `lowbit doctor` shows its instruction set")
    rows = []
    for k in COLUMNS:
        rows.append(measure(k, given.rounds))
        print(json.dumps(rows[-1]), flush=True)
    given.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
