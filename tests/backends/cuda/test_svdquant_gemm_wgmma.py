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


CASES = {
    "8 tokens, split": (8, 2, 2, 11, 80, 1216, 33, torch.float16, torch.float32, True),
    "16 tokens": (16, 2, 1, 16, 72, 960, 32, torch.bfloat16, torch.bfloat16, False),
    "64 tokens": (64, 2, 1, 5, 77, 448, 40, torch.float16, torch.float32, False),
    "64 tokens, split": (64, 2, 2, 69, 135, 576, 7, torch.bfloat16, torch.float16, True),
    "128 tokens": (128, 3, 1, 70, 72, 448, 32, torch.bfloat16, torch.bfloat16, True),
    "256 tokens": (256, 4, 1, 200, 40, 576, 64, torch.bfloat16, torch.bfloat16, False),
}
"""Tokens of a tile, slots of the ring (few, so that it goes round), splits, then what `_call` takes."""


@pytest.mark.parametrize("name", CASES)
def test_product(name, monkeypatch):
    """A simulated GPU gives the whole linear, rounded once, for odd sizes, ranks and dtypes, whatever comes first."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    tokens, slots, splits, m, n, k, rank, dtype, scale_dtype, unsigned = CASES[name]
    _only(monkeypatch, tokens, splits, slots=slots)
    arguments, wanted = _call(m, n, k, rank, dtype, scale_dtype, unsigned=unsigned, biased=m != 5)
    found = []
    for seed in "12" if tokens < 128 else "3":
        monkeypatch.setenv("LOWBIT_SIMULATOR_SEED", seed)
        found.append(_product(arguments, wanted, dtype))
        _check(found[-1], wanted)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 64), (64, 128, 64), (3, 129, 128), (65, 64, 192)])
def test_few_groups(m, n, k, monkeypatch):
    """One group, two and three, one row, and a tile that is full give the linear without a low rank and a bias."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    _only(monkeypatch, 64, 1)
    arguments, wanted = _call(m, n, k, 0, torch.float16, torch.float32, low_splits=1, biased=False)
    _check(_product(arguments, wanted, torch.float16), wanted)


def test_extreme_low_rank(monkeypatch):
    """float16 keeps the low rank of tokens whose sums are beyond its range or under it; infinity stays in its token."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    _only(monkeypatch, 64, 1)
    (codes, scale, low, weight, weight_scale, up, _), _ = _call(5, 77, 256, 40, torch.float16, torch.float32)
    sizes = torch.tensor([1e6, 1.0, 1e-3, 1e8, 0.0])
    low[:, :5] *= sizes[:, None]
    up = (up * 1e-3).half()
    arguments = (codes, torch.zeros_like(scale), low, weight, weight_scale, up, None)
    wanted = low.sum(0)[:5].double() @ up.double().t()
    found = _product(arguments, wanted, torch.float16).double()
    reached = wanted.abs() < 60000
    assert reached[3].logical_not().any()  # the row of 1e8 is too large for the result, too
    for token in range(5):
        inside = reached[token]
        error = (found[token] - wanted[token])[inside].abs()
        half_ulp = torch.finfo(torch.float16).eps / 2 * wanted[token][inside].abs()
        assert (error <= half_ulp + 2.0**-25 + 2e-6 * wanted[token].abs().max()).all()
    low[0, 1, 3] = torch.inf
    found_too = _product(arguments, wanted, torch.float16)
    assert not found_too[1].isfinite().any()
    assert torch.equal(found_too[0], found[0].half())


def test_nothing_to_do(monkeypatch):
    """No tokens, or no rows, are no launch: a grid of no blocks is an error."""
    monkeypatch.setattr(kernels, "launch", lambda *_: pytest.fail("launched"))
    arguments, _ = _call(16, 64, 64, 8, torch.float16, torch.float16)
    with assume(Target("cuda", (9, 0))):
        svdquant_gemm_wgmma.product(*arguments, torch.empty(0, 64).half())
        svdquant_gemm_wgmma.product(*arguments, torch.empty(16, 0).half())


def test_memory_that_begins_anywhere(monkeypatch):
    """Bulk copies want multiples of 16 bytes: what begins elsewhere is copied first, the rest is not."""
    seen = []
    monkeypatch.setattr(kernels, "launch", lambda *given, **_: seen.append(given))
    arguments, _ = _call(16, 64, 64, 8, torch.float16, torch.float16)
    room = torch.zeros(arguments[0].numel() + 4, dtype=torch.int8)
    codes = room[4:].view(arguments[0].shape)
    with assume(Target("cuda", (9, 0))):
        svdquant_gemm_wgmma.product(codes, *arguments[1:], torch.empty(16, 64).half())
    given = next(one[5] for one in seen if "svdquant_product" in one[1])
    assert given[0].data_ptr() % 16 == 0
    assert given[2].data_ptr() == arguments[3].data_ptr()


def test_refusals():
    """Sizes that the kernel cannot take are refused in words that name them."""
    assert svdquant_gemm_wgmma.refuses_product(1, 1, 64, 0) is None
    assert "96 columns" in svdquant_gemm_wgmma.refuses_product(1, 64, 96, 16)
    assert "0 columns" in svdquant_gemm_wgmma.refuses_product(1, 64, 0, 16)
    assert "tokens" in svdquant_gemm_wgmma.refuses_product(1 << 24, 64, 64, 16)
    assert "rows" in svdquant_gemm_wgmma.refuses_product(1, 1 << 24, 64, 16)


@pytest.mark.parametrize("processors", [1, 78, 132])
def test_plans(processors):
    """Every size gets a tile with room for it, shared memory that a block can have, and groups for every split."""
    for m in (1, 8, 9, 16, 17, 64, 65, 256, 4096, 100_000):
        for n in (1, 64, 3072, 12288):
            for groups in (1, 7, 48, 192):
                plan = svdquant_gemm_wgmma._plan(m, n, groups, processors)
                assert 1 <= plan.splits <= groups
                assert plan.tile.tokens >= min(m, 64)
                assert plan.tile.shared(torch.float32) * plan.tile.resident <= 227 * 1024
                assert not plan.whole or plan.tile.tokens >= 64


def test_grids(monkeypatch):
    """However many tokens there are, and whatever a tile is thought to cost, no grid is larger than it can be."""
    svdquant_gemm_wgmma._plan.cache_clear()
    monkeypatch.setattr(svdquant_gemm_wgmma, "_cycles", lambda plan, *_: plan.tile.tokens - plan.splits)
    for m in (64, 65535 * 16, 65535 * 16 + 1, 65535 * 64 + 1, svdquant_gemm_wgmma._MOST_TOKENS):
        plan = svdquant_gemm_wgmma._plan(m, 64, 48, 132)
        assert -(-m // plan.tile.tokens) <= 65535
        assert plan.whole or -(-m // 16) <= 65535
        assert plan.splits > 1 or m > 65535 * 16
    svdquant_gemm_wgmma._plan.cache_clear()


def _launches(m, n, k, rank, dtype, scale_dtype):
    """The launches of a product of these sizes on an H200."""
    padded, groups = round_up(m, svdquant_gemm_wgmma.TOKENS_MULTIPLE), k // GROUP
    with assume(Target("cuda", (9, 0))), kernels.record() as launches:
        svdquant_gemm_wgmma.product(
            torch.empty((groups, padded, GROUP), dtype=torch.int8, device="meta"),
            torch.empty((groups, padded), device="meta"),
            torch.empty((1, padded, rank), device="meta"),
            torch.empty((-(-n // 64), groups, 4, 32, 16), dtype=torch.uint8, device="meta"),
            torch.empty((groups, n), dtype=scale_dtype, device="meta"),
            torch.empty((n, rank), dtype=dtype, device="meta"),
            torch.empty(n, dtype=dtype, device="meta"),
            torch.empty((m, n), dtype=dtype, device="meta"),
        )  # fmt: skip
    return launches


@pytest.mark.parametrize(
    ("m", "dtype", "scale_dtype"),
    [
        (1, torch.bfloat16, torch.bfloat16),
        (32, torch.float16, torch.float32),
        (64, torch.bfloat16, torch.bfloat16),
        (640, torch.bfloat16, torch.float32),
        (4096, torch.float16, torch.float16),
        (4096, torch.bfloat16, torch.bfloat16),
    ],
)
def test_compiles(m, dtype, scale_dtype):
    """What is launched compiles for Hopper without a warning, a spill, or products that are made to wait."""
    # Compilers before 13.4 put a few registers aside once a block, between the groups and the low rank.
    aside = 64 if tuple(map(int, compiler.nvrtc_version().split("."))) < (13, 4) else 0
    launches = _launches(m, 3072, 3072, 128, dtype, scale_dtype)
    assert len(launches) == 2
    for launch in launches:
        binary = compiler.compile_now(launch.source, launch.name, "sm_90a")
        assert not binary.warnings
        assert binary.spills <= aside
        assert "Potential Performance Loss" not in binary.log  # the assembler's notes on serialized products


def test_every_tile_compiles(monkeypatch):
    """The largest tiles compile as well when their sums are finished elsewhere, with the registers that there are."""
    for tokens in (128, 256):
        _only(monkeypatch, tokens, 2)
        main, _ = _launches(512, 3072, 3072, 128, torch.bfloat16, torch.bfloat16)
        binary = compiler.compile_now(main.source, main.name, "sm_90a")
        assert not binary.spills
        assert "Potential Performance Loss" not in binary.log  # serialized products, registers that are not handed out
        assert binary.registers == 168  # what the kernel hands out among its warps: with fewer they would wait for ever
