"""The regular Hadamard rotation: its matrix, its inverse, its groups."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowbit.errors import FormatError
from lowbit.numerics import rotations
from lowbit.numerics.rotations import REGULAR_SIZES, regular_hadamard, rotate_groups


@pytest.mark.parametrize("size", [4, *REGULAR_SIZES])
def test_the_matrix_is_orthonormal_symmetric_and_regular(size):
    """H H = I exactly, H = H^T, and every row sums to the same value, which is no row of ones."""
    matrix = regular_hadamard(size)
    assert torch.equal(matrix @ matrix, torch.eye(size))
    assert torch.equal(matrix, matrix.t())
    assert torch.equal(matrix.sum(1), torch.ones(size))
    assert matrix.abs().unique().tolist() == [size**-0.5]


def test_the_first_row_of_sixteen_is_the_known_one():
    """The order of the Kronecker product is that of the reference."""
    row = [1, 1, 1, -1, 1, 1, 1, -1, 1, 1, 1, -1, -1, -1, -1, 1]
    assert (regular_hadamard(16)[0] * 4).tolist() == row


@pytest.mark.parametrize("size", [16, 64, 256])
def test_the_matrix_is_that_of_comfy_kitchen(size):
    """Bit by bit the same matrix as the convention's owner builds."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.convrot_w4a4")
    assert torch.equal(regular_hadamard(size), kitchen._build_hadamard(size))


@pytest.mark.parametrize("size", [0, 1, 2, 8, 32, 48, 128, 255])
def test_other_sizes_are_refused(size):
    """Only powers of four from 4 have a regular Hadamard matrix here."""
    with pytest.raises(FormatError, match="power of 4"):
        regular_hadamard(size)


@pytest.mark.parametrize("size", REGULAR_SIZES)
def test_rotating_twice_gives_the_values_back(size):
    """The rotation is its own inverse within float32 rounding, for any leading axes.

    A sum of `size` terms is off by a random walk of as many roundings at most, in whatever order a processor adds.
    """
    x = torch.randn(2, 3, 2 * size)
    error = rotate_groups(rotate_groups(x, size), size) - x
    assert error.norm() <= 2.0**-24 * size**0.5 * x.norm()


def test_each_group_is_rotated_on_its_own():
    """A value in one group leaves all other groups untouched."""
    x = torch.zeros(1, 48)
    x[0, 20] = 1.0
    rotated = rotate_groups(x, 16)
    assert not rotated[0, :16].any()
    assert not rotated[0, 32:].any()
    assert torch.equal(rotated[0, 16:32], regular_hadamard(16)[4])


def test_squared_length_is_kept():
    """The rotation is orthonormal: a squared error is the same in both bases."""
    x = torch.randn(64, 512, dtype=torch.float32)
    assert torch.allclose(rotate_groups(x, 256).square().sum(1), x.square().sum(1), rtol=1e-5)


def test_sixteen_bit_input_is_rounded_once():
    """bfloat16 rows are rotated in float32 and cast at the end."""
    x = torch.randn(8, 256).bfloat16()
    assert torch.equal(rotate_groups(x, 256), rotate_groups(x.float(), 256).bfloat16())


def test_a_ragged_last_group_is_refused():
    """K must be a multiple of the group."""
    with pytest.raises(FormatError, match="K = 100 is not a multiple of the rotation group 16"):
        rotate_groups(torch.randn(2, 100), 16)


def test_a_matrix_cached_in_inference_mode_serves_training():
    """The cache must not hold an inference tensor, which autograd refuses."""
    regular_hadamard.cache_clear()
    with torch.inference_mode():
        rotate_groups(torch.randn(1, 64), 64)
    x = torch.randn(1, 64, requires_grad=True)
    rotate_groups(x, 64).sum().backward()
    assert x.grad is not None


def test_the_defaults_of_dtype_and_device_do_not_matter():
    """The matrix is float32 on the CPU even under another default device or dtype."""
    regular_hadamard.cache_clear()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            matrix = regular_hadamard(16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (matrix.dtype, matrix.device.type) == (torch.float32, "cpu")


def test_a_matrix_made_under_a_dispatch_mode_does_not_outlive_it():
    """Fake tensors are not kept for the time after, and plain ones that are kept do not meet fake ones."""
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    want = x @ regular_hadamard(64)
    regular_hadamard.cache_clear()
    rotations._hadamard_on.cache_clear()
    for _ in range(2):  # with nothing kept, then with both matrices
        with FakeTensorMode():
            assert rotate_groups(torch.empty(2, 64), 64).shape == (2, 64)
        assert torch.equal(rotate_groups(x, 64), want)
