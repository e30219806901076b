"""decode_rows and multiply: what the kernels of a device make of parts is what their format says, for every format."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.formats import parse_spec
from lowbit.ops.encode import decode_rows, multiply
from tests.support import gaussian
from tests.support.specs import SMALL_SPECS

N, K = 256, 256


@pytest.mark.parametrize("scaled", [False, True], ids=["", "pre_quant_scale"])
@pytest.mark.parametrize("spec", SMALL_SPECS)
def test_rows_and_products_are_those_of_the_format(spec, scaled):
    """Some rows of a weight, whose input may be multiplied by a stored vector first, and products with all of it.

    Who multiplies has taken that vector into x before: see `Format`.
    """
    fmt, w = parse_spec(spec), 0.02 * gaussian(N, K)
    parts = fmt.quantize(w)
    if scaled:
        fmt = replace(fmt, pre_quant_scale=True)
        parts["pre_quant_scale"] = 0.5 + torch.rand(K, generator=torch.Generator().manual_seed(1))
    start = fmt.row_multiple
    wanted = fmt.dequantize_rows(parts, K, start, N, torch.float32)
    found = decode_rows(fmt, parts, K, start, N)
    assert (found - wanted).norm() <= 1e-3 * wanted.norm()
    if scaled:
        return
    x = gaussian(5, K, seed=3)
    product = fmt.linear(x, parts, None)
    assert (multiply(fmt, x, parts, None) - product).norm() <= 1e-2 * product.norm()
