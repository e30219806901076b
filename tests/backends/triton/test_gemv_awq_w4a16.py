from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import explain, use_backend
from lowbit.formats import parse_spec
from lowbit.ops.awq import gemv_awq_w4a16
from tests.support.cpu_linear import activations, relative_error
from tests.support.triton_linear import DEVICE, DTYPES, require
from tests.support.triton_rows import in_layout

require()


def weight(n: int, k: int, group: int, dtype: torch.dtype):
    """Codes, scales and zeros where kernels run, and the weight in float64."""
    fmt = parse_spec(f"awq_w4a16(group_size={group})")
    parts = fmt.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(n)).to(dtype))
    return in_layout(fmt, parts, "").values(), fmt.dequantize(parts, (n, k), torch.float32).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_product(group, dtype):
    """The named op gives the product of the dequantized weight in the dtype of x, with and without a bias."""
    for n, m in ((33, 1), (7, 12)):
        (codes, scales, zeros), wanted = weight(n, 256, group, torch.float16)
        x, bias = activations(m, 256, dtype), torch.randn(n).half()
        with use_backend("triton"), torch.inference_mode():
            plain = gemv_awq_w4a16(x.to(DEVICE), codes, scales, zeros, None, group)
            added = gemv_awq_w4a16(x.to(DEVICE).view(1, m, 256), codes, scales, zeros, bias.to(DEVICE), group)
        assert plain.dtype == dtype
        limit = 1e-5 if dtype == torch.float32 else 6e-3
        assert relative_error(plain.cpu(), x.double() @ wanted.t()) <= limit
        assert relative_error(added[0].cpu(), x.double() @ wanted.t() + bias.double()) <= limit


def test_gradient_of_the_input():
    """x gets the gradient of the dequantized weight."""
    (codes, scales, zeros), wanted = weight(33, 256, 64, torch.float32)
    x = activations(5, 256, torch.float32).to(DEVICE).requires_grad_()
    with use_backend("triton"):
        gemv_awq_w4a16(x, codes, scales, zeros, None, 64).sum().backward()
    assert relative_error(x.grad.cpu(), wanted.sum(0).expand(5, -1)) <= 1e-5


def test_refusal():
    """A group that ends within a byte is refused in words."""
    (codes, scales, zeros), _ = weight(4, 6, 3, torch.float16)
    x = torch.zeros((1, 6), dtype=torch.float16, device=DEVICE)
    with use_backend("triton"):
        said = explain("gemv_awq_w4a16", "*", "", DEVICE.type, (x, codes, scales, zeros, None, 3))
    assert "groups of 3 columns" in said["triton:gemv_awq_w4a16"]
