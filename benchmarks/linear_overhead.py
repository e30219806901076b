"""What a call of F.linear on a quantized weight costs beside its kernel, in microseconds on one core.

The kernel is replaced by one that returns a ready result, so all that is left is our way from F.linear to it. Plain
F.linear with a 1 x 1 weight is shown for scale: it includes PyTorch's own dispatch and a product of one number.

    python benchmarks/linear_overhead.py [--format SPEC] [--json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.nn import functional as F

import lowbit
from lowbit import QuantizedTensor, dispatch

MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "training": torch.enable_grad,  # with an input that takes a gradient, which autograd has to record
}
CALLS = 2000
ROUNDS = 15
COLD_CALLS = 200
COLD_BYTES = 48 << 20
N, K = 64, 256


def main() -> None:
    """Measure all modes with and without bias, and print them."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--format", default="fp8_e4m3(granularity=row)", help="the spec of the weight")
    arguments.add_argument("--cold", action="store_true", help="read another buffer before every call")
    arguments.add_argument("--json", action="store_true", help="print JSON")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    weight = QuantizedTensor.quantize(torch.randn(N, K), options.format)
    rows = measure(weight, cold=options.cold)
    if options.json:
        machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
        print(
            json.dumps({"format": weight.spec, "lowbit": lowbit.__version__, **machine, "microseconds": rows}, indent=2)
        )
        return
    print(f"F.linear on {weight.spec} with a kernel that does nothing, microseconds a call")
    print(f"{'mode':<12}{'bias':<8}{'quantized':>10}{'kernel':>10}{'overhead':>10}{'plain 1x1':>11}")
    for row in rows:
        print(
            f"{row['mode']:<12}{row['bias']!s:<8}{row['quantized']:>10.1f}{row['kernel']:>10.1f}"
            f"{row['overhead']:>10.1f}{row['plain']:>11.1f}"
        )


def measure(weight: QuantizedTensor, *, cold: bool = False) -> list[dict[str, object]]:
    """One row a grad mode and bias, in microseconds: the least of several rounds, or the median of cold calls."""
    timed = _Cold() if cold else _microseconds
    ready = torch.randn(1, N)
    x, one = torch.randn(1, K), torch.ones(1, 1)
    arguments = (weight.format, x, weight.parts, None)
    chosen = dispatch.select("linear", weight.format.name, weight.kernel_layout, "cpu", arguments)
    row = dispatch._STATE.kernels[chosen.op, chosen.format]  # noqa: SLF001  (a benchmark of this very table)
    empty = replace(chosen, run=lambda *_: ready)
    row[row.index(chosen)] = empty
    dispatch._STATE.candidates.clear()  # noqa: SLF001
    results: list[dict[str, object]] = []
    try:
        for mode, context in MODES.items():
            for bias in (None, torch.randn(N)):
                given = x.clone().requires_grad_(mode == "training")
                with context():
                    quantized = timed(partial(F.linear, given, weight, bias))
                    kernel = timed(partial(empty.run, *arguments))
                    plain = timed(partial(F.linear, one, one, None if bias is None else one[0]))
                results.append(
                    {
                        "mode": mode,
                        "bias": bias is not None,
                        "quantized": quantized,
                        "kernel": kernel,
                        "overhead": quantized - kernel,
                        "plain": plain,
                    }
                )
    finally:
        row[row.index(empty)] = chosen
        dispatch._STATE.candidates.clear()  # noqa: SLF001
    return results


def _microseconds(function: Callable[[], object]) -> float:
    """The least time of a call over the rounds: whatever disturbs a round only adds to it."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        best = min(best, time.perf_counter() - start)
    return best / CALLS * 1e6


class _Cold:
    """The median time of a call after another buffer was read."""

    def __init__(self) -> None:
        self._buffer = torch.ones(COLD_BYTES // 4)

    def __call__(self, function: Callable[[], object]) -> float:
        times = []
        for _ in range(COLD_CALLS):
            self._buffer.sum()
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1e6


if __name__ == "__main__":
    main()
