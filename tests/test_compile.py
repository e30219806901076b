"""Quantized weights under torch.compile and torch.export."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowbit
from lowbit import QuantizedTensor
from tests.support import gaussian, sqnr

SPEC = "fp8_e4m3(granularity=row)"

COMPILED = {
    "mm": lambda x, w: x @ w.t(),
    "addmm": lambda x, w: torch.addmm(torch.ones(48), x, w.t(), beta=0.5, alpha=2.0),
    "left": lambda x, w: w @ x.t(),
    "dequantize": lambda _, w: w.dequantize() + 0,
    "rows": lambda x, w: F.linear(x, w[3:9]),
    "bank": lambda x, w: torch.bmm(x.expand(4, 3, 64), w.view(4, 12, 64).transpose(1, 2)),
    "to": lambda x, w: F.linear(x.bfloat16(), w.to(torch.bfloat16)),
    "cat": lambda x, w: F.linear(x, torch.cat([w[:16], w[16:]])),
    "embedding": lambda _, w: F.embedding(torch.tensor([[1, 47]]), w),
}


@pytest.mark.parametrize("name", COMPILED)
def test_operations_compile_without_graph_breaks(name):
    """Products, views and lookups inside one compiled function give the eager result."""
    w, x = QuantizedTensor.quantize(gaussian(48, 64, seed=1), SPEC), torch.randn(3, 64)
    expected = COMPILED[name](x, w)

    found = torch.compile(COMPILED[name], fullgraph=True, backend="aot_eager")(x, w)

    assert found.dtype == expected.dtype
    assert sqnr(expected, found) > 45
    torch.compiler.reset()


@pytest.mark.parametrize("spec", [SPEC, "nvfp4", "svdquant_w4a4(rank=8)"])
def test_a_dynamic_batch_compiles_once(spec):
    """With the batch marked dynamic, other batch sizes need no new compilation."""
    layer = nn.Linear(64, 48)
    lowbit.quantize_(layer, spec)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    first = torch.randn(3, 64)
    torch._dynamo.mark_dynamic(first, 0)
    compiled(first)

    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (2, 5, 17):
            x = torch.randn(batch, 64)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.slow
def test_the_default_compiler_backend(tmp_path, monkeypatch):
    """Inductor compiles quantized layers in one graph, with gradients."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 64))
    lowbit.quantize_(model, SPEC)
    x = torch.randn(3, 64, requires_grad=True)
    expected = model(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)

    found = torch.compile(model, fullgraph=True)(x)

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x)[0], gradient, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


def test_export_keeps_the_op():
    """torch.export gives a program that still holds lowbit's linear and computes the same."""

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 48)

        def forward(self, x):
            return self.layer(x)

    model = Wrapper()
    lowbit.quantize_(model, SPEC)
    x = torch.randn(3, 64)

    program = torch.export.export(model, (x,))

    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", ["nvfp4", "svdquant_w4a4(rank=8)"])
def test_rows_of_one_weight_are_joined_while_tracing(spec):
    """Pieces that share their global parts by identity are joined without comparing values, which tracing has not."""
    w, x = QuantizedTensor.quantize(gaussian(48, 64, seed=1), spec), torch.randn(3, 64)

    found = torch.compile(lambda x, w: F.linear(x, torch.cat([w[:16], w[16:]])), fullgraph=True, backend="aot_eager")(
        x, w
    )

    assert sqnr(F.linear(x, w), found) > 90
    torch.compiler.reset()
