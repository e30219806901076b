"""Products of pairs of bfloat16 columns (native/bf16_gemm.h), where the processor has them, fast or not."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowbit.dispatch import use_backend
from lowbit.tensor import QuantizedTensor
from tests.support.cpu_linear import (
    ROWS,
    TOKENS,
    activations,
    check_linear,
    check_properties,
    packed_weight,
    relative_error,
    tolerance,
)

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)
from lowbit.backends.cpu import e2m1_ways, linear_fp8, native

# A spec and what K it is tested with: the smallest, and more than one panel of columns with a rest.
SPECS = (
    ("fp8_e4m3", 32),
    ("fp8_e4m3", 300),
    ("fp8_e4m3(granularity=row)", 1028),
    ("fp8_e4m3(granularity=block)", 384),
    ("fp8_e4m3(granularity=block,block_size=20x36)", 612),
    ("fp8_e4m3(granularity=block,block_size=1x100)", 700),
    ("fp8_e4m3(granularity=block,block_size=32x320)", 640),
    ("fp8_e5m2", 300),
    ("fp8_e5m2(granularity=block)", 384),
    ("mxfp8", 32),
    ("mxfp8", 352),
    ("nvfp4", 16),
    ("nvfp4", 304),
    ("nvfp4(global_scale_divides=True,row_global_scale=True)", 272),
)
CODES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def choose(monkeypatch: pytest.MonkeyPatch, pairs: bool) -> None:
    """Let every number of bfloat16 tokens go by pairs, or none."""
    monkeypatch.setattr(native, "bf16_dots", lambda: pairs)
    monkeypatch.setattr(linear_fp8, "_FEW_PAIRED", 0)
    monkeypatch.setattr(e2m1_ways, "_FEW_PAIRED", {16: 0})


@pytest.fixture(autouse=True)
def pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip where there are none, and choose them."""
    if not native.module().can_bf16_dots():
        pytest.skip("this processor, or this instruction set, has no products of pairs of bfloat16")
    choose(monkeypatch, True)


def product(x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """x @ weight.T by the kernel."""
    with use_backend("cpu"), torch.inference_mode():
        return F.linear(x, weight)


def test_only_where_they_are_fast():
    """A processor that cannot is not called fast, and other dtypes and few tokens keep their way."""
    assert native.module().can_bf16_dots() >= native.module().has_fast_bf16_dots()
    x = torch.zeros(1)
    assert linear_fp8.way(x.bfloat16(), 40, 128) == linear_fp8.PAIRS
    assert e2m1_ways.way(x.bfloat16(), 40, 16) == e2m1_ways.PAIRS
    for dtype in (torch.float32, torch.float16):
        assert linear_fp8.way(x.to(dtype), 40, 128) != linear_fp8.PAIRS
        assert e2m1_ways.way(x.to(dtype), 40, 16) != e2m1_ways.PAIRS
    assert linear_fp8.way(x.bfloat16(), 40, 16) != linear_fp8.PAIRS


@pytest.mark.parametrize(("spec", "k"), SPECS)
def test_product(spec, k):
    """The product equals that of the dequantized weight on odd shapes; threads, gaps and axes change nothing."""
    for n in ROWS:
        check_linear(spec, n, k, 13, torch.bfloat16)
    for m in (*TOKENS, 12, 200):
        check_linear(spec, 35, k, m, torch.bfloat16, bias=m % 2 == 0)
    check_properties(spec, 100, k)


@pytest.mark.parametrize(("spec", "k"), SPECS)
def test_both_ways_agree(spec, k, monkeypatch):
    """What pairs give differs from what the other ways give by no more than the tolerance."""
    weight, _ = packed_weight(spec, 100, k, "rows16")
    for m in (3, 20, 40):
        x = activations(m, k, torch.bfloat16)
        choose(monkeypatch, True)
        found = product(x, weight)
        choose(monkeypatch, False)
        assert relative_error(found, product(x, weight).double()) <= tolerance(spec, "rows16", x, weight, None)


@pytest.mark.parametrize("spec", ["fp8_e4m3", "fp8_e5m2(granularity=row)", "mxfp8"])
def test_pairs_are_used_where_they_are_chosen(spec, monkeypatch):
    """Subnormal activations are zeros to a product of pairs, and not to one in float32."""
    weight, _ = packed_weight(spec, 35, 64, "rows16")
    weight.parts["scale"].add_(100 if spec == "mxfp8" else 2.0**100)
    x = torch.full((40, 64), 2.0**-130, dtype=torch.bfloat16)
    assert not product(x, weight).count_nonzero()
    choose(monkeypatch, False)
    assert product(x, weight).count_nonzero()


def test_pairs_are_used_for_nvfp4_where_they_are_chosen(monkeypatch):
    """A column of activations a million times larger than others leaves nothing of those as integers, but as pairs."""
    w = torch.ones(35, 64)
    w[:, 0] = 0
    weight = QuantizedTensor.quantize(w, "nvfp4", dtype=torch.float32).in_layout("rows16")
    x = torch.ones(40, 64, dtype=torch.bfloat16)
    x[:, 0] = 2.0**20
    assert product(x, weight).count_nonzero() == 40 * 35
    choose(monkeypatch, False)
    assert not product(x, weight).count_nonzero()


@pytest.mark.parametrize("codes", CODES)
def test_every_code_of_fp8_in_every_column(codes):
    """Each of the 256 codes is what it stands for, in each of the four columns that are looked up together."""
    every = torch.arange(256, dtype=torch.uint8)
    wanted = every.view(CODES[codes]).bfloat16().expand(13, 256)
    for column in range(4):
        plain = QuantizedTensor.quantize(torch.zeros(256, 32), codes, dtype=torch.float32)
        plain.parts["qdata"].view(torch.uint8)[:, column] = every
        plain.parts["scale"].fill_(0.5)
        x = torch.zeros(13, 32, dtype=torch.bfloat16)
        x[:, column] = 2.0
        found = product(x, plain.in_layout("rows16"))
        assert torch.equal(found.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0)), column


def test_every_code_of_nvfp4():
    """Each of the 16 codes times each of the 256 scales is exact, and NaN where the scale is."""
    plain = QuantizedTensor.quantize(torch.zeros(256, 16), "nvfp4", dtype=torch.float32)
    plain.parts["qdata"].copy_(torch.arange(8, dtype=torch.uint8) * 34 + 16)  # nibbles 0 1, 2 3, 4 5, ...
    plain.parts["scale"].copy_(torch.arange(256, dtype=torch.uint8)[:, None].view(torch.float8_e4m3fn))
    plain.parts["global_scale"].fill_(2.0**-3)
    wanted = plain.dequantize(torch.float32).t().bfloat16()
    found = product(torch.eye(16, dtype=torch.bfloat16), plain.in_layout("rows16"))
    assert torch.equal(found.nan_to_num(nan=7e6), wanted.nan_to_num(nan=7e6))


@pytest.mark.parametrize("spread", [0, 16, 17, 100])
def test_scales_of_mxfp8_near_and_far_from_each_other(spread):
    """Every code is exact, in rows whose scales differ little or much, beside NaN of codes and scales.

    Scales that differ by up to 2**16 in the columns of a panel go into the values, others into the sums.
    """
    generator = torch.Generator().manual_seed(spread)
    k = 2 * 256 + 32
    plain = QuantizedTensor.quantize(torch.zeros(70, k), "mxfp8", dtype=torch.float32)
    codes = torch.randint(256, (70, k), generator=generator, dtype=torch.uint8)
    plain.parts["qdata"].view(torch.uint8).copy_(codes)
    scale = plain.parts["scale"]
    scale.copy_(127 - spread // 2 + torch.randint(spread + 1, scale.shape, generator=generator).to(torch.uint8))
    scale[3, 5] = 255
    wanted = plain.dequantize(torch.float32).t()
    # One product of a NaN is NaN, whatever the activation: columns by themselves, then rows without any.
    packed, eye = plain.in_layout("rows16"), torch.eye(k, dtype=torch.bfloat16)
    found = product(eye, packed).float()
    clean = ~wanted.isnan().any(dim=0)
    assert not bool(found[:, ~clean].isfinite().any())
    plain.parts["qdata"].view(torch.uint8)[codes & 127 == 127] = 0x42
    scale[3, 5] = 127
    found = product(eye, plain.in_layout("rows16")).float()
    assert torch.equal(found, plain.dequantize(torch.float32).t())


def test_every_scale_of_mxfp8():
    """Each of the 256 scales is the power of two it stands for; products below the normal numbers are zero."""
    plain = QuantizedTensor.quantize(torch.zeros(256, 32), "mxfp8", dtype=torch.float32)
    plain.parts["qdata"].view(torch.uint8)[:, 5] = 0x38  # 1.0
    plain.parts["scale"].copy_(torch.arange(256, dtype=torch.uint8)[:, None])
    wanted = torch.tensor([2.0 ** (code - 127) for code in range(255)] + [float("nan")], dtype=torch.float32)
    found = product(torch.ones(40, 32, dtype=torch.bfloat16), plain.in_layout("rows16")).float()
    assert torch.equal(found.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0).expand(40, 256))


@pytest.mark.parametrize("spec", ["fp8_e4m3", "fp8_e4m3(granularity=block)", "fp8_e5m2", "mxfp8", "nvfp4"])
def test_infinities_and_nan_are_what_eager_makes_of_them(spec):
    """Infinities and NaN among the activations give what they give in eager, and change no other token."""
    packed, _ = packed_weight(spec, 35, 384, "rows16")
    x = activations(17, 384, torch.bfloat16)
    clean = product(x, packed)
    for value in (float("inf"), float("-inf"), float("nan")):
        bad = x.clone()
        bad[3, 100] = value
        found = product(bad, packed)
        with use_backend("eager"), torch.inference_mode():
            wanted = F.linear(bad, packed.in_layout(""))
        assert torch.equal(found[3].isnan(), wanted[3].isnan())
        assert torch.equal(found[3].nan_to_num(0, 1, -1), wanted[3].nan_to_num(0, 1, -1))
        others = [token for token in range(17) if token != 3]
        assert torch.equal(found[others], clean[others])
