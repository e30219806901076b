"""Activations rounded to float8_e4m3fn on the fly, and the W8A8 linears made of them."""

from __future__ import annotations

import pytest
import torch

from lowbit.numerics import fp8_matmul
from lowbit.numerics.floats import from_fp8, to_fp8
from lowbit.numerics.fp8_matmul import fp8_linear, fp8_linear_blocks, fp8_mm, quantize_rows_fp8

SIZES = [(1, 1, 1), (0, 8, 8), (4, 0, 8), (1, 16, 3072), (17, 33, 100), (3, 5, 1025), (33, 1, 7)]


def codes(rows: int, columns: int) -> torch.Tensor:
    """Random e4m3 codes of all exponents, NaN left out."""
    raw = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    return torch.where((raw & 127) == 127, raw - 1, raw).view(torch.float8_e4m3fn)


def wide(rows: torch.Tensor) -> torch.Tensor:
    """What the codes and scales of rows stand for, float64."""
    q, scale = quantize_rows_fp8(rows)
    return from_fp8(q).double() * scale.double()


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_products_are_those_of_the_codes(m, n, k):
    """The result is the float64 product for every size, odd and empty, within float32 rounding of its terms."""
    a, b = codes(m, k), codes(n, k)
    got = fp8_mm(a, b)
    left, right = from_fp8(a).double(), from_fp8(b).double()
    assert got.dtype == torch.float32
    assert bool(((got - left @ right.t()).abs() <= 1e-6 * (left.abs() @ right.abs().t())).all())


def test_a_coarse_matmul_precision_changes_no_product():
    """bfloat16 holds every code: the sums stay those of exact products under `set_float32_matmul_precision`."""
    a, b = codes(9, 500), codes(11, 500)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        got = fp8_mm(a, b)
    finally:
        torch.set_float32_matmul_precision(before)
    left, right = from_fp8(a).double(), from_fp8(b).double()
    assert bool(((got - left @ right.t()).abs() <= 1e-6 * (left.abs() @ right.abs().t())).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_have_scale_absmax_by_448_and_the_codes_of_the_quotient(dtype):
    """The largest value of a row becomes +-448, all codes are torch's cast of x / scale, and zero rows are zeros."""
    x = (torch.randn(64, 100) * torch.logspace(-6, 4, 64)[:, None]).to(dtype)
    x[3] = 0
    q, scale = quantize_rows_fp8(x)
    assert torch.equal(scale, (x.float().abs().amax(1, keepdim=True) / 448).clamp_min(1e-30))
    assert torch.equal(q.view(torch.uint8), to_fp8(x.float() / scale, torch.float8_e4m3fn).view(torch.uint8))
    peak = from_fp8(q).abs().amax(1)
    assert peak[3] == 0
    assert bool((peak[torch.arange(64) != 3] == 448).all())


def test_rows_of_the_smallest_and_largest_numbers():
    """From float32 subnormals to the end of its range scales are above zero and finite, and codes are not NaN."""
    x = torch.randn(6, 50).sign() * torch.tensor([1e-45, 1e-38, 1e-30, 1e-20, 1e30, 3.4e38])[:, None]
    q, scale = quantize_rows_fp8(x)
    assert bool(((scale > 0) & scale.isfinite()).all())
    assert bool((from_fp8(q)[3:].abs() == 448).all())
    assert bool((from_fp8(q)[0] == 0).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("blocks", [False, True])
def test_what_is_not_finite_makes_its_row_nan(bad, blocks):
    """A NaN or an infinity in a row of x makes that row of the result NaN, and no other row."""
    x, weight = torch.randn(3, 32), codes(8, 32)
    x[1, 5] = bad
    if blocks:
        y = fp8_linear_blocks(x, weight, torch.ones(1, 2), (8, 16), None, torch.float32)
    else:
        y = fp8_linear(x, weight, torch.ones(8, 1), None, torch.float32)
    assert bool(y[1].isnan().all())
    assert bool(y[[0, 2]].isfinite().all())


@pytest.mark.parametrize("scales", [(), (1,), (48,), (48, 1)])
@pytest.mark.parametrize("lead", [(), (1,), (0,), (5,), (2, 3), (2, 0, 3)])
def test_the_linear_is_the_product_of_its_dequantized_operands(scales, lead):
    """For any leading axes and kinds of scale the result is that of float64 operands, within float32 rounding."""
    x, weight, scale, bias = torch.randn(*lead, 128), codes(48, 128), torch.rand(scales) + 0.1, torch.randn(48)
    y = fp8_linear(x, weight, scale, bias, torch.float32)
    w = from_fp8(weight).double() * scale.double().reshape(-1, 1)
    left = wide(x.reshape(-1, 128))
    limit = 2e-6 * (left.abs() @ w.abs().t()) + 1e-6
    assert y.shape == (*lead, 48)
    assert bool(((y.reshape(-1, 48) - (left @ w.t() + bias)).abs() <= limit).all())


@pytest.mark.parametrize("tile", [(32, 32), (128, 128), (7, 50), (1, 1000)])
def test_the_blockwise_linear_is_the_product_of_its_dequantized_operands(tile):
    """Ragged tiles included, each block of columns has its own activation scale, and sums are float32."""
    n, k = 40, 150
    x, weight = torch.randn(10, k), codes(n, k)
    scale = torch.rand(-(-n // tile[0]), -(-k // tile[1])) + 0.1
    y = fp8_linear_blocks(x.reshape(2, 5, k), weight, scale, tile, None, torch.float32).reshape(10, n)
    i, j = torch.arange(n)[:, None] // tile[0], torch.arange(k)[None] // tile[1]
    w = from_fp8(weight).double() * scale.double()[i, j]
    left = torch.cat([wide(x[:, at : at + tile[1]]) for at in range(0, k, tile[1])], dim=1)
    assert bool(((y - left @ w.t()).abs() <= 2e-6 * (left.abs() @ w.abs().t())).all())


def test_results_are_rounded_once():
    """With 16-bit x the result is the cast of what float32 x of the same values gives, bias included."""
    x, weight, bias = torch.randn(5, 96).bfloat16(), codes(24, 96), torch.randn(24).bfloat16()
    scale = torch.rand(24, 1)
    y = fp8_linear(x, weight, scale, bias, torch.bfloat16)
    assert torch.equal(y, fp8_linear(x.float(), weight, scale, bias.float(), torch.float32).bfloat16())


def test_pieces_do_not_change_the_result(monkeypatch):
    """Rows are independent: working on few at a time gives the same numbers within the order of summation."""
    x, weight, scale, tiles = torch.randn(37, 256), codes(40, 256), torch.rand(40, 1), torch.rand(2, 2)
    whole = fp8_linear(x, weight, scale, None, torch.float32)
    blocks = fp8_linear_blocks(x, weight, tiles, (32, 128), None, torch.float32)
    monkeypatch.setattr(fp8_matmul, "_ROWS", 1000)
    monkeypatch.setattr(fp8_matmul, "_PIECE", 1000)
    limit = 1e-6 * whole.abs().max()
    assert bool(((fp8_linear(x, weight, scale, None, torch.float32) - whole).abs() <= limit).all())
    limit = 1e-6 * blocks.abs().max()
    again = fp8_linear_blocks(x, weight, tiles, (32, 128), None, torch.float32)
    assert bool(((again - blocks).abs() <= limit).all())
