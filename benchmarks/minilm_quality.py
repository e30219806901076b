"""Convert MiniLM by every pipeline and test it on text of another kind: what each step buys, and what it takes.

    python -m benchmarks.minilm_quality [--formats NAME...] [--from GENRE...] [--vary SHARE] [--steps] [--json FILE]

Calibrates all-MiniLM-L6-v2 as `lowbit calibrate` does (in bfloat16 where the processor is fast at it), on 256
sentences of one genre (each a second time with two fifths of its tokens replaced at random: --vary 0 leaves that out),
on the text that comes with lowbit, or on every second passage of that (256, with variants). Converts the 36 linears of
its encoder with `make_plan` and `convert`, loads the result and compares its sentence embeddings with those of the
float32 model on other genres: the mean of 1 - cosine, as a share of what plain rounding to nearest gives.
What "plain" is: for 8 bits and nvfp4 `rtn` in the same format, for 4-bit integers asymmetric min-max in groups of 64,
for w4a4 the weights and inputs rounded in groups of 64 without smoothing or low rank. Seconds are those of calibration
and conversion together, reading, writing and verifying the file included; importing torch is not. With --steps each
format is converted by ever longer pipelines. Every row is written at once; rows that a run does not measure stay.

All sentences of the other genres are tested on, and of the calibration's own those after the first 256: these show how
much of the gain is lost when the text changes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.minilm_model import (
    CALIBRATION_SENTENCES,
    MIXED,
    Batch,
    embedding_error,
    embeddings,
    linears,
    load_model,
    lowbit_batches,
    machine,
    tokens_in,
    unseen_batches,
)
from benchmarks.plain_w4a4 import PlainLinear
from lowbit.calibration import StatisticsCollection, calibrate
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.load import load
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.integrations.minilm_demo import model_folder
from lowbit.integrations.text_models import calibration_dtype
from lowbit.integrations.text_objectives import text_objective

RESULT = Path(__file__).parent / "results" / "minilm_quality.json"
GENRES = ("everyday", "novel", "reference")
ENCODER = r"^encoder\.layer\."


@dataclass(frozen=True)
class Target:
    """A format, what its error is held up against, and the share of that which is aimed at."""

    spec: str
    plain: str
    aim: float


TARGETS = {
    "fp8": Target("fp8_e4m3", "fp8_e4m3", 0.37),
    "int8": Target("int8(activations=none)", "int8(activations=none)", 0.27),
    "int4": Target("awq_w4a16", "awq_w4a16", 0.21),
    "nvfp4": Target("nvfp4", "awq_w4a16", 0.27),
    "w4a4": Target("svdquant_w4a4", "plain w4a4", 0.5),
    "w8a8": Target("int8(rotation=0)", "int8(rotation=0)", 1.0),
    "w8a8_rotated": Target("int8(rotation=64)", "int8(rotation=0)", 1.0),
}
STEPS = ("scale_search", "scale_search+gptq", "scale_search+gptq+descent", "scale_search+gptq+descent+bias")
W4A4_STEPS = ("rtn", "scale_search", "svdquant", "svdquant+gptq", "svdquant+gptq+descent", "svdquant+gptq+descent+bias")


@dataclass(frozen=True)
class Row:
    """One conversion. `error`: by the genre tested on; `share`: of plain rounding's. `rejected`: layers with a note."""

    format: str
    solver: str
    calibrated_on: str
    seconds: float
    error: dict[str, float]
    share: dict[str, float]
    aim: float
    rejected: int


class Bench:
    """The model, the texts and what plain rounding loses on them."""

    def __init__(self, vary: float | None = None, *, gradients: bool = True) -> None:
        self.vary, self.gradients = vary, gradients
        self.model, self.tokenizer = load_model()
        self.runs = copy.deepcopy(self.model).to(calibration_dtype("cpu"))
        self.tests = {genre: unseen_batches(self.tokenizer, genre) for genre in GENRES}
        self.rest = {genre: unseen_batches(self.tokenizer, genre, skip=CALIBRATION_SENTENCES) for genre in GENRES}
        self._plain: dict[tuple[str, str], dict[str, float]] = {}

    def errors(self, model: nn.Module, calibrated_on: str) -> dict[str, float]:
        """The error of a model by genre: all sentences, of the calibration's own genre those that it has not seen."""
        found = {}
        for genre in GENRES:
            batches = (self.rest if genre == calibrated_on else self.tests)[genre]
            found[genre] = embedding_error(embeddings(self.model, batches), embeddings(model, batches))
        return found

    def plain(self, name: str, genre: str) -> dict[str, float]:
        """The errors of plain rounding, on what a calibration on `genre` is tested on."""
        if (name, genre) not in self._plain:
            if name == "plain w4a4":
                changed = copy.deepcopy(self.model)
                for key, layer in linears(changed).items():
                    changed.set_submodule(key, PlainLinear(layer, weights=True, inputs=True))
            else:
                changed = self.converted(name, "rtn", None)[0]
            self._plain[name, genre] = self.errors(changed, genre)
        return self._plain[name, genre]

    def converted(self, spec: str, solver: str, known: StatisticsCollection | None) -> tuple[nn.Module, list]:
        """A copy of the model with its encoder converted, and the report's layers."""
        with tempfile.TemporaryDirectory() as folder, open_source(model_folder() / "model.safetensors") as source:
            plan = make_plan(source, spec, solver=solver, preset="none", only=[ENCODER], statistics=known)
            target = Path(folder) / "model.safetensors"
            report = convert(source, target, plan, statistics=known)
            changed = copy.deepcopy(self.model)
            load(changed, target, strict=False)
        return changed, list(report.layers)

    def calibrated(self, genre: str) -> tuple[StatisticsCollection, float, list[Batch]]:
        """Statistics of a genre's first sentences, and the seconds they took."""
        batches = lowbit_batches(self.model, self.tokenizer, genre, self.vary)
        began = time.perf_counter()
        found = calibrate(
            self.runs, batches, broad=genre in MIXED, gradients=text_objective if self.gradients else False
        )
        return found, time.perf_counter() - began, batches

    def rows(self, genre: str, names: list[str], *, steps: bool) -> Iterator[Row]:
        """The conversions calibrated on one genre."""
        known, calibration, batches = self.calibrated(genre)
        print(f"{genre}: {tokens_in(batches)} tokens, calibrated in {calibration:.1f} s")
        for name in names:
            target = TARGETS[name]
            plain = self.plain(target.plain, genre)
            several = W4A4_STEPS if name == "w4a4" else STEPS
            for solver in several if steps else ("auto",):
                began = time.perf_counter()
                model, layers = self.converted(target.spec, solver, known)
                seconds = time.perf_counter() - began + (calibration if layers[0].error is not None else 0)
                errors = self.errors(model, genre)
                share = {test: errors[test] / plain[test] for test in errors}
                rejected = sum(bool(layer.note) for layer in layers)
                yield Row(target.spec, layers[0].solver, genre, seconds, errors, share, target.aim, rejected)


def show(row: Row) -> None:
    """Print one line."""
    shares = "  ".join(f"{test} {share:.3f}" for test, share in row.share.items())
    print(f"{row.format:26s} {row.solver:34s} {shares}   aim {row.aim:.2f}   {row.seconds:5.1f} s   {row.rejected}")


def main() -> None:
    """Measure, print and write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--formats", nargs="+", choices=TARGETS, default=list(TARGETS))
    known = (*MIXED, *GENRES)
    arguments.add_argument("--from", nargs="+", dest="genres", choices=known, default=list(known))
    arguments.add_argument("--vary", type=float, help="the share of tokens to replace in the copies")
    arguments.add_argument("--no-gradients", action="store_true", help="calibrate without passes backward")
    arguments.add_argument("--steps", action="store_true", help="every pipeline, not only the one auto takes")
    arguments.add_argument("--json", type=Path, default=RESULT)
    given = arguments.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    bench = Bench(given.vary, gradients=not given.no_gradients)
    rows = json.loads(given.json.read_text())["rows"] if given.json.exists() else []
    for genre in given.genres:
        for row in bench.rows(genre, given.formats, steps=given.steps):
            show(row)
            about = machine()
            ran_in = str(next(bench.runs.parameters()).dtype).removeprefix("torch.")
            known = {"varied": given.vary, "gradients": bench.gradients, "calibrated_in": ran_in}
            new = {**asdict(row), **known, "commit": about["commit"], "load": os.getloadavg()[0]}
            rows = [old for old in rows if not _same(old, new, steps=given.steps)] + [new]
            given.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


def _same(old: dict[str, object], new: dict[str, object], *, steps: bool) -> bool:
    """Whether a row is of the same conversion: with --steps a format has one for each pipeline."""
    names = ("format", "calibrated_on", *["solver"] * steps)
    return all(old[name] == new[name] for name in names)


if __name__ == "__main__":
    main()
