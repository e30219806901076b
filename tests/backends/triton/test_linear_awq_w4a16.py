from __future__ import annotations

import pytest
import torch

from tests.support.triton_linear import DTYPES, ROWS, TOKENS, check_linear, check_properties, require

require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
def test_product(group, dtype):
    """The product equals that of the dequantized weight for every group size, odd numbers of rows and of tokens."""
    spec = f"awq_w4a16(group_size={group})"
    for n in ROWS:
        check_linear(spec, n, 256, 3, dtype, layout="words128")
    for m in TOKENS:
        check_linear(spec, 35, 512, m, dtype, layout="words128", bias=m % 2 == 0)


def test_properties():
    """Gaps, leading axes and no tokens change nothing, and every call gives the same bits."""
    check_properties("awq_w4a16", 36, 512, layout="words128")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large(dtype):
    """Shapes of real layers give the right product, for numbers of tokens on both sides of every crossover."""
    for m in (1, 7, 16, 33, 300, 1500):
        check_linear("awq_w4a16", 18432, 3072, m, dtype, layout="words128")
