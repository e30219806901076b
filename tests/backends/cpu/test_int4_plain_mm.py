from __future__ import annotations

import pytest
import torch

from lowbit.backends.eager.int4_plain import int4_plain_mm as eager
from lowbit.dispatch import select, use_backend
from lowbit.errors import UnsupportedError
from lowbit.layouts.coalesced_int4 import TAG
from lowbit.ops import int4_plain_mm
from tests.support.cpu_linear import DTYPES, ROWS, TOKENS, activations, relative_error

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)


def operands(n, k, group, dtype=torch.bfloat16):
    """Random codes, scales, and zero points that are not integers."""
    generator = torch.Generator().manual_seed(n + k + group)
    qdata = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(n, k // group, generator=generator) + 0.5).div(32).to(dtype)
    return qdata, scale, (torch.rand(n, k // group, generator=generator) * 15).to(dtype)


def check(n, k, group, m, dtype, scale_dtype=torch.bfloat16):
    """Assert that the kernel's result is eager's: in float32 but for the order of sums, else but for one rounding."""
    weight, x = operands(n, k, group, scale_dtype), activations(m, k, dtype)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(dtype) if m % 2 else None
    with use_backend("cpu"):
        found = int4_plain_mm(x, *weight, bias, group_size=group, layout=TAG)
    wanted = eager(x, *weight, bias, group)
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    tolerance = select("int4_plain_mm", "*", "", "cpu", (x, *weight, bias, group)).tolerance
    limit = 2e-6 if dtype == torch.float32 else tolerance
    assert relative_error(found, wanted.double()) <= limit, (n, k, group, m, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [8, 16, 32, 64, 256])
def test_equals_eager(group, dtype):
    """Every group size, odd numbers of rows and of tokens, and scales of every dtype give eager's product."""
    for n, scale_dtype in zip(ROWS, 2 * DTYPES, strict=True):
        check(n, 256, group, 3, dtype, scale_dtype)
    for m in TOKENS:
        check(35, 512, group, m, dtype)
    check(17, max(group, 32), group, 2, dtype)
    for k in (64, 128, 192):  # of which the scales of a row fill no vector
        if k % group == 0:
            check(21, k, group, 3, dtype)


def test_integers_are_exact():
    """With scales of 1 every value is an integer below 2**24, and the result is the integer product itself."""
    qdata, scale, zero = operands(33, 256, 32, torch.float32)
    x = torch.randint(-127, 128, (6, 256)).float()
    x[:, ::32] = 127
    ones, zero = torch.ones_like(scale), zero.round()
    with use_backend("cpu"):
        found = int4_plain_mm(x, qdata, ones, zero, group_size=32, layout=TAG)
    assert torch.equal(found, eager(x, qdata, ones, zero, None, 32))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-44])
def test_extreme_activations(value):
    """What is not finite makes its own row not finite and no other; the smallest numbers count as zero."""
    x, weight = torch.ones(2, 256), operands(24, 256, 32)
    x[0] = 0.0
    x[0, 40] = value
    with use_backend("cpu"):
        y = int4_plain_mm(x, *weight, group_size=32, layout=TAG)
    assert bool(y[1].isfinite().all())
    assert bool(y[0].isfinite().any()) == (value == 1e-44)


def test_leading_axes_gaps_and_threads():
    """Leading axes, gaps in x, no tokens and the number of threads change nothing."""
    weight = operands(100, 512, 64)
    before = torch.get_num_threads()
    with use_backend("cpu"):
        assert int4_plain_mm(torch.ones(2, 0, 512), *weight, group_size=64, layout=TAG).shape == (2, 0, 100)
        for m in (1, 9, 40):
            x = activations(m, 512, torch.bfloat16)
            whole = int4_plain_mm(x, *weight, group_size=64, layout=TAG)
            gaps = activations(m, 1024, torch.bfloat16)
            gaps[:, ::2] = x
            assert torch.equal(int4_plain_mm(gaps[:, ::2], *weight, group_size=64, layout=TAG), whole)
            assert torch.equal(
                int4_plain_mm(x.view(1, m, 1, 512), *weight, group_size=64, layout=TAG), whole.view(1, m, 1, 100)
            )
            try:
                for threads in (1, 3):
                    torch.set_num_threads(threads)
                    assert torch.equal(int4_plain_mm(x, *weight, group_size=64, layout=TAG), whole)
            finally:
                torch.set_num_threads(before)


def test_refusals():
    """A dtype that the kernel has no code for and a weight with gaps are refused in words, and eager runs them."""
    qdata, scale, zero = operands(24, 256, 32)
    x = torch.randn(2, 256)
    gaps = torch.zeros(24, 256, dtype=torch.uint8)
    gaps[:, ::2] = qdata
    for args, why in (
        ((x.double(), qdata, scale, zero), "x is float64"),
        ((x, gaps[:, ::2], scale, zero), r"qdata has gaps.*\.contiguous"),
    ):
        with use_backend("cpu"), pytest.raises(UnsupportedError, match=why):
            int4_plain_mm(*args, group_size=32, layout=TAG)
        assert torch.equal(
            int4_plain_mm(*args, group_size=32, layout=TAG), eager(args[0], qdata, scale, zero, None, 32)
        )
