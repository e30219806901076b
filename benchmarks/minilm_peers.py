"""MiniLM by other quantizers: llm-compressor (plain and GPTQ), AutoRound and HQQ, beside lowbit, plain and calibrated.

    python -m benchmarks.minilm_peers [--only NAME...] [--from GENRE...] [--runs 2] [--output FILE]

Each method quantizes the 36 linears of all-MiniLM-L6-v2's encoder, calibrated with 256 sentences of one genre, or with
the 512 passages of the text that comes with lowbit, and is judged on sentences of others (`minilm_model.DIRECTIONS`);
lowbit runs each of the 256 sentences a second time, varied, as its command does. Weights only: the model runs in
float32 with the weights that the method chose, except in the rows that say w4a4. Seconds are calibration and
quantization together, the smallest of --runs, without imports and without loading the model.

The peers pin other versions of transformers and compressed-tensors than lowbit's own tests use, so they need an
environment of their own; see benchmarks/README.md or `NEEDS`. What is measured is written after every method, and a
second run keeps the rows that it does not measure itself; each row has the processor and the commit of its own run.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.minilm_model import (
    BUILTIN,
    DIRECTIONS,
    Batch,
    calibration_batches,
    calibration_sentences,
    embedding_error,
    embeddings,
    linears,
    load_model,
    lowbit_batches,
    machine,
    tokens_in,
    unseen_batches,
    with_weights,
)
from lowbit import QuantizedTensor, calibrate, parse_spec, quantize_
from lowbit.integrations.text_objectives import text_objective

RESULT = Path(__file__).parent / "results" / "minilm_peers.json"
NEEDS = "python3.11 -m venv peers && peers/bin/pip install -e '.[peers]' 'torch==2.13.0'"
GROUP = 64
ENCODER = r"^encoder\.layer\."
FORMATS: dict[str, dict[str, Any]] = {  # the arguments of compressed-tensors
    "fp8_e4m3 tensor": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"},
    "int8 row": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "int4 g64 asymmetric": {
        "num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP,
    },
    "nvfp4": {
        "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16,
        "scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn,
    },
}  # fmt: skip
OURS = {
    "fp8_e4m3 tensor": "fp8_e4m3",
    "int8 row": "int8(activations=none)",
    "int4 g64 asymmetric": "awq_w4a16",
    "nvfp4": "nvfp4",
    "w4, low rank 32": "svdquant_w4a4",
}
# What every method is compared with: llm-compressor's plain rounding has whole zero points, ours has float ones.
BASELINE = "lowbit rtn"
Method = Callable[[nn.Module, Any, str], nn.Module]
"""Takes the float32 model (which it may change), the tokenizer and the genre to calibrate on."""


def main() -> None:
    """Measure, print and write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", metavar="NAME", help="methods whose row contains one of these words")
    genres = list(dict.fromkeys(genre for genre, _ in DIRECTIONS))
    arguments.add_argument(
        "--from", nargs="+", dest="genres", choices=genres, default=genres,
        help="what to calibrate on; methods that look at no data run as well",
    )  # fmt: skip
    arguments.add_argument("--runs", type=int, default=2, help="repetitions of methods that take less than 20 s")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--output", type=Path, default=RESULT)
    options = arguments.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(options.threads)
    rows = before(options.output)
    directions = [pair for pair in DIRECTIONS if pair[0] in options.genres]
    for fmt, name, method, data_free in methods():
        if options.only and not any(word in f"{name} {fmt}" for word in options.only):
            continue
        for calibrated_on, tests in calibrations(directions, data_free=data_free):
            for measured in measure(method, calibrated_on, tests, options.runs):
                row = {"format": fmt, "method": name, **measured}
                rows = [old for old in rows if _key(old) != _key(row)] + [row]
                print(json.dumps(row), flush=True)
            write(options.output, rows)
    table(json.loads(options.output.read_text())["rows"])


def methods() -> Iterator[tuple[str, str, Method, bool]]:
    """The format, the name, the method, and whether it looks at no data."""
    for fmt, spec in OURS.items():
        yield fmt, BASELINE, lowbit_rtn(spec), True
    yield "w4a4, low rank 32", BASELINE, lowbit_w4a4, True
    for fmt in FORMATS:
        yield fmt, "llm-compressor rtn", llm_compressor(fmt, gptq=False), True
    yield "int4 g64 asymmetric", "hqq", hqq, True
    for fmt, spec in OURS.items():  # what svdquant_w4a4 runs rounds its inputs, too
        yield fmt.replace("w4,", "w4a4,"), "lowbit", lowbit_calibrated(spec), False
    for fmt in FORMATS:
        yield fmt, "llm-compressor gptq, act-order", llm_compressor(fmt, actorder="static"), False
        yield fmt, "llm-compressor gptq", llm_compressor(fmt, actorder=None), False
    yield "int4 g64 asymmetric", "auto-round 200", auto_round, False


def before(path: Path) -> list[dict[str, Any]]:
    """The rows of earlier runs, each with the processor and the commit that it was measured on."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    about = {name: found["machine"][name] for name in ("cpu", "commit")}
    return [{**about, **row} for row in found["rows"]]


def calibrations(directions: Sequence[tuple[str, str]], *, data_free: bool) -> list[tuple[str | None, list[str]]]:
    """What to calibrate on, once each, and the genres to test then; None for all tests of a method without data."""
    found: dict[str | None, dict[str, None]] = {}
    for calibrated_on, test in directions:
        found.setdefault(None if data_free else calibrated_on, {})[test] = None
    return [(calibrated_on, list(tests)) for calibrated_on, tests in found.items()]


def measure(method: Method, calibrated_on: str | None, tests: Sequence[str], runs: int) -> Iterator[dict[str, Any]]:
    """Seconds of one method, and the error of its model on every test; a slow one runs once."""
    tokenizer = original()[1]
    about = machine()
    seconds: list[float] = []
    load = os.getloadavg()[0]
    while not seconds or (len(seconds) < runs and seconds[0] < 20):
        candidate = copy.deepcopy(original()[0])
        began, cpu = time.perf_counter(), time.process_time()
        candidate = method(candidate, tokenizer, calibrated_on or "")
        seconds.append(time.perf_counter() - began)
        cpu_seconds = time.process_time() - cpu
    for test in tests:
        batches, reference = original_embeddings(test)
        yield {
            "calibrated_on": calibrated_on,
            "tested_on": test,
            "error": embedding_error(reference, embeddings(candidate, batches)),
            "seconds": min(seconds),
            "cpu_seconds": cpu_seconds,
            "load_before": load,
            "cpu": about["cpu"],
            "commit": about["commit"],
        }


@cache
def original() -> tuple[nn.Module, Any]:
    """The float32 model and its tokenizer."""
    return load_model()


@cache
def original_embeddings(genre: str) -> tuple[list[Batch], Tensor]:
    """The test batches of a genre and what the float32 model makes of them."""
    batches = unseen_batches(original()[1], genre)
    return batches, embeddings(original()[0], batches)


def lowbit_rtn(spec: str) -> Method:
    """The weights of lowbit's plain rounding, decoded."""
    fmt = parse_spec(spec)

    def run(model: nn.Module, tokenizer: Any, genre: str) -> nn.Module:
        weights = {}
        for name, linear in linears(model).items():
            w = linear.weight.detach()
            weights[name] = fmt.dequantize(fmt.quantize(w), (w.shape[0], w.shape[1]), torch.float32)
        return with_weights(model, weights)

    return run


def lowbit_calibrated(spec: str) -> Method:
    """lowbit's own calibration and its solver `auto`."""

    def run(model: nn.Module, tokenizer: Any, genre: str) -> nn.Module:
        batches = lowbit_batches(model, tokenizer, genre)
        known = calibrate(model, batches, layers=[ENCODER], broad=genre == BUILTIN, gradients=text_objective)
        quantize_(model, {ENCODER: spec}, statistics=known)
        return model

    return run


def lowbit_w4a4(model: nn.Module, tokenizer: Any, genre: str) -> nn.Module:
    """Plain svdquant_w4a4, its activations rounded to four bits too."""
    for linear in linears(model).values():
        linear.weight = nn.Parameter(QuantizedTensor.quantize(linear.weight, "svdquant_w4a4"), requires_grad=False)
    return model


def llm_compressor(fmt: str, *, gptq: bool = True, actorder: str | None = None) -> Method:
    """llm-compressor's own model: its forward rounds the weights to its scales."""

    def run(model: nn.Module, tokenizer: Any, genre: str) -> nn.Module:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from torch.utils.data import DataLoader

        weights = QuantizationArgs(**FORMATS[fmt])
        groups = {"encoder": QuantizationScheme(targets=["re:encoder[.]layer[.].*"], weights=weights)}
        if not gptq:
            oneshot(model=model, recipe=QuantizationModifier(config_groups=groups))
            return model
        loader = DataLoader(_Batches(calibration_batches(tokenizer, genre)), batch_size=None)
        recipe = GPTQModifier(config_groups=groups, actorder=actorder)
        oneshot(model=model, dataset=loader, recipe=recipe, pipeline="sequential", sequential_targets=["BertLayer"])
        return model

    return run


def auto_round(model: nn.Module, tokenizer: Any, genre: str) -> nn.Module:
    """AutoRound with 200 iterations; it wants sentences of one length, and its loss leaves out what the mask hides."""
    from auto_round import AutoRound

    lines = calibration_sentences(genre)
    length = max(len(ids) for ids in tokenizer(lines, truncation=True)["input_ids"]) + 1
    batch = tokenizer(lines, padding="max_length", max_length=length, return_tensors="pt")
    data = [{key: value[i : i + 8] for key, value in batch.items()} for i in range(0, len(lines), 8)]
    found = AutoRound(
        model, tokenizer, bits=4, group_size=GROUP, sym=False, iters=200, dataset=data, seqlen=length,
        nsamples=len(lines), batch_size=8, device_map="cpu", enable_torch_compile=False,
    ).quantize()  # fmt: skip
    return found[0] if isinstance(found, tuple) else found


def hqq(model: nn.Module, tokenizer: Any, genre: str) -> nn.Module:
    """HQQ in groups along the input (axis 1, as kernels want it), zero points in float."""
    from hqq.core.quantize import Quantizer

    weights: dict[str, Tensor] = {}
    for name, linear in linears(model).items():
        codes, meta = Quantizer.quantize(
            linear.weight, nbits=4, group_size=GROUP, axis=1, bitpack=False, device="cpu", compute_dtype=torch.float32
        )
        weights[name] = Quantizer.dequantize(codes, {**meta, "compute_dtype": torch.float32})
    return with_weights(model, weights)


class _Batches(torch.utils.data.Dataset):
    """Batches as a data set, for a loader that shall not batch again."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows with their ratio to the baseline of their format, and what they were measured on."""
    base = {(row["format"], row["tested_on"]): row["error"] for row in rows if row["method"] == BASELINE}
    for row in rows:
        plain = base.get((row["format"], row["tested_on"]))
        row["of_plain"] = row["error"] / plain if plain else None
    tokenizer = original()[1]
    tokens = {genre: tokens_in(calibration_batches(tokenizer, genre)) for genre, _ in DIRECTIONS}
    about = machine("llmcompressor", "compressed-tensors", "auto-round", "hqq")
    order = sorted(rows, key=lambda row: (row["tested_on"], list(OURS).index(row["format"].replace("w4a4", "w4"))))
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({"machine": about, "calibration_tokens": tokens, "rows": order}, indent=2)
    path.write_text(f"{text}\n", encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    print(
        f"{'calibrated':<11}{'tested on':<11}{'format':<22}{'method':<32}"
        f"{'error':>9}{'of plain':>10}{'seconds':>9}{'load':>6}"
    )
    for row in rows:
        share = f"{row['of_plain']:.3f}" if row["of_plain"] else "-"
        print(
            f"{row['calibrated_on'] or '-':<11}{row['tested_on']:<11}{row['format']:<22}{row['method']:<32}"
            f"{row['error']:>9.5f}{share:>10}{row['seconds']:>9.1f}{row['load_before']:>6.1f}"
        )


def _key(row: dict[str, Any]) -> tuple[str | None, ...]:
    return row["format"], row["method"], row["calibrated_on"], row["tested_on"]


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        sys.exit(f"{error}; the peers have an environment of their own: {NEEDS}")
