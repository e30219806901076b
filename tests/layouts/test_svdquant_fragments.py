"""svdquant_fragments: what every lane holds, the exact inverse, and what it refuses."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from torch import nn

import lowbit
from lowbit import QuantizedTensor
from lowbit.errors import PartsError
from lowbit.layouts import svdquant_fragments as fragments
from lowbit.layouts.base import get_layout, misfit, read_tag
from tests.layouts.svdquant_parts import FMT, random_parts
from tests.support import gaussian


@pytest.mark.parametrize(("n", "k"), [(0, 64), (1, 64), (64, 128), (65, 192), (100, 64), (256, 192)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_unpack_is_the_exact_inverse(n, k, dtype):
    """Packed parts tell N, keep all but the codes as they were, and come back bit for bit, strided parts included."""
    plain = random_parts(n, k, dtype)
    strided = {name: part.t().contiguous().t() if part.dim() == 2 else part for name, part in plain.items()}
    for source in (plain, strided):
        packed = fragments.pack(FMT, source)
        assert packed["qdata"].shape == (-(-n // 64), k // 64, 4, 32, 16)
        assert packed["qdata"].is_contiguous()
        assert fragments.rows(FMT, packed) == n
        assert all(packed[name] is source[name] for name in source if name != "qdata")
        back = fragments.unpack(FMT, packed)
        assert list(back) == list(plain)
        assert back["qdata"].dtype == torch.int8
        assert all(torch.equal(back[name], plain[name]) for name in plain)


def test_what_every_lane_holds():
    """Lane 4 o + p of each 16 rows has bytes 4 p .. + 3 of rows o and o + 8, then bytes 16 + 4 p .. + 3 of the same."""
    plain = random_parts(100, 192)["qdata"]
    packed = fragments.pack(FMT, {**random_parts(100, 192), "qdata": plain})["qdata"]
    whole = torch.cat([plain.view(torch.uint8), torch.zeros(28, 96, dtype=torch.uint8)])
    for block, group, tile, lane in torch.cartesian_prod(*map(torch.arange, (2, 3, 4, 32))).tolist():
        row, byte = 64 * block + 16 * tile + lane // 4, 32 * group + 4 * (lane % 4)
        words = [whole[row + down, byte + right : byte + right + 4] for right in (0, 16) for down in (0, 8)]
        assert torch.equal(packed[block, group, tile, lane], torch.cat(words))


def test_many_rows_are_packed_in_pieces(monkeypatch):
    """Rows packed a block at a time, as those of large weights are, give the same bytes, there and back."""
    plain = random_parts(200, 128)
    whole = fragments.pack(FMT, plain)["qdata"]
    monkeypatch.setattr(fragments, "row_chunks", lambda *_: [(at, min(at + 64, 200)) for at in range(0, 200, 64)])
    packed = fragments.pack(FMT, plain)
    assert torch.equal(packed["qdata"], whole)
    assert torch.equal(fragments.unpack(FMT, packed)["qdata"], plain["qdata"])


def test_shapes_without_values():
    """Parts on the meta device are packed, too, and have the shapes that the layout foretells."""
    made = fragments.pack(FMT, FMT.empty_parts((70, 128), torch.device("meta")))
    assert {name: tuple(part.shape) for name, part in made.items()} == fragments.shapes(FMT, 70, 128)
    assert made["qdata"].shape == (2, 2, 4, 32, 16)


def test_other_arrangements_are_refused():
    """Parts of another arrangement are neither packed nor unpacked, and the error says what was expected."""
    plain = random_parts(70, 128)
    packed = fragments.pack(FMT, plain)
    with pytest.raises(PartsError, match=r"expected \[N, K / 2\]: the plain parts"):
        fragments.pack(FMT, packed)
    expected = r"expected uint8 \[2, 2, 4, 32, 16\]: not in svdquant_fragments"
    for wrong in (plain["qdata"], packed["qdata"][:1], packed["qdata"].view(torch.int8)):
        with pytest.raises(PartsError, match=expected):
            fragments.unpack(FMT, {**packed, "qdata": wrong})
    layout = get_layout(fragments.NAME, FMT)
    assert misfit(FMT, fragments.NAME, layout.packed(FMT, plain), 70, 128) is None
    assert "repack the plain parts" in misfit(FMT, fragments.NAME, plain, 70, 128)


def test_versions():
    """The layout is never stored in files, so its version rides behind its name, and another one is refused."""
    layout = get_layout(fragments.NAME, FMT)
    assert (layout.version, layout.stored, layout.tag) == (1, False, "svdquant_fragments:1")
    assert read_tag("svdquant_fragments:1") == "svdquant_fragments"
    with pytest.raises(PartsError, match="version 2 of the kernel layout svdquant_fragments"):
        read_tag("svdquant_fragments:2")


def test_files_hold_plain_parts(tmp_path):
    """A saved module has the bytes that it has without the layout, and a pickled weight comes back with its bits."""
    layers = {}
    for name in ("plain", "svdquant_fragments"):
        layer = nn.Linear(128, 72)
        with torch.no_grad():
            layer.weight.copy_(gaussian(72, 128))
            layer.bias.zero_()
        lowbit.quantize_(layer, "svdquant_w4a4(rank=8)", layout="plain")
        lowbit.repack_(layer, name)
        layers[name] = lowbit.save(layer, tmp_path / f"{name}.safetensors").read_bytes()
    assert layer.weight.kernel_layout == "svdquant_fragments"
    assert layers["plain"] == layers["svdquant_fragments"]
    again: QuantizedTensor = pickle.load(io.BytesIO(pickle.dumps(layer.weight.data)))
    assert again.spec.endswith("@svdquant_fragments:1")
    assert torch.equal(again.dequantize(), layer.weight.dequantize())
