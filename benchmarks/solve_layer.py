"""Solve one large layer with full second moments: seconds by step, and the gain on inputs that were not seen.

    python -m benchmarks.solve_layer [--shapes 3072x3072 12288x3072 3072x12288] [--formats SPEC...] [--json FILE]

The weight is Gaussian with heavy tails and some large columns; the input has a power-law spectrum in a basis that mixes
neighbouring channels, and channels of log-normal size. "gain" is the output error of plain rounding over that of the
result, in dB, on 2048 fresh rows, by the weight alone. `solve` is what `lowbit convert` runs for a layer, its trial and
its judging on held-out moments included.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.minilm_model import machine
from lowbit.formats import Format, parse_spec
from lowbit.solvers import Statistics, parse_pipeline, solve, solver
from lowbit.solvers.refinement import refine

RESULT = Path(__file__).parent / "results" / "solve_layer.json"
SHAPES = ("3072x3072", "12288x3072", "3072x12288")
FORMATS = ("awq_w4a16", "fp8_e4m3", "int8", "nvfp4", "svdquant_w4a4")
TOKENS = 2048  # of each half, and of the test: fewer than channels, as calibration often has
MIX = 64  # channels that are correlated with each other


class Inputs:
    """Rows with a power-law spectrum: groups of MIX channels mixed alike, each channel scaled."""

    def __init__(self, k: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(MIX, MIX, generator=self.generator)).Q
        spectrum = torch.arange(1, MIX + 1).float() ** -0.75
        self.mix = (basis * spectrum) @ basis.t()
        self.scale = torch.randn(k, generator=self.generator).mul_(0.7).exp_()
        self.common = torch.randn(32, k, generator=self.generator) * 0.1

    def rows(self, count: int) -> Tensor:
        """Fresh rows [count, K]."""
        k = self.scale.numel()
        noise = torch.randn(count, k // MIX, MIX, generator=self.generator) @ self.mix
        shared = torch.randn(count, 32, generator=self.generator) @ self.common
        return noise.flatten(1).add_(shared).mul_(self.scale)


def weight(n: int, k: int) -> Tensor:
    """Heavy tails and every 97th column four times as large, bfloat16."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(n, k, generator=generator)
    w *= 0.02 * torch.rand(n, k, generator=generator).clamp_min_(0.05).rsqrt_()
    w[:, ::97] *= 4
    return w.bfloat16()


def moments(x: Tensor) -> Tensor:
    """E[x x^T] of rows."""
    return x.t() @ x / x.shape[0]


def measure(n: int, k: int, formats: list[Format]) -> list[dict[str, object]]:
    """One shape in all formats."""
    inputs = Inputs(k)
    first, second, fresh = (inputs.rows(TOKENS) for _ in range(3))
    known = Statistics(
        hessian=moments(first),
        tokens=TOKENS,
        held_out=moments(second),
        held_out_tokens=TOKENS,
        absmax=torch.maximum(first.abs().amax(0), second.abs().amax(0)),
        mean=(first.mean(0) + second.mean(0)) / 2,
        samples=first[:256].clone(),
    )
    w = weight(n, k)
    return [one(w, fmt, known, fresh) for fmt in formats]


def one(w: Tensor, fmt: Format, known: Statistics, fresh: Tensor) -> dict[str, object]:
    """One format: the seconds of each step, and of `solve` as a whole."""
    seconds = {}

    def timed(name: str, run):
        began = time.perf_counter()
        made = run()
        seconds[name] = time.perf_counter() - began
        return made

    parts = timed(fmt.calibrated_start, lambda: solver(fmt.calibrated_start)(w, fmt, known))
    combined = known.combined
    assert combined is not None
    for step in ("gptq", "descent"):
        steps = parse_pipeline(f"rtn+{step}").refinements
        parts = timed(step, lambda start=parts, steps=steps: refine(w, fmt, start, steps, combined, 0.2, "layer"))
    solution = timed("solve", lambda: solve(w, fmt, "auto", known))
    lost = [output_error(w, fmt, found, fresh) for found in (fmt.quantize(w), solution.parts)]
    row = {
        "shape": list(w.shape),
        "format": fmt.spec,
        "solver": solution.solver,
        "seconds": seconds,
        "gain": 10 * math.log10(lost[0] / lost[1]),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    steps_text = "  ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    print(f"{w.shape[0]}x{w.shape[1]}  {fmt.spec:16s} {steps_text} s   gain {row['gain']:.2f} dB", flush=True)
    return row


def output_error(w: Tensor, fmt: Format, parts: dict[str, Tensor], x: Tensor) -> float:
    """The mean squared error of x W^T."""
    error = fmt.dequantize(parts, (w.shape[0], w.shape[1]), torch.float32) - w.float()
    return float((x @ error.t()).square().mean())


def main() -> None:
    """Measure, print and write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shapes", nargs="+", default=list(SHAPES))
    arguments.add_argument("--formats", nargs="+", default=list(FORMATS))
    arguments.add_argument("--json", type=Path, default=RESULT)
    given = arguments.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    rows = []
    for shape in given.shapes:
        n, _, k = shape.partition("x")
        rows += measure(int(n), int(k), [parse_spec(spec) for spec in given.formats])
    result = {"machine": machine(), "load": os.getloadavg()[0], "tokens": TOKENS, "rows": rows}
    given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
