from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import load
from lowbit.errors import PartsError
from lowbit.formats import parse_spec
from lowbit.layouts import rows16

SPECS = (
    "awq_w4a16(group_size=32)",
    "wna16(group_size=32)",
    "wna16(bits=8,group_size=0,zero_point=true)",
    "nvfp4",
    "nvfp4(row_global_scale=true)",
    "mxfp4",
    "mxfp8",
    "fp8_e4m3",
    "fp8_e4m3(granularity=row)",
    "fp8_e5m2(granularity=block,block_size=16x64)",
    "int8",
    "int8(granularity=tensor)",
    "svdquant_w4a4(rank=1)",
    "convrot_w4a4",
)


def _bits(part):
    return part.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("spec", SPECS)
def test_round_trip(spec, n):
    """Packed parts have the promised shapes, tell N, and come back bit for bit."""
    fmt = parse_spec(spec)
    plain = fmt.quantize(torch.randn(n, 256, generator=torch.Generator().manual_seed(n)))
    packed = rows16.pack(fmt, plain)
    assert {name: tuple(part.shape) for name, part in packed.items()} == rows16.shapes(fmt, n, 256)
    assert rows16.rows(fmt, packed) == n
    back = rows16.unpack(fmt, packed)
    for name, part in plain.items():
        assert back[name].dtype == part.dtype
        assert back[name].shape == part.shape
        assert torch.equal(_bits(back[name]), _bits(part))


def test_places():
    """Word w of row r of a block lies at 16 w + r, byte c of fp8 at 16 c + r, and rows that are not there are zeros."""
    fmt = parse_spec("int8")
    plain = fmt.quantize(torch.randn(17, 32))
    packed = rows16.pack(fmt, plain)["qdata"]
    words = plain["qdata"].view(torch.int32)
    assert packed[0, 16 * 3 + 5] == words[5, 3]
    assert packed[1, 16 * 7] == words[16, 7]
    assert not packed[1, 1:16].any()
    fmt = parse_spec("fp8_e4m3")
    plain = fmt.quantize(torch.randn(16, 32))
    packed = rows16.pack(fmt, plain)["qdata"].view(torch.uint8)
    assert packed[0, 16 * 9 + 5] == plain["qdata"].view(torch.uint8)[5, 9]


@pytest.mark.parametrize(
    ("spec", "n", "k", "words"),
    [
        ("wna16(act_order=true)", 16, 128, "act_order"),
        ("wna16(bits=3)", 16, 128, "3 bits"),
        ("nvfp4", 16, 24, "multiple of the group of 16"),
        ("int8", 16, 30, "30 bytes"),
        ("awq_w4a16(group_size=2)", 16, 10, "5 bytes"),
    ],
)
def test_refusals(spec, n, k, words):
    """What cannot be interleaved is refused in words, also by packing."""
    fmt = parse_spec(spec)
    assert words in rows16.refuses(fmt, n, k)
    if not fmt.config().get("act_order") and k % 16 != 8:  # parts of a padded K do not tell it
        with pytest.raises(PartsError, match="keep it in plain parts"):
            rows16.pack(fmt, fmt.quantize(torch.randn(n, k)))


@pytest.mark.parametrize("spec", SPECS)
def test_native_packing(spec):
    """The native way gives the same bits in both directions, for whole blocks and odd ones."""
    if load("cpu") is not None:
        pytest.skip("no compiled kernels")
    from lowbit.backends.cpu import pack_rows16

    fmt = parse_spec(spec)
    for n in (1, 16, 37):
        plain = fmt.quantize(torch.randn(n, 256, generator=torch.Generator().manual_seed(n)))
        wanted, found = rows16.pack(fmt, plain), pack_rows16.pack_rows16(fmt, plain, "rows16")
        back = pack_rows16.unpack_rows16(fmt, found, "rows16")
        for name, part in wanted.items():
            assert torch.equal(_bits(found[name]), _bits(part))
            assert torch.equal(_bits(back[name]), _bits(plain[name]))
