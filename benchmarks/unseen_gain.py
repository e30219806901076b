"""The gain that a conversion reports, against the gain on fresh inputs: random layers, formats and sample counts.

    python -m benchmarks.unseen_gain [--seeds 4] [--size 128] [--output FILE]

Layers are Gaussian weights behind inputs with a power law of eigenvalues in random directions (exponents 0, 0.5, 1 and
2), half of them with a mean that the bias corrects; their true second moments are known, so a gain on fresh inputs is
exact. With gradients, those at the output have a power law too. Prints, and writes to `results/unseen_gain.json`, for
each format and number of tokens a channel (of each half): the true gain over plain rounding in dB, how much more the
samples themselves show (`error`) and how much more is reported (`unseen_error`), with root mean squares and extremes,
and how many layers are worse than plain rounding on fresh inputs.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lowbit import parse_spec
from lowbit.formats.base import Format
from lowbit.solvers import AUTO, Solution, solve, solver
from lowbit.solvers.curvature import energy
from tests.support.layers import Layer

RESULT = Path(__file__).parent / "results" / "unseen_gain.json"
FORMATS = (
    "int8",
    "fp8_e4m3",
    "fp8_e4m3(granularity=block,block_size=32x32)",
    "nvfp4",
    "awq_w4a16(group_size=32)",
    "awq_w4a16(pre_quant_scale=true)",
    "svdquant_w4a4(rank=8)",
)
WITH_GRADIENTS = ("int8", "awq_w4a16(group_size=32)")
TOKENS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 32)
EXPONENTS = (0.0, 0.5, 1.0, 2.0)


def decibels(ratio: float) -> float:
    """Of errors."""
    return -10 * math.log10(ratio)


def true_gain(layer: Layer, fmt: Format, found: Solution, outputs: torch.Tensor | None) -> float:
    """Over plain rounding, of inputs (and gradients) with the layer's true second moments, in dB."""

    def lost(parts: Any, kind: Format, bias: torch.Tensor | None) -> float:
        shape = (layer.weight.shape[0], layer.weight.shape[1])
        error = kind.dequantize(parts, shape, torch.float32) - layer.weight
        whole = energy(error, layer.hessian, outputs)
        if bias is not None:
            mean = error @ layer.mean.float()
            whole += energy((mean + bias).unsqueeze(0), outputs) - energy(mean.unsqueeze(0), outputs)
        return whole

    plain = lost(solver("rtn")(layer.weight, fmt.plain), fmt.plain, None)
    return decibels(lost(found.parts, fmt, found.bias) / plain)


def cases(tokens: float, size: int, seeds: int, *, gradients: bool) -> Iterator[tuple[Layer, Any, torch.Tensor | None]]:
    """Layers, their statistics and the true G."""
    for exponent in EXPONENTS:
        for seed in range(seeds):
            layer = Layer.make(size, size, exponent, seed + 10, mean=0.3 * seed)
            known, count = layer.statistics(max(2, int(tokens * size)), seed), max(2, int(tokens * size))
            if not gradients:
                yield layer, known, None
                continue
            output = Layer.make(1, size, 2.0 - exponent, seed + 50)
            seen = output.statistics(count, seed + 9)
            yield layer, replace(known, output_hessian=seen.hessian, output_held_out=seen.held_out), output.hessian


def measure(spec: str, tokens: float, size: int, seeds: int, *, gradients: bool) -> dict[str, Any]:
    """One row of the result."""
    fmt, rows = parse_spec(spec), []
    for index, (layer, known, outputs) in enumerate(cases(tokens, size, seeds, gradients=gradients)):
        found = solve(layer.weight, fmt, AUTO, known, has_bias=bool(index % 2))
        unseen = getattr(found, "unseen_error", found.error)
        gains = [decibels(error / found.rtn_error) for error in (found.error, unseen)]
        rows.append((true_gain(layer, fmt, found, outputs), *gains))
    true = [row[0] for row in rows]
    return {
        "format": spec,
        "gradients": gradients,
        "tokens_per_channel": tokens,
        "layers": len(rows),
        "true": sum(true) / len(true),
        "on_samples": too_good([row[1] - row[0] for row in rows]),
        "reported": too_good([row[2] - row[0] for row in rows]),
        "worse_than_rounding": sum(gain < 0 for gain in true),
        "least": min(true),
    }


def too_good(excess: list[float]) -> dict[str, float]:
    """By how many dB gains are above the true ones: their mean, root mean square, least and most."""
    squares = sum(x * x for x in excess) / len(excess)
    return {"mean": sum(excess) / len(excess), "rms": math.sqrt(squares), "least": min(excess), "most": max(excess)}


def main() -> None:
    """See the module."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=4, help="layers of each kind")
    options.add_argument("--size", type=int, default=128, help="rows and channels of a layer")
    options.add_argument("--output", type=Path, default=RESULT)
    given = options.parse_args()
    result = []
    for spec, gradients in [*((spec, False) for spec in FORMATS), *((spec, True) for spec in WITH_GRADIENTS)]:
        for tokens in TOKENS:
            row = measure(spec, tokens, given.size, given.seeds, gradients=gradients)
            result.append(row)
            shown, told = row["on_samples"], row["reported"]
            print(
                f"{spec:46}{'G' if gradients else ' '} {tokens:5}: true {row['true']:6.2f}, on samples "
                f"{shown['mean']:+5.2f} (rms {shown['rms']:.2f}), reported {told['mean']:+5.2f} (rms {told['rms']:.2f},"
                f" {told['least']:+.2f} to {told['most']:+.2f}), worse {row['worse_than_rounding']} of {row['layers']}",
                flush=True,
            )
    given.output.write_text(json.dumps({"size": given.size, "rows": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
