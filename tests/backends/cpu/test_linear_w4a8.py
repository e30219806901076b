from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import preferred_layout
from lowbit.errors import PartsError
from lowbit.formats import parse_spec
from lowbit.layouts.base import get_layout
from lowbit.numerics.w4a8 import quantize_blocks
from lowbit.tensor import QuantizedTensor
from tests.support.cpu_linear import DTYPES, ROWS, TOKENS, check_linear, check_properties, packed_weight

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)

LAYOUT = "rows16_w4a8"
SPECS = pytest.mark.parametrize(
    "spec", ["awq_w4a16(group_size=32)", "awq_w4a16", "wna16(group_size=0)", "wna16(group_size=96,zero_point=true)"]
)


def rounded_product(x, weight):
    """The float64 product of x, rounded to int8 by blocks of 32, with a weight."""
    codes, scale = quantize_blocks(x)
    return (codes.double() * scale.double().repeat_interleave(32, dim=1)) @ weight.t()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@SPECS
def test_product_of_rounded_activations(spec, dtype):
    """The product equals that of activations rounded to int8 by blocks of 32, for odd numbers of rows and tokens."""
    for n in ROWS:
        check_linear(spec, n, 192, 3, dtype, layout=LAYOUT, reference=rounded_product)
    for m in TOKENS:
        check_linear(spec, 35, 192, m, dtype, layout=LAYOUT, bias=m % 2 == 0, reference=rounded_product)


@pytest.mark.parametrize("group", [8, 24, 40])
def test_short_blocks(group):
    """Groups that 32 does not divide have blocks within a group, and the product is within the declared tolerance."""
    for dtype in DTYPES:
        check_linear(f"awq_w4a16(group_size={group})", 33, 4 * group, 5, dtype, layout=LAYOUT, float32_error=3e-2)


@SPECS
def test_properties(spec):
    """Gaps, leading axes, no tokens and the number of threads change nothing."""
    check_properties(spec, 100, 384, layout=LAYOUT)


@SPECS
def test_only_when_asked_for(spec):
    """Weights are packed for activations as they are unless somebody names this layout."""
    assert preferred_layout("linear", parse_spec(spec), 64, 384, "cpu") == "rows16"


def test_same_weight_as_rows16():
    """The layout holds the bits of rows16, and values of 8 bits are refused in words."""
    here, there = (packed_weight("awq_w4a16", 20, 128, name)[0] for name in (LAYOUT, "rows16"))
    assert all(torch.equal(part, there.parts[name]) for name, part in here.parts.items())
    assert torch.equal(here.dequantize(), there.dequantize())
    spec = "wna16(bits=8)"
    assert "codes of 8 bits" in str(get_layout(LAYOUT, parse_spec(spec)).refuses(parse_spec(spec), 16, 128))
    with pytest.raises(PartsError, match="bits"):
        QuantizedTensor.quantize(torch.randn(16, 128), spec).in_layout(LAYOUT)
