"""dequantize and embedding on the CPU backend: the values of the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowbit.dispatch import select, use_backend
from lowbit.formats import parse_spec
from lowbit.numerics.rotations import rotate_groups
from lowbit.tensor import QuantizedTensor
from tests.support.cpu_linear import DTYPES
from tests.support.cpu_rows import decoded, same_bits

coded_rows = pytest.importorskip("lowbit.backends.cpu.coded_rows", reason="no compiled kernels", exc_type=ImportError)

# With the columns of a weight that plain parts hold, and of one that rows16 holds, too.
SPECS = {
    "fp8_e4m3": (37, 36),
    "fp8_e4m3(granularity=row)": (37, 36),
    "fp8_e4m3(granularity=block,block_size=5x24)": (37, 48),
    "fp8_e5m2": (37, 36),
    "fp8_e5m2(granularity=block,block_size=32x16)": (40, 48),
    "int8": (37, 36),
    "int8(granularity=tensor)": (37, 36),
    "int8(granularity=block,block_size=5x24)": (37, 48),
    "nvfp4": (37, 48),
    "nvfp4(global_scale_divides=True)": (37, 48),
    "nvfp4(row_global_scale=True)": (37, 48),
    "nvfp4(global_scale_divides=True,row_global_scale=True)": (37, 48),
    "mxfp4": (37, 96),
    "mxfp8": (37, 96),
    "awq_w4a16(group_size=8)": (40, 40),
    "awq_w4a16(group_size=12)": (36, 24),
    "awq_w4a16": (128, 128),
    "wna16(group_size=16)": (37, 48),
    "wna16(group_size=24,zero_point=True)": (37, 48),
    "wna16(group_size=0)": (37, 48),
    "wna16(bits=8,group_size=20)": (37, 40),
    "wna16(bits=8,group_size=32,zero_point=True)": (37, 64),
    "convrot_w4a4(rotation=0)": (38, 40),
    "fp8_e4m3(pre_quant_scale=True)": (37, 36),
    "awq_w4a16(pre_quant_scale=True)": (64, 64),
}


def table(spec: str, n: int, k: int, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    """A quantized weight [n, k]; its scales have what its dtype leads to."""
    generator = torch.Generator().manual_seed(n + k)
    fmt = parse_spec(spec)
    w = (torch.randn(n, k, generator=generator) * torch.exp(torch.randn(n, 1, generator=generator))).to(dtype)
    parts = fmt.plain.quantize(w)
    if fmt.pre_quant_scale:
        parts["pre_quant_scale"] = torch.rand(k, generator=generator).add(0.5).to(dtype)
    return QuantizedTensor.from_parts(parts, fmt, (n, k), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_every_value_is_the_one_of_the_reference(spec, dtype):
    """Plain parts of odd sizes and packed ones decode to the same bits, for scales of each dtype."""
    plain_k, packed_k = SPECS[spec]
    for n in (1, 16, 35):
        weight = table(spec, n, plain_k, dtype)
        assert same_bits(decoded(weight, dtype, "cpu"), decoded(weight, dtype, "eager"))
        weight = table(spec, n, packed_k, dtype)
        assert same_bits(decoded(weight.in_layout("rows16"), dtype, "cpu"), decoded(weight, dtype, "eager"))
    wide = table(spec, 70, 2 * packed_k, torch.bfloat16)
    assert same_bits(decoded(wide, dtype, "cpu"), decoded(wide, dtype, "eager"))
    assert same_bits(decoded(wide.in_layout("rows16"), dtype, "cpu"), decoded(wide, dtype, "eager"))


@pytest.mark.parametrize("spec", ["fp8_e4m3", "fp8_e5m2", "int8", "mxfp8", "wna16(bits=8,group_size=32)"])
def test_every_code_of_a_byte(spec):
    """All 256 codes decode as the reference does, NaN, infinities and zeros of both signs among them."""
    parts = table(spec, 8, 32).parts
    codes = torch.arange(256).to(torch.uint8).view(8, 32)
    weight = QuantizedTensor.from_parts(
        {**parts, "qdata": codes.view(parts["qdata"].dtype)}, spec, (8, 32), torch.float32
    )
    for one in (weight, weight.in_layout("rows16")):
        assert same_bits(decoded(one, torch.float32, "cpu"), decoded(weight, torch.float32, "eager"))


@pytest.mark.parametrize("spec", ["nvfp4", "mxfp4"])
def test_every_scale_of_a_byte(spec):
    """All codes of scales decode as the reference does: subnormal powers of two and NaN, too."""
    group = parse_spec(spec).unit((1, 64))[1]
    parts = table(spec, 256, group).parts
    every = torch.arange(256).to(torch.uint8).view(256, 1).view(parts["scale"].dtype)
    weight = QuantizedTensor.from_parts({**parts, "scale": every}, spec, (256, group), torch.float32)
    for one in (weight, weight.in_layout("rows16")):
        assert same_bits(decoded(one, torch.float32, "cpu"), decoded(weight, torch.float32, "eager"))


@pytest.mark.parametrize("rotation", [16, 64, 256, 1024])
@pytest.mark.parametrize("name", ["int8", "convrot_w4a4"])
def test_a_rotated_weight_is_turned_back(name, rotation):
    """The values are those of a rotation in float64, to float32's rounding."""
    weight = table(f"{name}(rotation={rotation})", 20, 1024)
    fmt = weight.format
    codes = fmt.unpack(weight.parts["qdata"], 1024).double() * weight.parts["scale"].double().view(20, 1)
    exact = (codes.view(-1, rotation) @ rotate_groups(torch.eye(rotation), rotation).double()).view(20, 1024)
    for one in (weight, weight.in_layout("rows16")):
        found = decoded(one, torch.float32, "cpu")
        assert (found.double() - exact).norm() / exact.norm() < 3e-7
    entry = select("dequantize", name, "", "cpu", (fmt, weight.parts, (20, 1024), torch.float32))
    assert entry.tolerance >= 3e-7


@pytest.mark.parametrize("spec", ["awq_w4a16(group_size=8)", "wna16(group_size=8,zero_point=True)", "int8", "nvfp4"])
def test_views_of_parts(spec):
    """Parts with gaps, such as those of a slice of rows, decode to the slice of what the whole decodes to."""
    weight = table(spec, 40, 64)
    whole = decoded(weight, torch.float32, "cpu")
    assert same_bits(decoded(weight[9:30], torch.float32, "cpu"), whole[9:30])
    spread = {name: torch.stack([part, part], -1)[..., 0] for name, part in weight.parts.items()}
    gaps = QuantizedTensor.from_parts(spread, spec, (40, 64), torch.float32)
    assert same_bits(decoded(gaps, torch.float32, "cpu"), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_rows_by_index(spec, dtype):
    """Indices of both dtypes and any shape give the rows of the reference, in any order; none give none."""
    n = 35
    for columns, layout in zip(SPECS[spec], ("", "rows16"), strict=True):
        weight = table(spec, n, columns, dtype)
        wanted, one = decoded(weight, dtype, "eager"), weight.in_layout(layout)
        indices = torch.tensor([[0, n - 1, 16], [16, 7, 0]])
        with use_backend("cpu"), torch.inference_mode():
            for found in (F.embedding(indices, one), F.embedding(indices.int(), one)):
                assert found.dtype == dtype
                assert same_bits(found, wanted[indices])
            assert same_bits(F.embedding(indices.t(), one), wanted[indices.t()])
            assert same_bits(F.embedding(torch.tensor(5), one), wanted[5])
            assert F.embedding(torch.zeros(0, 3, dtype=torch.int64), one).shape == (0, 3, columns)
            many = torch.randint(0, n, (1000,), generator=torch.Generator().manual_seed(0))
            assert same_bits(F.embedding(many, one), wanted[many])


@pytest.mark.parametrize("layout", ["", "rows16"])
@pytest.mark.parametrize("wrong", [-1, 35, 1 << 40])
def test_an_index_of_no_row(wrong, layout):
    """It is an IndexError, as it is with the reference, and names the index."""
    weight = table("int8", 35, 36).in_layout(layout)
    indices = torch.tensor([3, wrong, 0])
    with use_backend("eager"), pytest.raises(IndexError):
        F.embedding(indices, table("int8", 35, 36))
    with use_backend("cpu"), pytest.raises(IndexError, match=f"{wrong} names no row of a table with 35"):
        F.embedding(indices, weight)


def test_threads_change_nothing():
    """The result is the same on any number of threads."""
    weight = table("nvfp4", 3000, 64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = decoded(weight, torch.bfloat16, "cpu")
        torch.set_num_threads(3)
        assert same_bits(decoded(weight, torch.bfloat16, "cpu"), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("spec", "dtype", "why"),
    [
        ("wna16(bits=3)", torch.float32, "codes of 3 bits"),
        ("wna16(act_order=True)", torch.float32, "act_order"),
        ("awq_w4a16(group_size=3)", torch.float32, "groups of 3 columns"),
        ("int8", torch.float64, "float64"),
    ],
)
def test_what_it_refuses(spec, dtype, why):
    """Codes that cross bytes, scattered groups and float64 are refused in words and left to the reference."""
    assert why in coded_rows.refuses(parse_spec(spec), dtype)
    weight = table(spec, 8, 384)
    assert torch.equal(weight.dequantize(dtype), decoded(weight, dtype, "eager"))
