from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowbit.dispatch import explain, use_backend
from lowbit.ops.nvfp4 import dequantize_nvfp4, quantize_nvfp4
from tests.support.triton_linear import DEVICE, DTYPES, require

require()
nvfp4_ops = pytest.importorskip("lowbit.backends.triton.nvfp4_ops", exc_type=ImportError)

SHAPES = ((1, 16, False), (17, 48, False), (5, 37, True), (130, 32, False), (15, 576, True))
NUMPY_SPEAKS = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # where a GPU is silent


def values(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Random rows of different sizes, one of them zeros."""
    generator = torch.Generator().manual_seed(m + k)
    x = torch.randn(m, k, generator=generator) * torch.exp(2 * torch.randn(m, 1, generator=generator))
    x[0], x[-1, ::3] = 0, -0.0
    return x.to(dtype)


def same_bytes(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two tensors are the same in shape, dtype and every bit."""
    alike = found.dtype == wanted.dtype and found.shape == wanted.shape
    return alike and torch.equal(found.cpu().view(torch.uint8), wanted.cpu().view(torch.uint8))


@NUMPY_SPEAKS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k", "pad"), SHAPES)
def test_both_ways(m, k, pad, dtype):
    """Codes, swizzled scales, padding and the values they decode to are the reference's, in both orders of nibbles."""
    x = values(m, k, dtype)
    for number, scale in enumerate((0.01, 1.0, 0.0, 1e-20) if m < 10 else (0.1,)):
        factor, high = torch.tensor(scale), number % 2 == 0
        with use_backend("eager"):
            wanted = quantize_nvfp4(x, factor, pad_16x=pad, hi_first=high)
            back = dequantize_nvfp4(wanted[0], factor, wanted[1], dtype, hi_first=high)
        with use_backend("triton"):
            found = quantize_nvfp4(x.to(DEVICE), factor.to(DEVICE), pad_16x=pad, hi_first=high)
            values_found = dequantize_nvfp4(found[0], factor.to(DEVICE), found[1], dtype, hi_first=high)
        assert same_bytes(found[0], wanted[0]), scale
        assert same_bytes(found[1], wanted[1]), scale
        assert torch.equal(values_found.cpu(), back), scale


@NUMPY_SPEAKS
def test_not_finite():
    """NaN makes the scale of its group NaN and touches no other group; an infinity saturates."""
    x = torch.ones(3, 64, device=DEVICE)
    x[0, 20], x[1, 3] = float("nan"), -float("inf")
    one = torch.ones((), device=DEVICE)
    with use_backend("triton"):
        codes, scale = quantize_nvfp4(x, one)
        back = dequantize_nvfp4(codes, one, scale, torch.float32)
    assert bool(back[0, 16:32].isnan().all())
    back[0, 16:32] = 1
    assert back[1, 3].item() == -6 * 448
    assert back[1, :3].tolist() == [0, 0, 0]
    back[1, :16] = 1
    torch.testing.assert_close(back, torch.ones_like(back), rtol=0.07, atol=0)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
def test_activation(activation):
    """An activation fused with the quantizer gives what it gives alone, but for its last bits."""
    x = values(33, 128, torch.float32).clamp(-8, 8)
    scale = torch.tensor(0.003)
    if activation == "swiglu":
        gate, up = x.chunk(2, dim=1)
        applied = F.silu(gate) * up
    else:
        applied = F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    with use_backend("eager"):
        wanted = dequantize_nvfp4(*_with(scale, quantize_nvfp4(applied, scale)), torch.float32)
    found = nvfp4_ops.quantize_activated(x.to(DEVICE), scale.to(DEVICE), activation)
    with use_backend("eager"):
        back = dequantize_nvfp4(*_with(scale.to(DEVICE), found), torch.float32).cpu()
    same = torch.isclose(back, wanted, rtol=1e-6, atol=1e-9)
    assert same.float().mean() > 0.995  # the others were next to a tie
    assert (back - wanted).norm() <= 0.02 * wanted.norm()


def _with(scale, quantized):
    codes, scales = quantized
    return codes, scale, scales


def test_properties():
    """Gaps in x and no rows at all change nothing; float64 is refused in words."""
    x, scale = values(9, 128, torch.float16).to(DEVICE), torch.tensor(0.1, device=DEVICE)
    with use_backend("triton"):
        whole = quantize_nvfp4(x[:, ::2].contiguous(), scale)
        gaps = quantize_nvfp4(x[:, ::2], scale)
        assert same_bytes(whole[0], gaps[0])
        assert same_bytes(whole[1], gaps[1])
        codes, scales = quantize_nvfp4(x[:0], scale)
        assert codes.shape == (0, 64)
        assert dequantize_nvfp4(codes, scale, scales, torch.float32).shape == (0, 128)
    said = explain("quantize_nvfp4", "*", "", DEVICE.type, (x.double(), scale, 0.0, False, True))
    assert any(name.startswith("triton:") and "float64" in why for name, why in said.items()), said


@pytest.mark.gpu
def test_large():
    """Activations as large as those of real layers get the reference's codes and scales, in bfloat16."""
    x, scale = values(4000, 3072, torch.bfloat16), torch.tensor(0.02)
    with use_backend("eager"):
        wanted = quantize_nvfp4(x, scale)
        back = dequantize_nvfp4(wanted[0], scale, wanted[1])
    with use_backend("triton"):
        found = quantize_nvfp4(x.to(DEVICE), scale.to(DEVICE))
        assert torch.equal(dequantize_nvfp4(found[0], scale.to(DEVICE), found[1]).cpu(), back)
    assert same_bytes(found[0], wanted[0])
    assert same_bytes(found[1], wanted[1])
