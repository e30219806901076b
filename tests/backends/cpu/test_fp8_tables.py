"""Codes of fp8 and mxfp8 looked up in tables, where the processor can, against the same kernels converting them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from lowbit.dispatch import use_backend
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


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """Skip where nothing is looked up, and leave the choice as it was."""
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
