"""What a forward on a GPU has to survive: CUDA graphs, torch.compile, several streams, and any device index."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from lowbit import QuantizedTensor, dispatch, ops
from lowbit.dispatch import use_backend
from lowbit.formats import parse_spec
from lowbit.layouts import coalesced_int4
from tests.support.cpu_linear import activations, relative_error

pytestmark = pytest.mark.gpu

N, K = 512, 1024
TOKENS = (1, 16, 300)
W4A8 = "int4_plain_mm"
MORE = (
    "fp8_e4m3(granularity=row,activations=fp8)", "fp8_e4m3(granularity=block,activations=fp8)",
    "fp8_e4m3(granularity=row)", "int8(granularity=block)", "int8(granularity=tensor)", "int8(rotation=256)",
    "int8(activations=none)", "wna16(group_size=64,zero_point=true)", "svdquant_w4a4(act_unsigned=True)",
    "nvfp4(row_global_scale=True)",
)  # fmt: skip


def _specs():
    """Every format with a Triton linear by its default spec, the variants above, and the product with int8 blocks."""
    if dispatch.load("triton") is not None:
        return []
    with_linear = {entry.format for entry in dispatch.table() if entry.backend == "triton" and entry.op == "linear"}
    found = [
        *sorted(with_linear - {dispatch.ANY_FORMAT}),
        *(one for one in MORE if parse_spec(one).name in with_linear),
    ]
    named = {entry.op for entry in dispatch.table() if entry.backend == "triton"}
    return [*found, *([W4A8] if W4A8 in named else [])]


SPECS = _specs()
every_linear = pytest.mark.parametrize("spec", SPECS)


@functools.cache
def quantized(spec):
    """The weight in this format, made once."""
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.02
    return QuantizedTensor.quantize(w.bfloat16(), parse_spec(spec))


def linear(spec, device="cuda"):
    """A function of x that multiplies with a weight in this format, on a device."""
    weight = quantized("wna16(group_size=64,zero_point=true)" if spec == W4A8 else spec)
    fmt = weight.format
    if spec == W4A8:
        operands = coalesced_int4.operands(coalesced_int4.pack(fmt, weight.parts))
        operands = tuple(part.to(device) for part in operands)
        return lambda x: ops.int4_plain_mm(x, *operands, group_size=64, layout=coalesced_int4.TAG)
    moved = weight.to(device)
    packed = moved.in_layout(dispatch.preferred_layout("linear", fmt, N, K, "cuda"))
    bias = torch.randn(N, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    return lambda x: F.linear(x, packed, bias)


def tokens(m, seed=1, device="cuda"):
    """Activations [m, K]."""
    return activations(m, K, torch.bfloat16, seed=seed).to(device)


@pytest.fixture(autouse=True)
def _triton_alone():
    """Triton's kernels and no other's, without autograd."""
    with use_backend("triton"), torch.inference_mode():
        yield


def test_there_are_linears():
    """The list of formats is not empty: a table that lost its kernels would pass every test below."""
    assert len(SPECS) >= 5


@every_linear
@pytest.mark.parametrize("m", TOKENS)
def test_a_graph_replays_with_new_input(spec, m):
    """Captured after a warm-up and replayed with other tokens, a linear gives the bits of a plain call."""
    run, x, other = linear(spec), tokens(m), tokens(m, seed=2)
    wanted = run(other)
    run(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x)
    x.copy_(other)
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)


@every_linear
def test_a_graph_of_a_shape_never_seen(spec):
    """Captured without a warm-up of that shape, the first config runs: the result is right within rounding."""
    run, x = linear(spec), tokens(1)
    run(tokens(300))  # compiles what does not depend on the number of tokens, and loads the library
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x)
    graph.replay()
    torch.cuda.synchronize()
    assert relative_error(out, run(x).double()) < 5e-3


@every_linear
def test_compiled_whole(spec):
    """torch.compile(fullgraph=True) gives the eager result, with no graph break."""
    torch.compiler.reset()
    run, x = linear(spec), tokens(16)
    wanted = run(x * 2) + 1
    compiled = torch.compile(lambda x: run(x * 2) + 1, fullgraph=True, dynamic=False)
    assert relative_error(compiled(x), wanted.double()) < 5e-3
    torch.compiler.reset()


@pytest.mark.parametrize("spec", SPECS[:3])
def test_compiled_with_most_autotuning(spec):
    """mode="max-autotune", which captures CUDA graphs itself, gives the eager result, again and again."""
    torch.compiler.reset()
    run, x = linear(spec), tokens(16)
    wanted = run(x)
    compiled = torch.compile(run, fullgraph=True, mode="max-autotune")
    for _ in range(4):
        assert relative_error(compiled(x).clone(), wanted.double()) < 5e-3
    torch.compiler.reset()


@every_linear
def test_two_streams_at_once(spec):
    """Two linears that run side by side on two streams give what each gives alone."""
    runs = [linear(spec), linear(spec)]
    xs = [tokens(m, seed=m) for m in (300, 16)]
    wanted = [run(x) for run, x in zip(runs, xs, strict=True)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found = [[], []]
    for _ in range(10):
        for stream, run, x, many in zip(streams, runs, xs, found, strict=True):
            with torch.cuda.stream(stream):
                many.append(run(x))
    torch.cuda.synchronize()
    for many, right in zip(found, wanted, strict=True):
        assert all(torch.equal(one, right) for one in many)


@every_linear
@pytest.mark.parametrize("m", TOKENS)
def test_results_repeat(spec, m):
    """Every call gives the same bits, in memory that was NaN before, and they are finite."""
    run, x = linear(spec), tokens(m)
    first = run(x)
    assert torch.isfinite(first).all()
    for _ in range(5):
        assert torch.equal(run(x), first)


@every_linear
def test_nothing_waits_for_the_device(spec):
    """A forward neither copies to the host nor waits: PyTorch's own guard raises where one does."""
    run, x = linear(spec), tokens(16)
    run(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_linear
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_device_than_the_current_one(spec):
    """On cuda:1, while cuda:0 is current, a linear gives the bits that it gives on cuda:0."""
    wanted = linear(spec, "cuda:0")(tokens(16, device="cuda:0"))
    found = linear(spec, "cuda:1")(tokens(16, device="cuda:1"))
    assert found.device == torch.device("cuda:1")
    assert torch.equal(found.cpu(), wanted.cpu())
