from __future__ import annotations

import pytest
import torch

from tests.support import cuda_simulator
from tests.support.cpu_linear import activations, packed_weight

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import kernels, linear_words, words_gemv
from lowbit.backends.gpu import Target, assume
from lowbit.formats import parse_spec
from lowbit.formats.base import Format
from lowbit.layouts import words128
from lowbit.tensor import QuantizedTensor

SPECS = (
    "awq_w4a16",
    "awq_w4a16(group_size=32)",
    "awq_w4a16(group_size=256)",
    "wna16",
    "nvfp4",
    "nvfp4(global_scale_divides=true)",
    "mxfp4",
)


def _parts_for(fmt: Format, packed: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parts with scales of 16 bits in the dtype of x, as a model in that dtype has them."""
    halves = (torch.bfloat16, torch.float16)
    parts = dict(zip(fmt.part_names, packed.part_list, strict=True))
    return {name: part.to(dtype) if part.dtype in halves else part for name, part in parts.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_product(spec, dtype, monkeypatch):
    """A simulated GPU gives the product of the dequantized weight, rounded once, for odd rows and up to 8 tokens.

    Warps have no block of 128 columns, one, or more than are on their way at a time.
    """
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    fmt = parse_spec(spec)
    for n, k, m, processors in ((20 if "fp4" in spec else 17, 256, 1, 132), (20, 4352, 8, 132), (132, 2304, 3, 1)):
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_plain_bytes(group, dtype, monkeypatch):
    """gemv_awq_w4a16 gives the same for codes as files hold them, in every order of columns that groups ask for."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    fmt = parse_spec(f"awq_w4a16(group_size={group})")
    n, k, m = 40, 1280, 5
    plain = fmt.quantize(torch.randn(n, k))
    q, scale, zero = plain["qdata"], plain["scale"].to(dtype), plain["zero"].to(dtype)
    weight = fmt.dequantize({"qdata": q, "scale": scale, "zero": zero}, (n, k), torch.float32).double()
    x, bias = activations(m, k, dtype), torch.randn(n).to(dtype)
    with assume(Target("cuda", (9, 0))):
        assert linear_words.refuses_gemv(x, q, scale, zero, bias, group) is None
        found = linear_words.gemv_awq_w4a16(x, q, scale, zero, bias, group)
    wanted = x.double() @ weight.t() + bias.double()
    half_ulp = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(found.double(), wanted, rtol=1.01 * half_ulp, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_extreme_scales(dtype, monkeypatch):
    """Every e4m3 scale of nvfp4 is multiplied into the codes without rounding, the smallest and the largest, too."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    fmt = parse_spec("nvfp4")
    packed, _ = packed_weight("nvfp4", 128, 128, words128.NAME)
    parts = _parts_for(fmt, packed, dtype)
    scales = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn)  # those that are finite and not negative
    parts["scale"] = torch.cat([scales, scales[:1]]).repeat(8, 1)
    weight = fmt.dequantize(words128.unpack(fmt, parts), (128, 128), torch.float32).double()
    x = torch.eye(128)[37:39].to(dtype)
    with assume(Target("cuda", (9, 0))):
        found = linear_words.linear(fmt, x, parts, None)
    torch.testing.assert_close(found.double(), weight[:, 37:39].t().to(dtype).double(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("n", "tiles"),
    [(3072, 1), (8192, 2), (9216, 1), (12288, 2), (14336, 1), (18432, 2), (28672, 2)],
)
def test_tiles(n, tiles):
    """Two tiles a warp where that leaves no multiprocessor of an H200 with much more to do than the others."""
    assert words_gemv._tiles(n, 4, 132) == tiles
    assert words_gemv._tiles(n, 2, 132) == 1  # groups of 32: registers
