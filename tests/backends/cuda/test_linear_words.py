"""The linears of 4-bit codes with activations of 16 bits: what is refused, and which kernel gets the rest."""

from __future__ import annotations

import pytest
import torch

from tests.support.cpu_linear import activations, packed_weight

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit import dispatch
from lowbit.backends.cuda import hopper_check, kernels, linear_words
from lowbit.backends.gpu import Target, assume
from lowbit.formats import parse_spec
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts import words128

FP16, AMPERE, HOPPER = torch.float16, Target("cuda", (8, 0)), Target("cuda", (9, 0))


def weight(spec: str, n: int = 16, k: int = 256) -> tuple[Format, Parts]:
    """A format and its parts in words128, scales of 16 bits in float16."""
    fmt = parse_spec(spec)
    packed, _ = packed_weight(spec, n, k, words128.NAME)
    parts = dict(zip(fmt.part_names, packed.part_list, strict=True))
    return fmt, {name: part.to(FP16) if part.dtype == torch.bfloat16 else part for name, part in parts.items()}


@pytest.mark.parametrize(("spec", "n", "m", "target", "source"), [
    ("awq_w4a16", 16, 1, HOPPER, "words_gemv.cu"),
    ("awq_w4a16", 16, 8, AMPERE, "words_gemv.cu"),
    ("awq_w4a16", 16, 9, AMPERE, "words_gemm_mma.cu"),
    ("awq_w4a16", 16, 9, HOPPER, "words_gemm_wgmma.cu"),
    ("awq_w4a16", 16, 9, Target("cuda", (12, 0)), "words_gemm_mma.cu"),
    ("nvfp4", 18, 1, AMPERE, "words_gemm_mma.cu"),  # scales of a byte are read by four rows
    ("nvfp4", 18, 1, HOPPER, "words_gemm_mma.cu"),
    ("nvfp4", 18, 9, HOPPER, "words_gemm_wgmma.cu"),
    ("nvfp4", 20, 1, HOPPER, "words_gemv.cu"),
    ("wna16(group_size=0)", 16, 1, HOPPER, "words_gemv.cu"),
    ("awq_w4a16", 16, 4096, HOPPER, "words_decoded.cu"),  # zeros are added to sums
    ("wna16", 16, 4096, HOPPER, "words_gemm_wgmma.cu"),
    ("wna16", 16, 4096, AMPERE, "words_decoded.cu"),
])  # fmt: skip
def test_which_kernel(spec, n, m, target, source):
    """Up to 8 tokens go to the kernel that reads weights once, more to the GPU's tensor cores."""
    fmt, parts = weight(spec, n)
    x = activations(m, 256, FP16)
    with assume(target), kernels.record() as launches:
        assert linear_words.refuses(fmt, x, parts, None) is None
        assert linear_words.linear(fmt, x, parts, None).shape == (m, n)
    assert launches[0].source == source


def test_plain_bytes_on_hopper():
    """What files hold is multiplied as it is: by a warp's tensor cores on Hopper, too."""
    fmt, parts = weight("awq_w4a16")
    plain = words128.unpack(fmt, parts)
    for m, source in ((2, "words_gemv.cu"), (20, "words_gemm_mma.cu"), (4096, "words_decoded.cu")):
        x = activations(m, 256, FP16)
        with assume(HOPPER), kernels.record() as launches:
            assert linear_words.refuses_gemv(x, *(plain[name] for name in ("qdata", "scale", "zero")), None, 64) is None
            linear_words.linear_plain(fmt, x, plain, None)
        assert launches[0].source == source


def test_products_that_are_wrong(monkeypatch):
    """Where a GPU's own products were found wrong, or cannot be tried, those of a warp are taken."""
    monkeypatch.setattr(hopper_check, "refuses", lambda _: "5 sums were wrong")
    fmt, parts = weight("awq_w4a16")
    with assume(HOPPER), kernels.record() as launches:
        linear_words.linear(fmt, activations(9, 256, FP16), parts, None)
    assert launches[0].source == "words_gemm_mma.cu"


@pytest.mark.parametrize("m", [1, 9])
def test_where_x_begins(m, monkeypatch):
    """The kernels load 16 bytes of x at a time: rows that begin elsewhere are copied first, others are not."""
    seen = []
    monkeypatch.setattr(kernels, "launch", lambda *args, **_: seen.append(args[5][0]))
    fmt, parts = weight("awq_w4a16")
    room = torch.zeros(m * 256 + 8, dtype=FP16)
    with assume(AMPERE):
        for offset in (0, 1, 4, 8):
            x = room[offset : offset + m * 256].view(m, 256)
            linear_words.linear(fmt, x, parts, None)
            assert seen[-1].data_ptr() % 16 == 0
            assert (seen[-1].data_ptr() == x.data_ptr()) == (offset % 8 == 0)


def test_nothing_to_do(monkeypatch):
    """No tokens, or no rows of the weight, give an empty result without a launch: a grid of no blocks is an error."""
    monkeypatch.setattr(kernels, "launch", lambda *_, **__: pytest.fail("launched"))
    fmt, parts = weight("awq_w4a16")
    none = {"qdata": parts["qdata"][:0], "scale": parts["scale"][:, :0], "zero": parts["zero"][:, :0]}
    with assume(HOPPER):
        assert linear_words.linear(fmt, torch.zeros(0, 256).half(), parts, None).shape == (0, 16)
        assert linear_words.linear(fmt, torch.zeros(2, 9, 256).half(), none, None).shape == (2, 9, 0)


def test_refusals():
    """What the kernels cannot take is refused in words that name it."""
    fmt, parts = weight("awq_w4a16")
    x = activations(1, 256, FP16)
    plain = words128.unpack(fmt, parts)
    with assume(HOPPER):
        assert linear_words.refuses(fmt, x, parts, None) is None
        assert linear_words.refuses(fmt, x.view(1, 1, 256), parts, None) is None
        assert "float32" in linear_words.refuses(fmt, x.float(), parts, None)
        assert "scales are float16" in linear_words.refuses(fmt, x.bfloat16(), parts, None)
        mixed = {**parts, "zero": parts["zero"].float()}
        assert "zeros are float32, scales float16" in linear_words.refuses(fmt, x, mixed, None)
        assert "bias is float32" in linear_words.refuses(fmt, x, parts, torch.zeros(16))
        assert "meta" in linear_words.refuses(fmt, x, parts, torch.zeros(16, device="meta"))
        assert linear_words.refuses_plain(fmt, x, plain, None) is None
        assert "100 columns" in linear_words.refuses_plain(fmt, activations(1, 100, FP16), plain, None)
        gaps = {**plain, "qdata": plain["qdata"].t().contiguous().t()}
        assert "qdata has gaps" in linear_words.refuses_plain(fmt, x, gaps, None)
        behind = torch.zeros(parts["qdata"].numel() + 1, dtype=torch.int32)[1:].view_as(parts["qdata"])
        assert "qdata has gaps, or begins" in linear_words.refuses(fmt, x, {**parts, "qdata": behind}, None)
        gaps = {**parts, "scale": parts["scale"].repeat(1, 2)[:, ::2]}
        assert "scale has gaps" in linear_words.refuses(fmt, x, gaps, None)
        assert "groups of 16" in linear_words.refuses_plain(parse_spec("awq_w4a16(group_size=16)"), x, plain, None)
    with assume(Target("cuda", (7, 5))):
        assert "7.5" in linear_words.refuses(fmt, x, parts, None)
    with assume(Target("hip")):
        assert "NVIDIA" in linear_words.refuses(fmt, x, parts, None)


def test_weights_are_packed_for_gpus_that_can():
    """On a GPU without these tensor cores no weight is packed for this backend."""
    fmt = parse_spec("awq_w4a16")
    found = {
        entry.layout: entry for entry in dispatch.candidates("linear", fmt.name, "cuda") if entry.backend == "cuda"
    }
    with assume(Target("cuda", (7, 5))):
        assert not found[words128.NAME].packs()
    with assume(AMPERE):
        assert found[words128.NAME].packs()
