from __future__ import annotations

import pytest
import torch

from tests.support.triton_linear import DTYPES, ROWS, TOKENS, check_linear, check_properties, require

require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", ["nvfp4", "nvfp4(row_global_scale=True)", "nvfp4(global_scale_divides=True)"])
def test_product(spec, dtype):
    """The product equals that of the dequantized weight for every kind of global scale, odd rows and tokens."""
    for n in ROWS:
        check_linear(spec, n, 256, 3, dtype, layout="words128")
    for m in TOKENS:
        check_linear(spec, 35, 384, m, dtype, layout="words128", bias=m % 2 == 0)


def test_properties():
    """Gaps, leading axes and no tokens change nothing, and every call gives the same bits."""
    check_properties("nvfp4", 36, 384, layout="words128")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large(dtype):
    """Shapes of real layers give the right product, for numbers of tokens on both sides of every crossover."""
    for m in (1, 7, 16, 33, 300, 1500):
        check_linear("nvfp4", 12288, 3072, m, dtype, layout="words128")
