from __future__ import annotations

import numpy as np
import pytest
import torch

from lowbit.dispatch import use_backend
from lowbit.formats import parse_spec
from lowbit.layouts import svdquant_tiles
from lowbit.numerics.int4_matmul import GELU_SHIFT
from lowbit.ops import quantize_svdquant_w4a4, scaled_mm_svdquant_w4a4
from tests.support import ptx
from tests.support.cpu_linear import activations, relative_error
from tests.support.triton_linear import DEVICE, DTYPES, require

require()

svdquant_gemm = pytest.importorskip("lowbit.backends.triton.svdquant_gemm")


def moved(*arguments):
    """The same arguments with tensors on the device that is tested."""
    return [one.to(DEVICE) if isinstance(one, torch.Tensor) else one for one in arguments]


def check_quantizing(m, k, rank, dtype, pad_size, unsigned):
    """Assert that codes and scales have eager's bits, and the low rank its values, with rows of zeros behind."""
    generator = torch.Generator().manual_seed(m)
    x, smooth = activations(m, k, dtype), (torch.rand(k, generator=generator) + 0.5).to(dtype)
    down = torch.randn(k, rank, generator=generator).to(dtype)
    x[3], x[4], smooth[70] = 0, x[4] * 1e-20, 0
    x[5] = x[5].round()  # quotients halfway between two codes
    lora_x = torch.randn(m, k, generator=generator) if unsigned else None
    arguments = (x + GELU_SHIFT if unsigned else x, smooth, down, pad_size, unsigned, lora_x)
    with use_backend("eager"):
        wanted = quantize_svdquant_w4a4(*arguments)
    with use_backend("triton"):
        found = quantize_svdquant_w4a4(*moved(*arguments))

    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in wanted]
    assert all(t.is_contiguous() for t in found)
    assert torch.equal(found[0].cpu(), wanted[0])
    assert torch.equal(found[1].cpu(), wanted[1])
    assert relative_error(found[2].cpu(), wanted[2].double()) < 1e-5
    assert not found[2][m:].any()


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pad_size", [1, 16])
def test_quantizing_is_bit_equal_to_eager(unsigned, dtype, pad_size):
    """Codes and scales, of zero and tiny rows and channels that are switched off too, and the low rank to rounding."""
    check_quantizing(23, 320, 11, dtype, pad_size, unsigned)


def check_multiplying(n, k, rank, m, dtype, unsigned):
    """Assert that the named product of a plain weight is eager's, and that of a tiled one has the same bits."""
    generator = torch.Generator().manual_seed(n)
    act, wgt = (torch.randint(-128, 128, (r, k // 2), generator=generator).to(torch.int8) for r in (m, n))
    ascales = torch.rand(m, k // 64, generator=generator).to(dtype).t()
    wscales = torch.randn(n, k // 64, generator=generator).to(dtype).t()
    low, up = torch.randn(m, rank, generator=generator), torch.randn(n, rank, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype) if m % 2 else None
    arguments = (act, wgt, ascales, wscales, low, up, bias, unsigned)
    with use_backend("eager"):
        wanted = scaled_mm_svdquant_w4a4(*arguments)
    with use_backend("triton"):
        found = scaled_mm_svdquant_w4a4(*moved(*arguments))
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    limit = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 3e-3}[dtype]
    assert m == 0 or relative_error(found.cpu(), wanted.double()) < limit, (n, k, rank, m)
    if n % svdquant_tiles.ROWS == 0:
        tiles = svdquant_tiles.pack(
            parse_spec(f"svdquant_w4a4(rank={rank})"),
            {"qdata": wgt, "scale": wscales, "proj_up": up, "smooth_factor": torch.ones(k)},
        )
        with use_backend("triton"):
            again = scaled_mm_svdquant_w4a4(
                *moved(act, tiles["qdata"], ascales, tiles["scale"], low, tiles["proj_up"], bias, unsigned)
            )
        assert torch.equal(again, found)


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multiplying_is_eagers(unsigned, dtype):
    """The named product of plain and of tiled weights is eager's, all codes and any strides of its tensors included."""
    for n, k, rank, m in ((100, 192, 3, 5), (128, 128, 40, 9), (1, 64, 1, 1), (17, 64, 4, 0)):
        check_multiplying(n, k, rank, m, dtype, unsigned)


def test_assembly():
    """The PTX makes of every byte, in every place of a register, 16 times its two codes."""
    packed = np.arange(256, dtype=np.uint8)
    packed = np.concatenate([packed, np.roll(packed, 1), np.roll(packed, 2), np.roll(packed, 3)])
    found = ptx.run(svdquant_gemm.NIBBLES.value, {2: packed.view(np.uint32)})
    codes = packed.view(np.int8).astype(np.int32)
    for register, wanted in ((0, ((codes & 15) ^ 8) - 8), (1, codes >> 4)):
        assert np.array_equal(found[register].view(np.int8), 16 * wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unsigned", [False, True])
def test_large(unsigned, dtype):
    """Shapes of real layers: eager's bits of codes and scales, and its product."""
    check_quantizing(700, 12288, 32, dtype, 256, unsigned)
    for m in (1, 40, 700):
        check_multiplying(6144, 3072, 32, m, dtype, unsigned)
