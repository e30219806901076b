from __future__ import annotations

import pytest
import torch

from tests.support import cuda_simulator
from tests.support.cpu_linear import activations, relative_error

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit import dispatch
from lowbit.backends.cuda import int4_plain_few, int4_plain_many, int4_plain_mm, int4_plain_tiles, kernels
from lowbit.backends.cuda.int4_plain_operands import Operands
from lowbit.backends.eager.int4_plain import int4_plain_mm as eager
from lowbit.backends.gpu import Target, assume
from lowbit.formats import parse_spec
from lowbit.layouts import coalesced_int4
from lowbit.numerics.w4a8 import quantize_blocks, w4a8_linear

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HOPPER = Target("cuda", (9, 0))


@pytest.fixture
def simulated(monkeypatch):
    """Launches run on a CPU."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)


def operands(n: int, k: int, group: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random codes, scales and zero points that need not be integers."""
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    return codes, (torch.rand(n, k // group) + 0.1).to(dtype), (7.5 + torch.randn(n, k // group)).to(dtype)


def check(way, n, k, m, group, dtype, scales, *, bias=True, processors=132):
    """Assert that a way gives the reference's product, rounded once."""
    weight, x = operands(n, k, group, scales), activations(m, k, dtype)
    added = torch.randn(n).to(dtype) if bias else None
    out = torch.empty(m, n, dtype=dtype)
    with assume(Target("cuda", (9, 0), processors)):
        assert int4_plain_mm.refuses(x, *weight, added, group) is None
        way.product(x, Operands(*weight, group), added, out)
    wanted = w4a8_linear(x.float(), *weight, group, None if added is None else added.float())
    atol = 2e-6 * wanted.abs().max().item()
    torch.testing.assert_close(out.float(), wanted, rtol=1.01 * torch.finfo(dtype).eps / 2, atol=atol)


@pytest.mark.parametrize(("n", "k", "m", "group", "dtype", "scales", "processors"), [
    (9, 64, 1, 32, F32, F32, 132), (17, 1536, 2, 64, BF16, BF16, 132), (70, 256, 1, 64, F16, F32, 1),
    (5, 128, 3, 128, F16, F16, 132), (33, 96, 8, 32, F32, BF16, 132), (20, 96, 1, 8, F32, BF16, 132),
    (20, 64, 2, 16, BF16, F32, 132), (110, 64, 1, 32, F16, F16, 1),
])  # fmt: skip
def test_few_tokens(n, k, m, group, dtype, scales, processors, simulated, monkeypatch):
    """Every number of tokens, group and dtype, whether blocks round x for themselves or another kernel does."""
    for most in (int4_plain_few.FUSED, 0) if n in (9, 33, 20) else (int4_plain_few.FUSED,):
        monkeypatch.setattr(int4_plain_few, "FUSED", most)
        check(int4_plain_few, n, k, m, group, dtype, scales, bias=m % 2 == 1, processors=processors)


@pytest.mark.parametrize(("n", "k", "m", "group", "dtype", "scales", "processors"), [
    (9, 64, 5, 32, F32, F32, 132), (70, 1056, 16, 32, F32, BF16, 132), (70, 160, 70, 32, BF16, F16, 132),
    (140, 256, 20, 128, F16, F16, 1), (40, 160, 9, 8, F32, BF16, 132), (40, 256, 40, 16, F32, F32, 1),
])  # fmt: skip
def test_tiles(n, k, m, group, dtype, scales, processors, simulated):
    """Tensor cores: rows, tokens and columns that fill no tile, several groups in a block of columns, every tile."""
    check(int4_plain_tiles, n, k, m, group, dtype, scales, bias=m % 2 == 0, processors=processors)


@pytest.mark.parametrize("seed", ["2", "3"])
def test_tiles_wait_for_their_copies(seed, simulated, monkeypatch):
    """Whatever the order of threads, and however late copies land, more chunks than stages give the right product."""
    monkeypatch.setenv("LOWBIT_SIMULATOR_SEED", seed)
    check(int4_plain_tiles, 33, 2048, 12, 64, BF16, BF16)


@pytest.mark.parametrize(("dtype", "scales", "group"), [(F16, F32, 32), (BF16, BF16, 8)])
def test_many_tokens(dtype, scales, group, simulated, monkeypatch):
    """Pieces of tokens and of rows, decoded to 16 bits, give the reference's product within the stated tolerance."""
    monkeypatch.setattr(int4_plain_many, "PIECE", 8 * 256)
    monkeypatch.setattr(int4_plain_many, "TOKENS", 16)
    monkeypatch.setattr(int4_plain_mm, "MANY", 16)
    weight, x = operands(20, 256, group, scales), activations(21, 256, dtype)
    entry = dispatch.Kernel("", "", "", "", int4_plain_mm._TOLERANCE, None, int4_plain_mm.int4_plain_mm)
    for bias in (None, torch.randn(20).to(dtype)):
        with assume(HOPPER):
            found = int4_plain_mm.int4_plain_mm(x, *weight, bias, group)
        assert relative_error(found, eager(x, *weight, bias, group).double()) < entry.tolerance
    codes, scale = quantize_blocks(x)
    rounded = (codes.float().view(-1, 32) * scale.view(-1, 1)).view(x.shape).to(dtype)
    with assume(HOPPER):
        assert torch.equal(int4_plain_many._rounded(x), rounded)
        decoded = int4_plain_many._decoded(Operands(*weight, group), 3, 20, dtype)
    nibbles = torch.stack([weight[0] & 15, weight[0] >> 4], dim=-1).flatten(1).float().unflatten(1, (-1, group))
    wanted = (nibbles - weight[2].float().unsqueeze(-1)) * weight[1].float().unsqueeze(-1)
    assert torch.equal(decoded, wanted.flatten(1)[3:].to(dtype))


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_rounded_activations(pieces, simulated):
    """Codes are the reference's, of each 32 columns the even ones first; beside their scales are sums by groups."""
    x = activations(3, 320, BF16)
    codes, steps = int4_plain_few.round_blocks(x, pieces, 5, 2.0)
    wanted, scale = quantize_blocks(x)
    blocks = wanted.view(3, 10, 16, 2)
    assert torch.equal(codes.view(3, 10, 2, 16), blocks.transpose(2, 3))
    assert torch.equal(steps[:, 0, :3], scale.t())
    sums = wanted.view(3, 10, pieces, -1).float().sum(-1)
    assert torch.equal(steps[:, 1:, :3], 2 * sums.permute(1, 2, 0))


def test_zeros_of_eight(simulated):
    """A linear of a weight without zero points gets none, and gives what zeros of 8 give, on every way."""
    fmt = parse_spec("wna16(group_size=32)")
    parts = coalesced_int4.pack(fmt, fmt.quantize(torch.randn(20, 64)))
    entries = dispatch.candidates("linear", "wna16", "cuda")
    entry = next(one for one in entries if (one.backend, one.layout) == ("cuda", coalesced_int4.NAME))
    for m in (1, 6):
        x = activations(m, 64, F32)
        with assume(HOPPER):
            assert entry.refuses(fmt, x, parts, None) is None
            found = entry.run(fmt, x, parts, None)
            wanted = int4_plain_mm.int4_plain_mm(x, *coalesced_int4.operands(parts), None, 32)
        assert torch.equal(found, wanted)


def test_native_layout(simulated):
    """The benchmark's variant reads scale and zero [groups, N], and gives the same bits."""
    codes, scale, zero = operands(20, 96, 32, BF16)
    x = activations(1, 96, BF16)
    with assume(HOPPER):
        found = int4_plain_mm.product_of_native(x, codes, scale.t().contiguous(), zero.t().contiguous(), 32)
        assert torch.equal(found, int4_plain_mm.int4_plain_mm(x, codes, scale, zero, None, 32))


@pytest.mark.parametrize("m", [3, 6])
def test_not_finite(m, simulated):
    """A NaN or an infinity in x makes the token's results not finite, and no other token's."""
    weight = operands(8, 64, 32, F32)
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = torch.randn(m, 64)
        x[1, 40] = bad
        x[2] = 0
        with assume(HOPPER):
            found = int4_plain_mm.int4_plain_mm(x, *weight, None, 32)
        assert not found[1].isfinite().any()
        assert found[0].isfinite().all()
        assert torch.equal(found[2], torch.zeros(8))


def test_smallest_activations(simulated):
    """A block whose scale has no finite reciprocal counts as zero, in both ways of rounding."""
    weight, x = operands(8, 64, 32, F32), torch.zeros(5, 64)
    x[:, 40] = 1e-44
    with assume(HOPPER):
        assert not int4_plain_mm.int4_plain_mm(x, *weight, None, 32).any()
        assert not int4_plain_mm.int4_plain_mm(x[:1], *weight, None, 32).any()


@pytest.mark.parametrize(("capability", "dtype", "m", "functions"), [
    ((9, 0), BF16, 1, ["int4_rows"]), ((9, 0), BF16, 4, ["round_blocks", "int4_rows"]),
    ((8, 0), F32, 5, ["round_blocks", "int4_tiles"]), ((9, 0), BF16, 255, ["round_blocks", "int4_tiles"]),
    ((9, 0), BF16, 256, ["rounded_blocks", "decoded_rows"]), ((9, 0), F32, 256, ["round_blocks", "int4_tiles"]),
    ((7, 5), F16, 8, ["round_blocks", "int4_rows"]), ((7, 5), F16, 9, ["rounded_blocks", "decoded_rows"]),
])  # fmt: skip
def test_ways(capability, dtype, m, functions):
    """The number of tokens decides which way a product goes; without int8 tensor cores many tokens are decoded for."""
    x = torch.empty(m, 8192, dtype=dtype, device="meta")
    qdata, scale = torch.empty(64, 4096, dtype=torch.uint8, device="meta"), torch.empty(64, 256, device="meta")
    with assume(Target("cuda", capability)), kernels.record() as launches:
        assert int4_plain_mm.refuses(x, qdata, scale, scale, None, 32) is None
        assert int4_plain_mm.int4_plain_mm(x, qdata, scale, scale, None, 32).shape == (m, 64)
    assert [launch.name.partition("::")[2].partition("<")[0] for launch in launches] == functions


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize("n", [64, 3072, 18432])
def test_every_tile_fits(n, pieces):
    """Whatever the number of tokens, a block needs no more shared memory than the smallest GPU gives, and 8 warps."""
    for m in (5, 8, 9, 16, 17, 33, 65, 300):
        tile = int4_plain_tiles.tile_of(m, n, pieces, 132)
        assert tile.shared <= 99 * 1024 - 1024
        assert tile.stages >= 2
        assert tile.split * tile.row_warps == 8
        assert tile.tokens >= min(m, 64 // pieces)


def test_nothing_to_do(monkeypatch):
    """No tokens, or no rows of the weight, give an empty result without a launch: a grid of no blocks is an error."""
    monkeypatch.setattr(kernels, "launch", lambda *_, **__: pytest.fail("launched"))
    codes, scale, zero = operands(8, 64, 32, F16)
    with assume(HOPPER):
        assert int4_plain_mm.int4_plain_mm(torch.zeros(2, 0, 64).half(), codes, scale, zero, None, 32).shape == (
            2,
            0,
            8,
        )
        none = codes[:0], scale[:0], zero[:0]
        assert int4_plain_mm.int4_plain_mm(torch.zeros(2, 64).half(), *none, None, 32).shape == (2, 0)


def test_where_x_begins(monkeypatch):
    """The kernels load 16 bytes of x at a time: rows that begin elsewhere are copied first, others are not."""
    seen = []
    monkeypatch.setattr(kernels, "launch", lambda *args, **_: seen.append(args[5][0]))
    weight, room = operands(8, 64, 32, F16), torch.zeros(200, dtype=F16)
    with assume(HOPPER):
        for offset in (0, 1, 4, 8):
            x = room[offset : offset + 64].view(1, 64)
            int4_plain_mm.int4_plain_mm(x, *weight, None, 32)
            assert seen[-1].data_ptr() % 16 == 0
            assert (seen[-1].data_ptr() == x.data_ptr()) == (x.data_ptr() % 16 == 0)


def test_refusals():
    """What the kernel cannot take is refused in words that name it."""
    weight, x = operands(8, 64, 32, F16), torch.randn(1, 64, dtype=F16)
    with assume(HOPPER):
        assert int4_plain_mm.refuses(x, *weight, None, 32) is None
        assert int4_plain_mm.refuses(x.expand(9, 64), *operands(8, 64, 8, F16), None, 8) is None
        assert "x is float64" in int4_plain_mm.refuses(x.double(), *weight, None, 32)
        assert "bias is float32" in int4_plain_mm.refuses(x, *weight, torch.zeros(8), 32)
        assert "zeros are float32, scales float16" in int4_plain_mm.refuses(x, *weight[:2], weight[2].float(), None, 32)
        empty = (part[:, :0] for part in weight)
        assert "no columns" in int4_plain_mm.refuses(x[:, :0], *empty, None, 32)
        assert "gaps" in int4_plain_mm.refuses(x, weight[0].t().contiguous().t(), *weight[1:], None, 32)
        assert "meta" in int4_plain_mm.refuses(x, weight[0].to("meta"), *weight[1:], None, 32)
        huge = torch.empty(1 << 20, 1 << 16, dtype=torch.uint8, device="meta")
        assert "takes fewer than" in int4_plain_mm.refuses(x.to("meta"), huge, *weight[1:], None, 32)
    with assume(Target("cuda", (7, 5))):
        assert int4_plain_mm.refuses(x.float(), *weight, None, 32) is None
        assert "more than 8 tokens, for which float32" in int4_plain_mm.refuses(
            x.float().expand(9, 64), *weight, None, 32
        )
        assert "bfloat16 needs" in int4_plain_mm.refuses(x.bfloat16().expand(9, 64), *weight, None, 32)
    with assume(Target("cuda", (7, 0))):
        assert "7.0" in int4_plain_mm.refuses(x, *weight, None, 32)
    with assume(Target("hip")):
        assert "NVIDIA" in int4_plain_mm.refuses(x, *weight, None, 32)
