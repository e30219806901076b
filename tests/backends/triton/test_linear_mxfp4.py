from __future__ import annotations

import pytest
import torch

from lowbit import QuantizedTensor
from lowbit.dispatch import use_backend
from tests.support.cpu_linear import activations, relative_error
from tests.support.triton_linear import DEVICE, DTYPES, ROWS, TOKENS, check_linear, check_properties, require

require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product(dtype):
    """The product equals that of the dequantized weight for odd numbers of rows and of tokens."""
    for n in ROWS:
        check_linear("mxfp4", n, 256, 3, dtype, layout="words128")
    for m in TOKENS:
        check_linear("mxfp4", 35, 384, m, dtype, layout="words128", bias=m % 2 == 0)


def test_scales_at_both_ends():
    """Powers of two far from 1 are right in float32, a NaN scale makes a NaN of its row, and of no other."""
    for exponent in (-120, 120):
        w = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)) * 2.0**exponent
        plain = QuantizedTensor.quantize(w, "mxfp4", dtype=torch.float32)
        x = activations(3, 128, torch.float32) * 2.0 ** (-exponent / 2)
        wanted = x.double() @ plain.dequantize(torch.float32).double().t()
        assert relative_error(_linear(x, plain), wanted) <= 1e-5
    parts = dict(plain.parts)
    parts["scale"] = parts["scale"].clone()
    parts["scale"][2, 1] = 255
    found = _linear(x, QuantizedTensor.from_parts(parts, "mxfp4", (5, 128), torch.float32))
    assert found.isnan().all(0).tolist() == [row == 2 for row in range(5)]
    assert not found[:, [0, 1, 3, 4]].isnan().any()


def _linear(x, plain):
    packed = plain.to(DEVICE).in_layout("words128")
    with use_backend("triton"), torch.inference_mode():
        return torch.nn.functional.linear(x.to(DEVICE), packed).cpu()


def test_properties():
    """Gaps, leading axes and no tokens change nothing, and every call gives the same bits."""
    check_properties("mxfp4", 36, 384, layout="words128")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large(dtype):
    """Shapes of real layers give the right product, for numbers of tokens on both sides of every crossover."""
    for m in (1, 7, 16, 33, 300, 1500):
        check_linear("mxfp4", 12288, 3072, m, dtype, layout="words128")
