"""Products by tiles: those of the sets that have none, bit for bit."""

from __future__ import annotations

import functools

import pytest
import torch

from lowbit.dispatch import use_backend
from lowbit.layouts.coalesced_int4 import TAG
from lowbit.ops import int4_plain_mm
from lowbit.tensor import QuantizedTensor
from tests.support.cpu_linear import activations, packed_weight

cpu = pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels here", exc_type=ImportError)
native = cpu.native

BASES = {"amx": "avx512", "amx_emulated": "avx2"}
PAIRS = [(tiles, base) for tiles, base in BASES.items() if {tiles, base} <= set(native.available())]
# Fewer than a tile, one, two with tokens in both, a pair and one more, and two chunks of them.
TOKENS = (15, 16, 17, 32, 33, 49, 205)

pytestmark = pytest.mark.skipif(not PAIRS, reason="neither amx nor amx_emulated is built with the set beneath it")


def on(monkeypatch, name, product):
    """What a product gives on the modules of an instruction set."""
    module = native._load(f"_native_{name}")
    with monkeypatch.context() as patched, use_backend("cpu"), torch.inference_mode():
        patched.setattr(native, "isa", lambda: name)
        patched.setattr(native, "module", lambda: module)
        return product()


@functools.cache
def weight_of(spec, n, k, layout) -> QuantizedTensor:
    """The same weight for all numbers of tokens."""
    return packed_weight(spec, n, k, layout)[0]


@pytest.mark.parametrize(("tiles", "base"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("spec", "n", "k", "layout"),
    [
        ("int8", 100, 1120, "rows16"),
        ("int8", 35, 1124, ""),
        ("int8(granularity=tensor)", 17, 64, "rows16"),
        ("int8(granularity=block,block_size=24x160)", 50, 1120, "rows16"),
        ("awq_w4a16", 100, 640, "rows16"),
        ("awq_w4a16(group_size=32)", 35, 192, "rows16_w4a8"),
        ("wna16(bits=8,group_size=128)", 50, 512, "rows16"),
        ("wna16(group_size=0)", 33, 192, "rows16"),
        ("mxfp4", 50, 320, "rows16"),
        ("svdquant_w4a4(rank=5)", 100, 576, "rows16"),
        ("svdquant_w4a4(rank=5,act_unsigned=true)", 35, 192, ""),
        ("convrot_w4a4", 100, 512, "rows16"),
        ("w4a8_codebook", 50, 512, ""),
    ],
)
def test_linears_have_the_bits_of_the_set_without_tiles(monkeypatch, spec, n, k, layout, dtype, tiles, base):
    """Integers are exact and roundings come in one order: every output is that of the same set without tiles."""
    weight, bias = weight_of(spec, n, k, layout), torch.randn(n).to(dtype)
    for m in TOKENS:
        x = activations(m, k, dtype)
        found, wanted = (
            on(monkeypatch, name, lambda x=x: torch.nn.functional.linear(x, weight, bias)) for name in (tiles, base)
        )
        assert torch.equal(found, wanted), m


@pytest.mark.parametrize(("tiles", "base"), PAIRS)
@pytest.mark.parametrize("group", [8, 32, 64])
def test_int4_plain_mm_has_the_bits_of_the_set_without_tiles(monkeypatch, group, tiles, base):
    """The same of weights in plain rows, whose blocks are put in order first."""
    n, k = 100, 512
    generator = torch.Generator().manual_seed(group)
    qdata = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(n, k // group, generator=generator) + 0.5).to(torch.bfloat16)
    zero = (torch.rand(n, k // group, generator=generator) * 15).to(torch.bfloat16)
    for m in TOKENS:
        x = activations(m, k, torch.bfloat16)
        found, wanted = (
            on(monkeypatch, name, lambda x=x: int4_plain_mm(x, qdata, scale, zero, None, group_size=group, layout=TAG))
            for name in (tiles, base)
        )
        assert torch.equal(found, wanted), m


@pytest.mark.parametrize(("tiles", "base"), PAIRS)
def test_extreme_integers_and_threads(monkeypatch, tiles, base):
    """The largest codes of both signs do not saturate, and any number of threads gives the same bits."""
    n, k = 70, 2048
    codes = torch.where(torch.rand(n, k) < 0.5, -128, 127).to(torch.int8)
    codes[0], codes[1] = 127, -128
    parts = {"qdata": codes, "scale": torch.full((n, 1), 0.5)}
    weight = QuantizedTensor.from_parts(parts, "int8", (n, k), torch.float32).in_layout("rows16")
    x = torch.where(torch.rand(40, k) < 0.5, -1.0, 1.0)
    x[0], x[1] = 1, -1
    wanted = ((x * 127).double() @ codes.double().t()).float() * (torch.tensor(1.0) / 127 * 0.5)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(on(monkeypatch, tiles, lambda: torch.nn.functional.linear(x, weight)), wanted)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(on(monkeypatch, base, lambda: torch.nn.functional.linear(x, weight)), wanted)
