from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import use_backend
from lowbit.formats import parse_spec
from lowbit.ops import linear
from tests.support.triton_linear import DEVICE, DTYPES, ROWS, check_linear, check_properties, require

require()

SPECS = (
    "fp8_e4m3", "fp8_e4m3(granularity=row)", "fp8_e4m3(granularity=block)", "fp8_e5m2", "fp8_e5m2(granularity=row)",
    "fp8_e5m2(granularity=block)",
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_product(spec, dtype):
    """The product equals that of the dequantized weight for every granularity, odd rows, columns and tokens."""
    for n in ROWS:
        check_linear(spec, n, 128, 3, dtype, layout="")
    for m in (1, 8, 17, 63):
        check_linear(spec, 35, 256, m, dtype, layout="", bias=m % 2 == 0)


@pytest.mark.parametrize("k", [1, 4, 77, 260])
def test_ragged_columns(k):
    """Any number of columns works, whether words of codes fit in a row or not."""
    for spec, m in (("fp8_e4m3(granularity=row)", 1), ("fp8_e5m2(granularity=block)", 40)):
        check_linear(spec, 33, k, m, torch.float16, layout="")


@pytest.mark.parametrize("block", ["16x16", "1x128", "64x256", "100x12", "7x6", "128x5", "32x1000"])
def test_block_sizes(block):
    """Blocks of any size have their scale, whether it multiplies sums or values."""
    check_linear(f"fp8_e4m3(granularity=block,block_size={block})", 70, 300, 3, torch.float32, layout="")


def test_many_tokens():
    """With some hundred tokens, whose weight is decoded beforehand, the product is right."""
    for spec in SPECS[:4]:
        check_linear(spec, 17, 128, 512, torch.float16, layout="")


def test_properties():
    """Gaps, leading axes and no tokens change nothing, and every call gives the same bits."""
    check_properties("fp8_e4m3(granularity=block)", 70, 256, layout="")


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_where_x_begins(offset):
    """Activations may begin at any element of their memory, for few tokens and for some, which are put in order."""
    fmt = parse_spec("fp8_e4m3")
    parts = [part.to(DEVICE) for part in fmt.quantize(torch.randn(9, 128)).values()]
    for m in (3, 40):
        room = torch.zeros(m * 128 + 4, dtype=torch.float16, device=DEVICE)
        x = room[offset : offset + m * 128].view(m, 128).copy_(torch.randn(m, 128))
        with use_backend("triton"):
            assert torch.equal(linear(x, parts, None, fmt.spec), linear(x.clone(), parts, None, fmt.spec))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("k", [77, 128, 260])
def test_nan_codes(k, code):
    """A code of NaN makes its own row of the weight NaN, for every token, and no other row."""
    fmt = parse_spec("fp8_e4m3(granularity=row)")
    parts = fmt.quantize(torch.randn(9, k))
    parts["qdata"].view(torch.uint8)[4, 0] = code
    parts["qdata"].view(torch.uint8)[7, k - 1] = code
    parts = {name: part.to(DEVICE) for name, part in parts.items()}
    x = torch.zeros(3, k, dtype=torch.float16, device=DEVICE)
    with use_backend("triton"):
        found = linear(x, list(parts.values()), None, fmt.spec)
    assert found.isnan().any(0).nonzero().flatten().tolist() == [4, 7]
    assert bool(found[:, [4, 7]].isnan().all())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_large(spec, dtype):
    """Shapes of real layers give the right product, for numbers of tokens on both sides of every crossover."""
    for m in (1, 7, 16, 33, 300, 1500):
        check_linear(spec, 12288, 3072, m, dtype, layout="")
