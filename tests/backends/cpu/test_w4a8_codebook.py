"""w4a8_codebook on the CPU backend: exact integer products, and values that are the reference's before the rotation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowbit.dispatch import explain, use_backend
from lowbit.formats import parse_spec
from lowbit.numerics import rotations
from lowbit.tensor import QuantizedTensor
from tests.support.cpu_linear import DTYPES, ROUNDING, ROWS, TOKENS, activations, relative_error
from tests.support.cpu_rows import check_embedding, check_plain_linear, decoded

linear_codebook = pytest.importorskip(
    "lowbit.backends.cpu.linear_w4a8_codebook", reason="no compiled kernels", exc_type=ImportError
)

SPECS = (
    "w4a8_codebook(rotation=16)",
    "w4a8_codebook(rotation=64,group_size=4)",
    "w4a8_codebook(rotation=16,group_size=8,codebook=False)",
    "w4a8_codebook(rotation=16,group_size=48)",
    "w4a8_codebook(rotation=64,bits=6,codebook=False)",
    "w4a8_codebook(rotation=16,bits=6,codebook=False,group_size=64)",
)
CORRECTED = "w4a8_codebook(rotation=16,correction=True)"
COLUMNS = 192


def weight(spec: str, n: int, k: int, scales: torch.dtype = torch.float8_e4m3fn) -> QuantizedTensor:
    """A quantized weight [n, k] with relative scales in a dtype."""
    generator = torch.Generator().manual_seed(n + k)
    w = torch.randn(n, k, generator=generator) * torch.exp(torch.randn(n, 1, generator=generator))
    parts = parse_spec(spec).quantize(w)
    parts["s_rel"] = parts["s_rel"].to(scales)
    if scales == torch.float32:
        parts["s_rel"] *= 1.01  # no e4m3 value
    return QuantizedTensor.from_parts(parts, spec, (n, k), torch.float32)


def exact_activations(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Activations whose rotated values are exact in any order of summation: small integers."""
    generator = torch.Generator().manual_seed(m)
    return torch.randint(-8, 9, (m, k), generator=generator).to(dtype)


@pytest.mark.parametrize("scales", [torch.float8_e4m3fn, torch.float32], ids=str)
@pytest.mark.parametrize("few", [0, 1 << 30], ids=["pairs", "bytes"])
@pytest.mark.parametrize("spec", SPECS)
def test_bits_are_eagers_where_the_rotation_is_exact(spec, few, scales, monkeypatch):
    """Odd numbers of rows and tokens, with a bias and without one: the same codes, sums and roundings."""
    monkeypatch.setattr(linear_codebook, "_FEW_BYTES", few)
    for n, k, m in [(n, COLUMNS, 3) for n in ROWS] + [(35, COLUMNS, m) for m in TOKENS] + [(17, 1344, 5)]:
        one = weight(spec, n, k, scales)
        for dtype in DTYPES if m == 3 else (torch.bfloat16,):
            x = exact_activations(m, k, dtype)
            bias = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(dtype) if m % 2 else None
            with use_backend("cpu"), torch.inference_mode():
                found = F.linear(x, one, bias)
            assert torch.equal(found, one.format.linear(x, one.parts, bias)), (n, k, m, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", ["w4a8_codebook", "w4a8_codebook(bits=6,rotation=64,codebook=False)"])
def test_any_activations(spec, dtype):
    """The product is eager's but for single codes of activations that lie between two."""
    for m, n, k in ((1, 1, 256), (2, 17, 768), (9, 33, 256), (63, 16, 256)):
        one, x = weight(spec, n, k), activations(m, k, dtype)
        with use_backend("cpu"), torch.inference_mode():
            found = F.linear(x, one)
        assert relative_error(found, one.format.linear(x, one.parts, None).double()) < 3e-3, (m, n, k)


@pytest.mark.parametrize("spec", SPECS)
def test_properties(spec):
    """Gaps, leading axes, slices of rows, no tokens and the number of threads change nothing."""
    check_plain_linear(weight(spec, 50, COLUMNS))


@pytest.mark.parametrize("scales", [torch.float8_e4m3fn, torch.float32], ids=str)
@pytest.mark.parametrize("spec", [*SPECS, CORRECTED])
def test_decoded_values(spec, scales):
    """Weights and rows by index are the reference's but for the order of the rotation's sums."""
    for n in (1, 16, 35):
        one = weight(spec, n, COLUMNS, scales)
        for dtype in DTYPES:
            exact = decoded(one, torch.float32, "eager").double()
            assert relative_error(decoded(one, dtype, "cpu"), exact) <= max(ROUNDING[dtype], 1e-6)
        check_embedding(one, decoded(one, torch.float32, "cpu"))


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[4]])
def test_every_scale_and_code(spec):
    """All scales of a byte but NaN, under all codes, stand for the reference's integers."""
    fmt = parse_spec(spec)
    parts = weight(spec, 254, 64).parts
    finite = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    parts["s_rel"] = finite.view(-1, 1).expand(parts["s_rel"].shape).contiguous().view(torch.float8_e4m3fn)
    codes = torch.arange(2**fmt.bits).repeat(64 // 2**fmt.bits).to(torch.uint8).expand(254, 64)
    parts["qdata"] = fmt.pack(codes)
    x = rotations.rotate_groups(127 * torch.eye(64), fmt.rotation)  # each row reads one column of the integers
    one = QuantizedTensor.from_parts(parts, spec, (254, 64), torch.float32)
    with use_backend("cpu"), torch.inference_mode():
        assert torch.equal(F.linear(x, one), fmt.linear(x, parts, None))


@pytest.mark.parametrize("scales", [torch.float8_e4m3fn, torch.float32], ids=str)
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], SPECS[4]])
def test_scales_that_are_nan_or_too_large(spec, scales):
    """A NaN is 0 in the integer product and NaN in its rotated group of the weight; what is too large is clamped."""
    fmt, x = parse_spec(spec), rotations.rotate_groups(127 * torch.eye(COLUMNS), parse_spec(spec).rotation)
    one = weight(spec, 18, COLUMNS, scales)
    wrong = (torch.nan, torch.inf, -torch.inf, 1e10, -1e10) if scales == torch.float32 else (torch.nan,)
    for row, scale in enumerate(wrong):
        one.parts["s_rel"][3 * row + 1, 2] = scale
    with use_backend("cpu"), torch.inference_mode():
        assert torch.equal(F.linear(x, one), fmt.linear(x, one.parts, None))
    found, wanted = (decoded(one, torch.float32, backend) for backend in ("cpu", "eager"))
    assert wanted.isnan().any()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * wanted.nan_to_num().abs().max(), equal_nan=True)


def test_what_it_refuses():
    """A correction of groups and float64 are refused in words and left to the reference."""
    one = weight(CORRECTED, 8, COLUMNS)
    x = torch.randn(2, COLUMNS)
    reasons = explain("linear", "w4a8_codebook", "", "cpu", (one.format, x, one.parts, None))
    assert "no integer product" in reasons["cpu:linear_w4a8_codebook"]
    assert torch.equal(F.linear(x, one), one.format.linear(x, one.parts, None))
    assert torch.equal(one.dequantize(torch.float64), decoded(one, torch.float64, "eager"))
