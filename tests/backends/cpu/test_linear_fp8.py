from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import use_backend
from lowbit.tensor import QuantizedTensor
from tests.support.cpu_linear import DTYPES, ROWS, TOKENS, check_linear, check_properties

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)

SCALES = ("tensor", "row", "block", "block,block_size=32x64", "block,block_size=20x36", "block,block_size=1x60")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", SCALES)
@pytest.mark.parametrize("codes", ["fp8_e4m3", "fp8_e5m2"])
def test_product(codes, granularity, dtype):
    """The product equals that of the dequantized weight for every granularity, odd numbers of rows and of tokens."""
    spec = f"{codes}(granularity={granularity})"
    k = {"block": 384, "block,block_size=32x64": 320, "block,block_size=20x36": 324}.get(granularity, 300)
    for n in ROWS:
        check_linear(spec, n, k, 3, dtype)
    for m in TOKENS:
        check_linear(spec, 35, k, m, dtype, bias=m % 2 == 0)


@pytest.mark.parametrize("spec", ["fp8_e4m3", "fp8_e5m2(granularity=row)"])
def test_few_columns(spec):
    """The smallest K is one vector of columns, for a few and for many tokens."""
    for m in (1, 40):
        check_linear(spec, 17, 4, m, torch.float32)


@pytest.mark.parametrize("codes", ["fp8_e4m3", "fp8_e5m2"])
def test_every_code(codes):
    """Each of the 256 codes is multiplied as what it stands for: subnormals, infinities and NaN of both signs, too."""
    dtype = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[codes]
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    weight = torch.zeros(256, 4, dtype=torch.uint8)
    weight[:, 2] = every.view(torch.uint8)
    plain = QuantizedTensor.quantize(torch.zeros(256, 4), codes, dtype=torch.float32)
    plain.parts["qdata"].copy_(weight.view(dtype))
    plain.parts["scale"].fill_(0.5)
    packed = plain.in_layout("rows16")
    for m in (1, 40):
        x = torch.zeros(m, 4)
        x[:, 2] = 2.0
        with use_backend("cpu"), torch.inference_mode():
            found = torch.nn.functional.linear(x, packed)
        assert torch.equal(found.nan_to_num(nan=7e6), every.float().nan_to_num(nan=7e6).expand(m, 256))


def test_largest_scale():
    """A scale near the largest float32 is not multiplied with anything before the code that brings it back in range."""
    plain = QuantizedTensor.quantize(torch.zeros(16, 4), "fp8_e4m3", dtype=torch.float32)
    plain.parts["qdata"].view(torch.uint8).fill_(1)  # 2**-9
    plain.parts["scale"].fill_(2.0**126)
    packed = plain.in_layout("rows16")
    for m in (1, 40):
        with use_backend("cpu"), torch.inference_mode():
            found = torch.nn.functional.linear(torch.full((m, 4), 0.25), packed)
        assert torch.equal(found, torch.full((m, 16), 2.0**117))


def test_properties():
    """Gaps, leading axes, no tokens and the number of threads change nothing."""
    for granularity in ("tensor", "row", "block"):
        check_properties(f"fp8_e4m3(granularity={granularity})", 100, 512)
    check_properties("fp8_e5m2", 16, 32)
