"""Dense packing of codes of any width, against the definition written out bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from lowbit.numerics.bit_packing import pack_bits, packed_bytes, unpack_bits
from lowbit.numerics.packing import pack_nibbles

WIDTHS = range(1, 9)


def packed_row(codes: list[int], bits: int) -> list[int]:
    """The bytes of one row: all its codes as one long number, the first code lowest."""
    number = sum((code & ((1 << bits) - 1)) << (i * bits) for i, code in enumerate(codes))
    return list(number.to_bytes(-(-len(codes) // 8) * bits, "little"))


@given(bits=st.integers(1, 8), rows=st.integers(0, 4), columns=st.integers(0, 40), seed=st.integers(0, 2**31))
def test_bytes_are_those_of_the_definition(bits, rows, columns, seed):
    """For any size and width every byte is that of the rows as long numbers, whatever high bits the codes carry."""
    codes = torch.randint(0, 256, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)

    packed = pack_bits(codes, bits)

    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_bytes(columns, bits))
    if bits < 8:
        assert packed.tolist() == [packed_row(row, bits) for row in codes.tolist()]
    else:
        assert torch.equal(packed[:, :columns], codes)
    assert torch.equal(unpack_bits(packed, bits, columns), codes & ((1 << bits) - 1))


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_byte_is_a_packed_byte(bits):
    """Any bytes unpack to codes below 2**bits that pack to the same bytes."""
    packed = torch.randint(0, 256, (3, 5, 7 * bits), dtype=torch.uint8)

    codes = unpack_bits(packed, bits)

    assert codes.shape == (3, 5, 56)
    assert int(codes.max()) < 2**bits
    assert torch.equal(pack_bits(codes, bits), packed)


@pytest.mark.parametrize("bits", WIDTHS)
def test_padding_is_zero_codes(bits):
    """A row that does not fill its last bytes is filled with zero codes."""
    padded = unpack_bits(pack_bits(torch.full((2, 11), 255, dtype=torch.uint8), bits), bits)

    assert padded.shape == (2, 16)
    assert not padded[:, 11:].any()


@pytest.mark.parametrize("bits", WIDTHS)
def test_strided_and_shifted_tensors_are_read_as_they_are(bits):
    """A transposed, sliced or unaligned tensor is packed and unpacked by its logical order."""
    codes = torch.randint(0, 2**bits, (24, 40), dtype=torch.uint8)
    flat = torch.randint(0, 2**bits, (1 + 3 * 16,), dtype=torch.uint8)[1:].view(3, 16)  # starts at an odd address
    packed = pack_bits(codes, bits)

    for view in (codes.t(), codes[:, ::3], codes[3:, 5:], flat, codes[:1].t()):
        assert torch.equal(pack_bits(view, bits), pack_bits(view.clone(memory_format=torch.contiguous_format), bits))
    assert torch.equal(unpack_bits(packed[5:], bits), codes[5:])
    assert torch.equal(unpack_bits(packed[:, bits:], bits), codes[:, 8:])
    assert torch.equal(unpack_bits(packed.t().contiguous().t(), bits), codes)


def test_three_bits_by_hand():
    """Codes 1 2 3 4 5 6 7 0 of three bits make the bytes d1 58 1f: the lowest bit first, over the ends of bytes."""
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)

    assert pack_bits(codes, 3).tolist() == [[0xD1, 0x58, 0x1F]]


def test_four_bits_are_nibbles():
    """At four bits the bytes are those of `pack_nibbles`."""
    codes = torch.randint(0, 16, (3, 24), dtype=torch.uint8)

    assert torch.equal(pack_bits(codes, 4), pack_nibbles(codes))


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7, 8])
def test_like_compressed_tensors(bits):
    """The bytes are those of compressed-tensors' int32 words, which pack codes less 2**(bits - 1)."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 2**bits, (5, 64), dtype=torch.uint8)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)

    words = helpers.pack_to_int32(signed, bits)

    assert torch.equal(words.view(torch.uint8), pack_bits(codes, bits))
    assert torch.equal(unpack_bits(words.view(torch.uint8), bits), codes)
