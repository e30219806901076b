"""Whole models on this processor: a sentence model's latency, and a decoder's tokens a second, against bfloat16.

    python -m benchmarks.cpu_models [--models minilm decoder] [--rounds 30] [--isa NAME] [--quick] [--json FILE]

`minilm`: all-MiniLM-L6-v2, one sentence of 32 tokens, its 36 linears quantized, everything else in bfloat16 or float32,
against the same model in bfloat16 and in float32. `decoder`: two layers with the shapes of a Llama of 7 billion
weights (hidden 4096, intermediate 11008) and grouped-query attention, one token at a time, with 4-bit weights and int8
activations (`int4_plain_mm`) and with 4-bit weights alone, against the same values in bfloat16.

All variants of a model take turns in one process, after their results were compared with those of float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import cpu_machine
from benchmarks.cpu import RESULTS, spread
from benchmarks.cpu_linears import W4A8, W4A8_FORMAT, Drawn, WrongResultError, group_of, preferred, relative_error
from benchmarks.cpu_timing import Contender, alternate, quartiles, ratio
from benchmarks.minilm_model import embedding_error, linears, load_model, sentences
from lowbit import QuantizedTensor, dispatch, ops
from lowbit.layouts import coalesced_int4

TOKENS = 32
FORMATS = ("int8", "fp8_e4m3(granularity=row)", "awq_w4a16", "nvfp4", "svdquant_w4a4")
EIGHT_BIT_ERROR, FOUR_BIT_ERROR = 0.005, 0.1  # 1 - cosine: to notice a model that is broken, not to judge a format
HIDDEN, LAYERS, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 4096, 2, 11008, 32, 8, 256
PROMPT = 32
DECODER_ERROR = {"bfloat16": 0.02, "awq_w4a16": 0.02, W4A8: 0.04}
BUDGET = 20.0


def minilm(rounds: int) -> dict[str, Any]:
    """Latency of one sentence. Raises `WrongResultError` for embeddings that are too far from those of float32."""
    model, tokenizer = load_model()
    ids = tokenizer(" ".join(sentences("everyday")[:8]), truncation=True, max_length=TOKENS, return_tensors="pt")
    batch = dict(ids)
    variants = {
        "float32": (model, torch.float32, ""),
        "bfloat16": (copy.deepcopy(model).bfloat16(), torch.bfloat16, ""),
    }
    kernels = {}
    for spec in FORMATS:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{spec}, rest {str(dtype).removeprefix('torch.')}"
            made = copy.deepcopy(model).to(dtype)
            for layer in linears(made).values():
                weight = preferred(QuantizedTensor.quantize(layer.weight.detach(), spec))
                layer.weight = nn.Parameter(weight, requires_grad=False)
                kernels[name] = _kernel(weight, torch.zeros(TOKENS, weight.matrix[1], dtype=dtype))
            variants[name] = (made, dtype, spec)
    right = _embedding(model, batch)
    errors = {}
    for name, (made, _, spec) in variants.items():
        limit = FOUR_BIT_ERROR if spec in FORMATS[2:] else EIGHT_BIT_ERROR
        errors[name] = _within(name, embedding_error(right, _embedding(made, batch)), limit)
    timed = {name: lambda _, own=made: own(**batch) for name, (made, _, _) in variants.items()}
    return {
        "tokens": batch["input_ids"].shape[1],
        "rows": _race(timed, rounds, ("bfloat16", "float32"), errors, kernels),
    }


def _embedding(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**batch).last_hidden_state.float().mean(1)


def _kernel(weight: QuantizedTensor, x: Tensor) -> str:
    args = (weight.format, x, weight.parts, None)
    return dispatch.select("linear", weight.format.name, weight.kernel_layout, "cpu", args).name


def _within(name: str, error: float, limit: float) -> float:
    if not error <= limit:
        raise WrongResultError(f"{name}: its result is off by {error:.2e}, more than {limit:.2e}; nothing is reported")
    return error


def _race(
    timed: Mapping[str, Callable[[int], object]],
    rounds: int,
    against: Sequence[str],
    errors: Mapping[str, float],
    kernels: Mapping[str, str],
) -> list[dict[str, Any]]:
    contenders = {name: Contender(name, run) for name, run in timed.items()}
    alternate(list(contenders.values()), rounds, BUDGET)
    return [
        {
            "name": name,
            "kernel": kernels.get(name),
            "error": errors[name],
            "seconds": one.median,
            "quartiles": quartiles(one.times),
            "rounds": len(one.times),
            "ratios": {other: ratio(one, contenders[other]) for other in against if other != name},
        }
        for name, one in contenders.items()
    ]


class W4A8Linear(nn.Module):
    """x W^T by `int4_plain_mm`, without a bias."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        self.group = group_of(drawn.fmt)
        parts = coalesced_int4.pack(drawn.fmt, drawn.weight.parts)
        self.operands = coalesced_int4.operands(parts)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return ops.int4_plain_mm(x, *self.operands, group_size=self.group, layout=coalesced_int4.TAG)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions over a cache of fixed size."""

    def __init__(self, linear: Callable[[int, int], nn.Module], size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width = HIDDEN // HEADS
        self.q, self.o = linear(HIDDEN, HIDDEN), linear(HIDDEN, HIDDEN)
        self.k, self.v = linear(KV_HEADS * self.width, HIDDEN), linear(KV_HEADS * self.width, HIDDEN)
        self.keys = torch.zeros(1, KV_HEADS, size, self.width, dtype=dtype)
        self.values = torch.zeros_like(self.keys)

    def forward(self, x: Tensor, at: int, turns: tuple[Tensor, Tensor]) -> Tensor:
        """x [1, T, hidden], the tokens from position `at` on."""
        length = x.shape[1]
        end = at + length
        q, k, v = (part(x).unflatten(2, (-1, self.width)).transpose(1, 2) for part in (self.q, self.k, self.v))
        self.keys[:, :, at:end] = _turned(k, turns)
        self.values[:, :, at:end] = v
        out = F.scaled_dot_product_attention(
            _turned(q, turns), self.keys[:, :, :end], self.values[:, :, :end], is_causal=length > 1, enable_gqa=True
        )
        return self.o(out.transpose(1, 2).flatten(2))


def _turned(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turns
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Block(nn.Module):
    """A layer: attention and a gated product."""

    def __init__(self, linear: Callable[[int, int], nn.Module], size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = Attention(linear, size, dtype)
        self.gate, self.up = linear(INTERMEDIATE, HIDDEN), linear(INTERMEDIATE, HIDDEN)
        self.down = linear(HIDDEN, INTERMEDIATE)
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN, eps=1e-5, dtype=dtype) for _ in range(2))

    def forward(self, x: Tensor, at: int, turns: tuple[Tensor, Tensor]) -> Tensor:
        """x [1, T, hidden] -> the same shape."""
        x = x + self.attention(self.norms[0](x), at, turns)
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A Llama with few layers and a small vocabulary; `linear(n, k)` makes its linears."""

    def __init__(self, linear: Callable[[int, int], nn.Module], size: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.table = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype)
        self.blocks = nn.ModuleList(Block(linear, size, dtype) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-5, dtype=dtype)
        half = HIDDEN // HEADS // 2
        angles = torch.outer(torch.arange(size).float(), 10000.0 ** (-torch.arange(half) / half))
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, ids: Tensor, at: int) -> Tensor:
        """ids [1, T] from position `at` on -> logits [1, T, vocabulary]."""
        turns = (self.cos[at : at + ids.shape[1]], self.sin[at : at + ids.shape[1]])
        x = self.table[ids]
        for block in self.blocks:
            x = block(x, at, turns)
        return F.linear(self.norm(x), self.table)


class Weights:
    """The same weights for every variant, in the order in which a decoder asks for them; layers share shapes only."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        self.kind, self.dtype, self.made, self.kernel = kind, dtype, 0, ""

    def __call__(self, n: int, k: int) -> nn.Module:
        """The next linear, of a weight [n, k]."""
        self.made += 1
        drawn = Drawn.make(W4A8_FORMAT if self.kind != "awq_w4a16" else self.kind, n, k, seed=self.made)
        if self.kind == W4A8:
            layer: nn.Module = W4A8Linear(drawn)
            args = (torch.zeros(1, k, dtype=self.dtype), *layer.operands, None, layer.group)
            self.kernel = dispatch.select(W4A8, dispatch.ANY_FORMAT, "", "cpu", args).name
            return layer
        layer = nn.Linear(k, n, bias=False, device="meta")
        weight = drawn.weight.dequantize(self.dtype)
        if self.kind == "awq_w4a16":
            weight = preferred(drawn.weight)
            self.kernel = _kernel(weight, torch.zeros(1, k, dtype=self.dtype))
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer


def decoder(rounds: int) -> dict[str, Any]:
    """Tokens a second. Raises `WrongResultError` for logits too far from those of the same values in float32."""
    size = PROMPT + 8
    ids = torch.randint(VOCABULARY, (1, PROMPT + 1), generator=torch.Generator().manual_seed(4))
    right = {kind: _last_logits(Decoder(Weights(kind, torch.float32), size, torch.float32), ids) for kind in
             ("float32", "awq_w4a16")}  # fmt: skip
    timed, errors, kernels = {}, {}, {}
    for kind, limit in DECODER_ERROR.items():
        weights = Weights(kind, torch.bfloat16)
        model = Decoder(weights, size, torch.bfloat16)
        expected = right["awq_w4a16" if kind == "awq_w4a16" else "float32"]
        errors[kind] = _within(kind, relative_error(_last_logits(model, ids), expected), limit)
        timed[kind] = lambda _, own=model: own(ids[:, -1:], PROMPT)
        kernels[kind] = weights.kernel
    rows = _race(timed, rounds, ("bfloat16",), errors, kernels)
    return {"prompt": PROMPT, "rows": [{**row, "tokens_s": 1 / row["seconds"]} for row in rows]}


def _last_logits(model: Decoder, ids: Tensor) -> Tensor:
    """Read all but the last token at once, then the last one by itself."""
    model(ids[:, :-1], 0)
    return model(ids[:, -1:], PROMPT).double()


MODELS: dict[str, Callable[[int], dict[str, Any]]] = {"minilm": minilm, "decoder": decoder}


def show(console: Console, name: str, result: dict[str, Any]) -> None:
    """The table of one model."""
    against = list(dict.fromkeys(other for row in result["rows"] for other in row["ratios"]))
    table = Table(title=name)
    for head in ("what", "kernel", "ms", "error", *(f"x {other}" for other in against)):
        table.add_column(head, justify="left" if head in {"what", "kernel"} else "right")
    for row in result["rows"]:
        ratios = [spread(row["ratios"][other]) if other in row["ratios"] else "" for other in against]
        table.add_row(row["name"], row["kernel"] or "", f"{1e3 * row['seconds']:.2f}", f"{row['error']:.1e}", *ratios)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--isa", help="force an instruction set of the cpu backend (LOWBIT_CPU_ISA)")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    path = given.json or RESULTS / (f"cpu_models_{given.isa}.json" if given.isa else "cpu_models.json")
    console = Console(width=None if sys.stdout.isatty() else 200)
    torch.set_num_threads(given.threads)
    if given.isa:
        os.environ["LOWBIT_CPU_ISA"] = given.isa
        if (why := dispatch.load("cpu")) is not None:
            sys.exit(f"--isa {given.isa}: {why}")
    result = json.loads(path.read_text()) if path.is_file() else {}
    try:
        for name in given.models:
            with torch.inference_mode():
                found = MODELS[name](3 if given.quick else given.rounds)
            result[name] = {"machine": cpu_machine.about(), **found}
            show(console, name, found)
            path.write_text(json.dumps(result, indent=1) + "\n")
    except WrongResultError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
