"""kitchen_tile_packed_w4a4: where every byte goes, the exact inverse, and the same results as plain parts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import lowbit
from lowbit.errors import FormatError, PartsError
from lowbit.layouts import svdquant_tiles
from lowbit.layouts.base import get_layout, layouts
from tests.layouts.svdquant_parts import FMT, random_parts
from tests.support import gaussian


def test_every_entry_lies_where_the_contract_says():
    """Row n = 128 t + 4 q + l has byte b of group g at [t, g, q, 32 l + b], scales and factors at [t, ., n mod 128]."""
    plain = random_parts(256)
    tiles = svdquant_tiles.pack(FMT, plain)
    n, column = torch.meshgrid(torch.arange(256), torch.arange(96), indexing="ij")
    t, q, l = n // 128, n % 128 // 4, n % 4

    assert tiles["qdata"].shape == (2, 3, 32, 128)
    assert torch.equal(tiles["qdata"][t, column // 32, q, l * 32 + column % 32], plain["qdata"])
    assert tiles["scale"].shape == (2, 3, 128)
    assert torch.equal(tiles["scale"][1, 2, 7], plain["scale"][2, 135])
    assert tiles["proj_up"].shape == (2, 5, 128)
    assert torch.equal(tiles["proj_up"][1, 4, 7], plain["proj_up"][135, 4])
    assert all(tiles[name] is plain[name] for name in ("smooth_factor", "proj_down"))


@pytest.mark.parametrize(("n", "k"), [(128, 64), (256, 192), (0, 64), (384, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unpack_is_the_exact_inverse(n, k, dtype):
    """Bit for bit, strided parts included."""
    plain = random_parts(n, k, dtype)
    strided = {name: part.t().contiguous().t() if part.dim() == 2 else part for name, part in plain.items()}

    for source in (plain, strided):
        back = svdquant_tiles.unpack(FMT, svdquant_tiles.pack(FMT, source))
        assert back.keys() == plain.keys()
        assert all(torch.equal(back[name], plain[name]) for name in plain)


def test_agrees_with_comfy_kitchen():
    """Its eager code turns our tiles into our plain parts."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.svdquant")
    plain = random_parts(256)
    tiles = svdquant_tiles.pack(FMT, plain)

    assert torch.equal(kitchen._tile_packed_weight_to_row_major(tiles["qdata"]), plain["qdata"])
    assert torch.equal(kitchen._tile_packed_scales_to_natural(tiles["scale"]), plain["scale"])
    assert torch.equal(kitchen._tile_packed_lora_up_to_natural(tiles["proj_up"]), plain["proj_up"])


def test_is_registered_with_a_version():
    """The layout is known by its name, for its format only."""
    layout = layouts()["kitchen_tile_packed_w4a4"]

    assert (layout.name, layout.version) == (svdquant_tiles.NAME, 1)
    assert get_layout(svdquant_tiles.NAME, FMT) is layout
    with pytest.raises(FormatError, match="has no layout"):
        get_layout(svdquant_tiles.NAME, lowbit.parse_spec("awq_w4a16"))


def test_rows_that_make_no_whole_tile_are_refused():
    """N must be a multiple of 128; the reason is the same before and while packing."""
    assert svdquant_tiles.refuses(FMT, 256, 64) is None
    assert "200 rows" in str(svdquant_tiles.refuses(FMT, 200, 64))
    with pytest.raises(PartsError, match="200 rows, not a multiple of 128"):
        svdquant_tiles.pack(FMT, random_parts(200))


@pytest.mark.parametrize("name", ["qdata", "scale", "proj_up"])
def test_the_wrong_arrangement_is_refused(name):
    """Plain parts are never taken for tiles, nor tiles for plain parts, whichever tensor is wrong."""
    plain = random_parts(256)
    tiles = svdquant_tiles.pack(FMT, plain)

    with pytest.raises(PartsError, match=f"{name} has shape .* for kitchen_tile_packed_w4a4"):
        svdquant_tiles.unpack(FMT, {**tiles, name: plain[name]})
    with pytest.raises(PartsError, match="in tiles already"):
        svdquant_tiles.pack(FMT, tiles)


@pytest.mark.parametrize("lead", [(3,), (2, 0), (2, 3)])
def test_a_tiled_weight_works_like_a_plain_one(lead):
    """linear, dequantize and the gradient of x over tiles give the results of the plain parts; repacking is undone."""
    plain = lowbit.QuantizedTensor.quantize(gaussian(256, 128), FMT)
    tiled = plain.in_layout(svdquant_tiles.NAME)
    x, bias = torch.randn(*lead, 128, requires_grad=True), torch.randn(256)

    assert tiled.shape == plain.shape
    assert torch.equal(tiled.dequantize(), plain.dequantize())
    y = F.linear(x, tiled, bias)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    (expected,) = torch.autograd.grad(F.linear(x, plain, bias), x, torch.ones_like(y))
    assert torch.equal(y, F.linear(x, plain, bias))
    torch.testing.assert_close(grad, expected)
    back = tiled.in_layout("")
    assert all(torch.equal(part, plain.parts[name]) for name, part in back.parts.items())


def test_pieces_cover_all_rows(monkeypatch):
    """However small the pieces are, they are whole tiles in order and give the same weight."""
    plain = FMT.quantize(gaussian(384, 128))
    tiles = svdquant_tiles.pack(FMT, plain)
    monkeypatch.setattr(svdquant_tiles, "_PIECE", 1)

    found = list(svdquant_tiles.pieces(FMT, tiles))

    assert [(start, stop) for start, stop, _ in found] == [(0, 128), (128, 256), (256, 384)]
    assert torch.equal(torch.cat([piece["qdata"] for _, _, piece in found]), plain["qdata"])
