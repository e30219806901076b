"""Our linears on a GPU as the dispatch table chooses them, on weights whose right results are known.

Weights are those of `cpu_linears`: rows drawn from a few hundred that were quantized, moved to the GPU and packed there
as loading packs them.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cpu_linears import W4A8, W4A8_FORMAT, Drawn, Entry, _run_w4a8, check_ours, group_of
from benchmarks.gpu_timing import copies_for
from lowbit import QuantizedTensor, dispatch
from lowbit.dispatch import Kernel
from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import parse_spec
from lowbit.layouts import coalesced_int4

FP8_ROW = "fp8_e4m3(granularity=row,activations=fp8)"
# The most important first: what the budget leaves no time for is at the end.
SPECS = (
    "svdquant_w4a4", "awq_w4a16", "int8", FP8_ROW, "nvfp4", "fp8_e4m3(granularity=row)", "mxfp4", "mxfp8", W4A8,
)  # fmt: skip
HUGE = 1 << 62
# By format, the routes that a launcher takes by the number of tokens: the constants of kernel files that force each.
Route = Mapping[str, Mapping[str, int]]
ROUTES: dict[str, dict[str, Route]] = {}


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


@contextlib.contextmanager
def forced(route: Route) -> Iterator[None]:
    """Within this block the constants of kernel files have these values.

    Raises `UnsupportedError` for one that is not there: the table of routes has to follow the kernels.
    """
    before = []
    try:
        for module, constants in route.items():
            loaded = importlib.import_module(f"lowbit.backends.triton.{module}")
            for name, value in constants.items():
                if not hasattr(loaded, name):
                    raise UnsupportedError(
                        f"{module}.py has no {name}; ROUTES in benchmarks/gpu_linears.py is outdated"
                    )
                before.append((loaded, name, getattr(loaded, name)))
                setattr(loaded, name, value)
        yield
    finally:
        for loaded, name, value in reversed(before):
            setattr(loaded, name, value)
