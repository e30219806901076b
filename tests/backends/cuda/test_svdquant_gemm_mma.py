from __future__ import annotations

import pytest
import torch

from tests.support import cuda_simulator

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import compiler, kernels, svdquant_gemm_mma
from lowbit.backends.gpu import Target, assume
from lowbit.layouts import svdquant_fragments, svdquant_tiles
from lowbit.numerics.groups import round_up
from lowbit.numerics.int4_matmul import GROUP, unpack_codes

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INT4, INT8 = "fragments4", "fragments8"
WHOLE = 2e-6  # of the largest result: what float32 sums may differ by, cut off as tensor cores do
ARCHITECTURES = {"sm_80": (8, 0), "sm_90a": (9, 0), "sm_120a": (12, 0)}


def _stored(codes: torch.Tensor, storage: str) -> torch.Tensor:
    """Codes [Mp, K] in a storage, code by code as it is described."""
    padded, k = codes.shape
    m, c = torch.meshgrid(torch.arange(padded), torch.arange(GROUP), indexing="ij")
    groups = codes.view(padded, k // GROUP, GROUP).transpose(0, 1).int()
    if storage == INT4:
        at = m // 16 * 512 + (m % 8 * 4 + c // 8 % 4) * 16 + m % 16 // 8 * 8 + c // 32 * 4 + c % 8 // 2
        out = torch.zeros((k // GROUP, padded * 32), dtype=torch.int32)
        out[:, at[:, ::2]] = groups[..., ::2] & 15 | (groups[..., 1::2] & 15) << 4
    else:
        s = c // 2
        out = torch.zeros((k // GROUP, padded * 64), dtype=torch.int32)
        out[:, m // 8 * 512 + (m % 8 * 4 + s % 16 // 4) * 16 + (c % 2 * 2 + s // 16) * 4 + s % 4] = groups
    return out.to(torch.uint8).view(torch.int8).view(k // GROUP, -1, 512)


def _tiled(qdata, scale, up):
    n, rank = up.shape
    tiles = scale.view(-1, n // 128, 128).transpose(0, 1).contiguous()
    return svdquant_tiles.tile_rows(qdata), tiles, up.view(n // 128, 128, rank).transpose(1, 2).contiguous()


def _check(
    monkeypatch, m, n, k, rank, tile, *, storage=INT8, dtype=F32, parts=None, bias=F32, unsigned=False,
    arrangement="fragments", splits=1, lows=2,
):  # fmt: skip
    """A simulated product by a given tile is the exact one, in memory that holds no numbers before."""
    torch.manual_seed(m + n + k + rank)
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    plan = svdquant_gemm_mma._Plan(next(one for one in svdquant_gemm_mma._TILES if one.tokens == tile), splits)
    monkeypatch.setattr(svdquant_gemm_mma, "_plan", lambda *_: plan)
    padded, parts = round_up(m, svdquant_gemm_mma.TOKENS_MULTIPLE), parts or dtype
    codes = torch.randint(0, 16, (padded, k)) if unsigned else torch.randint(-8, 8, (padded, k))
    scale = torch.rand(k // GROUP, padded) + 0.1
    codes[m:], scale[:, m:] = 0, 0
    qdata = torch.randint(-128, 128, (n, k // 2), dtype=torch.int8)
    row_scale, up = (torch.randn(k // GROUP, n) / 8).to(parts), torch.randn(n, rank).to(parts)
    low = torch.randn(lows, padded, rank)
    added = None if bias is None else torch.randn(n).to(bias)
    x = codes[:m].double() * scale[:, :m].double().t().repeat_interleave(GROUP, 1)
    weight = unpack_codes(qdata, unsigned=False).double() * row_scale.double().t().repeat_interleave(GROUP, 1)
    wanted = x @ weight.t() + low.double().sum(0)[:m] @ up.double().t()
    wanted += 0 if added is None else added.double()
    operands = {
        "fragments": lambda: (svdquant_fragments.pack(None, {"qdata": qdata})["qdata"], row_scale, up),
        "plain": lambda: (qdata, row_scale, up),
        "tiles": lambda: _tiled(qdata, row_scale, up),
    }[arrangement]()
    out = torch.full((m, n), torch.nan, dtype=dtype)
    with assume(Target("cuda", (12, 0))):
        svdquant_gemm_mma.product(
            _stored(codes, storage), scale, low, *operands, added, out, storage=storage, unsigned=unsigned
        )
    half_ulp = 0 if dtype == F32 else torch.finfo(dtype).eps / 2
    largest = wanted.abs().max().item()
    torch.testing.assert_close(out.double(), wanted, rtol=1.01 * half_ulp, atol=WHOLE * largest)


@pytest.mark.parametrize(
    ("m", "n", "k", "rank", "tile"),
    [
        (1, 1, 64, 16, 16),
        (5, 70, 192, 32, 16),
        (16, 67, 640, 40, 16),
        (33, 72, 576, 5, 32),
        (50, 72, 384, 33, 64),
        (131, 72, 576, 16, 128),
    ],
)
@pytest.mark.parametrize("storage", [INT4, INT8])
def test_product(m, n, k, rank, tile, storage, monkeypatch):
    """Whatever the tile, tokens, rows, groups and ranks that fill none of its blocks give the exact product."""
    _check(monkeypatch, m, n, k, rank, tile, storage=storage)


@pytest.mark.parametrize("seed", ["2", "3", "4"])
@pytest.mark.parametrize(("tile", "m", "storage"), [(16, 9, INT8), (64, 40, INT4)])
def test_order_of_threads(tile, m, storage, seed, monkeypatch):
    """Whichever thread is first, and however late copies land: more steps than are held, and a rank of two pieces."""
    monkeypatch.setenv("LOWBIT_SIMULATOR_SEED", seed)
    _check(monkeypatch, m, 72, 704, 40, tile, storage=storage)


@pytest.mark.parametrize("storage", [INT4, INT8])
@pytest.mark.parametrize("unsigned", [False, True])
def test_largest_sums(storage, unsigned, monkeypatch):
    """Codes at both ends of their range, in every column, stay within what a sum is offset by."""
    for lowest in (-8, 7):
        codes = torch.full((16, 64), 15 if unsigned else -8)
        qdata = torch.full((64, 32), (lowest & 15) * 17 - (256 if lowest < 0 else 0), dtype=torch.int8)
        monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
        out = torch.empty(16, 64)
        ones = torch.ones(1, 64)
        with assume(Target("cuda", (12, 0))):
            svdquant_gemm_mma.product(
                _stored(codes, storage), ones[:, :16].contiguous(), torch.zeros(1, 16, 1), qdata, ones,
                torch.zeros(64, 1), None, out, storage=storage, unsigned=unsigned,
            )  # fmt: skip
        assert torch.equal(out, torch.full((16, 64), 64.0 * codes[0, 0].item() * lowest))


@pytest.mark.parametrize("storage", [INT4, INT8])
def test_unsigned_codes(storage, monkeypatch):
    """Codes of activations above 7 are what they are, not negative."""
    _check(monkeypatch, 20, 70, 192, 16, 32, storage=storage, unsigned=True)


@pytest.mark.parametrize(
    ("dtype", "parts", "bias"), [(BF16, BF16, BF16), (F16, F16, F16), (BF16, F32, None), (F32, F16, BF16)], ids=str
)
def test_dtypes(dtype, parts, bias, monkeypatch):
    """The result is rounded once, to its dtype, whatever the dtypes of scales, the low rank's factor and the bias."""
    _check(monkeypatch, 7, 72, 192, 32, 16, dtype=dtype, parts=parts, bias=bias)
    _check(monkeypatch, 7, 71, 192, 32, 16, dtype=dtype, parts=parts, bias=bias)


@pytest.mark.parametrize("arrangement", ["plain", "tiles"])
@pytest.mark.parametrize(("tile", "m", "dtype"), [(16, 3, F32), (64, 20, BF16)], ids=str)
def test_other_arrangements(arrangement, tile, m, dtype, monkeypatch):
    """Plain weights, and those in tiles of 128 rows, give the same, of more rows than one block has, too."""
    n = 256 if arrangement == "tiles" else 150
    _check(monkeypatch, m, n, 192, 16, tile, dtype=dtype, arrangement=arrangement)


@pytest.mark.parametrize("storage", [INT4, INT8])
def test_splits(storage, monkeypatch):
    """Sums of pieces of K, of unequal length and with the low rank shared among them, are added and rounded once."""
    _check(monkeypatch, 17, 72, 704, 70, 32, storage=storage, dtype=BF16, bias=F32, splits=3)


def test_mixed_parts(monkeypatch):
    """Scales in another dtype than the low rank's factor are taken, too."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    qdata, scale = torch.randint(-128, 128, (64, 32), dtype=torch.int8), torch.rand(1, 64).half()
    codes, ones = torch.randint(-8, 8, (16, 64)), torch.ones(1, 16)
    low, up = torch.randn(1, 16, 16), torch.randn(64, 16).bfloat16()
    out = torch.empty(16, 64)
    with assume(Target("cuda", (12, 0))):
        svdquant_gemm_mma.product(
            _stored(codes, INT8), ones, low, qdata, scale, up, None, out, storage=INT8, unsigned=False
        )
    weight = unpack_codes(qdata, unsigned=False).double() * scale.double().t()
    wanted = codes.double() @ weight.t() + low[0].double() @ up.double().t()
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=WHOLE * wanted.abs().max().item())


def test_nothing_to_do(monkeypatch):
    """No tokens, or no rows, are no launch: a grid of no blocks is an error."""
    monkeypatch.setattr(kernels, "launch", lambda *_, **__: pytest.fail("launched"))
    for m, n in ((0, 64), (4, 0)):
        arguments = [torch.empty(1, m, 512).char(), torch.empty(1, m), torch.empty(1, m, 16)]
        arguments += [torch.empty(n, 32).char(), torch.empty(1, n), torch.empty(n, 16), None, torch.empty(m, n)]
        svdquant_gemm_mma.product(*arguments, storage=INT8, unsigned=False)


def test_plans():
    """Few tokens are split over all processors; many are not, and take the largest tile."""
    for n, k in ((3072, 3072), (12288, 3072), (3072, 12288)):
        few, many = (svdquant_gemm_mma._plan(m, n, k // GROUP, 132) for m in (1, 4096))
        assert few.tile.tokens == 16
        assert few.splits * n // 64 >= 132
        assert (many.tile.tokens, many.splits) == (128, 1)
    assert svdquant_gemm_mma._plan(1, 64, 1, 132).splits == 1


def test_refusals():
    """Sizes that the kernel or its grid cannot take are refused in words."""
    assert svdquant_gemm_mma.refuses_product(4096, 12288, 3072, 32) is None
    assert "96 columns" in svdquant_gemm_mma.refuses_product(1, 64, 96, 32)
    assert "0 columns" in svdquant_gemm_mma.refuses_product(1, 64, 0, 32)
    assert "4194241 rows" in svdquant_gemm_mma.refuses_product(1, 65535 * 64 + 1, 64, 32)
    assert "16777216 tokens" in svdquant_gemm_mma.refuses_product(1 << 24, 64, 64, 32)
    assert "of rank 16777216" in svdquant_gemm_mma.refuses_product(1, 64, 64, 1 << 24)


def test_products_of_the_architecture():
    """int4 from sm_80 to sm_89, whose instructions take it; int8 else."""
    for capability, storage in (((8, 0), INT4), ((8, 6), INT4), ((8, 9), INT4), ((9, 0), INT8), ((12, 0), INT8)):
        with assume(Target("cuda", capability)):
            assert svdquant_gemm_mma.storage_of(torch.device("cuda")) == storage


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("m", [1, 4096])
def test_compiled(architecture, m):
    """The smallest and the largest tile compile without warnings and keep all in registers."""
    meta = torch.device("meta")
    with assume(Target("cuda", ARCHITECTURES[architecture])), kernels.record() as launches:
        storage = svdquant_gemm_mma.storage_of(meta)
        padded, each = round_up(m, 16), 16 if storage == INT4 else 8
        svdquant_gemm_mma.product(
            torch.empty((48, padded // each, 512), dtype=torch.int8, device=meta),
            torch.empty((48, padded), device=meta), torch.empty((1, padded, 32), device=meta),
            torch.empty((48, 48, 4, 32, 16), dtype=torch.uint8, device=meta),
            torch.empty((48, 3072), dtype=BF16, device=meta), torch.empty((3072, 32), dtype=BF16, device=meta), None,
            torch.empty((m, 3072), dtype=BF16, device=meta), storage=storage, unsigned=False,
        )  # fmt: skip
    assert len(launches) == (2 if m == 1 else 1)
    for launch in launches:
        made = compiler.compile_now(launch.source, launch.name, architecture)
        assert not made.warnings
        assert made.spills == 0
