from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import load
from lowbit.errors import PartsError, UnsupportedError
from lowbit.formats import parse_spec
from lowbit.layouts import gguf_rows16
from lowbit.layouts.base import get_layout
from lowbit.numerics.gguf_blocks import READABLE
from lowbit.tensor import QuantizedTensor

EVERY_TYPE = pytest.mark.parametrize("name", READABLE)
SIZES = [(n, blocks) for n in (1, 15, 16, 17, 100) for blocks in (1, 2, 3)]


def drawn(name: str, n: int, blocks: int):
    """A format and blocks of any bytes."""
    fmt = parse_spec(f"gguf(type={name})")
    generator = torch.Generator().manual_seed(n + blocks)
    shape = fmt.part_shapes(n, blocks * fmt.block.columns)["qdata"]
    return fmt, {"qdata": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)}


@EVERY_TYPE
def test_round_trip(name):
    """Packed blocks have the promised shape, tell N and the length of a row, and come back bit for bit."""
    for n, blocks in SIZES:
        fmt, plain = drawn(name, n, blocks)
        packed = gguf_rows16.pack(fmt, plain)
        assert {key: tuple(part.shape) for key, part in packed.items()} == gguf_rows16.shapes(
            fmt, n, blocks * fmt.block.columns
        )
        assert gguf_rows16.rows(fmt, packed) == n
        assert gguf_rows16.row_bytes(fmt, packed["qdata"]) == plain["qdata"].shape[1]
        assert torch.equal(gguf_rows16.unpack(fmt, packed)["qdata"], plain["qdata"])


@EVERY_TYPE
def test_rows_are_looked_up(name):
    """Any rows of packed blocks are the plain ones, in any order, more than once, or none."""
    for n, blocks in SIZES:
        fmt, plain = drawn(name, n, blocks)
        packed = gguf_rows16.pack(fmt, plain)["qdata"]
        for rows in ([n - 1, 0, n // 2, n - 1], [n // 3], []):
            indices = torch.tensor(rows, dtype=torch.int32)
            assert torch.equal(gguf_rows16.look_up(fmt, packed, indices), plain["qdata"][indices])


def test_rows_with_gaps():
    """Rows that are a piece of longer ones are packed as those that are not, by either way."""
    fmt, plain = drawn("Q6_K", 32, 2)
    spread = torch.nn.functional.pad(plain["qdata"], (3, 8))[:, 3:-8]
    assert torch.equal(gguf_rows16.interleave(fmt, spread), gguf_rows16.interleave(fmt, plain["qdata"]))
    if load("cpu") is None:
        made = QuantizedTensor({"qdata": spread}, fmt, (32, 512), torch.float32).in_layout("gguf_rows16")
        assert torch.equal(made.parts["qdata"], gguf_rows16.interleave(fmt, plain["qdata"]))


def test_a_scale_rides_along():
    """The global scale of NVFP4 stays what it was."""
    fmt, plain = drawn("NVFP4", 5, 2)
    fmt = parse_spec("gguf(type=NVFP4,global_scale=True)")
    plain["global_scale"] = torch.tensor(0.5)
    packed = gguf_rows16.pack(fmt, plain)
    assert packed["global_scale"] is plain["global_scale"]
    assert torch.equal(gguf_rows16.unpack(fmt, packed)["qdata"], plain["qdata"])


def test_places():
    """Q6_K: words of codes and steps first, 52 a block; behind those of all blocks the float16 scales of 16 rows."""
    fmt, plain = drawn("Q6_K", 17, 2)
    packed = gguf_rows16.pack(fmt, plain)["qdata"]
    rows = plain["qdata"].view(17, 2, 210)
    assert packed[0, 52 * 16 + 7 * 16 + 3] == rows[3, 1, 28:32].clone().view(torch.int32)
    halves = packed[0, 2 * 52 * 16 :].view(torch.int16)
    assert halves[16 + 5] == rows[5, 1, 208:210].clone().view(torch.int16)
    assert packed[1, 0] == rows[16, 0, :4].clone().view(torch.int32)
    assert not packed[1, 1:16].any()
    fmt, plain = drawn("MXFP4", 16, 4)
    packed = gguf_rows16.pack(fmt, plain)["qdata"]
    rows = plain["qdata"].view(16, 4, 17)
    assert packed[0, 4 * 4 * 16 :].view(torch.uint8)[2 * 16 + 9] == rows[9, 2, 0]
    assert packed[0, 5 * 16 + 9] == rows[9, 1, 5:9].clone().view(torch.int32)


def test_what_is_refused():
    """A weight without columns, and packed parts of another shape, which name the remedy."""
    fmt, plain = drawn("Q4_0", 5, 0)
    with pytest.raises(PartsError, match="has no columns cannot be stored in gguf_rows16; keep it in plain parts"):
        gguf_rows16.pack(fmt, plain)
    fmt, plain = drawn("Q4_0", 5, 3)
    packed = gguf_rows16.pack(fmt, plain)
    packed["qdata"] = packed["qdata"][:, 1:]
    wrong = QuantizedTensor(packed, fmt, (5, 96), torch.float32, layout="gguf_rows16")
    with pytest.raises(UnsupportedError, match="in version 1 of gguf_rows16; repack the plain parts"):
        torch.nn.functional.linear(torch.ones(1, 96), wrong)


def test_other_formats_do_not_have_it():
    """It is of GGUF's blocks alone."""
    assert get_layout("gguf_rows16", parse_spec("gguf(type=Q4_K)")).version == 1
    with pytest.raises(Exception, match="int8 has no layout 'gguf_rows16'"):
        get_layout("gguf_rows16", parse_spec("int8"))


@EVERY_TYPE
def test_native_packing(name):
    """The native way gives the same bits in both directions."""
    if load("cpu") is not None:
        pytest.skip("no compiled kernels")
    from lowbit.backends.cpu import pack_gguf_rows16

    for n, blocks in SIZES:
        fmt, plain = drawn(name, n, blocks)
        wanted, found = gguf_rows16.pack(fmt, plain), pack_gguf_rows16.pack_gguf_rows16(fmt, plain, "gguf_rows16")
        assert torch.equal(found["qdata"], wanted["qdata"])
        assert torch.equal(pack_gguf_rows16.unpack_gguf_rows16(fmt, found, "gguf_rows16")["qdata"], plain["qdata"])
