"""The small floating-point formats, code by code, against PyTorch's casts and ml_dtypes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lowbit.numerics.floats import (
    all_finite,
    bytes_to_fp8,
    divisor,
    e2m1_codes,
    e2m1_values,
    e8m0_codes_round_up,
    e8m0_values,
    fp8_max,
    from_fp8,
    round_to_e2m1,
    stochastic_to_e2m1,
    stochastic_to_fp8,
    to_fp8,
)
from tests.support.other_device import back, elsewhere, needs_stand_in, other_device

ml_dtypes = pytest.importorskip("ml_dtypes")

FP8 = [
    pytest.param(torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn, id="e4m3"),
    pytest.param(torch.float8_e5m2, ml_dtypes.float8_e5m2, id="e5m2"),
]
BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def every_bf16() -> torch.Tensor:
    """All 65,536 bfloat16 values as float32, without the NaNs."""
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    return values[~values.isnan()]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit by bit, but any NaN equals any other: the sign of a NaN means nothing."""
    nan = a.isnan() & b.isnan()
    return bool((nan | (a.view(torch.int32) == b.view(torch.int32))).all())


@needs_stand_in
def test_quotients_are_rounded_once_on_every_device():
    """What a GPU divides by a number is multiplied by its inverse, which is rounded, too; a scalar beside it is not."""
    x = torch.arange(1.0, 2000.0)
    with other_device():
        moved = elsewhere(x)
        assert torch.equal(back(moved / divisor(127, moved)), x / 127)
        assert not torch.equal(back(moved / 127), x / 127)


@pytest.mark.gpu
def test_quotients_are_rounded_once_on_a_gpu():
    """The same, of a GPU itself."""
    x = torch.arange(1.0, 2000.0)
    assert torch.equal((x.cuda() / divisor(127, x.cuda())).cpu(), x / 127)


@pytest.mark.parametrize(("dtype", "oracle"), FP8)
def test_every_fp8_code_reads_as_in_torch_and_ml_dtypes(dtype, oracle):
    """All 256 codes, NaN, infinity and -0 included, decode to the exact value."""
    ours = from_fp8(BYTES.view(dtype))
    theirs = torch.from_numpy(BYTES.numpy().view(oracle).astype(np.float32))
    assert same_bits(ours, BYTES.view(dtype).float())
    assert same_bits(ours, theirs)


@pytest.mark.parametrize(("dtype", "oracle"), FP8)
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16])
def test_fp8_codes_read_into_16_bits_exactly(dtype, oracle, out):
    """Every fp8 value that float16 or bfloat16 can hold (all of them) is read into it unchanged."""
    assert same_bits(from_fp8(BYTES.view(dtype), out).float(), BYTES.view(dtype).float())


@pytest.mark.parametrize(("dtype", "oracle"), FP8)
def test_fp8_reads_any_shape_and_stride(dtype, oracle):
    """Empty tensors, scalars and transposed ones keep their shape and values."""
    codes = BYTES.view(dtype).reshape(16, 16)
    assert same_bits(from_fp8(codes.t()), codes.float().t().contiguous())
    assert from_fp8(codes[:0]).shape == (0, 16)
    assert from_fp8(codes[0, 0]).shape == ()


@pytest.mark.parametrize(("dtype", "oracle"), FP8)
def test_every_bf16_value_rounds_to_fp8_half_to_even(dtype, oracle):
    """Rounding agrees with ml_dtypes for all bfloat16 inputs, which hold every tie; beyond the range it saturates."""
    x = every_bf16()
    limit = fp8_max(dtype)
    expected = x.clamp(-limit, limit).numpy().astype(oracle).view(np.uint8)
    assert torch.equal(to_fp8(x, dtype).view(torch.uint8), torch.from_numpy(expected))


@pytest.mark.parametrize(("dtype", "oracle"), FP8)
def test_values_beside_a_tie_round_to_their_own_side(dtype, oracle):
    """One float32 ulp above or below the middle of two neighbours decides; the middle itself goes to the even code."""
    grid = from_fp8(torch.arange(120, dtype=torch.int32).to(torch.uint8).view(dtype))
    middle = (grid[:-1] + grid[1:]) / 2
    low, high = torch.nextafter(middle, torch.tensor(0.0)), torch.nextafter(middle, torch.tensor(torch.inf))
    codes = torch.arange(119, dtype=torch.uint8)
    assert torch.equal(to_fp8(low, dtype).view(torch.uint8), codes)
    assert torch.equal(to_fp8(high, dtype).view(torch.uint8), codes + 1)
    assert torch.equal(to_fp8(middle, dtype).view(torch.uint8), codes + codes % 2)


@pytest.mark.parametrize(("dtype", "oracle"), FP8)
def test_fp8_saturates_and_keeps_nan_and_the_sign_of_zero(dtype, oracle):
    """Infinity and huge values become the largest finite code, NaN stays NaN, -0 stays -0."""
    limit = fp8_max(dtype)
    x = torch.tensor([torch.inf, -torch.inf, 1e30, limit * 1.2, torch.nan, -0.0])
    got = to_fp8(x, dtype).float()
    assert got[:4].tolist() == [limit, -limit, limit, limit]
    assert got[4].isnan()
    assert got[5] == 0
    assert torch.signbit(got[5])


def test_every_bf16_value_rounds_to_e2m1_half_to_even():
    """Values and codes agree with ml_dtypes for all bfloat16 inputs, -0 and small negatives included."""
    x = every_bf16()
    expected = torch.from_numpy(x.clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 0xF)
    values = round_to_e2m1(x)
    assert torch.equal(e2m1_codes(values), expected)
    assert same_bits(values, e2m1_values(expected))


@pytest.mark.parametrize(
    ("x", "rounded"),
    [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5.0, 4), (6.1, 6), (1e30, 6), (0.2500001, 0.5)],
)
def test_e2m1_ties_go_to_the_even_code(x, rounded):
    """The middle of two values goes to the one with the even code, everything above 5 to 6."""
    assert round_to_e2m1(torch.tensor([x, -x])).tolist() == [rounded, -rounded]


def test_all_e2m1_codes_and_values_are_inverse():
    """The sixteen codes read as the values of the standard and are written back as they were."""
    codes = torch.arange(16, dtype=torch.uint8)
    values = e2m1_values(codes)
    assert values.tolist() == [*E2M1.tolist(), *(-E2M1).tolist()]
    assert torch.equal(e2m1_codes(values), codes)


def test_every_e8m0_code_is_its_power_of_two():
    """Code c is 2 ** (c - 127), as in torch and ml_dtypes; code 0 is a float32 subnormal and not zero, 255 is NaN."""
    ours = e8m0_values(BYTES)
    assert same_bits(ours, BYTES.view(torch.float8_e8m0fnu).float())
    theirs = BYTES.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert same_bits(ours, torch.from_numpy(theirs))
    assert ours[0] == 2.0**-127


def test_e8m0_rounds_up_from_one_ulp_above_a_power_of_two():
    """A power of two keeps its code, the next float32 above it gets the next code, the one below it the same code."""
    code = torch.arange(1, 254, dtype=torch.int32)
    power = e8m0_values(code.to(torch.uint8))
    above = (power.view(torch.int32) + 1).view(torch.float32)
    below = (power.view(torch.int32) - 1).view(torch.float32)
    assert torch.equal(e8m0_codes_round_up(power).int(), code)
    assert torch.equal(e8m0_codes_round_up(above).int(), code + 1)
    assert torch.equal(e8m0_codes_round_up(below).int(), code)


def test_e8m0_rounds_up_subnormals_and_zero_and_ends_at_254():
    """Float32 subnormals get the code that is not below them, zero the lowest one, the largest values the highest."""
    subnormal = torch.tensor([0, 1, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert e8m0_codes_round_up(subnormal).tolist() == [0, 0, 0, 0, 1, 1]
    assert e8m0_codes_round_up(torch.tensor([2.0**127, 3e38])).tolist() == [254, 254]


def test_e8m0_rounds_up_every_bf16_magnitude():
    """For all bfloat16 magnitudes up to 2 ** 127 the code is the smallest power of two that is not below."""
    x = every_bf16()
    x = x[(x > 0) & (x <= 2.0**127)]
    value = e8m0_values(e8m0_codes_round_up(x)).double()
    assert bool((value >= x).all())
    assert bool(((value / 2 < x) | (value == 2.0**-127)).all())


@pytest.mark.parametrize(("dtype", "oracle"), FP8)
def test_stochastic_rounding_chooses_a_neighbour_with_the_right_probability(dtype, oracle):
    """Over 4096 evenly spread noises, the share rounded away from zero is the distance to the lower neighbour."""
    grid = from_fp8(torch.arange(124, dtype=torch.int32).to(torch.uint8).view(dtype))
    grid = grid[grid.isfinite()]
    low, high = grid[:-1, None], grid[1:, None]
    noise = (torch.arange(4096) / 4096)[None]
    for fraction in (0.0, 0.25, 0.6875):
        for sign in (1.0, -1.0):
            x = (sign * (low + fraction * (high - low))).expand(-1, 4096)
            got = stochastic_to_fp8(x, dtype, noise.expand_as(x)).float().abs()
            assert bool(((got == low) | (got == high)).all())
            assert torch.equal((got == high).sum(1), torch.full((len(low),), int(fraction * 4096)))


@pytest.mark.parametrize(("dtype", "oracle"), FP8)
def test_stochastic_rounding_keeps_representable_values_and_saturates(dtype, oracle):
    """A value that the format holds never moves; infinity becomes the largest value, NaN stays NaN."""
    values = BYTES.view(dtype).float()
    values = values[values.isfinite()]
    noise = torch.full_like(values, 0.99999)
    assert same_bits(stochastic_to_fp8(values, dtype, noise).float(), values)
    edge = stochastic_to_fp8(torch.tensor([torch.inf, -torch.inf, torch.nan]), dtype, torch.full((3,), 0.5)).float()
    assert edge[:2].tolist() == [fp8_max(dtype), -fp8_max(dtype)]
    assert edge[2].isnan()


@pytest.mark.parametrize(("dtype", "oracle"), FP8)
def test_given_bytes_round_like_comfy_kitchen_for_every_float16(dtype, oracle):
    """For all float16 inputs and bytes that cover the range, codes equal the reference wherever that is a number."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    for byte in (0, 1, 2, 3, 4, 63, 64, 127, 128, 200, 252, 253, 254, 255):
        rng = torch.full(x.shape, byte, dtype=torch.uint8)
        theirs, ours = kitchen.stochastic_rounding_fp8(x, rng, dtype), bytes_to_fp8(x, rng, dtype)
        number = ~theirs.float().isnan()
        assert torch.equal(ours.view(torch.uint8)[number], theirs.view(torch.uint8)[number])
        assert torch.equal(ours.float().isnan(), x.isnan())


def test_stochastic_e2m1_goes_to_a_neighbour_by_distance():
    """A value and its noise go up where they reach the next step together, else down; values of the grid stay."""
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    for low, high in itertools.pairwise(grid):
        for share in (0.25, 0.5, 0.875):
            x = torch.stack([low + share * (high - low)] * 2)
            noise = torch.tensor([1 - share, 1 - share - 0.0625])
            for sign in (1, -1):
                assert torch.equal(stochastic_to_e2m1(sign * x, noise), sign * torch.stack([high, low]))
    for noise in (0.0, 0.5, 1 - 2**-20):
        signed = torch.cat([grid, -grid])
        assert torch.equal(stochastic_to_e2m1(signed, torch.full_like(signed, noise)), signed)
        assert stochastic_to_e2m1(torch.tensor([9.0]), torch.tensor([noise])).item() == 6.0
    assert torch.signbit(stochastic_to_e2m1(torch.tensor([-0.0, -0.1]), torch.zeros(2))).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_all_finite(dtype):
    """A sum that overflows is not taken for an infinity, and one infinity or NaN anywhere is found."""
    top = torch.finfo(dtype).max
    for fine in ([], [[top] * 500] * 3, [top, -top, 1.0]):
        assert all_finite(torch.tensor(fine, dtype=dtype))
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(4, 5, dtype=dtype)
        x[2, 3] = bad
        assert not all_finite(x)
    both = torch.tensor([float("inf"), -float("inf")], dtype=dtype)
    assert not all_finite(both)
