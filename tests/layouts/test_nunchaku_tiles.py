"""The orders of nunchaku: against the fragments of the instructions and the loops of the kernels that read them."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import PartsError
from lowbit.layouts import nunchaku_tiles as tiles

N, K, R = 256, 192, 48


def random_bytes(*shape):
    """Reproducible int8 values."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


def nibble(data, index):
    """The nibble of that number of a flat tensor, the low one of each byte first."""
    raw = data.reshape(-1).view(torch.uint8)
    return int(raw[index // 2]) >> (4 * (index % 2)) & 15


@pytest.mark.parametrize(
    ("untile", "shape"),
    [
        (tiles.untile_scales, (3, N)),
        (tiles.untile_down, (K, R)),
        (tiles.untile_up, (N, R)),
        (lambda numbered: tiles.channel_places(N).reshape(numbered.shape), (1, N)),
    ],
)
def test_every_value_has_one_place(untile, shape):
    """Taking numbered values out of the tiles gives each number once."""
    size = shape[0] * shape[1]
    taken = untile(torch.arange(size).reshape(shape))
    assert taken.shape == shape
    assert torch.equal(taken.flatten().sort().values, torch.arange(size))
    assert not torch.equal(taken.flatten(), torch.arange(size))


@pytest.mark.parametrize("order", ["codes", "awq"])
def test_every_code_has_one_place(order):
    """A single code that is not zero comes out as a single one, at a place of its own."""
    seen = set()
    for first in range(0, N * K, 1237):
        stored = torch.zeros(N * K // 2, dtype=torch.uint8)
        stored[first // 2] = 5 << (4 * (first % 2))
        if order == "codes":
            plain = tiles.untile_codes(stored.view(torch.int8).reshape(N, K // 2), N, K)
        else:
            plain = tiles.untile_awq(stored.view(torch.int32).reshape(N // 4, K // 2), N, K)
        (byte,) = plain.flatten().nonzero().flatten().tolist()
        low, high = nibble(plain, 2 * byte), nibble(plain, 2 * byte + 1)
        assert {low, high} == {0, 5}
        seen.add(2 * byte + (high == 5))
    assert len(seen) == len(range(0, N * K, 1237))


@pytest.mark.parametrize(
    ("tile", "untile", "plain"),
    [
        (tiles.tile_codes, lambda x: tiles.untile_codes(x, N, K), random_bytes(N, K // 2)),
        (tiles.tile_awq, lambda x: tiles.untile_awq(x, N, K), random_bytes(N, K // 2)),
        (tiles.tile_scales, tiles.untile_scales, torch.randn(3, N).bfloat16()),
        (tiles.tile_down, tiles.untile_down, torch.randn(K, R).bfloat16()),
        (tiles.tile_up, tiles.untile_up, torch.randn(N, R).half()),
    ],
)
def test_tiling_is_undone(tile, untile, plain):
    """Both directions are exact inverses."""
    assert torch.equal(untile(tile(plain)), plain)
    assert torch.equal(tile(untile(tile(plain))), tile(plain))


def test_codes_are_the_fragments_of_mma_m16n8k64():
    """Register j of lane i holds column i / 4 and rows 8 (i % 4) + .. of the operand, as PTX numbers B of 4 bits.

    A lane loads 16 bytes: two registers of 32 columns each for the first eight outputs, then two for the next eight.
    """
    plain = random_bytes(N, K // 2)
    stored = tiles.tile_codes(plain)
    for bn in range(N // 128):
        for step in range(K // 64):
            for tile in range(8):
                for lane in (0, 1, 5, 18, 31):
                    word = ((bn * (K // 64) + step) * 8 + tile) * 32 + lane  # of 16 bytes
                    for register in range(4):
                        for i in range(8):
                            n = 128 * bn + 16 * tile + 8 * (register // 2) + lane // 4
                            k = 64 * step + 32 * (register % 2) + 8 * (lane % 4) + i
                            assert nibble(stored, 32 * word + 8 * register + i) == nibble(plain, n * K + k)


def test_scales_are_where_the_kernel_broadcasts_them_from():
    """The order that nunchaku's source gives: 0 1 8 9 by lane 0, 2 3 10 11 by lane 1, .. 118 119 126 127 by lane 31."""
    stored = tiles.tile_scales(torch.arange(2 * 128).reshape(2, 128))
    lanes = stored.reshape(2, 32, 4)
    for lane, expected in (
        (0, [0, 1, 8, 9]),
        (1, [2, 3, 10, 11]),
        (3, [6, 7, 14, 15]),
        (4, [16, 17, 24, 25]),
        (28, [112, 113, 120, 121]),
        (31, [118, 119, 126, 127]),
    ):
        assert lanes[0, lane].tolist() == expected
        assert lanes[1, lane].tolist() == [128 + n for n in expected]
    places = tiles.channel_places(256)
    assert places[:4].tolist() == [0, 1, 4, 5]
    assert places[8:10].tolist() == [2, 3]
    assert places[128 + 127] == 128 + 127
    wide = tiles.tile_scales(torch.arange(2 * 256).reshape(2, 256)).flatten()  # tiles first, then groups
    assert wide[128:132].tolist() == [256, 257, 264, 265]


def test_low_rank_factors_are_the_fragments_of_mma_m16n8k16():
    """Register j of lane i holds column i / 4 and rows 2 (i % 4) + 8 j and the next: rank, or input, along."""
    down, up = torch.arange(K * R).reshape(K, R), torch.arange(N * R).reshape(N, R)
    stored_down, stored_up = tiles.tile_down(down).flatten(), tiles.tile_up(up).flatten()
    for ranks in range(R // 16):
        for lane in range(32):
            for register in range(4):
                for half in range(2):
                    across = 8 * (register // 2) + lane // 4
                    along = 8 * (register % 2) + 2 * (lane % 4) + half
                    for block in (0, 3):
                        at = ((block * (R // 16) + ranks) * 32 + lane) * 8 + 2 * register + half
                        assert stored_down[at] == down[16 * block + along, 16 * ranks + across]
                        assert stored_up[at] == up[16 * block + across, 16 * ranks + along]


def test_awq_codes_are_where_the_gemv_takes_them():
    """A thread has 32 codes of a row: nibbles i and i + 4 of word j are columns 8 i + 2 j and the next."""
    plain = random_bytes(N, K // 2)
    stored = tiles.tile_awq(plain)
    assert stored.shape == (N // 4, K // 2)
    for quad in (0, 7, N // 4 - 1):
        for thread in range(K // 64 * 8):
            row, column = (thread // 2) % 4, thread // 8 * 64 + thread % 2 * 32
            base = quad * 4 * K + thread * 32
            for i in range(4):
                for j in range(4):
                    for e in range(2):
                        found = nibble(stored, base + 8 * j + i + 4 * e)
                        assert found == nibble(plain, (4 * quad + row) * K + column + 8 * i + 2 * j + e)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: tiles.untile_codes(random_bytes(200, 64), 200, 128), "qweight"),
        (lambda: tiles.untile_codes(random_bytes(128, 48), 128, 128), "qweight"),
        (lambda: tiles.untile_awq(torch.zeros(6, 32, dtype=torch.int32), 26, 64), "qweight"),
        (lambda: tiles.untile_scales(torch.zeros(2, 100)), "wscales"),
        (lambda: tiles.untile_down(torch.zeros(128, 20)), "proj_down"),
        (lambda: tiles.untile_up(torch.zeros(100, 16)), "proj_up"),
    ],
)
def test_other_sizes_are_refused(call, name):
    """What is no whole number of tiles is an error that names the tensor."""
    with pytest.raises(PartsError, match=f"{name} has shape"):
        call()
