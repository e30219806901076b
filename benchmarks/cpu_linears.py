"""Our linears as the dispatch table chooses them, on weights whose right results are known.

A weight [N, K] has rows drawn at random from a few hundred that were quantized: the codes are real, making them is
quick, and the float64 product needs those few rows alone. Bytes count the stored parts of a weight in the arrangement
that its kernel reads: codes, scales, zero points and low-rank factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit import QuantizedTensor, dispatch, memory, ops
from lowbit.dispatch import Kernel
from lowbit.formats import Format, parse_spec
from lowbit.formats.parts import Parts, gather_rows
from lowbit.layouts import coalesced_int4
from lowbit.numerics.w4a8 import w4a8_linear

W4A8 = "int4_plain_mm"  # an op of its own, not the linear of a format: the activations are rounded to int8
W4A8_FORMAT = "wna16(group_size=64,zero_point=true)"
SPECS = (
    "awq_w4a16",
    "nvfp4",
    "mxfp8",
    "fp8_e4m3",
    "fp8_e4m3(granularity=row)",
    "int8",
    "int8(rotation=256)",
    W4A8,
    "svdquant_w4a4",
    "w4a8_codebook",
    "gguf(type=Q4_0)",
    "gguf(type=Q4_K)",
    "gguf(type=Q6_K)",
    "gguf(type=Q8_0)",
)
MORE = ("svdquant_w4a4(act_unsigned=True)", "fp8_e5m2", "int8(granularity=tensor)", "mxfp4", "wna16(group_size=64)")
DRAWN = 512  # quantized rows
ROUNDING = 2.0**-8  # of a bfloat16 result, and of the decoded weight where a kernel rounds that to bfloat16
CACHES = 3  # the copies of a weight together are so many times as large as the last-level cache
# Or so large, where that cache is shared by many cores: contenders take turns, and two dozen of them leave nothing of
# one in it until its turn comes again.
MOST_BYTES = 256 << 20


class WrongResultError(Exception):
    """A result that is not the product that it should be: nothing is reported of it."""


@dataclass
class Entry:
    """One way to multiply: `run(input(x), weight)` for any of the equal `weights`, with `check` for its result."""

    name: str
    run: Callable[[Any, Any], Tensor]
    weights: list[Any]
    nbytes: int
    check: Callable[[Tensor, Tensor], float]
    """The relative error of a result, given x and the result; raises `WrongResultError`."""
    kernel: Callable[[Tensor], Kernel] | None = None
    layout: str = ""
    of: tuple[str, ...] = ()
    """For a peer: the names of those it is compared with; none for all."""
    input: Callable[[Tensor], Any] = lambda x: x
    """What happens to x before the clock runs, such as a GELU where a format is for what one leaves."""
    least: int = 5
    """Rounds at least."""


@dataclass(frozen=True)
class Drawn:
    """A weight [N, K] with the rows of `base` in an order with repetitions."""

    fmt: Format
    base: Parts
    rows: Tensor
    k: int

    @classmethod
    def make(cls, spec: str, n: int, k: int, seed: int = 0) -> Drawn:
        """Quantize some rows and draw N of them."""
        fmt = parse_spec(spec)
        count = min(n, DRAWN) if fmt.row_multiple == 1 else n
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(count, k, generator=generator).mul_(k**-0.5).bfloat16()
        identity = torch.arange(n)
        rows = identity if count == n else torch.randint(count, (n,), generator=generator)
        base = QuantizedTensor.quantize(w, fmt).parts if fmt.encodable else any_blocks(fmt, count, k, generator)
        return cls(fmt, base, rows, k)

    @cached_property
    def weight(self) -> QuantizedTensor:
        """The whole weight in plain parts."""
        rows = self.rows
        parts = gather_rows(self.fmt.rules, self.base, rows) if self.fmt.row_multiple == 1 else self.base
        return QuantizedTensor(parts, self.fmt, (rows.numel(), self.k), torch.bfloat16)

    @cached_property
    def values(self) -> Tensor:
        """The values of the base rows, float64."""
        return self.fmt.dequantize(self.base, (self.fmt.rows_of(self.base), self.k), torch.float32).double()

    def exact(self, x: Tensor) -> Tensor:
        """The float64 product [M, N], with what an input that is shifted adds to it."""
        product = x.double() @ self.values.t()
        share = self.fmt.bias_share(self.base)
        return (product if share is None else product + share.double())[:, self.rows]

    def rounded(self, x: Tensor) -> Tensor:
        """The product as the format defines it in float32, with its input rounded as it says."""
        return self.fmt.linear(x.float(), self.base, None)[:, self.rows].double()

    def rounded_blocks(self, x: Tensor) -> Tensor:
        """The product of `int4_plain_mm` in float32, with its input rounded to int8."""
        group, operands = group_of(self.fmt), coalesced_int4.operands(coalesced_int4.pack(self.fmt, self.base))
        return w4a8_linear(x.float(), *operands, group, None)[:, self.rows].double()


def any_blocks(fmt: Format, n: int, k: int, generator: torch.Generator) -> Parts:
    """Blocks of any content, for what can only be read; bit 6 of every byte is zero, so that all steps are finite."""
    codes = torch.randint(0, 256, fmt.part_shapes(n, k)["qdata"], generator=generator, dtype=torch.uint8)
    return {"qdata": codes & 0xBF}


def group_of(fmt: Format) -> int:
    """The columns that share a scale."""
    return int(fmt.config()["group_size"])


def relative_error(y: Tensor, right: Tensor) -> float:
    """The RMS error relative to the RMS of what is right; infinite for a result that is not finite."""
    if y.shape != right.shape or not bool(torch.isfinite(y).all()):
        return math.inf
    return float((y.double() - right).norm() / right.norm())


def check_error(name: str, y: Tensor, right: Tensor, limit: float) -> float:
    """`relative_error`, if it is at most `limit`."""
    error = relative_error(y, right)
    if error > limit:
        raise WrongResultError(f"{name}: its result is off by {error:.2e}, more than {limit:.2e}; nothing is reported")
    return error


def check_ours(
    name: str, x: Tensor, y: Tensor, tolerance: float, drawn: Drawn, rounded: Callable[[Tensor], Tensor] | None
) -> float:
    """The error against the float64 product of the dequantized weight.

    A kernel that leaves its input alone has to be that near it. One that rounds its input has to be near what the
    rounded input gives, and no farther from the float64 product than that is.
    """
    limit = tolerance + ROUNDING
    exact = drawn.exact(x)
    if rounded is None:
        return check_error(name, y, exact, limit)
    right = rounded(x)
    check_error(name, y, right, limit)
    return check_error(name, y, exact, relative_error(right, exact) + limit)


def preferred(weight: QuantizedTensor) -> QuantizedTensor:
    """The weight as its kernel wants it: what loading does."""
    layout = dispatch.preferred_layout("linear", weight.format, *weight.matrix, "cpu")
    return weight.in_layout(layout)


def copies_for(nbytes: int, cache: int) -> int:
    """How many copies of a weight are larger than the cache together, within reason."""
    return max(2, min(math.ceil(CACHES * cache / nbytes), MOST_BYTES // nbytes))


def ours(spec: str, n: int, k: int, cache: int) -> tuple[Entry, Drawn]:
    """The linear of a format, as anybody calls it: F.linear of x and a quantized weight."""
    if spec == W4A8:
        return _w4a8(n, k, cache)
    drawn = Drawn.make(spec, n, k)
    fmt, weight = drawn.fmt, preferred(drawn.weight)
    count = copies_for(weight.nbytes_stored(), cache)

    def chosen(x: Tensor) -> Kernel:
        return dispatch.select("linear", fmt.name, weight.kernel_layout, "cpu", (fmt, x, weight.parts, None))

    def check(x: Tensor, y: Tensor) -> float:
        return check_ours(spec, x, y, chosen(x).tolerance, drawn, drawn.rounded if fmt.rounds_input else None)

    entry = Entry(
        spec,
        F.linear,
        [weight, *(weight.map_parts(memory.clone) for _ in range(count - 1))],
        weight.nbytes_stored(),
        check,
        chosen,
        weight.kernel_layout,
        input=F.gelu if fmt.folds_bias else lambda x: x,
    )
    return entry, drawn


def _w4a8(n: int, k: int, cache: int) -> tuple[Entry, Drawn]:
    drawn = Drawn.make(W4A8_FORMAT, n, k)
    group = group_of(drawn.fmt)
    operands = coalesced_int4.operands(coalesced_int4.pack(drawn.fmt, drawn.weight.parts))
    nbytes = sum(part.numel() * part.element_size() for part in operands)
    run = partial(_run_w4a8, group)

    def chosen(x: Tensor) -> Kernel:
        return dispatch.select(W4A8, dispatch.ANY_FORMAT, "", "cpu", (x, *operands, None, group))

    def check(x: Tensor, y: Tensor) -> float:
        return check_ours(W4A8, x, y, chosen(x).tolerance, drawn, drawn.rounded_blocks)

    clones = [tuple(memory.clone(part) for part in operands) for _ in range(copies_for(nbytes, cache) - 1)]
    return Entry(W4A8, run, [operands, *clones], nbytes, check, chosen, coalesced_int4.TAG), drawn


def _run_w4a8(group: int, x: Tensor, operands: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return ops.int4_plain_mm(x, *operands, group_size=group, layout=coalesced_int4.TAG)
