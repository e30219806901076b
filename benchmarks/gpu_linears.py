"""Our linears on a GPU as the dispatch table chooses them, on weights whose right results are known.

Weights are those of `cpu_linears`: rows drawn from a few hundred that were quantized, moved to the GPU and packed there
as loading packs them.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cpu_linears import W4A8, Drawn, Entry, _run_w4a8, check_ours, group_of
from benchmarks.gpu_timing import copies_for
from lowbit import QuantizedTensor, dispatch
from lowbit.dispatch import Kernel
from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import parse_spec
from lowbit.layouts import coalesced_int4

W4A8_FORMAT = "wna16(group_size=32,zero_point=true)"  # the groups that the coalesced layout was made for
FP8_ROW = "fp8_e4m3(granularity=row,activations=fp8)"
# The most important first: what the budget leaves no time for is at the end.
SPECS = (
    "svdquant_w4a4", "awq_w4a16", "int8", FP8_ROW, "nvfp4", "fp8_e4m3(granularity=row)", "mxfp4", "mxfp8", W4A8,
    "gguf(type=Q8_0)", "gguf(type=Q4_K)", "w4a8_codebook", "gguf(type=Q6_K)", "gguf(type=Q4_0)",
)  # fmt: skip
HUGE = 1 << 62


@dataclass(frozen=True)
class Route:
    """One way that a linear can go: a backend, with constants of kernel files that keep its launchers on that way."""

    backend: str = "triton"
    constants: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    decodes: bool = False
    """Whether the launcher is passed by: the weight is decoded once, and PyTorch multiplies."""
    only: str = ""
    """What the specs of those that have this way begin with."""


ROUTES: Mapping[str, Route] = {
    "cuda": Route("cuda"),
    "cuda, a product a thread": Route("cuda", {"cuda.int4_plain_mm": {"FEW": 8, "MANY": HUGE}}, only=W4A8),
    "cuda, tiles": Route("cuda", {"cuda.int4_plain_mm": {"FEW": 0, "MANY": HUGE}}, only=W4A8),
    "cuda, decoded": Route("cuda", {"cuda.int4_plain_mm": {"FEW": 0, "MANY": 0}}, only=W4A8),
    "cuda, words fused": Route("cuda", {"cuda.linear_words": {"MANY": HUGE}}, only="awq_w4a16"),
    "cuda, words decoded": Route("cuda", {"cuda.linear_words": {"MANY": 9}}, only="awq_w4a16"),
    "triton, fused": Route(
        constants={
            "triton.linear_bytes": {"MANY": HUGE},
            "triton.linear_words": {"MANY": HUGE},
            "triton.linear_plain": {"FEW": HUGE},
            "triton.linear_fp8_activations": {"_MANY": HUGE},
            "triton.linear_gguf": {"FEW": HUGE},
            "triton.linear_w4a8_codebook": {"FEW": HUGE},
        }
    ),
    "triton, blocks decoded": Route(constants={"triton.linear_gguf": {"FEW": 0}}, only="gguf"),
    "triton, integers decoded": Route(constants={"triton.linear_w4a8_codebook": {"FEW": 0}}, only="w4a8_codebook"),
    "triton, torch._scaled_mm": Route(constants={"triton.linear_fp8_activations": {"_MANY": 0}}, only=FP8_ROW),
    "triton, decoded": Route(decodes=True),
}


def drawn_on(device: torch.device, spec: str, n: int, k: int) -> Drawn:
    """A `Drawn` whose tensors are on a device."""
    made = Drawn.make(W4A8_FORMAT if spec == W4A8 else spec, n, k)
    return Drawn(made.fmt, {name: part.to(device) for name, part in made.base.items()}, made.rows.to(device), k)


def known(spec: str) -> bool:
    """Whether this lowbit has such a format."""
    try:
        return spec == W4A8 or bool(parse_spec(spec))
    except FormatError:
        return False


def packed(weight: QuantizedTensor) -> QuantizedTensor:
    """The weight as its kernel wants it: what loading does."""
    device = weight.parts["qdata"].device.type
    return weight.in_layout(dispatch.preferred_layout("linear", weight.format, *weight.matrix, device))


RIVALS = ("triton", "eager")  # our own other backends, which a kernel must be worth its place before
HEADLINE = (18432, 3072)  # the shape at which eager is timed, too: it is slow


def rivals(spec: str, drawn: Drawn, l2: int, failures: dict[str, str]) -> Iterator[Entry]:
    """The same linear by our other backends, each with the weight as it wants it."""
    if spec == W4A8 and drawn.rows.is_cuda and dispatch.load("cuda") is None:
        yield _native(drawn, l2)
    for backend in RIVALS:
        if backend == "eager" and tuple(drawn.weight.matrix) != HEADLINE:
            continue
        name = f"lowbit {backend}"
        try:
            with dispatch.use_backend(backend):
                made = ours(spec, drawn, l2)
        except UnsupportedError as error:
            failures.setdefault(name, str(error).splitlines()[0])
            continue
        yield replace(made, name=name, run=_run_with(backend, made.run), kernel=None)


def _run_with(backend: str, run: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    def forced_run(x: Any, weight: Any) -> Tensor:
        with dispatch.use_backend(backend):
            return run(x, weight)

    return forced_run


def ours(spec: str, drawn: Drawn, l2: int) -> Entry:
    """The linear of a format, as anybody calls it: F.linear of x and a quantized weight."""
    if spec == W4A8:
        return _w4a8(drawn, l2)
    fmt, weight = drawn.fmt, packed(drawn.weight)
    count = copies_for(weight.nbytes_stored(), l2)

    def chosen(x: Tensor) -> Kernel:
        return dispatch.select("linear", fmt.name, weight.kernel_layout, x.device.type, (fmt, x, weight.parts, None))

    def check(x: Tensor, y: Tensor) -> float:
        return check_ours(spec, x, y, chosen(x).tolerance, drawn, drawn.rounded if fmt.rounds_input else None)

    weights = [weight, *(weight.map_parts(torch.clone) for _ in range(count - 1))]
    return Entry(spec, F.linear, weights, weight.nbytes_stored(), check, chosen, weight.kernel_layout)


def _w4a8(drawn: Drawn, l2: int) -> Entry:
    group = group_of(drawn.fmt)
    operands = coalesced_int4.operands(coalesced_int4.pack(drawn.fmt, drawn.weight.parts))
    nbytes = sum(part.nbytes for part in operands)

    def chosen(x: Tensor) -> Kernel:
        return dispatch.select(W4A8, dispatch.ANY_FORMAT, "", x.device.type, (x, *operands, None, group))

    def check(x: Tensor, y: Tensor) -> float:
        return check_ours(W4A8, x, y, chosen(x).tolerance, drawn, drawn.rounded_blocks)

    clones = [tuple(part.clone() for part in operands) for _ in range(copies_for(nbytes, l2) - 1)]
    run = partial(_run_w4a8, group)
    return Entry(W4A8, run, [operands, *clones], nbytes, check, chosen, coalesced_int4.TAG)


def _native(drawn: Drawn, l2: int) -> Entry:
    """The product of few tokens with scales as files hold them, [K/g, N]: what the coalesced layout saves."""
    few = importlib.import_module("lowbit.backends.cuda.int4_plain_few")
    launcher = importlib.import_module("lowbit.backends.cuda.int4_plain_mm")
    made, group = _w4a8(drawn, l2), group_of(drawn.fmt)

    def run(x: Tensor, operands: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        if x.shape[0] > few.MOST:
            raise UnsupportedError(f"is for {few.MOST} tokens")
        return launcher.product_of_native(x, *operands, group)

    weights = [(q, scale.t().contiguous(), zero.t().contiguous()) for q, scale, zero in made.weights]
    return replace(made, name="lowbit cuda, scales [K/g, N]", run=run, weights=weights, kernel=None)


def routes(spec: str) -> dict[str, Route]:
    """The ways that a format's linear may go."""
    return {name: route for name, route in ROUTES.items() if spec.startswith(route.only)}


@contextlib.contextmanager
def forced(route: Route) -> Iterator[None]:
    """Within this block the route's backend alone runs, and the constants of kernel files have the route's values.

    Raises `UnsupportedError` for one that is not there: the table of routes has to follow the kernels.
    """
    before = []
    try:
        for module, constants in route.constants.items():
            loaded = importlib.import_module(f"lowbit.backends.{module}")
            for name, value in constants.items():
                if not hasattr(loaded, name):
                    raise UnsupportedError(
                        f"backends.{module} has no {name}; ROUTES in benchmarks/gpu_linears.py is outdated"
                    )
                before.append((loaded, name, getattr(loaded, name)))
                setattr(loaded, name, value)
        with dispatch.use_backend(route.backend):
            yield
    finally:
        for loaded, name, value in reversed(before):
            setattr(loaded, name, value)


def along(route: Route, entry: Entry) -> Callable[[Any, Any], Tensor]:
    """`entry.run` along a route. Raises `UnsupportedError` where the route is not open to it."""

    def run(x: Any, weight: Any) -> Tensor:
        with forced(route):
            return entry.run(x, weight)

    def decode(x: Any, weight: Any) -> Tensor:
        decoded = importlib.import_module("lowbit.backends.triton.decoded_linear")
        if not isinstance(weight, QuantizedTensor):
            raise UnsupportedError("is an op of its own, which is not decoded")
        given = (weight.format, x, weight.parts, None, weight.kernel_layout)
        if (why := decoded.refuses(*given)) is not None:
            raise UnsupportedError(why)
        return decoded.product(*given)

    return decode if route.decodes else run
