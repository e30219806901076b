from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import use_backend
from lowbit.tensor import QuantizedTensor
from tests.support.cpu_linear import DTYPES, ROWS, TOKENS, check_linear, check_properties

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fields", ["", "global_scale_divides=True", "row_global_scale=True",
                                    "global_scale_divides=True,row_global_scale=True"])  # fmt: skip
def test_product(fields, dtype):
    """The product equals that of the dequantized weight, whatever the global scale, odd numbers of rows and tokens."""
    spec = f"nvfp4({fields})" if fields else "nvfp4"
    for n in ROWS:
        check_linear(spec, n, 272, 3, dtype)
    for m in TOKENS:
        check_linear(spec, 35, 16, m, dtype, bias=m % 2 == 0)
        check_linear(spec, 35, 304, m, dtype, bias=m % 2 == 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code(dtype):
    """Each of the 16 codes and of the 256 scales is what it stands for, NaN too: exactly where activations are float32.

    Where they are integers, to the last bit of the output or 2**-15 of the group's largest.
    """
    plain = QuantizedTensor.quantize(torch.zeros(256, 16), "nvfp4", dtype=torch.float32)
    plain.parts["qdata"].copy_(torch.arange(8, dtype=torch.uint8) * 34 + 16)  # nibbles 0 1, 2 3, 4 5, ...
    plain.parts["scale"].copy_(torch.arange(256, dtype=torch.uint8)[:, None].view(torch.float8_e4m3fn))
    plain.parts["global_scale"].fill_(2.0**-3)
    weight, packed = plain.dequantize(torch.float32), plain.in_layout("rows16")
    largest = weight.abs().amax(dim=1).nan_to_num()
    for tokens in (1, 3):  # 16 and 48 of them: two ways for 16-bit activations
        x = torch.eye(16, dtype=dtype).repeat(tokens, 1)
        with use_backend("cpu"), torch.inference_mode():
            found = torch.nn.functional.linear(x, packed).float()
        wanted = weight.t().repeat(tokens, 1)
        assert torch.equal(found.isnan(), wanted.isnan())
        wrong = (found - wanted).abs().nan_to_num(nan=0.0)
        exact = dtype == torch.float32
        allowed = torch.zeros_like(wanted) if exact else wanted.abs().nan_to_num() * torch.finfo(dtype).eps
        assert bool((wrong <= allowed + (0.0 if exact else largest * 2.0**-15)).all())


def test_properties():
    """Gaps, leading axes, no tokens and the number of threads change nothing."""
    check_properties("nvfp4", 100, 512)
    check_properties("nvfp4(row_global_scale=True)", 17, 48)
