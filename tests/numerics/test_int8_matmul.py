"""Integer products that must be exact, and the dynamic W8A8 linears made of them."""

from __future__ import annotations

import pytest
import torch

from lowbit.numerics import int8_matmul
from lowbit.numerics.int8_matmul import (
    aligned_int_mm,
    int8_linear,
    int8_linear_blocks,
    int8_linear_input_gradient,
    int8_mm,
    quantize_rows,
)
from lowbit.numerics.rotations import rotate_groups

SIZES = [
    (1, 1, 1),
    (0, 8, 8),
    (4, 0, 8),
    (4, 8, 0),
    (1, 16, 3072),
    (17, 33, 100),
    (3, 5, 1025),
    (40, 70, 4097),
    (33, 1, 7),
]


def codes(rows: int, columns: int) -> torch.Tensor:
    """Random int8 codes over the whole range, -128 included."""
    return torch.randint(-128, 128, (rows, columns), dtype=torch.int8)


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_integer_products_are_exact(m, n, k):
    """The result is the int64 product for every size, odd, empty and larger than a piece."""
    a, b = codes(m, k), codes(n, k)
    got = int8_mm(a, b)
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), a.long() @ b.long().t())


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_products_padded_as_cuda_wants_them_are_the_same(m, n, k):
    """Padding to what `torch._int_mm` takes on CUDA changes nothing that is returned."""
    a, b = codes(m, k), codes(n, k)
    assert torch.equal(aligned_int_mm(a, b).long(), a.long() @ b.long().t())


def test_the_largest_sums_stay_exact():
    """All codes -128: a piece of 1024 columns reaches 2 ** 24, the last integer that float32 is sure of."""
    a = torch.full((2, 3000), -128, dtype=torch.int8)
    assert torch.equal(int8_mm(a, a), torch.full((2, 2), 3000 * 2**14, dtype=torch.int32))


def test_sums_beyond_int32_are_int64():
    """With K = 2 ** 17 the sum of the largest products does not fit int32, and is still right."""
    a = torch.full((1, 1 << 17), -128, dtype=torch.int8)
    assert int8_mm(a, a).tolist() == [[1 << 31]]


def test_a_coarse_matmul_precision_changes_nothing():
    """bfloat16 holds every code, and sums are float32: the product stays exact under `set_float32_matmul_precision`."""
    a, b = codes(9, 2000), codes(11, 2000)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        got = int8_mm(a, b)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got.long(), a.long() @ b.long().t())


def test_rows_use_the_whole_range_and_no_more():
    """The largest value of a row becomes +-127, never -128; a zero row gives zeros and a scale above zero."""
    x = torch.randn(64, 100)
    x[3] = 0
    q, scale = quantize_rows(x)
    peak = q.abs().amax(1)
    assert peak[3] == 0
    assert scale[3] > 0
    assert bool((peak[torch.arange(64) != 3] == 127).all())
    assert int(q.min()) >= -127


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_result(bad):
    """A NaN or an infinity in a row of x makes that row of the result not finite, and no other row."""
    x, weight = torch.randn(3, 32), codes(8, 32)
    x[1, 5] = bad
    y = int8_linear(x, weight, torch.ones(8, 1), None, torch.float32)
    assert not y[1].isfinite().any()
    assert bool(y[[0, 2]].isfinite().all())


@pytest.mark.parametrize("rotation", [0, 64])
@pytest.mark.parametrize("scales", [(), (1,), (48,), (48, 1)])
@pytest.mark.parametrize("lead", [(), (1,), (0,), (5,), (2, 3), (2, 0, 3)])
def test_the_linear_is_the_product_of_its_dequantized_operands(rotation, scales, lead):
    """For any leading axes and kinds of scale the result is that of float64 operands, within float32 rounding."""
    x, weight, scale, bias = torch.randn(*lead, 128), codes(48, 128), torch.rand(scales) + 0.1, torch.randn(48)
    y = int8_linear(x, weight, scale, bias, torch.float32, rotation)
    rows = (rotate_groups(x, rotation) if rotation else x).reshape(-1, 128)
    q, s = quantize_rows(rows)
    w = weight.double() * scale.double().reshape(-1, 1)
    expected = (q.double() * s.double()) @ w.t() + bias.double()
    assert y.shape == (*lead, 48)
    assert torch.allclose(y.double(), expected.reshape(y.shape), rtol=1e-6, atol=1e-4)


def test_pieces_of_rows_do_not_change_the_result(monkeypatch):
    """Rows are independent: working on few at a time gives the same bits."""
    x, weight, scale, tiles = torch.randn(37, 256), codes(40, 256), torch.rand(40, 1), torch.rand(2, 2)
    whole = int8_linear(x, weight, scale, None, torch.float32)
    blocks = int8_linear_blocks(x, weight, tiles, (32, 128), None, torch.float32)
    monkeypatch.setattr(int8_matmul, "_ROWS", 1000)
    monkeypatch.setattr(int8_matmul, "_PIECE", 1000)
    assert torch.equal(int8_linear(x, weight, scale, None, torch.float32), whole)
    assert torch.equal(int8_linear_blocks(x, weight, tiles, (32, 128), None, torch.float32), blocks)


@pytest.mark.parametrize("tile", [(32, 32), (128, 128), (7, 50), (1, 1000)])
def test_the_blockwise_linear_is_the_product_of_its_dequantized_operands(tile):
    """Ragged tiles included, each block of columns has its own activation scale, and sums are float32."""
    n, k = 40, 150
    x, weight = torch.randn(2, 5, k), codes(n, k)
    scale = torch.rand(-(-n // tile[0]), -(-k // tile[1])) + 0.1
    y = int8_linear_blocks(x, weight, scale, tile, None, torch.float32)
    i, j = torch.arange(n)[:, None] // tile[0], torch.arange(k)[None] // tile[1]
    w = weight.double() * scale.double()[i, j]
    expected = torch.zeros(10, n, dtype=torch.float64)
    for left in range(0, k, tile[1]):
        q, s = quantize_rows(x.reshape(10, k)[:, left : left + tile[1]])
        expected += (q.double() * s.double()) @ w[:, left : left + tile[1]].t()
    assert torch.allclose(y.double(), expected.reshape(2, 5, n), rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("rotation", [0, 16])
def test_the_input_gradient_is_grad_times_the_weight(rotation):
    """Sums are float32 whatever the dtype of grad, and the rotation is undone."""
    grad, weight, scale = torch.randn(2, 3, 40), codes(40, 48), torch.rand(40)
    got = int8_linear_input_gradient(grad, weight, scale, rotation)
    w = weight.float() * scale[:, None]
    w = rotate_groups(w, rotation) if rotation else w
    assert torch.allclose(got.double(), grad.double() @ w.double(), rtol=1e-5, atol=1e-3)
    assert int8_linear_input_gradient(grad.bfloat16(), weight, scale, rotation).dtype == torch.bfloat16
