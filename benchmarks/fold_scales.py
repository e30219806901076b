"""What scales folded into the layers before are worth: the logits of a small Llama, converted with and without them.

    python -m benchmarks.fold_scales [--formats SPEC...] [--solvers NAME...] [--one-in N...] [--seeds N] [--json FILE]

The model has 4 blocks of width 256 and random weights in bfloat16; one channel in 16, or in 64, of each norm stands out
8 to 16 times, as some do in trained models. It is calibrated on 8192 random tokens, converted by each solver, loaded,
and run on 2048 tokens that it has not seen: the distance of its logits from those of the original, relative to their
length, as the root mean square over the seeds, each of which is another model. With the same scales, but nothing
quantized, the logits show what folding alone changes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.minilm_model import machine
from lowbit.calibration import StatisticsCollection, calibrate
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.fold_plan import plan_folds
from lowbit.checkpoint.folding import folded
from lowbit.checkpoint.load import load
from lowbit.checkpoint.plan import Plan, make_plan
from lowbit.checkpoint.source import Source, open_source

RESULT = Path(__file__).parent / "results" / "fold_scales.json"
FORMATS = ("awq_w4a16", "nvfp4")
SOLVERS = ("scale_search", "scale_search+gptq+descent")
LINEARS = "_proj$"
VOCABULARY = 512


@dataclass(frozen=True)
class Row:
    """One way to convert. Errors of logits, relative; `gain`: mean of what the groups' outputs gain, in dB, as planned.

    `alone`: the error of the folded model in bfloat16, nothing quantized.
    """

    one_in: int
    format: str
    solver: str
    plain: float
    folded: float
    alone: float
    groups: int
    groups_folded: int
    gain: float


def make_model(seed: int, one_in: int = 16) -> Any:
    """A Llama with one channel in so many of its norms outstanding, float32 with weights that bfloat16 holds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=VOCABULARY, max_position_embeddings=128, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * noise)
            else:
                calm = 0.3 if any(part in name for part in ("q_proj", "k_proj", "o_proj", "down_proj")) else 1.0
                parameter.copy_(calm * noise * parameter.shape[-1] ** -0.5)
            if "layernorm" in name:
                places = torch.randperm(len(parameter), generator=generator)[: len(parameter) // one_in]
                parameter[places] *= 8 + 8 * torch.rand(len(places), generator=generator)
    return model.bfloat16().float()


def tokens(count: int, seed: int) -> Tensor:
    """Random ones, [count, 128]."""
    return torch.randint(3, VOCABULARY, (count, 128), generator=torch.Generator().manual_seed(seed))


class Bench:
    """One model, its folder, statistics and logits."""

    def __init__(self, seed: int, one_in: int, folder: Path) -> None:
        self.model, self.folder, self.one_in = make_model(seed, one_in), folder, one_in
        self.test = tokens(16, 2000 + seed)
        self.wanted = self.logits(self.model)
        batches = [{"input_ids": batch} for batch in tokens(64, 1000 + seed).split(8)]
        self.known: StatisticsCollection = calibrate(self.model, batches)
        make_model(seed, one_in).bfloat16().save_pretrained(folder / "model")

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        """[T, V]."""
        found: Tensor = model(input_ids=self.test).logits
        return found.float()

    def error(self, model: Any) -> float:
        """Of the logits, relative."""
        return float((self.logits(model) - self.wanted).norm() / self.wanted.norm())

    def measured(self, spec: str, solvers: list[str]) -> Iterator[Row]:
        """By each solver, with and without scales, which do not depend on it."""
        with open_source(self.folder / "model") as source:
            plans = [
                make_plan(source, spec, solver=solver, preset="none", only=[LINEARS], statistics=self.known)
                for solver in solvers
            ]
            folds = plan_folds(source, plans[0], self.known).components[0].folds
            active = [fold for fold in folds if fold.active]
            gains = [10 * math.log10((fold.error_before or 1) / (fold.error_after or 1)) for fold in active]
            for solver, plain in zip(solvers, plans, strict=True):
                plan = dataclasses.replace(plain, components=(dataclasses.replace(plain.components[0], folds=folds),))
                yield Row(
                    self.one_in, spec, solver, self._converted(source, plain), self._converted(source, plan),
                    self._alone(source, plan), len(folds), len(active), sum(gains) / max(len(gains), 1),
                )  # fmt: skip

    def _converted(self, source: Source, plan: Plan) -> float:
        with tempfile.TemporaryDirectory(dir=self.folder) as target:
            convert(source, Path(target) / "out", plan, statistics=self.known, verify=False)
            model = make_model(0)
            load(model, Path(target) / "out", strict=False)
        return self.error(model)

    def _alone(self, source: Source, plan: Plan) -> float:
        view, _ = folded(source, plan, self.known)
        model = make_model(0)
        model.load_state_dict({key: view.read("", key).float() for key in source.tensors})
        return self.error(model)


def together(found: list[list[Row]]) -> Iterator[Row]:
    """Each way to convert, over the seeds."""
    for each in zip(*found, strict=True):
        errors = {
            name: math.sqrt(sum(getattr(row, name) ** 2 for row in each) / len(each))
            for name in ("plain", "folded", "alone")
        }
        total, active = sum(row.groups for row in each), sum(row.groups_folded for row in each)
        gain = sum(row.gain for row in each) / len(each)
        yield dataclasses.replace(each[0], **errors, groups=total, groups_folded=active, gain=gain)


def main() -> None:
    """Measure, print and write, after each seed."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--formats", nargs="+", default=list(FORMATS))
    arguments.add_argument("--solvers", nargs="+", default=list(SOLVERS))
    arguments.add_argument("--one-in", nargs="+", type=int, default=[16, 64], help="how rare outstanding channels are")
    arguments.add_argument("--seeds", type=int, default=2)
    arguments.add_argument("--json", type=Path, default=RESULT)
    given = arguments.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    found: list[list[Row]] = []
    for seed in range(given.seeds):
        found.append([])
        for one_in in given.one_in:
            with tempfile.TemporaryDirectory() as folder:
                bench = Bench(seed, one_in, Path(folder))
                found[-1] += [row for spec in given.formats for row in bench.measured(spec, given.solvers)]
        rows = list(together(found))
        for row in rows:
            print(
                f"{seed + 1} seeds, one in {row.one_in}: {row.format:12s} {row.solver:28s} {100 * row.plain:6.2f} % -> "
                f"{100 * row.folded:6.2f} % ({row.folded / row.plain:.3f}), alone {100 * row.alone:.3f} %, "
                f"{row.groups_folded} of {row.groups} groups, {row.gain:.2f} dB",
                flush=True,
            )
        result = {"machine": machine(), "seeds": seed + 1, "rows": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
