"""Two nibbles in a byte: order, odd lengths, signs."""

from __future__ import annotations

import pytest
import torch

from lowbit.numerics.packing import pack_nibbles, sign_extend_nibbles, swap_nibbles, unpack_nibbles


def test_the_even_column_is_the_low_nibble():
    """Codes 1, 2 make the byte 0x21, whatever high bits the codes carry."""
    assert pack_nibbles(torch.tensor([1, 2, 15, 0], dtype=torch.uint8)).tolist() == [0x21, 0x0F]
    assert pack_nibbles(torch.tensor([-7, 7], dtype=torch.int8)).tolist() == [0x79]


def test_all_bytes_unpack_and_pack_to_themselves():
    """All 256 bytes are unpacked into low and high nibble and packed back."""
    packed = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    codes = unpack_nibbles(packed)
    assert torch.equal(codes[0::2], packed & 15)
    assert torch.equal(codes[1::2], packed >> 4)
    assert torch.equal(pack_nibbles(codes), packed)
    assert torch.equal(unpack_nibbles(packed.view(torch.int8)), codes)


@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (2, 3, 5), (0, 4), (4, 0), (5,)])
def test_odd_lengths_are_padded_with_a_zero_code(shape):
    """An odd last axis gains one zero nibble, which `columns` takes off again; empty tensors stay empty."""
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (*shape[:-1], (shape[-1] + 1) // 2)
    assert torch.equal(unpack_nibbles(packed, shape[-1]), codes)
    assert not unpack_nibbles(packed)[..., shape[-1] :].any()


def test_strided_codes_are_packed_as_they_read():
    """A transposed or sliced tensor is packed by its logical order."""
    codes = torch.randint(0, 16, (8, 6), dtype=torch.uint8)
    assert torch.equal(pack_nibbles(codes.t()), pack_nibbles(codes.t().contiguous()))
    assert torch.equal(pack_nibbles(codes[:, ::3]), pack_nibbles(codes[:, ::3].contiguous()))
    assert torch.equal(pack_nibbles(codes[:, :1].t()), pack_nibbles(codes[:, 0])[None])
    assert torch.equal(unpack_nibbles(codes.t()), unpack_nibbles(codes.t().contiguous()))
    assert torch.equal(unpack_nibbles(codes[:, :1]), unpack_nibbles(codes[:, :1].clone()))
    assert torch.equal(unpack_nibbles(codes[0, ::6]), unpack_nibbles(codes[0, :1].clone()))


def test_nibbles_are_signed_in_twos_complement():
    """Codes 0..7 are themselves, 8..15 are -8..-1."""
    codes = torch.arange(16, dtype=torch.uint8)
    assert sign_extend_nibbles(codes).tolist() == [*range(8), *range(-8, 0)]


def test_signed_codes_survive_packing():
    """int8 values -8..7 come back after pack, unpack and sign extension."""
    values = torch.arange(-8, 8, dtype=torch.int8)
    assert torch.equal(sign_extend_nibbles(unpack_nibbles(pack_nibbles(values))), values)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_swapping_nibbles_twice_changes_nothing(dtype):
    """The exchange is its own inverse for all bytes, and keeps the dtype."""
    packed = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    swapped = swap_nibbles(packed)
    assert swapped.dtype == dtype
    assert swapped.view(torch.uint8)[0x27] == 0x72
    assert torch.equal(swap_nibbles(swapped), packed)
