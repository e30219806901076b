from __future__ import annotations

import pytest
import torch

from lowbit.formats import parse_spec
from tests.support.triton_linear import DEVICE, DTYPES, ON_GPU, require
from tests.support.triton_rows import (
    PLAIN_SPECS,
    WORDS_SPECS,
    assert_same_bits,
    in_layout,
    random_parts,
    refusal,
    run,
)  # fmt: skip

require()
CASES = [(spec, "") for spec in PLAIN_SPECS] + [(spec, "words128") for spec in WORDS_SPECS]


def check(spec: str, layout: str, n: int, k: int, dtype: torch.dtype, *, scales: torch.dtype = torch.float32) -> None:
    """Assert that a weight of random parts decodes to the bits of the reference."""
    fmt = parse_spec(spec)
    parts = random_parts(fmt, n, k, seed=n + k, dtype=scales)
    found = run("dequantize", spec, layout, fmt, in_layout(fmt, parts, layout), (n, k), dtype)
    assert_same_bits(found, fmt.dequantize(parts, (n, k), dtype))


@pytest.mark.parametrize(("spec", "layout"), CASES)
def test_bits_are_those_of_the_reference(spec, layout):
    """Every code under every scale decodes to the reference's bits, whatever the number of rows."""
    for n, dtype, scales in zip((37, 1, 130), DTYPES, (torch.float16, torch.float32, torch.bfloat16), strict=False):
        check(spec, layout, n, 384, dtype, scales=scales)


@pytest.mark.parametrize("k", [2, 90, 120, 1030])
@pytest.mark.parametrize("spec", PLAIN_SPECS)
def test_ragged_rows(spec, k):
    """Numbers of columns that are no multiple of a word of codes, nor of a group, decode the same."""
    if parse_spec(spec).check_shape(3, k) is None:
        check(spec, "", 3, k, torch.float16)


@pytest.mark.parametrize("spec", ["nvfp4", "mxfp4", "fp8_e4m3(granularity=row)", "int8", "mxfp8", "wna16(bits=8)"])
def test_odd_number_of_columns(spec):
    """Rows of an odd number of columns follow each other without a gap."""
    for k in (1, 17, 129):
        check(spec, "", 5, k, torch.float32)


@pytest.mark.parametrize("spec", ["awq_w4a16", "wna16(zero_point=True)", "nvfp4", "int8", "mxfp8"])
def test_memory_that_is_not_aligned(spec):
    """Parts that begin at any byte and rows with gaps between them decode the same."""
    fmt = parse_spec(spec)
    parts = random_parts(fmt, 9, 256)
    wanted = fmt.dequantize(parts, (9, 256), torch.float16)
    for offset in (1, 2, 4):
        moved = in_layout(fmt, parts, "")
        codes = moved["qdata"].view(torch.uint8)
        room = torch.zeros((9, codes.shape[1] + 8), dtype=torch.uint8, device=DEVICE)[:, offset:][:, : codes.shape[1]]
        room.copy_(codes)
        moved["qdata"] = room.view(parts["qdata"].dtype)
        assert_same_bits(run("dequantize", spec, "", fmt, moved, (9, 256), torch.float16), wanted)
    transposed = {
        name: part.t().contiguous().t() if part.dim() == 2 else part for name, part in in_layout(fmt, parts, "").items()
    }
    assert_same_bits(run("dequantize", spec, "", fmt, transposed, (9, 256), torch.float16), wanted)


def test_nothing_to_decode():
    """A weight without rows gives a result without rows."""
    fmt = parse_spec("nvfp4")
    parts = in_layout(fmt, random_parts(fmt, 0, 64), "")
    assert run("dequantize", "nvfp4", "", fmt, parts, (0, 64), torch.float16).shape == (0, 64)


@pytest.mark.parametrize(
    ("spec", "layout", "dtype", "why"),
    [
        ("wna16(bits=3)", "", torch.float16, "codes of 3 bits lie across bytes"),
        ("wna16(act_order=True)", "", torch.float16, "scattered"),
        ("int8(rotation=16)", "", torch.float16, "rotated"),
        ("awq_w4a16(group_size=3)", "", torch.float16, "groups of 3 columns"),
        ("awq_w4a16(group_size=4)", "words128", torch.float16, "groups of 4 columns"),
        ("nvfp4", "", torch.float64, "the result is float64"),
        ("nvfp4", "", torch.int32, "the result is int32"),
    ],
)
def test_refusals(spec, layout, dtype, why):
    """What the decoder cannot read is refused in words."""
    fmt = parse_spec(spec)
    parts = in_layout(fmt, random_parts(fmt, 4, 384), layout)
    assert why in refusal("dequantize", spec, layout, fmt, parts, (4, 384), dtype)


@pytest.mark.skipif(ON_GPU, reason="a GPU rounds bfloat16 correctly")
def test_bfloat16_in_the_interpreter_is_refused():
    """The interpreter's bfloat16 is not the reference's, and it says so."""
    fmt = parse_spec("int8")
    parts = random_parts(fmt, 4, 64)
    assert "bfloat16" in refusal("dequantize", "int8", "", fmt, parts, (4, 64), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(("spec", "layout"), CASES)
def test_large(spec, layout):
    """A thousand rows of a real layer decode to the reference's bits."""
    check(spec, layout, 1000, 3072, torch.bfloat16, scales=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(("spec", "layout"), [("awq_w4a16", ""), ("nvfp4", "words128"), ("int8", "")])
def test_several_steps(spec, layout):
    """So many rows that a program decodes several tiles give the reference's bits, the last tile included."""
    check(spec, layout, 6001, 3072, torch.float16, scales=torch.bfloat16)


@pytest.mark.gpu
def test_addresses_beyond_32_bits():
    """The last rows of a weight of more than 2**31 codes are its own."""
    fmt = parse_spec("int8")
    n, k = 140_000, 16_384
    parts = {
        "qdata": torch.zeros((n, k), dtype=torch.int8, device=DEVICE), "scale": torch.ones((n, 1), device=DEVICE),
    }  # fmt: skip
    parts["qdata"][-1] = torch.arange(k, device=DEVICE).to(torch.int8)
    found = run("dequantize", "int8", "", fmt, parts, (n, k), torch.float16)
    assert_same_bits(found[-2:], parts["qdata"][-2:].half().cpu())
