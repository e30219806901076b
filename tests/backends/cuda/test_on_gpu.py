"""Whole linears of the backend on tensors of a GPU: what launching there adds to the kernels that other tests run."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit import QuantizedTensor, dispatch, ops
from lowbit.dispatch import use_backend
from lowbit.formats import parse_spec
from lowbit.layouts import coalesced_int4
from lowbit.numerics import rotations
from tests.support.cpu_linear import activations, relative_error

pytestmark = pytest.mark.gpu

DEVICE, BACKEND = "cuda", "cuda"
N, K = 528, 1280  # rows that fill no tile
W4A8, W4A8_FORMAT = "int4_plain_mm", "wna16(group_size=64,zero_point=true)"
FEW = (1, 3, 8)
ALL = (*FEW, 9, 17, 64, 130, 300, 2100)
PYTORCH = 256  # tokens from which decoded weights may go to PyTorch's product, whose bits are its own affair
CASES = {
    **dict.fromkeys(("awq_w4a16", "wna16", "wna16(group_size=32)", "nvfp4", "mxfp4"), ALL),
    **dict.fromkeys(("svdquant_w4a4", "svdquant_w4a4(act_unsigned=True)", W4A8), ALL),
    **dict.fromkeys(("int8", "int8(rotation=256)", "int8(activations=none)"), FEW),  # more tokens are Triton's
}
every_linear = pytest.mark.parametrize("spec", CASES)
every_call = pytest.mark.parametrize(("spec", "m"), [(spec, m) for spec, many in CASES.items() for m in many])


@functools.cache
def quantized(spec):
    """The weight in this format, made once."""
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.02
    return QuantizedTensor.quantize(w.bfloat16(), parse_spec(W4A8_FORMAT if spec == W4A8 else spec))


def linear(spec, backend=BACKEND, device=DEVICE):
    """A function of x that multiplies with a weight in this format, by one backend."""
    weight = quantized(spec).to(device)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    with use_backend(backend):
        if spec == W4A8:
            operands = coalesced_int4.operands(coalesced_int4.pack(weight.format, weight.parts))
            call = functools.partial(ops.int4_plain_mm, group_size=64, layout=coalesced_int4.TAG)
            return lambda x: _run(backend, lambda: call(x, *operands, bias))
        packed = weight.in_layout(dispatch.preferred_layout("linear", weight.format, N, K, device))
    return lambda x: _run(backend, lambda: F.linear(x, packed, bias))


def _run(backend, call):
    with use_backend(backend), torch.inference_mode():
        return call()


def tokens(m, seed=1):
    """Activations [m, K]."""
    return activations(m, K, torch.bfloat16, seed=seed).to(DEVICE)


@every_call
def test_right(spec, m):
    """Results are eager's on a CPU within rounding, the same bits every time, and wherever x begins."""
    run, x = linear(spec), tokens(m)
    found = run(x)
    assert relative_error(found.cpu(), linear(spec, "eager", "cpu")(x.cpu()).double()) < 5e-3
    shifted = torch.zeros(m * K + 1, dtype=x.dtype, device=DEVICE)[1:].view(m, K)
    shifted.copy_(x)
    for again in (x, shifted, x.t().contiguous().t()):
        assert torch.equal(run(again), found)


@every_call
def test_a_graph_of_a_shape_never_seen(spec, m):
    """Kernels may be compiled and loaded while a graph is captured; replayed, it gives what plain calls give."""
    run, x, other = linear(spec), tokens(m), tokens(m, seed=2)
    run(tokens(CASES[spec][-1]))  # what is found out once on a GPU
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x)
    for given in (x.clone(), other):
        x.copy_(given)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        wanted = run(given)
        assert torch.equal(out, wanted) if m < PYTORCH else relative_error(out, wanted.double()) < 5e-3


@every_linear
def test_two_streams_at_once(spec):
    """Two linears that run side by side on two streams give what each gives alone."""
    runs, xs = [linear(spec), linear(spec)], [tokens(m, seed=m) for m in CASES[spec][1:3]]
    wanted = [run(x) for run, x in zip(runs, xs, strict=True)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found = []
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found.append((runs[i](xs[i]), wanted[i]))
    torch.cuda.synchronize()
    assert all(torch.equal(one, right) for one, right in found)


@every_linear
def test_another_thread(spec):
    """A thread that has not used the GPU before launches there, too."""
    run, x, found = linear(spec), tokens(8), []
    wanted = run(x)
    thread = threading.Thread(target=lambda: found.append(run(x)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], wanted)


@every_linear
def test_nothing_waits_for_the_device(spec):
    """A forward neither copies to the host nor waits: PyTorch's own guard raises where one does."""
    run, x = linear(spec), tokens(8)
    run(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_constant_that_a_capture_needs_first():
    """It is no part of the graph: it has its values before that runs, and the graph reads it."""
    x = torch.randn(64, 256, device=DEVICE)
    x @ x.T  # loads what products need
    rotations._hadamard_on.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rotations.rotate_groups(x, 16)
    at_once = rotations.rotate_groups(x, 16)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(at_once.cpu(), rotations.rotate_groups(x.cpu(), 16))
    torch.testing.assert_close(captured, at_once)
