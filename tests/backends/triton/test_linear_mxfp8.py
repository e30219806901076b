from __future__ import annotations

import pytest
import torch

from tests.support.triton_linear import DTYPES, ROWS, check_linear, check_properties, require

require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product(dtype):
    """The product equals that of the dequantized weight for odd numbers of rows and of tokens."""
    for n in ROWS:
        check_linear("mxfp8", n, 256, 3, dtype, layout="")
    for m in (1, 8, 17, 63):
        check_linear("mxfp8", 35, 384, m, dtype, layout="", bias=m % 2 == 0)


@pytest.mark.parametrize("k", [1, 32, 77, 260])
def test_ragged_columns(k):
    """A last group cut short is multiplied as far as it goes, whether scales fill words or not."""
    for m in (1, 40):
        check_linear("mxfp8", 33, k, m, torch.float16, layout="")


def test_many_tokens():
    """With some hundred tokens, whose weight is decoded beforehand, the product is right."""
    check_linear("mxfp8", 17, 128, 512, torch.float16, layout="")


def test_properties():
    """Gaps, leading axes and no tokens change nothing, and every call gives the same bits."""
    check_properties("mxfp8", 70, 256, layout="")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large(dtype):
    """Shapes of real layers give the right product, for numbers of tokens on both sides of every crossover."""
    for m in (1, 7, 16, 33, 300, 1500):
        check_linear("mxfp8", 12288, 3072, m, dtype, layout="")
