from __future__ import annotations

import pytest
import torch

from lowbit.backends.eager import svdquant as eager
from lowbit.layouts import svdquant_tiles as tiles
from tests.support import cuda_simulator

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import kernels, scaled_mm_svdquant_w4a4 as cuda
from lowbit.backends.gpu import Target, assume

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def _operands(m: int, n: int, k: int, rank: int, dtype: torch.dtype, tiled: bool):
    """act, wgt, ascales, wscales, lora_act_in, lora_up and bias of the op."""
    torch.manual_seed(m + n + k)
    act, wgt = (torch.randint(-128, 128, (rows, k // 2), dtype=torch.int8) for rows in (m, n))
    ascales, wscales = (torch.rand(k // 64, m) + 0.1).to(dtype), (torch.randn(k // 64, n) / 8).to(dtype)
    low, up, bias = torch.randn(m, rank), torch.randn(n, rank).to(dtype), torch.randn(n).to(dtype)
    if tiled:
        wgt, count = tiles.tile_rows(wgt), n // tiles.ROWS
        wscales = wscales.view(-1, count, tiles.ROWS).transpose(0, 1).contiguous()
        up = up.view(count, tiles.ROWS, rank).transpose(1, 2).contiguous()
    return act, wgt, ascales, wscales, low, up, bias


@pytest.mark.parametrize(
    ("m", "n", "k", "rank", "dtype", "unsigned", "tiled"),
    [
        (3, 70, 192, 16, BF16, False, False),
        (17, 65, 64, 40, F16, True, False),
        (5, 128, 128, 32, BF16, True, True),
        (2, 3, 128, 5, F32, False, False),
    ],
)
@pytest.mark.parametrize("capability", [(8, 0), (12, 0)], ids=["int4", "int8"])
def test_op(m, n, k, rank, dtype, unsigned, tiled, capability, monkeypatch):
    """Simulated products of int4 and of int8 give eager's results in float32, rounded once."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    *operands, bias = _operands(m, n, k, rank, dtype, tiled)
    with assume(Target("cuda", capability)):
        assert cuda.refuses(*operands, bias, unsigned) is None
        found = cuda.scaled_mm_svdquant_w4a4(*operands, bias, unsigned)
    *others, up = operands
    wanted = eager.scaled_mm_svdquant_w4a4(*others, up.float(), bias.float(), unsigned).double()
    assert (found.shape, found.dtype) == (wanted.shape, dtype)
    half_ulp = 0 if dtype == F32 else torch.finfo(dtype).eps / 2
    torch.testing.assert_close(found.double(), wanted, rtol=1.01 * half_ulp, atol=1e-6 * wanted.abs().max().item())


def test_nothing_to_do(monkeypatch):
    """No tokens give an empty result without a launch."""
    monkeypatch.setattr(kernels, "launch", lambda *_, **__: pytest.fail("launched"))
    with assume(Target("cuda", (8, 0))):
        assert cuda.scaled_mm_svdquant_w4a4(*_operands(0, 16, 64, 4, BF16, False), False).shape == (0, 16)


def test_refusals():
    """What the kernels cannot take is refused in words that name it."""
    act, wgt, ascales, wscales, low, up, bias = _operands(2, 16, 64, 4, BF16, False)
    with assume(Target("cuda", (8, 9))):
        assert cuda.refuses(act, wgt, ascales, wscales, low, up, bias, False) is None
        assert "ascales is float64" in cuda.refuses(act, wgt, ascales.double(), wscales, low, up, bias, False)
        assert "wgt is on meta" in cuda.refuses(act, wgt.to("meta"), ascales, wscales, low, up, bias, False)
        none = act[:, :0], wgt[:, :0], ascales[:0], wscales[:0], low, up, None, False
        assert "0 columns" in cuda.refuses(*none)
    with assume(Target("cuda", (7, 5))):
        assert "7.5" in cuda.refuses(act, wgt, ascales, wscales, low, up, bias, False)
    with assume(Target("hip")):
        assert "NVIDIA" in cuda.refuses(act, wgt, ascales, wscales, low, up, bias, False)
