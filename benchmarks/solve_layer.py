"""Solve one large layer with full second moments: seconds by step, and the gain on inputs that were not seen.

    python -m benchmarks.solve_layer [--shapes 3072x3072 12288x3072 3072x12288] [--formats SPEC...] [--peer]

The weight is Gaussian with heavy tails and some large columns; the input has a power-law spectrum in a basis that mixes
neighbouring channels, and channels of log-normal size. "gain" is the output error of plain rounding over that of the
result, in dB, on 2048 fresh rows, by the weight alone. `solve` is what `lowbit convert` runs for a layer, its trial and
its judging on held-out moments included. With --peer, the first shape is converted by convert-to-quant's learned
rounding, too (`ctq` with its defaults, fp8): a process of its own, whose start and file count.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.minilm_model import machine
from lowbit.checkpoint.load import load
from lowbit.formats import Format, parse_spec
from lowbit.solvers import Statistics, parse_pipeline, solve, solver
from lowbit.solvers.refinement import Unrefined, refine

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


def measure(n: int, k: int, formats: list[Format], *, peer: bool = False) -> list[dict[str, object]]:
    """One shape in all formats, and by the peer."""
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
    rows = [one(w, fmt, known, fresh) for fmt in formats]
    return [*rows, convert_to_quant(w, fresh)] if peer else rows


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
        given = Unrefined(w, fmt, parts, combined, 0.2, "layer")
        parts = timed(step, lambda given=given, steps=steps: refine(given, steps))
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


def convert_to_quant(w: Tensor, fresh: Tensor) -> dict[str, object]:
    """convert-to-quant's learned rounding of the same weight, beside rounding to nearest in the same format."""
    fmt = parse_spec("fp8_e4m3")
    model = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=False))
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.safetensors", Path(folder) / "out.safetensors"
        save_file({"0.weight": w}, source)
        command = [str(Path(sys.executable).parent / "ctq"), "-i", str(source), "-o", str(target)]
        began = time.perf_counter()
        subprocess.run([*command, "--comfy_quant", "--save-quant-metadata"], check=True, capture_output=True)
        seconds = time.perf_counter() - began
        load(model, target)
    decoded = model[0].weight.dequantize()
    lost = [output_error(w, fmt, fmt.quantize(w), fresh), mean_square(decoded.float() - w.float(), fresh)]
    gain = 10 * math.log10(lost[0] / lost[1])
    print(f"{w.shape[0]}x{w.shape[1]}  fp8_e4m3 by ctq  {seconds:.1f} s   gain {gain:.2f} dB", flush=True)
    return {
        "shape": list(w.shape), "format": fmt.spec, "solver": "ctq", "seconds": {"solve": seconds}, "gain": gain,
    }  # fmt: skip


def output_error(w: Tensor, fmt: Format, parts: dict[str, Tensor], x: Tensor) -> float:
    """The mean squared error of x W^T."""
    return mean_square(fmt.dequantize(parts, (w.shape[0], w.shape[1]), torch.float32) - w.float(), x)


def mean_square(error: Tensor, x: Tensor) -> float:
    """The mean square of x E^T."""
    return float((x @ error.t()).square().mean())


def main() -> None:
    """Measure, print and write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shapes", nargs="+", default=list(SHAPES))
    arguments.add_argument("--formats", nargs="+", default=list(FORMATS))
    arguments.add_argument("--peer", action="store_true", help="convert-to-quant on the first shape (minutes)")
    arguments.add_argument("--json", type=Path, default=RESULT)
    given = arguments.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    rows = []
    for shape in given.shapes:
        n, _, k = shape.partition("x")
        formats = [parse_spec(spec) for spec in given.formats]
        rows += measure(int(n), int(k), formats, peer=given.peer and shape == given.shapes[0])
    result = {
        "machine": machine(*["convert-to-quant"] * given.peer),
        "load": os.getloadavg()[0],
        "tokens": TOKENS,
        "rows": rows,
    }
    given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
