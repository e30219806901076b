"""The ways a 4-bit product may go: which one is taken, and that the ways agree."""

from __future__ import annotations

import pytest
import torch

from tests.support.cpu_linear import activations, packed_weight
from tests.support.triton_linear import DEVICE, check_linear, require

require()

from lowbit.backends.triton import decoded_linear, device, linear_words  # noqa: E402
from lowbit.backends.triton.device import Target, assume  # noqa: E402
from lowbit.dispatch import load, use_backend  # noqa: E402
from lowbit.formats import parse_spec  # noqa: E402
from lowbit.formats.parts import narrow_rows  # noqa: E402
from lowbit.layouts.base import get_layout  # noqa: E402
from lowbit.ops.generic import run_linear  # noqa: E402

SPECS = ("awq_w4a16", "wna16(group_size=32,zero_point=True)", "nvfp4", "mxfp4")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_many_tokens(spec, dtype, monkeypatch):
    """From a number of tokens on the weight is decoded once, with the same accuracy; below it never is."""
    load("triton")
    calls = []
    product = decoded_linear.product
    monkeypatch.setattr(decoded_linear, "product", lambda *args: calls.append(args[1].shape) or product(*args))
    monkeypatch.setattr(linear_words, "MANY", 5)
    check_linear(spec, 35, 256, 4, dtype, layout="words128")
    assert calls == []
    check_linear(spec, 35, 256, 5, dtype, layout="words128")
    assert calls == [(5, 256)]


@pytest.mark.parametrize(
    ("target", "dtype", "first"),
    [
        (Target("cuda", (9, 0)), torch.bfloat16, 512), (Target("cuda", (9, 0)), torch.float32, 17),
        (Target("cuda", (7, 5)), torch.float16, 1), (Target("hip"), torch.float16, 512),
    ],
)  # fmt: skip
def test_no_scalar_code_that_spills(target, dtype, first):
    """Where Triton has no tensor-core code the weight is decoded for as few tokens as make it spill."""
    fmt = parse_spec("awq_w4a16")
    packed, _ = packed_weight("awq_w4a16", 16, 256, "words128")
    parts = dict(zip(fmt.part_names, packed.part_list, strict=True))
    parts = {name: part.to(dtype) if part.is_floating_point() else part for name, part in parts.items()}
    with assume(target):
        found = [
            linear_words.is_many(fmt, torch.empty(m, 256, dtype=dtype), parts, None) for m in (0, first - 1, first)
        ]
    assert found == [False, False, True]


@pytest.mark.parametrize("spec", SPECS)
def test_no_rows(spec):
    """A weight without rows gives a result without columns."""
    fmt = parse_spec(spec)
    packed, _ = packed_weight(spec, 16, 256, "words128")
    parts = narrow_rows(fmt.rules, dict(zip(fmt.part_names, packed.in_layout("").part_list, strict=True)), 0, 0)
    parts = {name: part.to(DEVICE) for name, part in get_layout("words128", fmt).packed(fmt, parts).items()}
    x = activations(3, 256, torch.float16).to(DEVICE)
    with use_backend("triton"), torch.inference_mode():
        assert run_linear(x, list(parts.values()), None, f"{fmt.spec}@words128:1").shape == (3, 0)


@pytest.mark.parametrize("layout", ["", "words128"])
def test_bias_with_gaps(layout):
    """A bias is read where its elements are."""
    packed, _ = packed_weight("awq_w4a16", 35, 256, layout)
    packed = packed if DEVICE.type == "cpu" else packed.in_layout("").to(DEVICE).in_layout(layout)
    x, bias = activations(3, 256, torch.float16).to(DEVICE), torch.randn(70, device=DEVICE).half()[::2]
    with use_backend("triton"), torch.inference_mode():
        wanted = torch.nn.functional.linear(x, packed, bias.contiguous())
        assert torch.equal(torch.nn.functional.linear(x, packed, bias), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("spec", [*SPECS, "nvfp4(row_global_scale=True)"])
def test_folded(spec, dtype, monkeypatch):
    """For up to 4 tokens a row is cut into pieces that fill the tile, with the same result, for odd numbers of rows."""
    monkeypatch.setattr(linear_words, "_FOLDED_ROWS", 0)
    folds = []
    fold = linear_words._fold
    monkeypatch.setattr(linear_words, "_fold", lambda *args: folds.append(fold(*args)) or folds[-1])
    for n, k, m in ((35, 1024, 1), (3, 1024, 2), (35, 256, 3), (9, 256, 4), (9, 256, 5), (9, 384, 1)):
        check_linear(spec, n, k, m, dtype, layout="words128", bias=m % 2 == 0)
    assert folds == [8, 4, 2, 2, 1, 1]


def test_folds():
    """Pieces hold whole blocks and whole groups, and rows are left whole where there are too few to need it."""
    hopper = Target("cuda", (9, 0))
    assert linear_words._fold(1, 12288, 3072, 128, hopper) == 8
    assert linear_words._fold(1, 12288, 3072, 3072, hopper) == 1
    assert linear_words._fold(1, 12288, 1536, 256, hopper) == 2
    assert linear_words._fold(1, 256, 3072, 64, hopper) == 1
    assert linear_words._fold(8, 12288, 3072, 64, hopper) == 1


def _tiles(m: int, target: Target, assemble: bool) -> set[tuple[int, int]]:
    kernel = linear_words._linear_words
    arguments = {"x": torch.empty(m, 128, device=DEVICE), "ASSEMBLE": assemble, "m_bucket": 1 << (m - 1).bit_length()}
    with assume(target):
        left = kernel.prune(kernel.configs, arguments)
    assert 1 <= len(left) <= 5
    return {(one.constants["BLOCK_M"], one.constants["BLOCK_N"]) for one in left}


def test_tiles():
    """Every number of tokens has few tiles to try; the smallest and the tallest are for GPUs that can run them."""
    hopper, ampere, other = Target("cuda", (9, 0)), Target("cuda", (8, 0)), Target("hip")
    for m in (1, 2, 8, 9, 16, 17, 33, 64, 100, 5000):
        for target in (hopper, ampere, other):
            tiles = _tiles(m, target, target.kind == "cuda")
            assert max(rows for _, rows in tiles) <= (256 if target is hopper else 128)
            assert min(tokens for tokens, _ in tiles) >= (8 if target.kind == "cuda" else 16)
            assert max(tokens for tokens, _ in tiles) < max(2 * m, 17)
    assert {tokens for tokens, _ in _tiles(1, hopper, assemble=True)} == {8}
    assert device.target_of(DEVICE) != hopper


def test_tiles_that_triton_makes_a_trap():
    """For GPUs with tensor memory a tile of up to 32 tokens is tried, and is the first, for any number of tokens."""
    kernel = linear_words._linear_words
    for capability in ((10, 0), (10, 3), (11, 0)):
        for m_bucket in (16, 32, 64, 128, 512):
            arguments = {"x": torch.empty(1, 128, device=DEVICE), "ASSEMBLE": True, "m_bucket": m_bucket}
            with assume(Target("cuda", capability)):
                left = kernel.prune(kernel.configs, arguments)
            assert left[0].constants["BLOCK_M"] <= 32
            assert len(left) <= 5
