from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowbit.dispatch import explain, use_backend
from lowbit.ops.mxfp8 import dequantize_mxfp8, quantize_mxfp8
from tests.support.triton_linear import DEVICE, DTYPES, require

require()
mxfp8_ops = pytest.importorskip("lowbit.backends.triton.mxfp8_ops", exc_type=ImportError)

SHAPES = ((1, 32, False), (17, 96, False), (5, 37, True), (130, 32, False), (15, 1056, True))


def values(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Random rows of very different sizes, one of them zeros, one the smallest numbers there are."""
    generator = torch.Generator().manual_seed(m + k)
    x = torch.randn(m, k, generator=generator) * torch.exp(9 * torch.randn(m, 1, generator=generator)).clamp(max=1e4)
    x[0], x[-1, ::3] = 0, -0.0
    if m > 2 and dtype == torch.float32:
        x[1], x[2] = 1e-41, 3e38
    return x.to(dtype)


def same_bytes(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two tensors are the same in shape, dtype and every bit."""
    alike = found.dtype == wanted.dtype and found.shape == wanted.shape
    return alike and torch.equal(found.cpu().view(torch.uint8), wanted.cpu().view(torch.uint8))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # numpy's; a GPU gives infinity
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k", "pad"), SHAPES)
def test_both_ways(m, k, pad, dtype):
    """Codes, swizzled scales, padding and the values they decode to are the reference's."""
    x = values(m, k, dtype)
    with use_backend("eager"):
        wanted = quantize_mxfp8(x, pad_32x=pad)
        back = dequantize_mxfp8(*wanted, dtype)
    with use_backend("triton"):
        found = quantize_mxfp8(x.to(DEVICE), pad_32x=pad)
        values_found = dequantize_mxfp8(*found, dtype)
    assert same_bytes(found[0], wanted[0])
    assert same_bytes(found[1], wanted[1])
    assert torch.equal(values_found.cpu(), back)


def test_not_finite():
    """NaN and infinities give the reference's codes and scales and touch no other group."""
    x = values(9, 96, torch.float16).float()
    x[0, 20], x[1, 3], x[3, 40] = float("nan"), -float("inf"), float("inf")
    with use_backend("eager"):
        wanted = quantize_mxfp8(x)
    with use_backend("triton"):
        found = quantize_mxfp8(x.to(DEVICE))
    assert same_bytes(found[1], wanted[1])
    assert torch.equal(found[0].float().cpu().nan_to_num(), wanted[0].float().nan_to_num())
    assert torch.equal(found[0].float().cpu().isnan(), wanted[0].float().isnan())


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
def test_activation(activation):
    """An activation fused with the quantizer gives what it gives alone, but for its last bits."""
    x = torch.randn(33, 128, generator=torch.Generator().manual_seed(0)) * 3
    if activation == "swiglu":
        gate, up = x.chunk(2, dim=1)
        applied = F.silu(gate) * up
    else:
        applied = F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    with use_backend("eager"):
        wanted = dequantize_mxfp8(*quantize_mxfp8(applied), torch.float32)
    found = mxfp8_ops.quantize_activated(x.to(DEVICE), activation)
    with use_backend("eager"):
        back = dequantize_mxfp8(*found, torch.float32).cpu()
    same = torch.isclose(back, wanted, rtol=1e-6, atol=1e-9)
    assert same.float().mean() > 0.995  # the others were next to a tie
    assert (back - wanted).norm() <= 0.01 * wanted.norm()


def test_properties():
    """Gaps in x and no rows at all change nothing; float64 is refused in words."""
    x = values(9, 128, torch.float16).to(DEVICE)
    with use_backend("triton"):
        whole, gaps = quantize_mxfp8(x[:, ::2].contiguous()), quantize_mxfp8(x[:, ::2])
        assert same_bytes(whole[0], gaps[0])
        assert same_bytes(whole[1], gaps[1])
        codes, scales = quantize_mxfp8(x[:0])
        assert codes.shape == (0, 128)
        assert dequantize_mxfp8(codes, scales, torch.float32).shape == (0, 128)
    said = explain("quantize_mxfp8", "*", "", DEVICE.type, (x.double(), False))
    assert any(name.startswith("triton:") and "float64" in why for name, why in said.items()), said


@pytest.mark.gpu
def test_large():
    """Activations as large as those of real layers get the reference's codes and scales, in bfloat16."""
    x = values(4000, 3072, torch.bfloat16)
    with use_backend("eager"):
        wanted = quantize_mxfp8(x)
        back = dequantize_mxfp8(*wanted)
    with use_backend("triton"):
        found = quantize_mxfp8(x.to(DEVICE))
        assert torch.equal(dequantize_mxfp8(*found).cpu(), back)
    assert same_bytes(found[0], wanted[0])
    assert same_bytes(found[1], wanted[1])
