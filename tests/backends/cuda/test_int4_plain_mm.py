from __future__ import annotations

import pytest
import torch

from tests.support import cuda_simulator
from tests.support.cpu_linear import activations

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import int4_plain_mm, kernels
from lowbit.backends.gpu import Target, assume
from lowbit.numerics.w4a8 import w4a8_linear


def operands(n: int, k: int, group: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random codes, scales and zero points that need not be integers."""
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    return codes, (torch.rand(n, k // group) + 0.1).to(dtype), (7.5 + torch.randn(n, k // group)).to(dtype)


@pytest.mark.parametrize(("dtype", "scales"), [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32),
])  # fmt: skip
def test_product(dtype, scales, monkeypatch):
    """A simulated GPU gives the reference's product for odd rows, every number of tokens and groups of 32 and more."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    for n, k, m, group in ((9, 64, 1, 32), (17, 1536, 2, 64), (5, 128, 3, 128), (33, 96, 8, 32)):
        weight = operands(n, k, group, scales)
        x = activations(m, k, dtype)
        bias = torch.randn(n).to(dtype) if m % 2 else None
        with assume(Target("cuda", (9, 0))):
            assert int4_plain_mm.refuses(x, *weight, bias, group) is None
            found = int4_plain_mm.int4_plain_mm(x, *weight, bias, group)
        wanted = w4a8_linear(x.float(), *weight, group, None if bias is None else bias.float())
        assert found.dtype == dtype
        half_ulp = torch.finfo(dtype).eps / 2
        atol = 2e-6 * wanted.abs().max().item()
        torch.testing.assert_close(found.float(), wanted, rtol=1.01 * half_ulp, atol=atol)


def test_not_finite(monkeypatch):
    """A NaN or an infinity in x makes the token's results not finite, and no other token's."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    weight = operands(8, 64, 32, torch.float32)
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = torch.randn(3, 64)
        x[1, 40] = bad
        x[2] = 0
        with assume(Target("cuda", (9, 0))):
            found = int4_plain_mm.int4_plain_mm(x, *weight, None, 32)
        assert not found[1].isfinite().any()
        assert found[0].isfinite().all()
        assert torch.equal(found[2], torch.zeros(8))


def test_refusals():
    """What the kernel cannot take is refused in words that name it."""
    weight, x = operands(8, 64, 32, torch.float16), torch.randn(1, 64, dtype=torch.float16)
    with assume(Target("cuda", (9, 0))):
        assert int4_plain_mm.refuses(x, *weight, None, 32) is None
        assert "9 tokens" in int4_plain_mm.refuses(x.expand(9, 64), *weight, None, 32)
        assert "groups of 16" in int4_plain_mm.refuses(x, *weight, None, 16)
        assert "x is float64" in int4_plain_mm.refuses(x.double(), *weight, None, 32)
        assert "bias is float32" in int4_plain_mm.refuses(x, *weight, torch.zeros(8), 32)
        assert "gaps" in int4_plain_mm.refuses(x, weight[0].t().contiguous().t(), *weight[1:], None, 32)
    with assume(Target("cuda", (7, 0))):
        assert "7.0" in int4_plain_mm.refuses(x, *weight, None, 32)
