from __future__ import annotations

import pytest
import torch

from tests.support import cuda_simulator
from tests.support.cpu_linear import activations, packed_weight

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import kernels, linear_words
from lowbit.backends.gpu import Target, assume
from lowbit.formats import parse_spec
from lowbit.formats.base import Format
from lowbit.layouts import words128
from lowbit.tensor import QuantizedTensor

SPECS = ("awq_w4a16", "awq_w4a16(group_size=32)", "awq_w4a16(group_size=256)", "wna16", "nvfp4", "mxfp4")


def _parts_for(fmt: Format, packed: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parts with scales of 16 bits in the dtype of x, as a model in that dtype has them."""
    halves = (torch.bfloat16, torch.float16)
    parts = dict(zip(fmt.part_names, packed.part_list, strict=True))
    return {name: part.to(dtype) if part.dtype in halves else part for name, part in parts.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_product(spec, dtype, monkeypatch):
    """A simulated GPU gives the product of the dequantized weight, rounded once, for odd rows and up to 8 tokens."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    fmt = parse_spec(spec)
    for n, k, m, processors in ((17, 256, 1, 132), (40, 1280, 8, 132), (300, 256, 3, 1)):
        packed, _ = packed_weight(spec, n, k, words128.NAME)
        parts = _parts_for(fmt, packed, dtype)
        weight = fmt.dequantize(words128.unpack(fmt, parts), (n, k), torch.float32).double()
        x = activations(m, k, dtype)
        bias = torch.randn(n).to(dtype) if m != 3 else None
        with assume(Target("cuda", (9, 0), processors)):
            assert linear_words.refuses(fmt, x, parts, bias) is None
            found = linear_words.linear(fmt, x, parts, bias)
        assert found.shape == (m, n)
        assert found.dtype == dtype
        wanted = x.double() @ weight.t() + (0 if bias is None else bias.double())
        half_ulp = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(found.double(), wanted, rtol=1.01 * half_ulp, atol=1e-5 * wanted.abs().max().item())


def test_where_x_begins(monkeypatch):
    """The kernel loads 8 bytes of x at a time: rows that begin elsewhere are copied first, others are not."""
    seen = []
    monkeypatch.setattr(kernels, "launch", lambda *args: seen.append(args[-1][0]))
    fmt = parse_spec("awq_w4a16")
    packed, _ = packed_weight("awq_w4a16", 16, 256, words128.NAME)
    parts = _parts_for(fmt, packed, torch.float16)
    room = torch.zeros(520, dtype=torch.float16)
    with assume(Target("cuda", (9, 0))):
        for offset in (0, 1, 2, 4):
            x = room[offset : offset + 512].view(2, 256)
            linear_words.linear(fmt, x, parts, None)
            assert seen[-1].data_ptr() % 8 == 0
            assert (seen[-1].data_ptr() == x.data_ptr()) == (offset % 4 == 0)


def test_nothing_to_do(monkeypatch):
    """No tokens, or no rows of the weight, give an empty result without a launch: a grid of no blocks is an error."""
    monkeypatch.setattr(kernels, "launch", lambda *_: pytest.fail("launched"))
    fmt = parse_spec("awq_w4a16")
    packed, _ = packed_weight("awq_w4a16", 16, 256, words128.NAME)
    parts = _parts_for(fmt, packed, torch.float16)
    none = {"qdata": parts["qdata"][:0], "scale": parts["scale"][:, :0], "zero": parts["zero"][:, :0]}
    with assume(Target("cuda", (9, 0))):
        assert linear_words.linear(fmt, torch.zeros(0, 256).half(), parts, None).shape == (0, 16)
        assert linear_words.linear(fmt, torch.zeros(2, 256).half(), none, None).shape == (2, 0)


def test_refusals():
    """What the kernel cannot take is refused in words that name it."""
    fmt = parse_spec("awq_w4a16")
    packed, _ = packed_weight("awq_w4a16", 16, 256, words128.NAME)
    parts = _parts_for(fmt, packed, torch.float16)
    x = activations(1, 256, torch.float16)
    with assume(Target("cuda", (9, 0))):
        assert linear_words.refuses(fmt, x, parts, None) is None
        assert "9 tokens" in linear_words.refuses(fmt, activations(9, 256, torch.float16), parts, None)
        assert "float32" in linear_words.refuses(fmt, x.float(), parts, None)
        assert "scales are float16" in linear_words.refuses(fmt, x.bfloat16(), parts, None)
        mixed = {**parts, "zero": parts["zero"].float()}
        assert "zeros are float32, scales float16" in linear_words.refuses(fmt, x, mixed, None)
        assert "bias is float32" in linear_words.refuses(fmt, x, parts, torch.zeros(16))
        assert "meta" in linear_words.refuses(fmt, x, parts, torch.zeros(16, device="meta"))
    with assume(Target("cuda", (7, 5))):
        assert "7.5" in linear_words.refuses(fmt, x, parts, None)
    with assume(Target("hip")):
        assert "NVIDIA" in linear_words.refuses(fmt, x, parts, None)
