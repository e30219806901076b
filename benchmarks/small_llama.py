"""Convert a small language model, with statistics of its inputs alone and with gradients: how far its predictions move.

    python -m benchmarks.small_llama DIR [--formats NAME...] [--rows N...] [--json FILE]

DIR: the model that `small_llama_train` trains (it is trained there first if nothing is). Calibrated as `lowbit
calibrate` does, on modules of Python's library that the training left out, or on the text that comes with lowbit;
tested on other modules that it left out, and on the Python language reference, which is English beside code. KL: of the
next token, mean and 99th percentile in nats, against the model in full precision; agreement: the share of tokens with
the same most likely next one. Its 42 linears are converted; the head and the embedding stay. With --rows, only this is
measured: what is left of the gain where gradients are known in blocks along the diagonal of so many rows at most, as in
a calibration that has no room for more. Rows that a run does not measure stay in the file.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.minilm_model import machine, sentences
from benchmarks.small_llama_train import TOKENS, modules, train_to
from lowbit.calibration import StatisticsCollection, calibrate
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.layer_statistics import InMemory, LayerStatistics
from lowbit.checkpoint.load import load
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.integrations.text_batches import builtin_text, text_batches
from lowbit.integrations.text_models import TextModel, calibration_dtype, load_text_model
from lowbit.integrations.text_objectives import text_objective
from lowbit.numerics.block_diagonal import divided
from lowbit.report.end_to_end import LanguageMeter
from lowbit.solvers import Statistics

RESULT = Path(__file__).parent / "results" / "small_llama.json"
FORMATS = ("fp8_e4m3", "int8(activations=none)", "awq_w4a16", "nvfp4", "wna16(bits=3)", "svdquant_w4a4")
LAYERS = r"^model\.layers\."
CALIBRATIONS = ("library", "built-in")
TESTS = ("library", "reference")
WINDOWS = 64  # to test on, of each text
KEYS = ("format", "calibrated_on", "statistics")  # of a row that replaces another


@dataclass(frozen=True)
class Row:
    """One conversion: `statistics` is "none", "inputs", "gradients" or these and how many rows a block has at most.

    `measures`: by test those of `LanguageMeter`.
    """

    format: str
    solver: str
    calibrated_on: str
    statistics: str
    seconds: float
    measures: dict[str, dict[str, float]]


class Bench:
    """The model in full precision, and texts to calibrate and to test on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = load_text_model(folder, dtype=torch.float32)
        left_out = modules(left_out=True)
        self.calibrations = {"library": "\n".join(left_out[::2]), "built-in": builtin_text()}
        tests = {"library": "\n".join(left_out[1::2]), "reference": "\n".join(sentences("reference"))}
        how = {"samples": WINDOWS, "max_tokens": TOKENS}
        self.tests = {name: text_batches(self.text, text, **how) for name, text in tests.items()}

    def statistics(self, calibrated_on: str, *, gradients: bool) -> tuple[StatisticsCollection, float]:
        """Of 256 windows, in the dtype that the command takes; and the seconds."""
        runs = TextModel(self.folder, copy.deepcopy(self.text.model), self.text.tokenizer, causal=True)
        runs.model.to(calibration_dtype("cpu"))
        batches = text_batches(runs, self.calibrations[calibrated_on], max_tokens=TOKENS)
        began = time.perf_counter()
        found = calibrate(
            runs.model, batches, layers=[LAYERS], broad=calibrated_on == "built-in",
            gradients=text_objective if gradients else False,
        )  # fmt: skip
        return found, time.perf_counter() - began

    def converted(self, spec: str, solver: str, known: LayerStatistics | None) -> tuple[torch.nn.Module, str]:
        """A copy of the model with its blocks converted, and the solver."""
        with tempfile.TemporaryDirectory() as folder, open_source(self.folder / "model.safetensors") as source:
            plan = make_plan(source, spec, solver=solver, preset="none", only=[LAYERS], statistics=known)
            target = Path(folder) / "model.safetensors"
            report = convert(source, target, plan, statistics=known)
            changed = copy.deepcopy(self.text.model)
            load(changed, target, strict=False)
        return changed, report.layers[0].solver

    def measured(self, model: torch.nn.Module) -> dict[str, dict[str, float]]:
        """By test, how far the predictions are from those in full precision."""
        found = {}
        for name, batches in self.tests.items():
            meter = LanguageMeter()
            with torch.inference_mode():
                for batch in batches:
                    counts = batch["attention_mask"].bool()
                    meter.add(self.text.model(**batch).logits[counts], model(**batch).logits[counts])
            found[name] = meter.result()[0]
        return found

    def in_blocks(self, formats: list[str], sizes: list[int]) -> Iterator[Row]:
        """Every format with gradients in blocks of at most so many rows, calibrated on the built-in text."""
        known, seconds = self.statistics("built-in", gradients=True)
        for size in sizes:
            some = InMemory({name: in_blocks(known[name], size) for name in known})
            for spec in formats:
                began = time.perf_counter()
                model, solver = self.converted(spec, "auto", some)
                took = seconds + time.perf_counter() - began
                yield Row(spec, solver, "built-in", f"gradients, {size}", took, self.measured(model))

    def rows(self, formats: list[str]) -> Iterator[Row]:
        """Plain rounding and every calibration of every format."""
        for spec in formats:
            model, solver = self.converted(spec, "rtn", None)
            yield Row(spec, solver, "", "none", 0.0, self.measured(model))
        for name in CALIBRATIONS:
            for kind in ("inputs", "gradients"):
                known, seconds = self.statistics(name, gradients=kind == "gradients")
                for spec in formats:
                    began = time.perf_counter()
                    model, solver = self.converted(spec, "auto", known)
                    took = seconds + time.perf_counter() - began
                    yield Row(spec, solver, name, kind, took, self.measured(model))


def in_blocks(known: Statistics, size: int) -> Statistics:
    """The statistics of a layer with gradients in as many blocks as leave each with at most `size` rows."""
    whole = known.output_hessian
    assert whole is not None
    assert known.output_held_out is not None
    count = 1
    while len(whole) // count > size:
        count *= 2
    blocks = {name: divided(getattr(known, name), count) for name in ("output_hessian", "output_held_out")}
    return replace(known, **blocks)


def main() -> None:
    """Measure, print and write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("directory", type=Path)
    arguments.add_argument("--formats", nargs="+", default=list(FORMATS))
    arguments.add_argument("--rows", nargs="+", type=int, help="gradients in blocks of at most so many rows")
    arguments.add_argument("--json", type=Path, default=RESULT)
    given = arguments.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    if not (given.directory / "training.json").exists():
        train_to(given.directory)
    training = json.loads((given.directory / "training.json").read_text())
    bench, rows = Bench(given.directory), json.loads(given.json.read_text())["rows"] if given.json.exists() else []
    for row in bench.in_blocks(given.formats, given.rows) if given.rows else bench.rows(given.formats):
        new = {**asdict(row), "commit": machine()["commit"]}
        rows = [old for old in rows if any(old[key] != new[key] for key in KEYS)] + [new]
        shown = "  ".join(
            f"{test} {found['mean KL']:.5f} {found['q99 KL']:.4f} {found['top-1 agreement']:.4f}"
            for test, found in row.measures.items()
        )
        print(f"{row.format:24s} {row.calibrated_on:9s} {row.statistics:10s} {shown}  {row.seconds:5.1f} s", flush=True)
        given.json.write_text(json.dumps({"machine": machine(), "training": training, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
