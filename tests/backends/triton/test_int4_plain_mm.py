from __future__ import annotations

import numpy as np
import pytest
import torch

from lowbit.backends.eager.int4_plain import int4_plain_mm as eager
from lowbit.dispatch import select, use_backend
from lowbit.errors import UnsupportedError
from lowbit.layouts.coalesced_int4 import TAG
from lowbit.ops import int4_plain_mm
from tests.support.cpu_linear import activations, relative_error
from tests.support.ptx import run
from tests.support.triton_linear import DEVICE, DTYPES, ON_GPU, require

require()

from lowbit.backends.triton.int4_plain_mm import NIBBLES  # noqa: E402  (Triton may not be installed)

SCALES = (torch.float16, torch.float32, torch.bfloat16)


def operands(n, k, group, dtype=torch.float16):
    """Random codes, scales, and zero points that are not integers."""
    generator = torch.Generator().manual_seed(n + k + group)
    qdata = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(n, k // group, generator=generator) + 0.5).div(32).to(dtype)
    zero = (torch.rand(n, k // group, generator=generator) * 15).to(dtype)
    return tuple(part.to(DEVICE) for part in (qdata, scale, zero))


def multiply(x, weight, group, bias=None):
    """The product by the Triton kernel."""
    with use_backend("triton"):
        return int4_plain_mm(x, *weight, bias, group_size=group, layout=TAG)


def check(n, k, group, m, dtype, scale_dtype=torch.float16):
    """Assert that the kernel's result is eager's: in float32 but for the order of sums, else but for one rounding."""
    weight, x = operands(n, k, group, scale_dtype), activations(m, k, dtype).to(DEVICE)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype) if m % 2 else None
    found = multiply(x, weight, group, bias)
    wanted = eager(x, *weight, bias, group)
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    tolerance = select("int4_plain_mm", "*", "", DEVICE.type, (x, *weight, bias, group)).tolerance
    limit = 1e-5 if dtype == torch.float32 else tolerance
    assert relative_error(found, wanted.double()) <= limit, (n, k, group, m, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [8, 16, 32, 64, 256])
def test_equals_eager(group, dtype):
    """Every group size, scales of every dtype, odd numbers of rows and of tokens give eager's product."""
    for n, m, scale_dtype in zip((1, 15, 35), (3, 1, 40), SCALES, strict=True):
        check(n, max(group, 128), group, m, dtype, scale_dtype)


@pytest.mark.parametrize(("k", "group"), [(32, 32), (96, 32), (160, 8), (192, 64), (512, 512)])
def test_columns(k, group):
    """Any number of whole blocks of columns works, and groups as wide as a row."""
    check(33, k, group, 5, torch.float32)


def test_integers_are_exact():
    """With scales of 1 every value is an integer below 2**24, and the result is the integer product itself."""
    qdata, scale, zero = operands(33, 256, 32, torch.float32)
    x = torch.randint(-127, 128, (6, 256), generator=torch.Generator().manual_seed(1)).float().to(DEVICE)
    x[:, ::32] = 127
    weight = (qdata, torch.ones_like(scale), zero.round())
    assert torch.equal(multiply(x, weight, 32), eager(x, *weight, None, 32))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-44])
def test_extreme_activations(value):
    """What is not finite makes its own row not finite and no other; the smallest numbers count as zero."""
    x, weight = torch.ones(2, 256, device=DEVICE), operands(24, 256, 32)
    x[0] = 0.0
    x[0, 40] = value
    y = multiply(x, weight, 32)
    assert bool(y[1].isfinite().all())
    assert bool(y[0].isfinite().any()) == (value == 1e-44)


def test_ptx_of_nibbles():
    """The PTX parts the codes of even columns from those of odd ones."""
    words = np.random.default_rng(0).integers(0, 1 << 32, 1000, dtype=np.uint32)
    found = run(NIBBLES.value, {2: words})
    assert np.array_equal(found[0].view(np.uint8), words.view(np.uint8) & 15)
    assert np.array_equal(found[1].view(np.uint8), words.view(np.uint8) >> 4)


def test_properties():
    """Leading axes, gaps in x and no tokens change nothing, and every call gives the same bits."""
    weight = operands(70, 256, 64)
    assert multiply(torch.ones(2, 0, 256, device=DEVICE), weight, 64).shape == (2, 0, 70)
    for m in (1, 40):
        x = activations(m, 256, torch.float16).to(DEVICE)
        whole = multiply(x, weight, 64)
        gaps = activations(m, 512, torch.float16).to(DEVICE)
        gaps[:, ::2] = x
        assert torch.equal(multiply(gaps[:, ::2], weight, 64), whole)
        assert torch.equal(multiply(x.view(1, m, 1, 256), weight, 64), whole.view(1, m, 1, 70))
        assert torch.equal(multiply(x, weight, 64), whole)


def test_refusals():
    """A dtype that the kernel has no code for and a weight with gaps are refused in words."""
    qdata, scale, zero = operands(24, 256, 32)
    x = torch.randn(2, 256, device=DEVICE)
    gaps = torch.zeros(24, 256, dtype=torch.uint8, device=DEVICE)
    gaps[:, ::2] = qdata
    for x_like, codes, why in ((x.double(), qdata, "x is float64"), (x, gaps[:, ::2], r"qdata has gaps.*contiguous")):
        with pytest.raises(UnsupportedError, match=why):
            multiply(x_like, (codes, scale, zero), 32)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [32, 128])
def test_large(group):
    """Shapes of real layers give eager's product for few tokens and for many."""
    assert ON_GPU
    for dtype in (torch.float16, torch.bfloat16):
        for m in (1, 7, 16, 33, 300, 1500):
            check(12288, 3072, group, m, dtype, torch.bfloat16)
