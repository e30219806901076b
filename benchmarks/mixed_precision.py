"""Plans for a size of all-MiniLM-L6-v2, every layer counting the same or by its gradients: what the embeddings lose.

    python -m benchmarks.mixed_precision [--sizes 0.14 0.16 0.2] [--json FILE]

Both are calibrated on the built-in text, once without and once with gradients, choose among the same formats for each
of the 36 linears of the encoder, and are measured by the whole pipeline that converts. A size is that of the encoder's
linears, as a share of their float32. Tested on everyday English, a novel and the reference of Python: the mean of
1 - cosine against the float32 model. The result goes to benchmarks/results/ as JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.minilm_model import BUILTIN, machine
from benchmarks.minilm_quality import ENCODER, GENRES, Bench
from lowbit.calibration import StatisticsCollection
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.load import load
from lowbit.checkpoint.mixed_precision import MixedPlan, Selection, find_choices, for_size
from lowbit.checkpoint.sensitivity import PLANNED, measure
from lowbit.checkpoint.source import Source, open_source
from lowbit.integrations.minilm_demo import model_folder

RESULT = Path(__file__).parent / "results" / "mixed_precision.json"
FORMATS = (
    "wna16(bits=3,group_size=64)", "nvfp4", "awq_w4a16", "wna16(bits=6,group_size=64)", "int8(activations=none)",
)  # fmt: skip
SIZES = (0.11, 0.125, 0.14, 0.16, 0.2)


def measured(source: Source, known: StatisticsCollection) -> Selection:
    """The choices of the encoder's linears with their errors."""
    found = find_choices(source, FORMATS, statistics=known, preset="none", only=[ENCODER])
    return found.with_errors(measure(source, found.candidates, known, measure_with=PLANNED), PLANNED)


def converted(model: nn.Module, source: Source, mixed: MixedPlan, known: StatisticsCollection) -> nn.Module:
    """A copy of the model as the plan says."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.safetensors"
        convert(source, target, mixed.plan(), statistics=known)
        changed = copy.deepcopy(model)
        load(changed, target, strict=False)
    return changed


def rows(bench: Bench, sizes: list[float]) -> list[dict[str, Any]]:
    """Each size by each way of counting; prints them as they come."""
    found: list[dict[str, Any]] = []
    for gradients in (False, True):
        bench.gradients = gradients
        known, _, _ = bench.calibrated(BUILTIN)
        with open_source(model_folder() / "model.safetensors") as source:
            began = time.perf_counter()
            selection = measured(source, known)
            seconds = time.perf_counter() - began
            whole = sum(max(choice.nbytes for choice in layer.choices) for layer in selection.layers)
            for size in sizes:
                mixed = for_size(selection, selection.fixed_bytes + int(size * whole))
                error = bench.errors(converted(bench.model, source, mixed, known), BUILTIN)
                nbytes = mixed.nbytes - selection.fixed_bytes
                row = {"size": size, "gradients": gradients, "bytes": nbytes, "error": error, "measuring": seconds}
                found.append(row)
                errors = "  ".join(f"{genre} {error[genre]:.2e}" for genre in GENRES)
                print(f"{size:6.3f}  {'by gradients' if gradients else 'all the same':12s}  {errors}", flush=True)
    return found


def main() -> None:
    """Measure, print and write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sizes", nargs="+", type=float, default=list(SIZES))
    arguments.add_argument("--json", type=Path, default=RESULT)
    given = arguments.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    found = rows(Bench(), given.sizes)
    given.json.write_text(json.dumps({"machine": machine(), "formats": FORMATS, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
