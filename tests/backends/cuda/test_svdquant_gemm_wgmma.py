from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.support import cuda_simulator

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import compiler, kernels, svdquant_gemm_wgmma
from lowbit.backends.gpu import Target, assume
from lowbit.layouts import svdquant_fragments
from lowbit.numerics.groups import round_up

GROUP = 64


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [N, K/2] -> codes [N, K]: the even column in the low nibble, two's complement."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).int()
    return (codes ^ 8) - 8


def _swizzled(codes: torch.Tensor) -> torch.Tensor:
    """Codes [Mp, K] -> int8 [K/64, Mp, 64], byte by byte as the storage is described."""
    padded, k = codes.shape
    out = torch.empty((k // GROUP, padded, GROUP), dtype=torch.int8)
    for m in range(padded):
        for c in range(GROUP):
            b = c % 2 * 32 + c // 2
            out[:, m, (b // 16 ^ m // 2 % 4) * 16 + b % 16] = codes[m, c::GROUP].to(torch.int8)
    return out


def _call(m, n, k, rank, dtype, scale_dtype, *, unsigned=False, low_splits=2, biased=True):
    """The arguments of a product, and its result in float64."""
    torch.manual_seed(m + n + k + rank)
    padded = round_up(m, svdquant_gemm_wgmma.TOKENS_MULTIPLE)
    codes = torch.randint(0, 16, (padded, k)) if unsigned else torch.randint(-8, 8, (padded, k))
    scale = torch.rand(k // GROUP, padded) + 0.1
    codes[m:], scale[:, m:] = 0, 0
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    weight_scale = (torch.randn(k // GROUP, n) / 8).to(scale_dtype)
    low, up = torch.randn(low_splits, padded, rank), torch.randn(n, rank).to(dtype)
    bias = torch.randn(n).to(dtype) if biased else None
    parts = svdquant_fragments.pack(None, {"qdata": packed, "scale": weight_scale})
    weight = _nibbles(packed).double() * weight_scale.double().t().repeat_interleave(GROUP, 1)
    x = codes[:m].double() * scale[:, :m].double().t().repeat_interleave(GROUP, 1)
    wanted = x @ weight.t() + low.sum(0)[:m].double() @ up.double().t() + (0 if bias is None else bias.double())
    return (_swizzled(codes), scale, low, parts["qdata"], weight_scale, up, bias), wanted


def _product(arguments, wanted, dtype):
    """The simulated product, in memory that holds no numbers before."""
    out = torch.full(wanted.shape, torch.nan, dtype=dtype)
    with assume(Target("cuda", (9, 0))):
        svdquant_gemm_wgmma.product(*arguments, out)
    return out


def _check(found, wanted):
    """One rounding, and what 23 bits of the low rank and float32 sums lose."""
    half_ulp = torch.finfo(found.dtype).eps / 2
    torch.testing.assert_close(found.double(), wanted, rtol=1.01 * half_ulp, atol=2e-5 * wanted.abs().max().item())


def _only(monkeypatch, tokens, splits, **changes):
    """Every call is cut up like this."""
    tile = next(one for one in svdquant_gemm_wgmma._TILES if one.tokens == tokens)
    plan = svdquant_gemm_wgmma._Plan(dataclasses.replace(tile, **changes), splits)
    monkeypatch.setattr(svdquant_gemm_wgmma, "_plan", lambda *_: plan)


@pytest.mark.parametrize(
    ("tokens", "splits", "m", "n", "k", "rank", "dtype", "scale_dtype", "unsigned"),
    [
        (8, 1, 1, 17, 64, 16, torch.bfloat16, torch.bfloat16, False),
        (8, 2, 11, 80, 640, 33, torch.float16, torch.float32, True),
        (16, 3, 16, 72, 960, 32, torch.bfloat16, torch.bfloat16, False),
        (32, 1, 21, 131, 320, 0, torch.float16, torch.float16, False),
        (64, 1, 64, 200, 192, 32, torch.bfloat16, torch.bfloat16, True),
        (64, 1, 5, 77, 256, 40, torch.float16, torch.float32, False),
        (64, 2, 19, 65, 256, 7, torch.bfloat16, torch.float16, True),
        (64, 1, 33, 64, 64, 0, torch.bfloat16, torch.bfloat16, False),
    ],
)
def test_product(tokens, splits, m, n, k, rank, dtype, scale_dtype, unsigned, monkeypatch):
    """A simulated GPU gives the whole linear, rounded once, for every tile, odd sizes, ranks and dtypes."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    _only(monkeypatch, tokens, splits)
    arguments, wanted = _call(m, n, k, rank, dtype, scale_dtype, unsigned=unsigned, biased=m != 5)
    _check(_product(arguments, wanted, dtype), wanted)
