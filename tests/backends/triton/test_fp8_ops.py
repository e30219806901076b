from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import explain, use_backend
from lowbit.ops.fp8 import dequantize_per_tensor_fp8, quantize_per_tensor_fp8, stochastic_rounding_fp8
from tests.support.triton_linear import DEVICE, DTYPES, ON_GPU, require

require()

TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SHAPES = ((1,), (3, 5, 7), (16, 64))


def values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random values of every size that the formats hold, and beyond."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * torch.exp(4 * torch.randn(shape, generator=generator))
    x.view(-1)[::7] = 0
    x.view(-1)[::11] = -0.0
    x.view(-1)[5::13] = -6e4
    return x.to(dtype)


def same_bytes(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two tensors are the same in shape, dtype and every bit."""
    alike = found.dtype == wanted.dtype and found.shape == wanted.shape
    return alike and torch.equal(found.cpu().view(torch.uint8), wanted.cpu().view(torch.uint8))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, where a GPU gives infinity in silence
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output_type", TYPES, ids=str)
def test_quantize(output_type, dtype):
    """Codes are the reference's bit for bit, whatever the scale: usual, 0, tiny or huge, in any shape."""
    for shape in SHAPES:
        x = values(shape, dtype)
        for scale in (0.37, 7.0, 0.0, 1e-38, 3e30):
            factor = torch.tensor(scale)
            with use_backend("eager"):
                wanted = quantize_per_tensor_fp8(x, factor, output_type)
            with use_backend("triton"):
                found = quantize_per_tensor_fp8(x.to(DEVICE), factor.to(DEVICE), output_type)
            assert same_bytes(found, wanted), (shape, scale)


@pytest.mark.parametrize("output_type", TYPES, ids=str)
def test_not_finite(output_type):
    """NaN stays NaN, infinities saturate, and neither touches other values; nothing of an empty tensor is written."""
    x = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), -2.0], device=DEVICE)
    noise = torch.zeros(5, dtype=torch.uint8, device=DEVICE)
    largest = torch.finfo(output_type).max
    with use_backend("triton"):
        for found in (
            quantize_per_tensor_fp8(x, torch.ones((), device=DEVICE), output_type),
            stochastic_rounding_fp8(x, noise, output_type),
        ):
            assert bool(found.float()[1].isnan())
            assert found.float()[[0, 2, 3, 4]].tolist() == [1.0, largest, -largest, -2.0]
        assert quantize_per_tensor_fp8(x[:0], torch.ones((), device=DEVICE), output_type).shape == (0,)
        nan = torch.full((1,), float("nan"), device=DEVICE)
        assert bool(quantize_per_tensor_fp8(x, nan, output_type).float().isnan().all())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of signalling NaNs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_dequantize(kind, dtype):
    """All 256 codes times a scale are the reference's values, NaN included."""
    codes = torch.arange(256, dtype=torch.uint8).view(kind)
    scale = torch.tensor([0.0123])
    with use_backend("eager"):
        wanted = dequantize_per_tensor_fp8(codes, scale, dtype)
    with use_backend("triton"):
        found = dequantize_per_tensor_fp8(codes.to(DEVICE), scale.to(DEVICE), dtype)
    torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output_type", TYPES, ids=str)
def test_stochastic_rounding(output_type, dtype):
    """The same random bytes give the reference's codes."""
    for shape in SHAPES:
        x = values(shape, dtype)
        noise = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        with use_backend("eager"):
            wanted = stochastic_rounding_fp8(x, noise, output_type)
        with use_backend("triton"):
            found = stochastic_rounding_fp8(x.to(DEVICE), noise.to(DEVICE), output_type)
        assert same_bytes(found, wanted), shape


@pytest.mark.parametrize("noise", [0, 1, 128, 255])
@pytest.mark.parametrize("output_type", TYPES, ids=str)
def test_stochastic_rounding_of_every_half(output_type, noise):
    """Every float16 rounds as the reference rounds it, those whose rounded logarithm is too large included."""
    x = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)
    noise = torch.full(x.shape, noise, dtype=torch.uint8)
    with use_backend("eager"):
        wanted = stochastic_rounding_fp8(x, noise, output_type)
    with use_backend("triton"):
        found = stochastic_rounding_fp8(x.to(DEVICE), noise.to(DEVICE), output_type)
    assert same_bytes(found, wanted)


def test_refusals():
    """float64, and in the interpreter bfloat16 results, are refused in words."""
    x, scale = torch.ones(4, dtype=torch.float64, device=DEVICE), torch.ones((), device=DEVICE)
    said = explain("quantize_per_tensor_fp8", "*", "", DEVICE.type, (x, scale, TYPES[0]))
    assert any(name.startswith("triton:") and "float64" in why for name, why in said.items()), said
    codes = torch.zeros(4, dtype=torch.uint8, device=DEVICE).view(TYPES[0])
    said = explain("dequantize_per_tensor_fp8", "*", "", DEVICE.type, (codes, scale, torch.float64))
    assert any(name.startswith("triton:") and "the result is float64" in why for name, why in said.items()), said
    if not ON_GPU:
        said = explain("dequantize_per_tensor_fp8", "*", "", DEVICE.type, (codes, scale, torch.bfloat16))
        assert any(name.startswith("triton:") and "rounds" in why for name, why in said.items()), said


@pytest.mark.gpu
@pytest.mark.parametrize("output_type", TYPES, ids=str)
def test_large(output_type):
    """A tensor as large as activations of real layers gets the reference's codes, in bfloat16."""
    x = values((4096, 3072), torch.bfloat16)
    noise = torch.randint(0, 256, x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    scale = torch.tensor(0.11)
    with use_backend("eager"):
        wanted = quantize_per_tensor_fp8(x, scale, output_type), stochastic_rounding_fp8(x, noise, output_type)
        back = dequantize_per_tensor_fp8(wanted[0], scale, torch.bfloat16)
    with use_backend("triton"):
        assert same_bytes(quantize_per_tensor_fp8(x.to(DEVICE), scale.to(DEVICE), output_type), wanted[0])
        assert same_bytes(stochastic_rounding_fp8(x.to(DEVICE), noise.to(DEVICE), output_type), wanted[1])
        assert same_bytes(dequantize_per_tensor_fp8(wanted[0].to(DEVICE), scale.to(DEVICE), torch.bfloat16), back)
