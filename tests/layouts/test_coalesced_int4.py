"""coalesced_int4: where scales and zero points go, the exact inverse, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import lowbit
from lowbit import dispatch
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.checkpoint.stored_format import StoredFormat
from lowbit.errors import FormatError, PartsError
from lowbit.formats import parse_spec
from lowbit.layouts import base, coalesced_int4
from lowbit.layouts.base import get_layout, layouts
from lowbit.ops import int4_plain_mm
from tests.support import gaussian

SPECS = (
    "wna16(group_size=32)",
    "wna16(group_size=32,zero_point=true)",
    "wna16(group_size=0)",
    "awq_w4a16(group_size=64)",
)


def parts_of(spec, n=24, k=128, dtype=torch.bfloat16):
    """Plain parts; for awq_w4a16 with offsets that are multiples of the scales, which are powers of two."""
    fmt = parse_spec(spec)
    parts = fmt.quantize(gaussian(n, k, dtype=dtype) + 0.2)
    if fmt.name == "awq_w4a16":
        parts["scale"] = torch.exp2(parts["scale"].float().log2().round()).to(dtype)
        zeros = torch.randint(0, 33, parts["scale"].shape, generator=torch.Generator().manual_seed(0)) / 2
        parts["zero"] = ((8 - zeros) * parts["scale"].float()).to(dtype)
    return fmt, parts


@pytest.mark.parametrize("spec", SPECS)
def test_operands_decode_to_the_weight(spec):
    """(code - zero) * scale over the operands, all by rows, is what the format decodes."""
    fmt, plain = parts_of(spec)
    packed = coalesced_int4.pack(fmt, plain)
    qdata, scale, zero = coalesced_int4.operands(packed)
    assert scale.shape == zero.shape == (24, 128 // (fmt.config()["group_size"] or 128))
    assert scale.is_contiguous()
    assert zero.dtype == scale.dtype
    codes = torch.stack([qdata.view(torch.uint8) & 15, qdata.view(torch.uint8) >> 4], dim=-1).flatten(1)
    groups = codes.float().unflatten(1, (scale.shape[1], -1))
    weight = ((groups - zero.float().unsqueeze(-1)) * scale.float().unsqueeze(-1)).flatten(1)
    assert torch.equal(weight, fmt.dequantize(plain, (24, 128), torch.float32))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_unpack_is_the_exact_inverse(spec, dtype):
    """Every part comes back with its bits, dtype and order."""
    fmt, plain = parts_of(spec, dtype=dtype)
    back = coalesced_int4.unpack(fmt, coalesced_int4.pack(fmt, plain))
    assert back.keys() == plain.keys()
    for name, part in plain.items():
        assert back[name].dtype == part.dtype
        assert torch.equal(back[name], part)


def test_a_row_lies_together():
    """Scale and zero of row n and group g are at [n, g]; awq_w4a16 has them at [g, n]."""
    fmt, plain = parts_of("awq_w4a16(group_size=64)")
    packed = coalesced_int4.pack(fmt, plain)
    assert packed["scale"][5, 1] == plain["scale"][1, 5]
    assert packed["zero"][5, 1] == 8 - plain["zero"][1, 5] / plain["scale"][1, 5]


def test_offsets_without_a_zero_point_are_refused():
    """An offset that is no multiple of the scale is not rounded away in silence."""
    fmt = parse_spec("awq_w4a16(group_size=64)")
    with pytest.raises(PartsError, match=r"no multiples of its scales.*wna16\(group_size=..,zero_point=true\)"):
        coalesced_int4.pack(fmt, fmt.quantize(gaussian(24, 128, dtype=torch.bfloat16)))


def test_a_group_of_zeros_has_a_zero_point():
    """A scale and an offset of 0 are packed and unpacked; an offset without a scale is refused."""
    fmt, plain = parts_of("awq_w4a16(group_size=64)")
    plain["scale"][1, 3] = plain["zero"][1, 3] = 0
    packed = coalesced_int4.pack(fmt, plain)
    assert packed["zero"][3, 1] == 8
    assert torch.equal(coalesced_int4.unpack(fmt, packed)["zero"], plain["zero"])
    plain["zero"][1, 3] = 0.5
    with pytest.raises(PartsError, match="no multiples of its scales"):
        coalesced_int4.pack(fmt, plain)


@pytest.mark.parametrize("spec", SPECS)
def test_a_packed_weight_works_like_a_plain_one(spec):
    """embedding, dequantize and the gradient of x give the results of the plain parts; packing is undone."""
    fmt, parts = parts_of(spec, dtype=torch.float32)
    plain = lowbit.QuantizedTensor(parts, fmt, (24, 128), torch.float32)
    packed = plain.in_layout(coalesced_int4.NAME)
    x, bias = torch.randn(2, 3, 128, requires_grad=True), torch.randn(24)
    assert torch.equal(packed.dequantize(), plain.dequantize())
    y, expected = F.linear(x, packed, bias), F.linear(x, plain, bias)
    ones = torch.ones_like(y)
    assert torch.equal(torch.autograd.grad(y, x, ones)[0], torch.autograd.grad(expected, x, ones)[0])
    rows = torch.tensor([3, 0, 23])
    assert torch.equal(F.embedding(rows, packed), F.embedding(rows, plain))
    back = packed.in_layout("")
    assert all(torch.equal(part, plain.parts[name]) for name, part in back.parts.items())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_linear_rounds_its_activations(spec, backend):
    """On every backend a linear is int4_plain_mm of the operands, and lies within 1 % of the plain weight's."""
    if dispatch.load(backend) is not None:
        pytest.skip(f"no {backend} backend")
    fmt, parts = parts_of(spec, dtype=torch.float32)
    plain = lowbit.QuantizedTensor(parts, fmt, (24, 128), torch.float32)
    packed = plain.in_layout(coalesced_int4.NAME)
    x, bias, group = torch.randn(2, 3, 128), torch.randn(24), fmt.config()["group_size"] or 128
    with dispatch.use_backend(backend), torch.inference_mode():
        y = F.linear(x, packed, bias)
        operands = coalesced_int4.operands(packed.parts)
        assert torch.equal(y, int4_plain_mm(x, *operands, bias, group_size=group, layout=coalesced_int4.TAG))
    expected = F.linear(x, plain, bias)
    assert 1e-4 < (y - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("spec", ["wna16(group_size=32)", "awq_w4a16(group_size=32)"])
def test_only_its_name_chooses_it(spec, monkeypatch):
    """Where nothing but its kernels is left, "auto" leaves plain parts, because the layout has to be named."""
    if dispatch.load("cpu") is not None:
        pytest.skip("no cpu backend")
    fmt = parse_spec(spec)
    its = tuple(one for one in dispatch.candidates("linear", fmt.name, "cpu") if one.layout == coalesced_int4.NAME)
    monkeypatch.setitem(dispatch._STATE.candidates, ("linear", fmt.name, "cpu"), its)
    assert [one.backend for one in its] == ["cpu", "eager"]
    assert dispatch.preferred_layout("linear", fmt, 24, 128, "cpu") == ""
    free = dataclasses.replace(layouts()[coalesced_int4.NAME], named=False)
    monkeypatch.setitem(base._REGISTRY, coalesced_int4.NAME, free)
    assert dispatch.preferred_layout("linear", fmt, 24, 128, "cpu") == coalesced_int4.NAME


def test_is_registered_with_a_version_and_never_stored():
    """The layout is known by its name and version for its formats; a file that should hold it is refused."""
    layout = layouts()["coalesced_int4"]
    assert (layout.name, layout.version, layout.stored) == (coalesced_int4.NAME, coalesced_int4.VERSION, False)
    assert coalesced_int4.TAG == "coalesced_int4:1"
    assert get_layout(coalesced_int4.NAME, parse_spec("wna16")) is layout
    with pytest.raises(FormatError, match="no file holds it; write wna16"):
        StoredFormat.parse("wna16@coalesced_int4").check_stored()
    StoredFormat.parse("svdquant_w4a4@kitchen_tile_packed_w4a4").check_stored()


@pytest.mark.parametrize("rules", [[], [("blocks", "wna16@coalesced_int4")]])
def test_a_plan_with_it_is_refused(tmp_path, rules):
    """Before anything is read, for the format of all layers and for that of some."""
    save_file({"blocks.0.weight": gaussian(128, 128)}, tmp_path / "in.safetensors")
    with open_source(tmp_path / "in.safetensors") as source, pytest.raises(FormatError, match="no file holds it"):
        make_plan(source, "int8" if rules else "wna16@coalesced_int4", layer_rules=rules)


@pytest.mark.parametrize(
    ("spec", "k", "reason"),
    [
        ("wna16(bits=3)", 128, "codes of 3 bits"),
        ("wna16(act_order=true)", 128, "act_order"),
        ("wna16(group_size=48)", 96, "groups of 48; expected a power of two from 8"),
        ("wna16(group_size=0)", 96, "groups of 96"),
        ("wna16(group_size=16)", 48, "48 columns, not a multiple of 32"),
        ("wna16(group_size=128)", 192, "not a multiple of the group size 128"),
        ("awq_w4a16(group_size=4)", 128, "groups of 4"),
    ],
)
def test_what_does_not_fit_is_refused(spec, k, reason):
    """The reason is the same before and while packing."""
    fmt = parse_spec(spec)
    assert reason in str(coalesced_int4.refuses(fmt, 24, k))
    with pytest.raises(PartsError, match=f"{reason}.*cannot be stored in coalesced_int4"):
        coalesced_int4.pack(fmt, fmt.quantize(gaussian(24, k)))


def test_plain_scales_are_not_taken_for_packed_ones():
    """Unpacking [n_groups, N] scales is refused with the remedy."""
    fmt, plain = parts_of("awq_w4a16(group_size=64)")
    with pytest.raises(PartsError, match=r"scale is bfloat16 \[2, 24\], expected \[24, 2\].*repack"):
        coalesced_int4.unpack(fmt, plain)
