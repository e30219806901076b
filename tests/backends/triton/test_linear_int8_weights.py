from __future__ import annotations

import pytest
import torch

from tests.support.triton_linear import DTYPES, ROWS, check_linear, check_properties, require

require()

SPECS = (
    "int8(activations=none)", "int8(activations=none,granularity=tensor)", "int8(activations=none,granularity=block)",
    "int8(activations=none,rotation=64)",
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_product(spec, dtype):
    """The product equals that of the dequantized weight for every granularity, rotated or not, odd rows and tokens."""
    for n in ROWS:
        check_linear(spec, n, 128, 3, dtype, layout="")
    for m in (1, 17, 40):
        check_linear(spec, 35, 192, m, dtype, layout="", bias=m % 2 == 0)


@pytest.mark.parametrize("k", [1, 4, 77, 260])
def test_ragged_columns(k):
    """Any number of columns works, whether words of codes fit in a row or not."""
    for spec, m in ((SPECS[0], 1), (SPECS[2], 40)):
        check_linear(spec, 33, k, m, torch.float16, layout="")


def test_many_tokens():
    """With some hundred tokens, whose weight is decoded beforehand, the product is right."""
    for spec in SPECS:
        check_linear(spec, 17, 128, 512, torch.float16, layout="")


def test_properties():
    """Gaps, leading axes and no tokens change nothing, and every call gives the same bits."""
    check_properties(SPECS[0], 70, 256, layout="")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_large(spec, dtype):
    """Shapes of real layers give the right product, for numbers of tokens on both sides of every crossover."""
    for m in (1, 7, 16, 33, 300, 1500):
        check_linear(spec, 12288, 3072, m, dtype, layout="")
