from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import use_backend
from lowbit.tensor import QuantizedTensor
from tests.support.cpu_linear import DTYPES, ROWS, TOKENS, check_linear, check_properties

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product(dtype):
    """The product equals that of the dequantized weight for odd numbers of rows, of groups and of tokens."""
    for n in ROWS:
        check_linear("mxfp4", n, 288, 3, dtype)
    for m in TOKENS:
        check_linear("mxfp4", 35, 32, m, dtype, bias=m % 2 == 0)
        check_linear("mxfp4", 35, 352, m, dtype, bias=m % 2 == 1)


def test_every_scale():
    """Each of the 256 scales is the power of two it stands for: 0 is 2**-127, 255 NaN, and 2**127 does not overflow."""
    plain = QuantizedTensor.quantize(torch.zeros(256, 32), "mxfp4", dtype=torch.float32)
    plain.parts["qdata"][:, 3] = 2  # 1.0 in column 6
    plain.parts["scale"].copy_(torch.arange(256, dtype=torch.uint8)[:, None])
    packed = plain.in_layout("rows16")
    wanted = torch.tensor([2.0 ** (code - 127) for code in range(255)] + [float("nan")], dtype=torch.float32)
    x = torch.zeros(40, 32)
    x[:, 6] = 1.0
    for m in (1, 40):
        with use_backend("cpu"), torch.inference_mode():
            found = torch.nn.functional.linear(x[:m], packed)
        assert torch.equal(found.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0).expand(m, 256))


def test_properties():
    """Gaps, leading axes, no tokens and the number of threads change nothing."""
    check_properties("mxfp4", 100, 512)
    check_properties("mxfp4", 16, 32)
