from __future__ import annotations

import pytest
import torch

from tests.support import cuda_simulator
from tests.support.cpu_linear import activations, packed_weight

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import compiler, kernels, linear_words, words_gemm_wgmma
from lowbit.backends.gpu import Target, assume
from lowbit.formats import parse_spec
from lowbit.formats.base import Format
from lowbit.layouts import words128

HOPPER = Target("cuda", (9, 0))
_SHARED = 227 * 1024  # bytes that a block may have


def parts_for(fmt: Format, spec: str, n: int, k: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Parts of a random weight, scales of 16 bits in the dtype of x, as a model in that dtype has them."""
    packed, _ = packed_weight(spec, n, k, words128.NAME)
    parts = dict(zip(fmt.part_names, packed.part_list, strict=True))
    halves = (torch.bfloat16, torch.float16)
    return {name: part.to(dtype) if part.dtype in halves else part for name, part in parts.items()}


def force(monkeypatch, tokens: int, tiles: int, splits: int) -> None:
    """Let the launcher take this share of a block."""

    def share(_m: int, _n: int, _k: int, kind: words_gemm_wgmma._Kind, _processors: int) -> words_gemm_wgmma._Tiles:
        beside = dict(words_gemm_wgmma._shapes(10**6, kind))[tokens, tiles]
        return words_gemm_wgmma._Tiles(tokens, tiles, splits, beside)

    monkeypatch.setattr(words_gemm_wgmma, "_tiles", share)


def check(fmt: Format, n: int, k: int, m: int, parts: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Assert that the simulated product is that of the dequantized weight, rounded once."""
    weight = fmt.dequantize(words128.unpack(fmt, parts), (n, k), torch.float32).double()
    x = activations(m, k, dtype)
    bias = torch.randn(n).to(dtype) if m % 2 else None
    with assume(HOPPER):
        assert linear_words.refuses(fmt, x, parts, bias) is None
        found = linear_words.linear(fmt, x, parts, bias)
    assert found.shape == (m, n)
    assert found.dtype == dtype
    wanted = x.double() @ weight.t() + (0 if bias is None else bias.double())
    half_ulp = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(found.double(), wanted, rtol=1.01 * half_ulp, atol=1e-5 * wanted.abs().max().item())


B, F = torch.bfloat16, torch.float16
CASES = [  # spec, dtype, (tokens, tiles, splits), (N, K, M), seed
    ("wna16", B, (16, 1, 1), (130, 256, 17), 1),
    ("wna16", F, (32, 2, 2), (61, 640, 40), 2),
    ("wna16(group_size=256)", B, (64, 1, 1), (61, 512, 9), 3),
    ("wna16(group_size=0)", B, (16, 1, 1), (8, 384, 9), 13),  # one group a row
    ("wna16(group_size=16)", F, (32, 1, 1), (37, 256, 33), 4),
    ("wna16(group_size=64)", B, (128, 2, 1), (137, 256, 9), 5),
    ("awq_w4a16", B, (16, 1, 2), (70, 384, 13), 6),
    ("awq_w4a16", F, (64, 2, 1), (200, 256, 70), 7),
    ("awq_w4a16(group_size=32)", B, (128, 1, 1), (16, 256, 11), 8),
    ("nvfp4", B, (16, 2, 3), (64, 384, 10), 9),
    ("nvfp4(global_scale_divides=true,row_global_scale=true)", F, (128, 2, 1), (129, 256, 9), 10),
    ("mxfp4", B, (32, 1, 1), (61, 256, 20), 11),
    ("mxfp4", F, (16, 2, 1), (61, 256, 12), 12),
]


@pytest.mark.parametrize(("spec", "dtype", "share", "shape", "seed"), CASES, ids=str)
def test_product(spec, dtype, share, shape, seed, monkeypatch):
    """Whatever order of threads and copies chance picks, every variant gives the product, rounded once."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    monkeypatch.setenv("LOWBIT_SIMULATOR_SEED", str(seed))
    force(monkeypatch, *share)
    n, k, m = shape
    fmt = parse_spec(spec)
    check(fmt, n, k, m, parts_for(fmt, spec, n, k, dtype), dtype)


@pytest.mark.parametrize("seed", ["21", "22", "23"])
def test_ring(seed, monkeypatch):
    """More blocks of columns than the ring has places: no place is written before it was read, nor read before."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    monkeypatch.setenv("LOWBIT_SIMULATOR_SEED", seed)
    force(monkeypatch, 16, 1, 1)
    fmt = parse_spec("awq_w4a16")
    check(fmt, 9, 1152, 16, parts_for(fmt, "awq_w4a16", 9, 1152, B), B)


def test_float32_scales(monkeypatch):
    """Scales and zeros of float32 are used as they are."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    force(monkeypatch, 16, 1, 1)
    fmt = parse_spec("awq_w4a16")
    parts = parts_for(fmt, "awq_w4a16", 24, 256, B)
    parts |= {name: parts[name].float() * 1.0001 for name in ("scale", "zero")}
    check(fmt, 24, 256, 9, parts, B)


def test_not_finite(monkeypatch):
    """A NaN in x makes its token's results NaN, and an infinity of one sign not finite; other tokens are untouched."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    force(monkeypatch, 16, 1, 1)
    fmt = parse_spec("wna16")
    parts, x = parts_for(fmt, "wna16", 16, 256, B), activations(9, 256, B)
    with assume(HOPPER):
        wanted = linear_words.linear(fmt, x, parts, None)
        x[2, 77], x[5, 200] = float("nan"), float("inf")
        found = linear_words.linear(fmt, x, parts, None)
    assert found[2].isnan().all()
    assert not found[5].isfinite().any()
    others = [0, 1, 3, 4, 6, 7, 8]
    assert torch.equal(found[others], wanted[others])


def recorded(spec: str, n: int, k: int, m: int, dtype: torch.dtype, processors: int = 132) -> list[kernels.Launch]:
    """The launches of a call with parts of no content."""
    meta = torch.device("meta")
    fmt = parse_spec(spec)
    dtypes = {**fmt.part_dtypes(dtype), "qdata": torch.int32}
    shapes = words128.shapes(fmt, n, k)
    parts = {name: torch.empty(shape, dtype=dtypes[name], device=meta) for name, shape in shapes.items()}
    x = torch.empty(m, k, dtype=dtype, device=meta)
    with assume(Target("cuda", (9, 0), processors)), kernels.record() as launches:
        assert linear_words.refuses(fmt, x, parts, None) is None
        linear_words.linear(fmt, x, parts, None)
    return launches


@pytest.mark.parametrize(("spec", "m"), [
    ("awq_w4a16", 16), ("awq_w4a16", 4096), ("wna16(group_size=64)", 4096), ("nvfp4", 64), ("mxfp4", 256),
])  # fmt: skip
def test_compile(spec, m):
    """What is launched compiles for sm_90a: no spill, no warning, products that do not wait for each other."""
    for launch in recorded(spec, 3072, 3072, m, B):
        made = compiler.compile_now(launch.source, launch.name, "sm_90a")
        assert not made.spills, launch.name
        assert not made.warnings, made.warnings
        assert "Potential Performance Loss" not in made.log  # serialized products, registers that are not handed out
        if "words_gemm" in launch.name:
            assert made.registers in (80, 168)  # what the kernel hands out among its warps
            assert made.shared + launch.shared <= _SHARED


def test_shares():
    """Few tokens of a weight with few rows are split over K so that most multiprocessors have work; many are not."""
    few = recorded("wna16", 4096, 4096, 16, B)
    assert len(few) == 2
    assert "add_word_splits" in few[1].name
    many = recorded("wna16", 4096, 4096, 4096, B)
    assert len(many) == 1
    assert many[0].name.endswith("128, 2>")


def test_more_tokens_than_a_grid_takes(monkeypatch):
    """Tokens beyond what a grid's second axis can hold are multiplied in a launch of their own."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    monkeypatch.setattr(words_gemm_wgmma, "_AT_ONCE", 16)
    fmt = parse_spec("wna16")
    check(fmt, 8, 128, 35, parts_for(fmt, "wna16", 8, 128, B), B)
