from __future__ import annotations

import pytest
import torch
from torch import nn

import lowbit
from lowbit.dispatch import preferred_layout, use_backend
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
from lowbit.backends.triton import weight_rows  # noqa: E402  (needs Triton)

CASES = [(spec, "") for spec in PLAIN_SPECS] + [(spec, "words128") for spec in WORDS_SPECS]
ROWS = 23
INDICES = torch.tensor([[22, 0, 3], [3, 7, 0]])


@pytest.mark.parametrize(("spec", "layout"), CASES)
def test_rows_are_those_of_the_decoded_table(spec, layout):
    """Each index gives the bits of its row, in the shape of the indices."""
    fmt = parse_spec(spec)
    parts = random_parts(fmt, ROWS, 384)
    packed = in_layout(fmt, parts, layout)
    for dtype, kind in zip(DTYPES, (torch.int64, torch.int32, torch.int64), strict=False):
        wanted = fmt.dequantize(parts, (ROWS, 384), dtype)[INDICES]
        found = run("embedding", spec, layout, fmt, INDICES.to(DEVICE, kind), packed, 384, dtype)
        assert_same_bits(found, wanted)


@pytest.mark.parametrize("spec", ["nvfp4", "int8", "fp8_e4m3(granularity=block)"])
def test_shapes_of_indices(spec):
    """One index, none at all, and indices with gaps between them are looked up; ragged rows, too."""
    fmt = parse_spec(spec)
    parts = random_parts(fmt, ROWS, 90)
    wanted = fmt.dequantize(parts, (ROWS, 90), torch.float16)
    packed = in_layout(fmt, parts, "")
    for indices in (torch.tensor(4), torch.empty((0, 3), dtype=torch.int64), torch.arange(20)[::3], INDICES.t()):
        found = run("embedding", spec, "", fmt, indices.to(DEVICE), packed, 90, torch.float16)
        assert_same_bits(found, wanted[indices])


def test_a_table_without_rows(monkeypatch):
    """Every index gives a row of NaN, and nothing is read: there is no memory to read."""
    monkeypatch.setattr(weight_rows, "_decode_rows", lambda *_, **__: pytest.fail("launched"))
    fmt = parse_spec("int8")
    parts = {name: part[:0] if part.dim() else part for name, part in random_parts(fmt, ROWS, 64).items()}
    indices = torch.tensor([0, -1, 5], device=DEVICE)
    found = run("embedding", "int8", "", fmt, indices, in_layout(fmt, parts, ""), 64, torch.float16)
    assert found.shape == (3, 64)
    assert found.isnan().all()


def test_an_index_that_names_no_row():
    """It gives a row of NaN, and no other row changes."""
    fmt = parse_spec("int8")
    parts = random_parts(fmt, ROWS, 64)
    indices = torch.tensor([-1, 5, ROWS, 1 << 40, -(1 << 40)], device=DEVICE)
    found = run("embedding", "int8", "", fmt, indices, in_layout(fmt, parts, ""), 64, torch.float16)
    assert found[[0, 2, 3, 4]].isnan().all()
    assert_same_bits(found[1], fmt.dequantize(parts, (ROWS, 64), torch.float16)[5])


def test_module():
    """A quantized nn.Embedding looks up through the kernel, from the plain parts that it prefers."""
    table = nn.Embedding(ROWS, 128, dtype=torch.float16)
    lowbit.quantize_(table, "nvfp4")
    table = table.to(DEVICE)
    wanted = table.weight.dequantize()[INDICES.to(DEVICE)]
    with use_backend("triton"), torch.inference_mode():
        assert_same_bits(table(INDICES.to(DEVICE)).cpu(), wanted.cpu())
        assert preferred_layout("embedding", parse_spec("nvfp4"), ROWS, 128, DEVICE.type) == ""


def test_refusals():
    """Indices of other dtypes, and codes that the decoder cannot read, are refused in words."""
    fmt = parse_spec("wna16(act_order=True)")
    parts = in_layout(fmt, random_parts(fmt, 4, 384), "")
    said = refusal("embedding", "wna16", "", fmt, INDICES.to(DEVICE), parts, 384, torch.float16)
    assert "scattered" in said
    said = refusal("embedding", "wna16", "", fmt, INDICES.to(DEVICE, torch.int16), parts, 384, torch.float16)
    assert "indices are int16" in said
    if ON_GPU:
        assert "move one" in refusal("embedding", "wna16", "", fmt, INDICES, parts, 384, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["nvfp4", "awq_w4a16", "int8", "mxfp8"])
def test_large(spec):
    """A vocabulary is looked up with the bits of the reference, in bfloat16."""
    fmt = parse_spec(spec)
    parts = random_parts(fmt, 32_000, 4096, dtype=torch.bfloat16)
    indices = torch.randint(0, 32_000, (3, 77))
    wanted = fmt.embedding(indices, parts, 4096, torch.bfloat16)
    found = run("embedding", spec, "", fmt, indices.to(DEVICE), in_layout(fmt, parts, ""), 4096, torch.bfloat16)
    assert_same_bits(found, wanted)
