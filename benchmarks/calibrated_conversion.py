"""Convert some blocks of a Llama with full second moments of inputs and gradients: seconds, cores kept busy, memory.

    python -m benchmarks.calibrated_conversion [--blocks 2] [--formats SPEC...] [--json FILE]

Linears of TinyLlama's shapes (2048, 5632, and 256 for keys and values), 44 M weights a block, Gaussian with heavy
tails and some large columns; statistics of `Inputs` of solve_layer, 2048 rows a half. `convert` runs as the command
does, reading, trial, judging, writing and verifying included, on one thread (`jobs=1`) and on one a core in turn. Both
must write the same bytes, and no layer may be worse than plain rounding on the half held out, or nothing is reported.
"gain": the mean over the layers, in dB, of what plain rounding loses over what the result does there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.minilm_model import machine
from benchmarks.solve_layer import TOKENS, Inputs, moments, weight
from lowbit.calibration import Collected, StatisticsFile
from lowbit.calibration.collection import Contents, InputFacts, LayerInput
from lowbit.checkpoint.conversion_report import ConversionReport
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.solvers import Statistics

RESULT = Path(__file__).parent / "results" / "calibrated_conversion.json"
FORMATS = ("awq_w4a16", "fp8_e4m3", "nvfp4", "svdquant_w4a4")
HIDDEN, KEYS, WIDE = 2048, 256, 5632
LINEARS = (  # name, N, K, and which of a block's inputs it reads
    ("self_attn.q_proj", HIDDEN, HIDDEN, "attention"),
    ("self_attn.k_proj", KEYS, HIDDEN, "attention"),
    ("self_attn.v_proj", KEYS, HIDDEN, "attention"),
    ("self_attn.o_proj", HIDDEN, HIDDEN, "heads"),
    ("mlp.gate_proj", WIDE, HIDDEN, "mlp"),
    ("mlp.up_proj", WIDE, HIDDEN, "mlp"),
    ("mlp.down_proj", HIDDEN, WIDE, "gated"),
)


class WrongResultError(Exception):
    """A conversion that is not what it should be: nothing is reported of it."""


def make(folder: Path, blocks: int) -> None:
    """Write `model.safetensors` and `statistics.safetensors`."""
    layers: dict[str, LayerInput] = {}
    inputs: dict[str, Statistics] = {}
    outputs: dict[str, dict[str, torch.Tensor]] = {}
    for block in range(blocks):
        for name, n, k, read in LINEARS:
            key, output = f"{block}.{read}", f"{block}.{name}"
            layers[f"model.layers.{block}.{name}"] = LayerInput(key, (n, k), output)
            if key not in inputs:
                inputs[key] = known(k, seed=len(inputs))
            gradients = Inputs(n, seed=1000 + len(outputs))
            outputs[output] = {
                "output_hessian": moments(gradients.rows(TOKENS)),
                "output_held_out": moments(gradients.rows(TOKENS)),
            }
    facts = {layer.input: InputFacts(layer.shape[1], TOKENS, TOKENS, "full") for layer in layers.values()}
    Collected(Contents("blocks of a Llama", layers, facts), inputs, outputs).save(folder / "statistics.safetensors")
    tensors = {f"{name}.weight": weight(*layer.shape) for name, layer in layers.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def known(k: int, seed: int) -> Statistics:
    """Statistics of an input of K channels."""
    inputs = Inputs(k, seed)
    first, second = inputs.rows(TOKENS), inputs.rows(TOKENS)
    both = torch.cat((first, second))
    return Statistics(
        hessian=moments(first),
        tokens=TOKENS,
        held_out=moments(second),
        held_out_tokens=TOKENS,
        absmax=both.abs().amax(0),
        mean=both.mean(0),
        minimum=both.amin(0),
        maximum=both.amax(0),
        samples=first[:256].clone(),
    )


def converted(folder: Path, spec: str, jobs: int | None) -> tuple[bytes, ConversionReport, float, float]:
    """The file, the report, and the seconds of the clock and of the processor."""
    target = folder / "out.safetensors"
    with open_source(folder / "model.safetensors") as source, StatisticsFile(folder / "statistics.safetensors") as file:
        plan = make_plan(source, spec, preset="none", statistics=file)
        began, used = time.perf_counter(), time.process_time()
        report = convert(source, target, plan, statistics=file, jobs=jobs)
        seconds, used = time.perf_counter() - began, time.process_time() - used
    return target.read_bytes(), report, seconds, used


def measure(folder: Path, spec: str) -> dict[str, object]:
    """One format, on one thread and on one a core. Raises `WrongResultError`."""
    one, _, alone, _ = converted(folder, spec, 1)
    two, report, seconds, used = converted(folder, spec, None)
    if one != two:
        raise WrongResultError(f"{spec}: one thread and one a core wrote different bytes")
    gains = []
    for layer in report.layers:
        if layer.error is None or layer.rtn_error is None or layer.error > layer.rtn_error:
            raise WrongResultError(f"{spec}: {layer.name} is worse than plain rounding on the half held out")
        gains.append(10 * math.log10(layer.rtn_error / layer.error))
    weights = sum(n * k for _, n, k, _ in LINEARS) * len(report.layers) // len(LINEARS)
    return {
        "format": spec,
        "solver": report.layers[0].solver,
        "seconds": seconds,
        "seconds_one_thread": alone,
        "cores_busy": used / seconds,
        "weights_per_second": weights / seconds,
        "gain": sum(gains) / len(gains),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Measure, print and write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--blocks", type=int, default=2)
    arguments.add_argument("--formats", nargs="+", default=list(FORMATS))
    arguments.add_argument("--json", type=Path, default=RESULT)
    given = arguments.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), given.blocks)
        for spec in given.formats:
            rows.append(measure(Path(name), spec))
            print(json.dumps(rows[-1]), flush=True)
            found = {"machine": machine(), "blocks": given.blocks, "rows": rows}
            given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
