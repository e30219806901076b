"""Sample a small diffusion transformer in every configuration from the same noise: PSNR against full precision.

    python -m benchmarks.digits_dit [--model DIR] [--images 100] [--steps 20] [--only NAME...]

Trains the model of lowbit.integrations.digits_dit (minutes), or takes the one in DIR; converts it with the public
`make_plan` and `convert`, loads the result with `load` and samples it. Against what it is held up: plain W4A4, every
weight and every input rounded to 4 bits in groups of 64 by absmax / 7, without smoothing or low rank, once for the
linears of the blocks (the same ones that the headline converts) and once for all that have 64 columns or more.

Calibrated rows use statistics of the inputs that the model meets while it samples from other noise than the one tested
with. PSNR is over all pixels of all images as sampled, not clipped, with a data range of 2 (-1 to 1); `clip.` the same
after clipping to that range, as an image file would; `mean` the mean over the images of each one's PSNR when clipped.
t=.1 .. t=.9: relative error of one prediction there, on full precision's images with fresh noise. read: the share of
images that a classifier reads as the class asked for. The result goes to benchmarks/results/ as JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.convert_qwen_image import machine
from benchmarks.digits_dit_train import classify, train_to
from benchmarks.plain_w4a4 import PlainLinear
from lowbit.calibration import StatisticsCollection, calibrate
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.dequantize import dequantize
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.integrations.digits_dit import PRESET, DigitsDiT, calibration_inputs, load_model, psnr, sample
from lowbit.numerics.int4_matmul import GROUP

SEEDS = (1, 2)  # of the noise that is sampled from; calibration starts at CALIBRATION_SEED
TIMES = (0.1, 0.5, 0.9)
RESULT = "digits_dit.json"
MODULATION = r"img_mod\.1$"
AFTER_GELU = r"img_mlp\.net\.2$"
BLOCKS = r"^transformer_blocks\."
ALL = r""


@dataclass(frozen=True)
class Configuration:
    """What a row of the table converts: a format, and (pattern, format) rules that come before it.

    `calibrated`: solvers know the statistics of the inputs. Without `inputs` the result is dequantized again before it
    runs: only the weights are rounded then. `shared`: query, key and value share smooth_factor and proj_down.
    `gradients`: solvers know those at the outputs, too.
    """

    name: str
    format: str
    rules: tuple[tuple[str, str], ...] = ()
    solver: str = "auto"
    inputs: bool = True
    calibrated: bool = False
    shared: bool = False
    gradients: bool = False


@dataclass(frozen=True)
class Plain:
    """A row without conversion: weights and inputs of the linears that match are rounded to 4 bits on the fly."""

    name: str
    pattern: str
    weights: bool = True
    inputs: bool = True


HEADLINE = "awq modulation + svdquant r32"
PLAIN = "plain W4A4, blocks"
_AWQ = (MODULATION, "awq_w4a16")
_UNSIGNED = (AFTER_GELU, "svdquant_w4a4(rank=32,act_unsigned=True)")
ROWS = (
    Plain(PLAIN, BLOCKS),
    Plain("plain W4A4, everything", ALL),
    Plain("plain W4A16, blocks", BLOCKS, inputs=False),
    Plain("plain W16A4, blocks", BLOCKS, weights=False),
    Configuration("int8 row", "int8(rotation=0)"),
    Configuration("int8 row, weight only", "int8(activations=none)"),
    Configuration("fp8_e4m3 row", "fp8_e4m3(granularity=row)"),
    Configuration("fp8_e4m3 tensor", "fp8_e4m3"),
    Configuration("mxfp8", "mxfp8"),
    Configuration("nvfp4", "nvfp4"),
    Configuration("awq_w4a16", "awq_w4a16"),
    Configuration("svdquant r16, rtn", "svdquant_w4a4(rank=16)", solver="rtn"),
    Configuration("svdquant r16", "svdquant_w4a4(rank=16)"),
    Configuration("svdquant r32", "svdquant_w4a4"),
    Configuration("awq modulation + svdquant r16", "svdquant_w4a4(rank=16)", (_AWQ,)),
    Configuration("awq modulation + svdquant r32, signed", "svdquant_w4a4", (_AWQ,)),
    Configuration(HEADLINE, "svdquant_w4a4", (_AWQ, _UNSIGNED)),
    Configuration(f"{HEADLINE}, weights", "svdquant_w4a4", (_AWQ, _UNSIGNED), inputs=False),
    *(
        Configuration(f"{name}, {how}", spec, rules, calibrated=True, gradients=how == "gradients")
        for how in ("calibrated", "gradients")
        for name, spec, rules in (
            ("int8 row", "int8(rotation=0)", ()),
            ("fp8_e4m3 tensor", "fp8_e4m3", ()),
            ("nvfp4", "nvfp4", ()),
            ("awq_w4a16", "awq_w4a16", ()),
            ("svdquant r32", "svdquant_w4a4", ()),
            ("awq modulation + svdquant r16", "svdquant_w4a4(rank=16)", (_AWQ,)),
            (HEADLINE, "svdquant_w4a4", (_AWQ, _UNSIGNED)),
        )
    ),
    Configuration(f"{HEADLINE}, shared", "svdquant_w4a4", (_AWQ, _UNSIGNED), shared=True),
    Configuration(f"{HEADLINE}, shared, calibrated", "svdquant_w4a4", (_AWQ, _UNSIGNED), calibrated=True, shared=True),
)


def plain_model(model: DigitsDiT, row: Plain) -> DigitsDiT:
    """A copy with the linears that match replaced by `PlainLinear`."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer.in_features % GROUP == 0 and re.search(row.pattern, name):
            owner, _, attribute = name.rpartition(".")
            rounded = PlainLinear(layer, weights=row.weights, inputs=row.inputs)
            setattr(model.get_submodule(owner), attribute, rounded)
    return model


@dataclass(frozen=True)
class Judge:
    """What full precision says, and how far another model is from it."""

    label: Tensor
    steps: int
    images: Tensor
    noisy: tuple[tuple[Tensor, Tensor, Tensor], ...]  # x_t, t, velocity

    @classmethod
    def of(cls, model: DigitsDiT, count: int, steps: int) -> Judge:
        """Sample `count` images a seed, and predict from them with fresh noise at TIMES."""
        label = torch.arange(count) % model.config.classes
        images = draw(model, label, steps)
        labels = label.repeat(len(SEEDS))
        generator = torch.Generator().manual_seed(SEEDS[-1] + 1)
        noisy = []
        for time_ in TIMES:
            x = torch.lerp(images, torch.randn(images.shape, generator=generator), time_)
            t = torch.full((len(labels),), time_)
            noisy.append((x, t, model(x, t, labels)))
        return cls(label, steps, images, tuple(noisy))

    @torch.no_grad()
    def score(self, model: nn.Module) -> dict:
        """PSNR of same-seed samples in dB, relative error of one prediction, and accuracy of classifiers."""
        began = time.perf_counter()
        images, labels = draw(model, self.label, self.steps), self.label.repeat(len(SEEDS))
        seconds = time.perf_counter() - began
        clipped, reference = images.clamp(-1, 1), self.images.clamp(-1, 1)
        each = [psnr(a, b) for a, b in zip(reference, clipped, strict=True)]
        errors = {
            str(at): ((model(x, t, labels) - v).norm() / v.norm()).item()
            for at, (x, t, v) in zip(TIMES, self.noisy, strict=True)
        }
        return {
            "psnr": psnr(self.images, images),
            "psnr_clipped": psnr(reference, clipped),
            "psnr_mean": sum(each) / len(each),
            "psnr_median": sorted(each)[len(each) // 2],
            "one_step_error": errors,
            "accuracy": classify(images, labels)["mlp"],
            "sample_seconds": seconds,
        }


def draw(model: nn.Module, label: Tensor, steps: int) -> Tensor:
    """Images of every test seed."""
    return torch.cat([sample(model, label, seed, steps) for seed in SEEDS])


def converted(
    folder: Path, target: Path, row: Configuration, statistics: Mapping[bool, StatisticsCollection]
) -> tuple[DigitsDiT, dict]:
    """The model converted as the row says, and what that took. `statistics`: without and with gradients."""
    known = statistics[row.gradients] if row.calibrated else None
    with open_source(folder) as source:
        plan = make_plan(
            source,
            row.format,
            solver=row.solver,
            preset=PRESET,
            layer_rules=row.rules,
            statistics=known,
            share_low_rank=row.shared,
        )
        report = convert(source, target, plan, resume=False, statistics=known)
    if not row.inputs:
        with open_source(target) as source:
            dequantize(source, target.with_name(f"{target.name}-plain"))
        target = target.with_name(f"{target.name}-plain")
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    about = {
        "spec": row.format,
        "rules": row.rules,
        "calibrated": row.calibrated,
        "gradients": row.gradients,
        "solvers": sorted({layer.solver for layer in report.layers}),
        "layers": len(report.layers),
        "bits_per_weight": 8 * sum(layer.bytes_after for layer in report.layers) / weights,
        "convert_seconds": report.seconds,
    }
    return load_model(target), about


def run(folder: Path, rows: tuple[Configuration | Plain, ...], count: int, steps: int) -> list[dict]:
    """Measure every row; prints each as it is done."""
    model = load_model(folder)
    judge = Judge.of(model, count, steps)
    inputs, statistics = calibration_inputs(model), {}
    for gradients in (False, True):
        began = time.perf_counter()
        statistics[gradients] = calibrate(model, inputs, gradients=gradients)
        print(f"calibrating {'with' if gradients else 'without'} gradients: {time.perf_counter() - began:.1f} s")
    print(f"{'configuration':44} {'bits':>5} {'PSNR':>6} {'clip.':>6} {'mean':>6} {'t=.1':>6} {'t=.5':>6} {'t=.9':>6} "
          f"{'read':>6} {'s':>5}")  # fmt: skip
    found = []
    with tempfile.TemporaryDirectory() as name:
        for index, row in enumerate(rows):
            if isinstance(row, Plain):
                other, about = plain_model(model, row), {}
            else:
                other, about = converted(folder, Path(name) / str(index), row, statistics)
            result = {"name": row.name, **about, **judge.score(other)}
            found.append(result)
            print_row(result)
    return found


def print_row(row: dict) -> None:
    errors = " ".join(f"{100 * error:5.2f}%" for error in row["one_step_error"].values())
    bits, seconds = row.get("bits_per_weight", math.nan), row.get("convert_seconds", math.nan)
    print(
        f"{row['name']:44} {bits:5.2f} {row['psnr']:6.2f} {row['psnr_clipped']:6.2f} {row['psnr_mean']:6.2f} {errors} "
        f"{100 * row['accuracy']:5.1f}% {seconds:5.1f}",
        flush=True,
    )


def gains(rows: list[dict]) -> dict[str, float]:
    """By how many dB the headline, data-free and calibrated, beats each plain row, where they were measured."""
    by_name = {row["name"]: row["psnr"] for row in rows}
    return {
        f"{name} over {plain}": by_name[name] - by_name[plain]
        for name in (HEADLINE, f"{HEADLINE}, calibrated", f"{HEADLINE}, gradients")
        for plain in by_name
        if name in by_name and plain.startswith("plain W4A4")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder that digits_dit_train made; without it, trains one")
    parser.add_argument("--images", type=int, default=100, help="how many a seed")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only the rows whose names contain one of these")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = args.model or Path(name) / "digits-dit"
        if args.model is None:
            train_to(folder)
        chosen = tuple(row for row in ROWS if not args.only or any(part in row.name for part in args.only))
        rows = run(folder, chosen, args.images, args.steps)
        training = json.loads((folder / "training.json").read_text())
    print("headline gains:", {name: round(value, 2) for name, value in gains(rows).items()})
    if args.only:  # a part of the table is not a result to keep
        return
    data = {
        "machine": machine(), "training": training, "images": args.images * len(SEEDS), "steps": args.steps,
        "headline": HEADLINE, "headline_gain_db": gains(rows), "rows": rows,
    }  # fmt: skip
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / RESULT).write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
