"""words128: where codes and scales go, the exact inverse, and what it refuses."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from torch import nn

import lowbit
from lowbit import QuantizedTensor
from lowbit.errors import PartsError
from lowbit.formats import parse_spec
from lowbit.formats.parts import raw_bytes
from lowbit.layouts import words128
from lowbit.layouts.base import get_layout, misfit, read_tag
from lowbit.numerics.packing import unpack_nibbles
from tests.support import gaussian

# Each with the shapes of its packed parts for a weight [17, 256].
SPECS = {
    "awq_w4a16": {"scale": (4, 17), "zero": (4, 17)},
    "awq_w4a16(group_size=16)": {"scale": (16, 17), "zero": (16, 17)},
    "wna16": {"scale": (2, 17)},
    "wna16(group_size=0,zero_point=True)": {"scale": (1, 17), "zero_point": (1, 17)},
    "wna16(group_size=1000)": {"scale": (1, 17)},
    "wna16(group_size=32,zero_point=True)": {"scale": (8, 17), "zero_point": (8, 17)},
    "nvfp4": {"scale": (16, 17), "global_scale": ()},
    "nvfp4(row_global_scale=True)": {"scale": (16, 17), "global_scale": (17,)},
    "mxfp4": {"scale": (8, 17)},
}


@pytest.mark.parametrize("n", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("spec", SPECS)
def test_round_trip(spec, n):
    """Packed parts tell N and keep their dtypes, and come back bit for bit, in their order."""
    fmt = parse_spec(spec)
    plain = fmt.quantize(gaussian(n, 384, seed=n))
    packed = words128.pack(fmt, plain)
    assert packed["qdata"].shape == (n, 48)
    assert words128.rows(fmt, packed) == n
    assert all(part.is_contiguous() for part in packed.values())
    assert all(packed[name].dtype == plain[name].dtype for name in plain if name != "qdata")
    back = words128.unpack(fmt, packed)
    assert list(back) == list(plain)
    for name, part in plain.items():
        assert (back[name].dtype, back[name].shape) == (part.dtype, part.shape)
        assert torch.equal(raw_bytes(back[name]), raw_bytes(part))


def test_many_rows_are_packed_in_pieces(monkeypatch):
    """Rows packed a few at a time, as those of large weights are, give the same words and the same bytes back."""
    fmt = parse_spec("nvfp4")
    plain = fmt.quantize(gaussian(37, 256))
    whole = words128.pack(fmt, plain)["qdata"]
    monkeypatch.setattr(words128, "row_chunks", lambda *_: [(at, min(at + 5, 37)) for at in range(0, 37, 5)])
    packed = words128.pack(fmt, plain)
    assert torch.equal(packed["qdata"], whole)
    assert torch.equal(words128.unpack(fmt, packed)["qdata"], plain["qdata"])


@pytest.mark.parametrize("spec", SPECS)
def test_places(spec):
    """Nibble j of word i of block b is column 128 b + 16 j + i, and the values of a group lie side by side."""
    fmt = parse_spec(spec)
    plain = fmt.quantize(gaussian(17, 256) + 0.1)
    packed = words128.pack(fmt, plain)
    codes = unpack_nibbles(plain["qdata"].view(torch.uint8))
    words = packed["qdata"].to(torch.int64) & 0xFFFFFFFF
    for row, block, word, nibble in ((0, 0, 0, 0), (16, 1, 15, 7), (5, 0, 3, 2), (9, 1, 11, 7)):
        found = words[row, 16 * block + word] >> 4 * nibble & 15
        assert found == codes[row, 128 * block + 16 * nibble + word]
    assert {name: tuple(part.shape) for name, part in packed.items()} == {"qdata": (17, 32), **SPECS[spec]}
    by_row = fmt.name != "awq_w4a16"
    assert torch.equal(raw_bytes(packed["scale"]), raw_bytes(plain["scale"].t() if by_row else plain["scale"]))


@pytest.mark.parametrize("spec", SPECS)
def test_shapes_without_values(spec):
    """Parts on the meta device are packed too: that is how shapes are checked."""
    fmt = parse_spec(spec)
    made = words128.pack(fmt, fmt.empty_parts((17, 256), torch.device("meta")))
    assert {name: tuple(part.shape) for name, part in made.items()} == {"qdata": (17, 32), **SPECS[spec]}


@pytest.mark.parametrize("spec", SPECS)
def test_empty_parts(spec):
    """Parts without values have the shapes and dtypes that packing gives, for few rows and for more than are tried."""
    fmt, meta = parse_spec(spec), torch.device("meta")
    layout = get_layout(words128.NAME, fmt)
    for shape in ((3, 128), (300, 256)):
        wanted = words128.pack(fmt, fmt.empty_parts(shape, meta, torch.float16))
        found = layout.empty_parts(fmt, shape, meta, torch.float16)
        assert {name: (part.shape, part.dtype) for name, part in found.items()} == {
            name: (part.shape, part.dtype) for name, part in wanted.items()
        }


@pytest.mark.parametrize(
    ("spec", "n", "k", "words"),
    [
        ("wna16(act_order=True)", 16, 128, "act_order"),
        ("wna16(bits=3)", 16, 128, "3 bits"),
        ("wna16(bits=8)", 16, 128, "8 bits"),
        ("nvfp4", 16, 192, "192 columns, not a multiple of 128"),
        ("mxfp4", 16, 96, "96 columns"),
        ("awq_w4a16", 16, 64, "64 columns"),
    ],
)
def test_refusals(spec, n, k, words):
    """What does not fit is refused in words, also by packing."""
    fmt = parse_spec(spec)
    assert words in words128.refuses(fmt, n, k)
    plain = fmt.quantize(gaussian(n, k))
    if fmt.config().get("bits", 4) == 4:
        with pytest.raises(PartsError, match=rf"\[{n}, {k}\] .*{words}.* cannot be in words128"):
            words128.pack(fmt, plain)


@pytest.mark.parametrize(
    "qdata",
    [torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(4, 12, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)],
    ids=["bytes", "12 words", "one axis"],
)
def test_other_arrangements_are_not_unpacked(qdata):
    """Parts that cannot be words of whole blocks raise, and say what was expected."""
    fmt = parse_spec("mxfp4")
    with pytest.raises(PartsError, match=r"expected int32 \[N, K / 8\] with K a multiple of 128: not in words128"):
        words128.unpack(fmt, {"qdata": qdata, "scale": torch.zeros(1, 4, dtype=torch.uint8)})


def test_versions():
    """The layout is never stored in files, so its version rides behind its name, and another one is refused."""
    layout = get_layout(words128.NAME, parse_spec("nvfp4"))
    assert (layout.version, layout.stored, layout.tag) == (1, False, "words128:1")
    assert read_tag("words128:1") == "words128"
    with pytest.raises(PartsError, match="version 2 of the kernel layout words128, and this lowbit has version 1"):
        read_tag("words128:2")


@pytest.mark.parametrize("spec", SPECS)
def test_plain_parts_are_no_packed_ones(spec):
    """What was not packed is refused with the remedy, where shapes tell it."""
    fmt = parse_spec(spec)
    layout = get_layout(words128.NAME, fmt)
    plain = fmt.quantize(gaussian(17, 256))
    assert misfit(fmt, words128.NAME, layout.packed(fmt, plain), 17, 256) is None
    assert "repack the plain parts" in misfit(fmt, words128.NAME, plain, 17, 256)


@pytest.mark.parametrize("spec", SPECS)
def test_files_hold_plain_parts(spec, tmp_path):
    """A saved module has the bytes that it has without the layout, and a pickled weight comes back with its bits."""
    layers = {}
    for name in ("plain", "words128"):
        layer = nn.Linear(256, 24)
        with torch.no_grad():
            layer.weight.copy_(gaussian(24, 256))
            layer.bias.zero_()
        lowbit.quantize_(layer, spec, layout="plain")
        lowbit.repack_(layer, name)
        layers[name] = lowbit.save(layer, tmp_path / f"{name}.safetensors").read_bytes()
    assert layer.weight.kernel_layout == "words128"
    assert layers["plain"] == layers["words128"]
    for again in (pickle.loads(pickle.dumps(layer.weight.data)), _through_torch(layer.weight.data)):
        assert again.spec.endswith("@words128:1")
        assert torch.equal(again.dequantize(), layer.weight.dequantize())


def _through_torch(weight: QuantizedTensor) -> QuantizedTensor:
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
