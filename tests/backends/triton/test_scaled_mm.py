from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import explain, use_backend
from lowbit.layouts.scale_128x4 import swizzle
from lowbit.ops.mxfp8 import quantize_mxfp8, scaled_mm_mxfp8
from lowbit.ops.nvfp4 import quantize_nvfp4, scaled_mm_nvfp4
from tests.support.cpu_linear import relative_error
from tests.support.triton_linear import DEVICE, DTYPES, ON_GPU, require

require()
device = pytest.importorskip("lowbit.backends.triton.device", exc_type=ImportError)

# Relative RMS: the order of float32 sums, which tensor cores cut off instead of rounding, or one rounding.
ROUNDING = {torch.float32: 1e-5 if ON_GPU else 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
SHAPES = ((1, 17, 64), (3, 100, 160), (17, 1, 128), (33, 70, 416), (150, 31, 96), (2, 5, 32))


def rows(m: int, k: int, seed: int) -> torch.Tensor:
    """Random rows of different sizes, one of them zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * torch.exp(torch.randn(m, 1, generator=generator))
    x[m // 2, ::3] = 0
    return x


def nvfp4_operands(m: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    """a, b, their global scales and their swizzled scales."""
    one, other = torch.tensor(0.002), torch.tensor(0.01)
    with use_backend("eager"):
        (a, a_scale), (b, b_scale) = quantize_nvfp4(rows(m, k, 1), one), quantize_nvfp4(rows(n, k, 2), other)
    return a, b, one, other, a_scale, b_scale


def mxfp8_operands(m: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    """a, b and their swizzled scales."""
    with use_backend("eager"):
        (a, a_scale), (b, b_scale) = quantize_mxfp8(rows(m, k, 1)), quantize_mxfp8(rows(n, k, 2))
    return a, b, a_scale, b_scale


OPS = {"nvfp4": (scaled_mm_nvfp4, nvfp4_operands), "mxfp8": (scaled_mm_mxfp8, mxfp8_operands)}


def check(op, operands, limit: float, **options) -> None:
    """Assert that Triton's product is eager's."""
    with use_backend("eager"):
        wanted = op(*operands, **{**options, "out_dtype": torch.float32})
    moved = {key: one.to(DEVICE) if isinstance(one, torch.Tensor) else one for key, one in options.items()}
    with use_backend("triton"):
        found = op(*(one.to(DEVICE) for one in operands), **moved)
    assert found.dtype == options["out_dtype"]
    assert found.shape == wanted.shape
    assert relative_error(found.cpu(), wanted.double()) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("name", OPS)
def test_product(name, m, n, k, dtype):
    """The product is the reference's, but for one rounding to the result's dtype, with and without a bias."""
    op, operands = OPS[name]
    made = operands(m, n, k)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(3))
    check(op, made, ROUNDING[dtype], out_dtype=dtype)
    check(op, made, ROUNDING[dtype], out_dtype=dtype, bias=bias.to(dtype))


@pytest.mark.parametrize("k", [16, 48, 80, 144, 272])
def test_groups_of_16(k):
    """K of nvfp4 needs to be a multiple of 16 alone."""
    check(scaled_mm_nvfp4, nvfp4_operands(5, 19, k), ROUNDING[torch.float32], out_dtype=torch.float32)


@pytest.mark.parametrize("name", OPS)
def test_turing(name):
    """Where there is no bfloat16, operands are multiplied in float32, in narrow blocks."""
    op, operands = OPS[name]
    with device.assume(device.Target("cuda", (7, 5))):
        check(op, operands(9, 70, 160), 1e-6, out_dtype=torch.float32, bias=torch.linspace(-1, 1, 70))


def test_alpha():
    """alpha takes the place of both global scales; before the bias, which it does not multiply."""
    made = nvfp4_operands(5, 40, 96)
    options = {"out_dtype": torch.float32, "alpha": torch.tensor([3.5e-5]), "bias": torch.linspace(-1, 1, 40)}
    check(scaled_mm_nvfp4, made, ROUNDING[torch.float32], **options)


def test_every_nvfp4_scale():
    """Every finite scale times every code is exact: a product with one code 1 a row gives it back."""
    codes = torch.arange(16, dtype=torch.uint8)
    b = (codes[1::2] << 4 | codes[::2])[None, :].repeat(254, 1)
    stored = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    b_scale = swizzle(stored[:, None]).view(torch.float8_e4m3fn)
    a = torch.zeros(16, 8, dtype=torch.uint8)
    for column in range(16):
        a[column, column // 2] = 2 << 4 * (column % 2)
    a_scale = swizzle(torch.full((16, 1), 0x38, dtype=torch.uint8)).view(torch.float8_e4m3fn)  # 1
    one = torch.ones(())
    operands = (a, b, one, one, a_scale, b_scale)
    with use_backend("eager"):
        wanted = scaled_mm_nvfp4(*operands, out_dtype=torch.float32)
    with use_backend("triton"):
        found = scaled_mm_nvfp4(*(part.to(DEVICE) for part in operands), out_dtype=torch.float32)
    assert wanted.unique().numel() > 200
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("raw", [False, True])
def test_every_mxfp8_code(raw):
    """Every finite code times powers of two is exact, whether scales are float8_e8m0fnu or bytes; NaN stays NaN."""
    b = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 32).view(torch.float8_e4m3fn)
    powers = 87 + torch.arange(256, dtype=torch.uint8)[:, None] % 80
    a = torch.zeros(1, 32)
    a[0, 5] = 1.0
    a_scale, b_scale = swizzle(torch.full((1, 1), 127, dtype=torch.uint8)), swizzle(powers)
    if not raw:
        a_scale, b_scale = a_scale.view(torch.float8_e8m0fnu), b_scale.view(torch.float8_e8m0fnu)
    operands = (a.to(torch.float8_e4m3fn), b, a_scale, b_scale)
    with use_backend("eager"):
        wanted = scaled_mm_mxfp8(*operands, out_dtype=torch.float32)
    with use_backend("triton"):
        found = scaled_mm_mxfp8(*(part.to(DEVICE) for part in operands), out_dtype=torch.float32)
    assert wanted.isnan().sum() == 2
    assert torch.equal(found.cpu().nan_to_num(7e7), wanted.nan_to_num(7e7))


def test_padding_of_scales():
    """What the layout's padding holds, NaN for instance, does not matter."""
    for name, (op, operands) in OPS.items():
        made = operands(3, 9, 96)
        with use_backend("triton"):
            clean = op(*(one.to(DEVICE) for one in made), out_dtype=torch.float32)
        *rest, a_scale, b_scale = made
        used = swizzle(torch.ones(128, 96 // (16 if name == "nvfp4" else 32), dtype=torch.uint8))
        dirty = [torch.where(used == 0, 0xFF, one.view(torch.uint8)).view(one.dtype) for one in (a_scale, b_scale)]
        with use_backend("triton"):
            found = op(*(one.to(DEVICE) for one in (*rest, *dirty)), out_dtype=torch.float32)
        assert torch.equal(found, clean), name


@pytest.mark.parametrize("name", OPS)
def test_properties(name):
    """Gaps and odd addresses change nothing, nor does a second call; no rows, no columns and no K give what they do."""
    op, operands = OPS[name]
    made = [one.to(DEVICE) for one in operands(9, 20, 128)]
    with use_backend("triton"):
        whole = op(*made, out_dtype=torch.float16)
        a = made[0].view(torch.uint8)
        gaps = torch.zeros((9, 2 * a.shape[1]), dtype=torch.uint8, device=DEVICE)
        gaps[:, ::2] = a
        moved = torch.zeros(a.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].view(a.shape)
        moved.copy_(a)
        for one in (gaps[:, ::2], moved, a):
            assert torch.equal(op(one.view(made[0].dtype), *made[1:], out_dtype=torch.float16), whole)
        scales = made[-2][:0], made[-1][:0]
        assert op(made[0][:0], *made[1:-2], scales[0], made[-1], out_dtype=torch.float16).shape == (0, 20)
        assert op(made[0], made[1][:0], *made[2:-2], made[-2], scales[1], out_dtype=torch.float16).shape == (9, 0)
        bias = torch.arange(20, dtype=torch.float32, device=DEVICE)
        empty = [one[:, :0] if one.dim() == 2 else one for one in made]
        assert torch.equal(op(*empty, bias=bias, out_dtype=torch.float32), bias.expand(9, 20))


@pytest.mark.parametrize("name", OPS)
def test_refusals(name):
    """float64, as a result or a bias, is refused in words."""
    op = f"scaled_mm_{name}"
    made = [one.to(DEVICE) for one in OPS[name][1](2, 4, 64)]
    after = (None,) if name == "nvfp4" else ()
    wide = torch.zeros(4, dtype=torch.float64, device=DEVICE)
    for bias, dtype in ((None, torch.float64), (wide, torch.float16)):
        said = explain(op, "*", "", DEVICE.type, (*made, bias, dtype, *after))
        assert any(who.startswith("triton:") and "float64" in why for who, why in said.items()), said


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("m", [1, 40, 300, 2000])
@pytest.mark.parametrize("name", OPS)
def test_large(name, m, dtype):
    """Sizes of real layers, with K split and not, are right on tensor cores."""
    op, operands = OPS[name]
    bias = torch.randn(3071, generator=torch.Generator().manual_seed(3))
    check(op, operands(m, 3071, 3072), ROUNDING[dtype], out_dtype=dtype, bias=bias.to(dtype))
