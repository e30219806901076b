"""A stack of blocks shaped like Qwen-Image's on a GPU: step time, memory and output error, by format of the weights.

Each block has two streams, image and text, that meet in one attention: hidden 3072, an MLP of 12288, and a modulation
layer a stream that makes 18432 values of one vector (one token). Weights are made here: all variants have the same
values before they are quantized. The step is one forward pass of all blocks, replayed as a CUDA graph; its error is the
RMS difference from the same model in float32, relative to that model's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cpu_linears import relative_error
from benchmarks.cpu_timing import quartiles, ratio
from benchmarks.gpu_linears import FP8_ROW, known, packed
from lowbit import QuantizedTensor
from lowbit.formats import parse_spec
from lowbit.formats.parts import gather_rows

if TYPE_CHECKING:
    from benchmarks.gpu import Bench

DENSE = "bf16"
MODULATION = "modulation"
_DRAWN = 512  # rows that are quantized; the weight repeats them in random order
# By variant: the format of the modulation layers and that of all others, and the largest error that is believed.
VARIANTS: Mapping[str, tuple[str, str, float]] = {
    DENSE: ("", "", 0.03),
    "fp8": (FP8_ROW, FP8_ROW, 0.15),
    "int8": ("int8", "int8", 0.15),
    "svdquant_w4a4 + awq_w4a16": ("awq_w4a16", "svdquant_w4a4", 0.5),
}


@dataclass(frozen=True)
class Sizes:
    """The shape of the stack and of its input."""

    hidden: int = 3072
    mlp: int = 12288
    heads: int = 24
    blocks: int = 4
    image: int = 4096
    text: int = 256


QUICK = Sizes(blocks=1)
Linear = Callable[[str, int, int], nn.Linear]


class Stream(nn.Module):
    """What image and text have each for themselves."""

    def __init__(self, sizes: Sizes, linear: Linear) -> None:
        super().__init__()
        h = sizes.hidden
        self.modulation = linear(MODULATION, 6 * h, h)
        self.q, self.k, self.v, self.out = (linear(name, h, h) for name in ("q", "k", "v", "out"))
        self.up, self.down = linear("up", sizes.mlp, h), linear("down", h, sizes.mlp)


class Block(nn.Module):
    """A double-stream block."""

    def __init__(self, sizes: Sizes, linear: Linear) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.streams = nn.ModuleList(Stream(sizes, linear) for _ in range(2))

    def forward(self, tokens: tuple[Tensor, Tensor], vector: Tensor) -> tuple[Tensor, Tensor]:
        """Image and text [1, T, hidden], conditioning [1, hidden] -> the same shapes."""
        shifts = [stream.modulation(F.silu(vector)).unsqueeze(1).chunk(6, dim=-1) for stream in self.streams]
        parts = []
        for stream, x, (shift, scale, *_) in zip(self.streams, tokens, shifts, strict=True):
            y = _modulated(x, shift, scale)
            parts.append([self._heads(part(y)) for part in (stream.q, stream.k, stream.v)])
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*parts, strict=True))
        q, k = (F.rms_norm(part, part.shape[-1:]) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        pieces = mixed.split([x.shape[1] for x in tokens], dim=1)
        found = []
        for stream, x, own, (_, _, gate, shift, scale, last) in zip(self.streams, tokens, pieces, shifts, strict=True):
            y = x + gate * stream.out(own)
            wide = F.gelu(stream.up(_modulated(y, shift, scale)), approximate="tanh")
            found.append(y + last * stream.down(wide))
        return found[0], found[1]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class Stack(nn.Module):
    """The blocks, one after the other."""

    def __init__(self, sizes: Sizes, linear: Linear) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(sizes, linear) for _ in range(sizes.blocks))

    def forward(self, image: Tensor, text: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Image and text [1, T, hidden], conditioning [1, hidden] -> the same shapes."""
        for block in self.blocks:
            image, text = block((image, text), vector)
        return image, text


@dataclass
class Weights:
    """The same linears for every variant, in the order in which a stack asks for them."""

    modulation: str
    others: str
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    made: int = 0
    nbytes: int = 0

    def __call__(self, name: str, n: int, k: int) -> nn.Linear:
        """The next linear, of a weight [n, k]."""
        self.made += 1
        generator = torch.Generator().manual_seed(self.made)
        base = torch.randn(min(n, _DRAWN), k, generator=generator).mul_(k**-0.5).bfloat16().to(self.device)
        rows = torch.randint(base.shape[0], (n,), generator=generator).to(self.device)
        layer = nn.Linear(k, n, device="meta")
        weight = self._weight(base, rows, self.modulation if name == MODULATION else self.others)
        bias = torch.randn(n, generator=generator).mul_(0.1).to(self.device, self.dtype)
        layer.weight, layer.bias = (nn.Parameter(part, requires_grad=False) for part in (weight, bias))
        stored = weight.nbytes_stored() if isinstance(weight, QuantizedTensor) else weight.nbytes
        self.nbytes += stored + bias.nbytes
        return layer

    def _weight(self, base: Tensor, rows: Tensor, spec: str) -> Tensor:
        if not spec:
            return base.index_select(0, rows).to(self.dtype)
        fmt = parse_spec(spec)
        parts = gather_rows(fmt.rules, QuantizedTensor.quantize(base, fmt).parts, rows)
        return packed(QuantizedTensor(parts, fmt, (rows.numel(), base.shape[1]), self.dtype))


def inputs(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Image, text and conditioning, bfloat16."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, sizes.image, sizes.hidden), (1, sizes.text, sizes.hidden), (1, sizes.hidden))
    image, text, vector = (torch.randn(shape, generator=generator).bfloat16().to(device) for shape in shapes)
    return image, text, vector


@torch.inference_mode()
def measure(bench: Bench, *, quick: bool = False, sizes: Sizes | None = None) -> list[dict[str, Any]]:
    """One row a variant. A variant whose output is wrong, or that cannot run, has a `fault` and no time."""
    sizes = sizes or (QUICK if quick else Sizes())
    given = inputs(sizes, bench.device)
    right = torch.cat(Stack(sizes, Weights("", "", bench.device, torch.float32))(*(x.float() for x in given)), dim=1)
    right = right.double()
    rows: list[dict[str, Any]] = []
    calls: list[tuple[str, Callable[[int], object], int]] = []
    for name, (modulation, others, limit) in VARIANTS.items():
        row: dict[str, Any] = {"name": name, "modulation": modulation, "others": others}
        rows.append(row)
        bench.begin({"section": "model", "name": name})
        if not all(known(spec) for spec in (modulation, others) if spec):
            row["skipped"] = "this lowbit has no such format"
            continue
        try:
            stack = _built(bench, sizes, modulation, others, given, right, row)
        except (RuntimeError, ValueError) as error:
            row["fault"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            continue
        if not row["error"] <= limit:
            row["fault"] = f"its output is off by {row['error']:.2e}, more than {limit}; no time is reported"
            continue
        calls.append((name, lambda _, own=stack: own(*given), 1))
    timed = bench.race(calls)
    dense = next(row for row in rows if row["name"] == DENSE)
    for row in rows:
        if row["name"] in timed:
            one = timed[row["name"]]
            row |= {"seconds": one.median, "quartiles": quartiles(one.times)}
            if DENSE in timed:
                row["ratio"] = ratio(one, timed[DENSE])
            row["of_dense_weights"] = row["weight_bytes"] / dense["weight_bytes"]
    return rows


def _built(
    bench: Bench, sizes: Sizes, modulation: str, others: str, given: tuple[Tensor, Tensor, Tensor], right: Tensor,
    row: dict[str, Any],
) -> Stack:  # fmt: skip
    """The stack of a variant; its memory and error are put into the row."""
    on_gpu = bench.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    weights = Weights(modulation, others, bench.device)
    stack = Stack(sizes, weights)
    row["weight_bytes"] = weights.nbytes
    stack(*given)  # compiles and tunes, which takes memory of its own
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    found = stack(*given)
    if on_gpu:
        torch.cuda.synchronize()
    row["peak_bytes"] = torch.cuda.max_memory_allocated() - before if on_gpu else None
    row["error"] = relative_error(torch.cat(found, dim=1), right)
    return stack


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table(title="blocks shaped like Qwen-Image's")
    for head in ("weights", "ms a step", "x bf16", "weights MB", "of bf16", "peak MB", "error", ""):
        table.add_column(head, justify="left" if head in {"weights", ""} else "right")
    for row in rows:
        ratio_ = row.get("ratio")
        low, high = ratio_["quartiles"] if ratio_ else (0, 0)
        table.add_row(
            row["name"], f"{1e3 * row['seconds']:.2f}" if "seconds" in row else "",
            f"{ratio_['ratio']:.2f} [{low:.2f}, {high:.2f}]" if ratio_ else "",
            f"{row['weight_bytes'] / 1e6:.0f}" if "weight_bytes" in row else "",
            f"{row['of_dense_weights']:.2f}" if "of_dense_weights" in row else "",
            f"{row['peak_bytes'] / 1e6:.0f}" if row.get("peak_bytes") else "",
            f"{row['error']:.1e}" if "error" in row else "", row.get("fault") or row.get("skipped") or "",
        )  # fmt: skip
    console.print(table)
