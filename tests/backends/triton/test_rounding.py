from __future__ import annotations

import pytest
import torch

from lowbit.numerics.floats import e2m1_codes, round_to_e2m1, stochastic_to_fp8, to_fp8
from tests.support.triton_linear import DEVICE, require

require()
rounding = pytest.importorskip("lowbit.backends.triton.rounding", exc_type=ImportError)
triton = pytest.importorskip("triton")
tl = triton.language

KINDS = {"e2m1": rounding.E2M1, "e4m3": rounding.E4M3, "e5m2": rounding.E5M2}
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@triton.jit
def _codes(x, noise, out, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at)
    if noise is None:
        tl.store(out + at, rounding.float_code(tl.abs(value), None, KIND) | rounding.sign_bit(value, 7))
    else:
        tl.store(out + at, rounding.float_code(tl.abs(value), tl.load(noise + at), KIND) | rounding.sign_bit(value, 7))


@triton.jit
def _quotients(x, divisor, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    below = tl.load(divisor + at)
    tl.store(out + at, rounding.quotient(tl.load(x + at), below, tl.div_rn(1.0, below)))


@triton.jit
def _stored(x, at, out, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out + index, rounding.store_rounded(at + index, tl.load(x + index), index < BLOCK))


def near_codes(kind: str) -> torch.Tensor:
    """Every value of a format up to its largest, every tie, and their neighbours, with both signs."""
    if kind == "e2m1":
        values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    else:
        values = torch.arange(127, dtype=torch.uint8).view(FP8[kind]).float()
        values = values[values.isfinite()]
    ties = (values[1:] + values[:-1]) / 2
    middle = torch.cat([values, ties])
    several = torch.cat([middle, torch.nextafter(middle, torch.tensor(0.0)), torch.nextafter(middle, values[-1])])
    return torch.cat([several, -several])


def blocks(values: torch.Tensor) -> torch.Tensor:
    """Values with copies of the first up to a power of two, on the device."""
    size = 1 << (values.numel() - 1).bit_length()
    return torch.cat([values, values[:1].expand(size - values.numel())]).to(DEVICE)


@pytest.mark.parametrize("kind", KINDS)
def test_codes(kind):
    """Every value of a format, every tie between two and all their neighbours round as the reference rounds them."""
    x = blocks(near_codes(kind))
    out = torch.empty(x.shape, dtype=torch.int32, device=DEVICE)
    _codes[(1,)](x, None, out, KINDS[kind], x.numel())
    if kind == "e2m1":
        wanted = e2m1_codes(round_to_e2m1(x)).int()
        wanted = (wanted & 7) | ((wanted & 8) << 4)
    else:
        wanted = to_fp8(x, FP8[kind]).view(torch.uint8).int()
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("kind", FP8)
def test_stochastic_codes(kind):
    """With the same noise the same codes come out as of the reference, subnormal ones included."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([near_codes(kind), torch.randn(500, generator=generator) * 2.0**-7])
    x = blocks(x)
    noise = torch.rand(x.shape, generator=generator).to(DEVICE)
    out = torch.empty(x.shape, dtype=torch.int32, device=DEVICE)
    _codes[(1,)](x, noise, out, KINDS[kind], x.numel())
    assert torch.equal(out, stochastic_to_fp8(x, FP8[kind], noise).view(torch.uint8).int())


def test_quotient():
    """Quotients are those of IEEE division, on random bits, near ties of codes and where mantissas are extreme."""
    generator = torch.Generator().manual_seed(0)
    count = 1 << 15
    x = torch.randn(count, generator=generator) * torch.exp2(torch.randint(-20, 20, (count,), generator=generator))
    divisor = torch.rand(count, generator=generator) + 1
    divisor[::3] = 2 - divisor[::3] * 2.0**-20
    divisor *= torch.exp2(torch.randint(-30, 30, (count,), generator=generator))
    x[::2] = torch.nextafter(divisor[::2] * 2.5, x[::2])
    x, divisor = x.to(DEVICE), divisor.to(DEVICE)
    out = torch.empty_like(x)
    _quotients[(1,)](x, divisor, out, count)
    assert torch.equal(out, x / divisor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_store_rounded(dtype):
    """Values are stored, and given back, rounded half to even, as a cast rounds them."""
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    x[:512] = (x[:512].view(torch.int32) & ~0xFFFF | 0x8000).view(torch.float32)  # ties of bfloat16
    x = x.to(DEVICE)
    at, out = torch.empty(x.shape, dtype=dtype, device=DEVICE), torch.empty_like(x)
    _stored[(1,)](x, at.view(torch.int16) if dtype == torch.bfloat16 else at, out, x.numel())
    assert torch.equal(at, x.to(dtype))
    assert torch.equal(out, x.to(dtype).float())
