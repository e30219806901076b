"""Tables of fp8 and mxfp8, where the processor can look up in them, against the same kernels calculating.

Linears look up what codes stand for; encoders look up the codes of bfloat16 weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from lowbit.dispatch import use_backend
from lowbit.formats import parse_spec
from lowbit.ops.encode import encode
from lowbit.tensor import QuantizedTensor
from tests.support.cpu_linear import DTYPES, activations, packed_weight

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)
from lowbit.backends.cpu import native

CODES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
TOKENS = (1, 2, 3, 4, 7, 16)
# A spec and the K it is tested with: the smallest, and one that is no multiple of a cache line's columns times 2^n.
SPECS = (
    ("fp8_e4m3", 4),
    ("fp8_e4m3", 300),
    ("fp8_e4m3(granularity=row)", 1028),
    ("fp8_e4m3(granularity=block,block_size=20x36)", 324),
    ("fp8_e5m2", 300),
    ("fp8_e5m2(granularity=row)", 4),
    ("fp8_e5m2(granularity=block)", 384),
    ("mxfp8", 32),
    ("mxfp8", 352),
)
# Enough weights under a scale for a table; rows of 1300 do not begin where a line of the cache does.
ENCODED = (
    ("fp8_e4m3", 2048),
    ("fp8_e4m3", 1300),
    ("fp8_e4m3(granularity=row)", 1024),
    ("fp8_e4m3(granularity=row)", 1300),
    ("fp8_e4m3(granularity=block,block_size=20x100)", 1300),
    ("fp8_e5m2", 1300),
    ("fp8_e5m2(granularity=row)", 2048),
)
LARGEST = (3e38, 57345.0, 448.0, 1.99, 1.0, 0.71, 0.0013, 3.1e-6, 2e-12)


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Skip where nothing is looked up, and leave the choice as it was; pairs of bfloat16 have tests of their own."""
    monkeypatch.setattr(native, "bf16_dots", lambda: False)
    if not native.module().want_fp8_tables(True):
        pytest.skip("this processor, or this instruction set, looks no codes up")
    yield
    native.module().want_fp8_tables(True)


def both_ways(x: torch.Tensor, weight: QuantizedTensor) -> list[torch.Tensor]:
    """The product with codes looked up, and with codes converted."""
    found = []
    for wanted in (True, False):
        assert native.module().want_fp8_tables(wanted) == wanted
        with use_backend("cpu"), torch.inference_mode():
            found.append(F.linear(x, weight))
    return found


def bits(values: torch.Tensor) -> torch.Tensor:
    """The values as integers, with one NaN for all."""
    whole = {2: torch.int16, 4: torch.int32}[values.element_size()]
    return torch.where(values.isnan(), torch.full_like(values, float("nan")), values).view(whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "k"), SPECS)
def test_both_ways_give_the_same_bits(spec, k, dtype):
    """Odd numbers of rows, any few tokens, every granularity; with infinities and NaN among the activations, too."""
    for n in (1, 15, 16, 17, 100):
        weight, _ = packed_weight(spec, n, k, "rows16")
        for m in TOKENS:
            x = activations(m, k, dtype)
            looked_up, converted = both_ways(x, weight)
            assert torch.equal(looked_up, converted), (n, m)
            x[-1, k // 2], x[0, 0] = float("nan"), float("-inf")
            looked_up, converted = both_ways(x, weight)
            assert torch.equal(bits(looked_up), bits(converted)), (n, m)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codes", CODES)
def test_every_code_in_every_column(codes, dtype):
    """Each of the 256 codes is what it stands for, in each of the four columns that are looked up together."""
    every = torch.arange(256, dtype=torch.uint8)
    values = every.view(CODES[codes]).float() + 0.0  # a sum has no minus zero
    for column in range(4):
        plain = QuantizedTensor.quantize(torch.zeros(256, 4), codes, dtype=torch.float32)
        plain.parts["qdata"].view(torch.uint8)[:, column] = every
        plain.parts["scale"].fill_(0.5)
        packed = plain.in_layout("rows16")
        for m in TOKENS:
            x = torch.zeros(m, 4, dtype=dtype)
            x[:, column] = 2.0
            wanted = bits(values.to(dtype).expand(m, 256).contiguous())
            for found in both_ways(x, packed):
                assert torch.equal(bits(found), wanted), (column, m)


@pytest.mark.parametrize("exponent", [-126, -70, 112])
def test_scales_and_activations_near_the_ends_of_float32(exponent):
    """Scales and activations whose product is moderate give the same bits, however far from 1 each of them is."""
    weight, _ = packed_weight("fp8_e4m3", 35, 512, "rows16")
    x = activations(2, 512, torch.bfloat16) * 2.0 ** -(exponent + 7)
    weight.parts["scale"].mul_(2.0**exponent)
    looked_up, converted = both_ways(x, weight)
    assert bool(looked_up.isfinite().all())
    assert bool(looked_up.count_nonzero())
    assert torch.equal(looked_up, converted)


def every_weight(largest: float, k: int) -> torch.Tensor:
    """Every bfloat16 up to a magnitude, [N, k]: shuffled, and sorted, where many beside each other are tiny."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    kept = every[every.abs() <= largest]  # without NaN
    shuffled = kept[torch.randperm(kept.numel(), generator=torch.Generator().manual_seed(k))]
    both = torch.cat([shuffled, kept.sort().values])
    return both[: both.numel() // k * k].view(-1, k)


@pytest.mark.parametrize(("spec", "k"), ENCODED)
def test_every_weight_gets_the_code_of_the_reference(spec, k):
    """Every bfloat16, under scales of any size, gets the same code looked up as calculated and as in the reference."""
    fmt = parse_spec(spec)
    for largest in LARGEST:
        w = every_weight(largest, k)
        wanted = fmt.quantize(w)
        for tables in (True, False):
            assert native.module().want_fp8_tables(tables) == tables
            with use_backend("cpu"):
                found = encode(w, fmt)
            assert torch.equal(found["scale"], wanted["scale"])
            codes = [parts["qdata"].view(torch.uint8) for parts in (found, wanted)]
            assert torch.equal(*codes), (largest, tables)


def test_weights_beyond_the_largest_code_saturate():
    """A scale that a search chose too small for a column that counts nothing gives it the largest code."""
    w = (torch.randn(64, 320, generator=torch.Generator().manual_seed(3)) * 2e-5).bfloat16()
    w[:, 7] = torch.linspace(-1, 1, 64).bfloat16()
    columns = torch.ones(320)
    columns[7] = 0
    factors, found = torch.tensor([0.125]), []
    for tables in (True, False):
        assert native.module().want_fp8_tables(tables) == tables
        codes, scale = torch.zeros(64, 320, dtype=torch.uint8), torch.zeros(1)
        assert native.module().quantize_granular(
            w.data_ptr(), 1, 64, 320, 0, True, 1, 320, 0, factors.data_ptr(), 1, columns.data_ptr(), codes.data_ptr(),
            scale.data_ptr(), 2,
        )  # fmt: skip
        assert torch.equal(scale, torch.ones(1) / 448 / 8)
        assert codes[0, 7] == 0xFE
        assert codes[63, 7] == 0x7E
        found.append(codes)
    assert torch.equal(*found)
