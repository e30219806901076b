from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowbit.formats import parse_spec
from tests.support.cpu_linear import activations, relative_error
from tests.support.triton_linear import DEVICE, DTYPES, require
from tests.support.triton_rows import in_layout, random_parts, refusal, run

require()
from lowbit.backends.triton import decoded_linear  # noqa: E402  (needs Triton)

CASES = [
    ("awq_w4a16", ""), ("awq_w4a16", "words128"), ("wna16(zero_point=True)", "words128"), ("nvfp4", ""),
    ("nvfp4(row_global_scale=True)", "words128"), ("int8", ""), ("fp8_e4m3(granularity=block)", ""),
]  # fmt: skip


def case(spec: str, layout: str, n: int, k: int, dtype: torch.dtype):
    """A format, parts where kernels run, and the weight they stand for, without NaN."""
    fmt = parse_spec(spec)
    made = fmt.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(n)))
    return fmt, in_layout(fmt, made, layout), fmt.dequantize(made, (n, k), dtype).to(DEVICE)


@pytest.mark.parametrize(("spec", "layout"), CASES)
def test_product_is_that_of_the_decoded_weight(spec, layout):
    """One piece gives the bits of F.linear on the dequantized weight, for any leading axes."""
    for dtype in DTYPES:
        fmt, parts, weight = case(spec, layout, 40, 256, dtype)
        bias = torch.randn(40, device=DEVICE)
        for x in (
            activations(7, 256, dtype),
            activations(6, 256, dtype).view(2, 3, 256),
            activations(1, 256, dtype)[0],
        ):
            moved = x.to(DEVICE)
            found = decoded_linear.product(fmt, moved, parts, bias, layout)
            assert torch.equal(found, F.linear(moved, weight, bias.to(dtype)))
        assert torch.equal(decoded_linear.product(fmt, moved, parts, None, layout), F.linear(moved, weight))


@pytest.mark.parametrize(("spec", "layout"), CASES)
def test_pieces(spec, layout, monkeypatch):
    """A weight decoded in pieces of any number of rows gives the same product, and no token gives none."""
    fmt, parts, weight = case(spec, layout, 150, 256, torch.float32)
    x, bias = activations(9, 256, torch.float32).view(3, 3, 256).to(DEVICE), torch.randn(150, device=DEVICE)
    monkeypatch.setattr(decoded_linear, "ELEMENTS", 256 * 83)
    for added in (bias, None):
        found = decoded_linear.product(fmt, x, parts, added, layout)
        torch.testing.assert_close(found, F.linear(x, weight, added), rtol=1e-5, atol=1e-4)
    assert decoded_linear.product(fmt, x[:0], parts, bias, layout).shape == (0, 3, 150)


@pytest.mark.parametrize(("spec", "layout"), CASES)
def test_input_gradient(spec, layout, monkeypatch):
    """The registered gradient is grad times the weight, in one piece and in several, for any leading axes."""
    fmt, parts, weight = case(spec, layout, 150, 256, torch.float32)
    grad = activations(6, 150, torch.float32).view(2, 3, 150).to(DEVICE)
    for elements in (1 << 20, 256 * 83):
        monkeypatch.setattr(decoded_linear, "ELEMENTS", elements)
        found = run("linear_input_gradient", spec, layout, fmt, grad, parts, 256)
        assert relative_error(found, grad.cpu().double() @ weight.cpu().double()) <= 1e-6


def test_refusal():
    """What the decoder cannot read is refused in its words."""
    fmt = parse_spec("wna16(bits=3)")
    parts = in_layout(fmt, random_parts(fmt, 4, 64), "")
    x = torch.zeros(1, 64, dtype=torch.float16, device=DEVICE)
    assert "3 bits" in decoded_linear.refuses(fmt, x, parts, None, "")
    assert "3 bits" in refusal("linear_input_gradient", "wna16", "", fmt, x[:, :4], parts, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["awq_w4a16", "nvfp4"])
def test_large(spec):
    """A weight of several pieces at their real size gives the right product."""
    fmt, parts, weight = case(spec, "words128", 12_288, 18_432, torch.bfloat16)
    x = activations(300, 18_432, torch.bfloat16).to(DEVICE)
    found = decoded_linear.product(fmt, x, parts, None, "words128")
    torch.testing.assert_close(found, F.linear(x, weight), rtol=2e-2, atol=1.0)
