from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import explain, preferred_layout, select, use_backend
from lowbit.formats import parse_spec
from lowbit.layouts import rows16, svdquant_tiles
from lowbit.numerics.int4_matmul import GELU_SHIFT
from lowbit.ops import quantize_svdquant_w4a4, scaled_mm_svdquant_w4a4
from lowbit.tensor import QuantizedTensor
from tests.support.cpu_linear import (
    DTYPES,
    TOKENS,
    activations,
    check_linear,
    check_properties,
    packed_weight,
    relative_error,
)

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)


def eager_linear(spec, n, k):
    """What eager makes of a weight's parts: (x, weight) -> float64, as `check_linear` takes it."""
    packed, _ = packed_weight(spec, n, k, rows16.NAME)
    parts = packed.in_layout("").parts
    return lambda x, _: parse_spec(spec).linear(x.float(), parts, None).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("layout", [rows16.NAME, ""])
def test_product(unsigned, dtype, layout):
    """The product is eager's for odd numbers of rows, tokens and low ranks, signed and unsigned, packed and plain."""
    for n, k, rank in ((1, 64, 1), (15, 192, 3), (17, 64, 9), (100, 640, 40)):
        spec = f"svdquant_w4a4(rank={min(rank, n)},act_unsigned={unsigned})"
        check_linear(spec, n, k, 3, dtype, layout=layout, reference=eager_linear(spec, n, k))
    spec = f"svdquant_w4a4(rank=5,act_unsigned={unsigned})"
    reference = eager_linear(spec, 35, 576)
    for m in TOKENS:
        check_linear(spec, 35, 576, m, dtype, layout=layout, bias=m % 2 == 0, reference=reference)


def test_properties():
    """Gaps, leading axes, no tokens and the number of threads change nothing."""
    check_properties("svdquant_w4a4(rank=8)", 100, 1216)
    check_properties("svdquant_w4a4(rank=2,act_unsigned=true)", 16, 64)


@pytest.mark.parametrize("unsigned", [False, True])
def test_tiles_and_plain_parts_give_the_same_bits(unsigned):
    """A weight in kitchen's tiles, which can be packed from there, and a plain one give the bits of rows16."""
    packed, _ = packed_weight(f"svdquant_w4a4(rank=6,act_unsigned={unsigned})", 256, 320, rows16.NAME)
    tiled = packed.in_layout(svdquant_tiles.NAME)
    for name, part in tiled.in_layout(rows16.NAME).parts.items():
        assert torch.equal(part, packed.parts[name])
    for m in (1, 6, 33):
        x, linear = activations(m, 320, torch.bfloat16), torch.nn.functional.linear
        with use_backend("cpu"), torch.inference_mode():
            wanted = linear(x, packed)
            assert torch.equal(linear(x, tiled), wanted)
            assert torch.equal(linear(x, packed.in_layout("")), wanted)


def test_rows16_is_preferred():
    """Weights are packed into rows16 at load, although plain ones and tiles can be read too."""
    assert preferred_layout("linear", parse_spec("svdquant_w4a4"), 256, 128, "cpu") == rows16.NAME


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pad_size", [1, 16])
def test_quantizing_is_bit_equal_to_eager(unsigned, dtype, pad_size):
    """Codes and scales, of zero and tiny rows and channels that are switched off too, and the low rank to rounding."""
    x, smooth, down = activations(37, 1152, dtype), torch.rand(1152).to(dtype) + 0.5, torch.randn(1152, 11).to(dtype)
    x[3], x[4], smooth[70] = 0, x[4] * 1e-20, 0
    lora_x = torch.randn(37, 1152) if unsigned else None
    arguments = (x + GELU_SHIFT if unsigned else x, smooth, down, pad_size, unsigned, lora_x)
    with use_backend("eager"):
        wanted = quantize_svdquant_w4a4(*arguments)
    with use_backend("cpu"):
        found = quantize_svdquant_w4a4(*arguments)

    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in wanted]
    assert all(t.is_contiguous() for t in found)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert relative_error(found[2], wanted[2].double()) < 1e-5
    assert not found[2][37:].any()


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multiplying_is_eagers(unsigned, dtype):
    """The named product of plain and of tiled weights is eager's, all codes and any strides of its tensors included."""
    for n, k, rank, m in ((100, 192, 3, 5), (256, 320, 32, 9), (1, 64, 1, 1), (17, 64, 4, 0)):
        generator = torch.Generator().manual_seed(n)
        act, wgt = (torch.randint(-128, 128, (r, k // 2), generator=generator).to(torch.int8) for r in (m, n))
        ascales = torch.rand(m, k // 64, generator=generator).to(dtype).t()
        wscales = torch.randn(n, k // 64, generator=generator).to(dtype).t()
        low, up = torch.randn(m, rank, generator=generator), torch.randn(n, rank, generator=generator).to(dtype)
        bias = torch.randn(n, generator=generator).to(dtype) if m % 2 else None
        arguments = (act, wgt, ascales, wscales, low, up, bias, unsigned)
        with use_backend("eager"):
            wanted = scaled_mm_svdquant_w4a4(*arguments)
        with use_backend("cpu"):
            found = scaled_mm_svdquant_w4a4(*arguments)
        assert found.shape == wanted.shape
        assert found.dtype == wanted.dtype
        assert m == 0 or relative_error(found, wanted.double()) < (1e-6 if dtype == torch.float32 else 5e-4)
        if n % svdquant_tiles.ROWS == 0:
            tiles = svdquant_tiles.pack(
                parse_spec(f"svdquant_w4a4(rank={rank})"),
                {"qdata": wgt, "scale": wscales, "proj_up": up, "smooth_factor": torch.ones(k)},
            )
            with use_backend("cpu"):
                again = scaled_mm_svdquant_w4a4(
                    act, tiles["qdata"], ascales, tiles["scale"], low, tiles["proj_up"], bias, unsigned
                )
            assert torch.equal(again, found)


def test_what_is_not_finite_stays_so():
    """A NaN or an infinity among the activations reaches every output of its token and no other token's."""
    packed, _ = packed_weight("svdquant_w4a4(rank=2)", 20, 128, rows16.NAME)
    x = activations(3, 128, torch.float32)
    x[0, 5], x[2, 70] = torch.nan, torch.inf
    with use_backend("cpu"), torch.inference_mode():
        found = torch.nn.functional.linear(x, packed)

    assert not found[[0, 2]].isfinite().any()
    assert found[1].isfinite().all()


def test_words_out_of_place_are_refused():
    """Codes that begin between two words are left to a kernel that reads bytes."""
    fmt = parse_spec("svdquant_w4a4(rank=1)")
    plain = QuantizedTensor.quantize(torch.randn(4, 64), "svdquant_w4a4(rank=1)")
    room = torch.empty(plain.parts["qdata"].numel() + 1, dtype=torch.int8)
    room[1:] = plain.parts["qdata"].reshape(-1)
    parts = {**plain.parts, "qdata": room[1:].view(plain.parts["qdata"].shape)}
    x = torch.randn(2, 64)

    assert "address" in explain("linear", fmt.name, "", "cpu", (fmt, x, parts, None))["cpu:linear_svdquant_w4a4_plain"]
    assert select("linear", fmt.name, "", "cpu", (fmt, x, parts, None)).backend == "eager"
    assert select("linear", fmt.name, "", "cpu", (fmt, x, dict(plain.parts), None)).backend == "cpu"


@pytest.mark.parametrize("unsigned", [False, True])
def test_the_largest_sums_are_exact(unsigned):
    """All weights and all activations of a group at their ends, of either sign: no sum leaves its integers."""
    fmt, ones = parse_spec(f"svdquant_w4a4(rank=1,act_unsigned={unsigned})"), torch.ones(128)
    for code in (0x77, -0x78, 0x78, -0x79):  # nibbles 7 and 7, -8 and -8, 7 and -8, -8 and 7
        parts = {
            "qdata": torch.full((16, 64), code, dtype=torch.int8),
            "scale": torch.ones(2, 16),
            "smooth_factor": ones,
            "proj_down": torch.zeros(128, 1),
            "proj_up": torch.zeros(16, 1),
        }
        alternating = ones.clone()
        alternating[1::2] = -1
        x = torch.stack([ones, -ones, alternating, -alternating])
        packed = rows16.pack(fmt, parts)
        entry = select("linear", fmt.name, rows16.NAME, "cpu", (fmt, x, packed, None))
        assert entry.backend == "cpu"
        torch.testing.assert_close(entry.run(fmt, x, packed, None), fmt.linear(x, parts, None), rtol=1e-6, atol=1e-4)
