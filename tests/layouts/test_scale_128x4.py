"""The tiled order of group scales against its closed form and comfy-kitchen."""

import pytest
import torch

from lowbit.errors import PartsError
from lowbit.layouts.scale_128x4 import swizzle, swizzled_shape, unswizzle

SHAPES = [(1, 1), (128, 4), (130, 13), (256, 12), (31, 4), (128, 1), (300, 9)]


def _numbered(height, width):
    """Scales that are all different and not zero."""
    return torch.arange(1, height * width + 1, dtype=torch.int32).reshape(height, width)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_every_offset_follows_the_closed_form(height, width):
    """Scale (r, c) lies where the formula of cuBLAS says; all other places are zero."""
    scale = _numbered(height, width)
    r, c = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    offset = ((r // 128) * -(-width // 4) + c // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4

    flat = swizzle(scale).reshape(-1)

    assert torch.equal(flat[offset], scale)
    assert flat.count_nonzero() == height * width


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float32], ids=str)
def test_unswizzle_is_the_inverse(height, width, dtype):
    """Any dtype survives the way there and back bit for bit, whatever the padding holds."""
    scale = torch.randint(1, 120, (height, width), dtype=torch.uint8)
    scale = scale.view(dtype) if dtype.itemsize == 1 else scale.to(dtype)

    tiled = swizzle(scale)
    back = unswizzle(tiled, height, width)

    assert tiled.dtype == back.dtype == dtype
    assert tuple(tiled.shape) == swizzled_shape(height, width)
    assert back.is_contiguous()
    assert torch.equal(back.view(torch.uint8), scale.view(torch.uint8))


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_it_is_the_order_of_comfy_kitchen(height, width):
    """swizzle and unswizzle equal to_blocked and from_blocked."""
    kitchen = pytest.importorskip("comfy_kitchen.float_utils")
    scale = _numbered(height, width)

    tiled = kitchen.to_blocked(scale, flatten=False)

    assert torch.equal(swizzle(scale), tiled)
    assert torch.equal(unswizzle(tiled, height, width), kitchen.from_blocked(tiled, height, width))


def test_no_rows():
    """A matrix without rows stays one."""
    assert swizzle(torch.zeros(0, 5)).shape == (0, 8)
    assert unswizzle(torch.zeros(0, 8), 0, 5).shape == (0, 5)


def test_a_view_is_swizzled_like_its_copy():
    """Transposed and sliced matrices need not be contiguous."""
    scale = _numbered(140, 260).t()[:, 3:100]

    assert torch.equal(swizzle(scale), swizzle(scale.contiguous()))


def test_wrong_shapes_are_named():
    """Scales in natural order, and tensors that are no matrix, are refused with what to do."""
    with pytest.raises(
        PartsError, match=r"blocks\.1: .* shape \[100, 4\], expected \[128, 4\] for 100 x 4 groups.*swizzle"
    ):
        unswizzle(torch.zeros(100, 4), 100, 4, "blocks.1")
    with pytest.raises(PartsError, match=r"has shape \[4\], expected \[rows, columns\]"):
        swizzle(torch.zeros(4))
