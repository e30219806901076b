"""What it costs that query, key and value share one smooth_factor and one proj_down.

    python -m benchmarks.shared_low_rank [--ranks R...] [--genre GENRE] [--json FILE]

Converts query, key and value of the six layers of MiniLM to svdquant_w4a4 of each rank, with and without
--share-low-rank, data-free and calibrated on one genre of text. `output`: the relative error of the layers' outputs,
inputs rounded to 4 bits too, on the samples held out (calibrated rows only): the mean over the layers, in dB.
`weight`: the same of the weights. `embedding`: 1 - cosine of sentence embeddings on the other genres, times 1000.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.minilm_model import machine
from benchmarks.minilm_quality import GENRES, Bench
from lowbit.calibration import StatisticsCollection
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.load import load
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.integrations.minilm_demo import model_folder

LAYERS = r"attention\.self\.(query|key|value)$"
RANKS = (8, 16, 32, 64)


@dataclass(frozen=True)
class Row:
    """One conversion: its errors, and how many of the layers share in the end."""

    rank: int
    shared: bool
    calibrated: bool
    sharing: int
    output: float | None
    weight: float
    embedding: float


def measure(bench: Bench, rank: int, known: StatisticsCollection | None, genre: str, *, shared: bool) -> Row:
    """Convert, load and judge."""
    with tempfile.TemporaryDirectory() as folder, open_source(model_folder() / "model.safetensors") as source:
        spec, only = f"svdquant_w4a4(rank={rank})", [LAYERS]
        plan = make_plan(source, spec, preset="none", only=only, statistics=known, share_low_rank=shared)
        target = Path(folder) / "model.safetensors"
        layers = convert(source, target, plan, statistics=known).layers
        changed = copy.deepcopy(bench.model)
        load(changed, target, strict=False)
    errors = bench.errors(changed, genre)
    others = [errors[name] for name in GENRES if name != genre]
    weights = [10 ** (-layer.accuracy.sqnr / 10) for layer in layers if layer.accuracy is not None]
    outputs = [layer.error for layer in layers if layer.error is not None]
    return Row(
        rank,
        shared,
        known is not None,
        sum(bool(layer.shares) for layer in layers),
        decibels(outputs) if outputs else None,
        decibels(weights),
        1000 * sum(others) / len(others),
    )


def decibels(errors: list[float]) -> float:
    """The mean of some relative squared errors in dB."""
    return 10 * math.log10(sum(errors) / len(errors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--genre", choices=GENRES, default=GENRES[0], help="what to calibrate on")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    args = parser.parse_args()
    bench = Bench()
    statistics = bench.calibrated(args.genre)[0]
    rows = []
    print(f"{'rank':>4} {'calibrated':>10} {'shared':>6} {'layers':>6} {'output':>7} {'weight':>7} {'embedding':>9}")
    for known in (None, statistics):
        for rank in args.ranks:
            for shared in (False, True):
                row = measure(bench, rank, known, args.genre, shared=shared)
                rows.append(row)
                output = "" if row.output is None else f"{row.output:.2f}"
                print(
                    f"{rank:4} {known is not None!s:>10} {shared!s:>6} {row.sharing:6} {output:>7} {row.weight:7.2f} "
                    f"{row.embedding:9.3f}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
