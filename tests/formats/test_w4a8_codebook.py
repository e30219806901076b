"""w4a8_codebook: kitchen's weights to the bit, an encoder above kitchen's, and its integer linear."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowbit.errors import FormatError, WeightError
from lowbit.formats import Parts, parse_spec
from lowbit.formats.w4a8_codebook import W4A8Codebook
from lowbit.numerics.codebooks import GAUSSIAN_16, codebook_error, fitted_codebook, gaussian_codebook
from lowbit.numerics.int8_matmul import int8_linear
from lowbit.solvers.descent import sweep
from tests.solvers.test_descent import check, error, made
from tests.support import gaussian, outlier_weight, sqnr

SHAPE = (64, 512)
VARIANTS = {
    "codebook": {},
    "six bits": {"bits": 6, "codebook": False},
    "uniform": {"codebook": False},
    "correction": {"codebook": False, "correction": True},
    "wide": {"group_size": 64, "rotation": 64},
    "narrow": {"group_size": 4, "rotation": 16},
}


def kitchen():
    """kitchen's eager functions."""
    return pytest.importorskip("comfy_kitchen.backends.eager.w4a8_int8")


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def fmt(request) -> W4A8Codebook:
    """Each variant of the format."""
    return W4A8Codebook(**request.param)


def theirs(fmt: W4A8Codebook, w: torch.Tensor, **options) -> Parts:
    """What kitchen makes of a weight, as parts."""
    made = kitchen().quantize_w4a8_int8_weight(
        w, fmt.group_size, fmt.rotation, not fmt.correction, codebook=fmt.codebook, bits=fmt.bits, **options
    )
    named = dict(zip(("qdata", "s_rel", "s_channel", "correction", "codebook"), made, strict=True))
    return {name: part for name, part in named.items() if part is not None}


def operands(fmt: W4A8Codebook, parts: Parts) -> tuple:
    """Parts in the order in which kitchen's functions take them."""
    return (*(parts.get(name) for name in ("qdata", "s_rel", "s_channel", "codebook", "correction")),)


@pytest.mark.parametrize("scale_dtype", [torch.float8_e4m3fn, torch.float32], ids=str)
def test_kitchen_weights_decode_to_its_values(fmt, scale_dtype):
    """What kitchen quantized passes the format's check; its int8 values are ours to the bit, and so is what we make."""
    w = outlier_weight(*SHAPE).float()
    for parts in (theirs(fmt, w, scale_dtype=scale_dtype), fmt.quantize(w)):
        wanted = kitchen().dequantize_w4a8_int8_weight(
            *operands(fmt, parts), fmt.group_size, fmt.rotation, output_dtype=torch.float32
        )
        integers = kitchen()._dequant_int4_grouped_to_int8(
            *operands(fmt, parts)[:2], parts.get("codebook"), fmt.group_size
        )

        fmt.check(parts, SHAPE)
        rows = fmt.decode(fmt.unpack(parts["qdata"], SHAPE[1]), parts)

        plain = integers.float() * parts["s_channel"].unsqueeze(1)
        if fmt.correction:
            plain = (fmt._groups(plain) + parts["correction"].t().unsqueeze(-1).float()).flatten(1)
        assert torch.equal(rows, plain)
        torch.testing.assert_close(fmt.dequantize(parts, SHAPE, torch.float32), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [gaussian, outlier_weight])
def test_the_encoder_is_more_accurate_than_that_of_kitchen(fmt, make):
    """Plain rounding beats kitchen's encoder in every variant, on Gaussian weights and on ones with outliers."""
    w = make(256, 1024).float()
    mine, other = (
        sqnr(w, fmt.dequantize(parts, (256, 1024), torch.float32)) for parts in (fmt.quantize(w), theirs(fmt, w))
    )

    assert mine > other + 0.1


def test_rounding_at_given_scales_is_the_nearest(fmt):
    """At kitchen's scales no other code of any weight is nearer than the one that we choose."""
    w = outlier_weight(*SHAPE).float()
    rows, parts = fmt.prepare(w), theirs(fmt, w)
    distance = (fmt.project(rows, parts) - rows).abs()
    low = 1 if fmt.bits == 6 else 0
    for code in range(low, 1 << fmt.bits):
        other = fmt.decode(torch.full(SHAPE, code, dtype=torch.uint8), parts)
        assert ((other - rows).abs() >= distance - 1e-6 * rows.abs().max()).all()


def test_linear_is_the_int8_linear_of_the_decoded_integers(fmt):
    """The linear is the exact int8 linear on kitchen's integers, and with a correction that of the decoded weight."""
    parts, x, bias = fmt.quantize(gaussian(*SHAPE)), gaussian(6, SHAPE[1], seed=3), gaussian(1, SHAPE[0])[0]
    got = fmt.linear(x.reshape(2, 3, -1), parts, bias).reshape(6, -1)

    if fmt.correction:
        assert torch.equal(got, F.linear(x, fmt.dequantize(parts, SHAPE, torch.float32), bias))
        return
    integers = kitchen()._dequant_int4_grouped_to_int8(*operands(fmt, parts)[:2], parts.get("codebook"), fmt.group_size)
    assert torch.equal(got, int8_linear(x, integers, parts["s_channel"], bias, x.dtype, fmt.rotation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_is_near_that_of_kitchen(fmt, dtype):
    """kitchen's eager linear gives the same up to the rounding of activations, which it does in the input's dtype."""
    parts, x = fmt.quantize(gaussian(*SHAPE)), gaussian(32, SHAPE[1], seed=3).to(dtype)
    bias = gaussian(1, SHAPE[0])[0].to(dtype)

    other = kitchen().w4a8_int8_linear(x, *operands(fmt, parts), bias, fmt.group_size, fmt.rotation, out_dtype=dtype)

    assert sqnr(other.float(), fmt.linear(x, parts, bias).float()) > (60 if dtype == torch.float32 else 38)


def test_six_bit_codes_are_packed_as_kitchen_does():
    """Six bits: the nibbles of a row, then its upper two bits, as kitchen's own packing; both ways."""
    packed = pytest.importorskip("comfy_kitchen.tensor.w4a8_packed")
    codes = torch.randint(0, 64, (5, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    fmt = W4A8Codebook(bits=6, codebook=False, rotation=16)

    qdata = fmt.pack(codes)

    assert torch.equal(qdata, packed._pack_codes(codes.int(), 6))
    assert torch.equal(fmt.unpack(qdata, 96), codes)


def test_code_zero_of_six_bits_is_read_and_never_written():
    """Six-bit code 0 decodes to -32 steps, but no weight is given it: kernels expect 1 to 63."""
    fmt = W4A8Codebook(bits=6, codebook=False, rotation=16)
    parts = fmt.quantize(gaussian(64, 64) * 100)

    assert fmt.unpack(parts["qdata"], 64).min() == 1
    one = {"s_rel": torch.ones(1, 4).to(torch.float8_e4m3fn), "s_channel": torch.ones(1)}
    assert (fmt.decode(torch.zeros(1, 64, dtype=torch.uint8), one) == -32).all()


def test_the_codebook_of_the_kernels_is_kept_for_gaussian_weights():
    """The built-in table is kitchen's number for number, and is what Gaussian weights get, whatever their outliers."""
    packed = pytest.importorskip("comfy_kitchen.tensor.w4a8_packed")

    assert GAUSSIAN_16 == packed._FIXED_LUT
    for w in (gaussian(64, 1024), outlier_weight(512, 1024), gaussian(7, 256)):
        assert torch.equal(W4A8Codebook().fit_shared(w)["codebook"], gaussian_codebook(w.device))


def test_another_codebook_is_fitted_where_it_is_worth_it():
    """A weight whose rotated values have heavy tails gets a sorted table of its own, which gains a decibel or more."""
    fmt = W4A8Codebook(rotation=16, group_size=64)
    w = fmt.restore(gaussian(64, 1024).pow(3))
    parts, shape = fmt.quantize(w), (64, 1024)
    usual = {**fmt.fit(fmt.prepare(w), {"codebook": gaussian_codebook(w.device)})}
    usual["qdata"] = fmt.pack(fmt.encode(fmt.prepare(w), usual))

    assert (parts["codebook"].diff() >= 0).all()
    assert not torch.equal(parts["codebook"], usual["codebook"])
    mine, other = (sqnr(w, fmt.dequantize(p, shape, torch.float32)) for p in (parts, usual))
    assert mine > other + 1


def test_lloyd_steps_never_raise_the_error():
    """A fitted table is no worse than the one it began with, and a sample of its own levels is met exactly."""
    samples = gaussian(1, 20000, seed=4)[0].clamp(-1, 1)
    start = gaussian_codebook(samples.device)

    assert codebook_error(samples, fitted_codebook(samples, start)) < codebook_error(samples, start)
    assert torch.equal(fitted_codebook(start.repeat(3), start), start)


@pytest.mark.parametrize(
    "variant", ["rotation=64", "bits=6,rotation=64,codebook=false", "rotation=64,codebook=false,correction=true"]
)
def test_descent_lowers_the_error_of_the_output(variant):
    """Sweeps over codes and row scales lower tr(E H E^T) and stay on what the codes can express."""
    draft, fmt, params = made(f"w4a8_codebook({variant})", 24, 128, seed=1, start="rtn")
    errors = [error(draft)]
    for _ in range(2):
        sweep(draft, codes=True, scales=True)
        check(draft, fmt, params)
        errors.append(error(draft))

    assert errors[1] < errors[0]
    assert errors[2] <= errors[1] * (1 + 1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        "bits=5",
        "rotation=0",
        "group_size=12",
        "group_size=2",
        "bits=6",
        "bits=6,codebook=false,correction=true",
        "codebook=3",
    ],
)
def test_bad_fields_are_refused(fields):
    """Fields that kitchen cannot hold, alone or together, are errors that say what there is."""
    with pytest.raises(FormatError, match=r"expected|goes with"):
        parse_spec(f"w4a8_codebook({fields})")


@pytest.mark.parametrize(
    ("fields", "k"),
    [("", 128), ("rotation=16,group_size=64", 96), ("rotation=16,bits=6,codebook=false", 48)],
)
def test_columns_that_do_not_fit_are_refused(fields, k):
    """Columns that rotation, groups or packing do not divide are named."""
    with pytest.raises(WeightError, match=f"has {k} columns, not a multiple of"):
        parse_spec(f"w4a8_codebook({fields})" if fields else "w4a8_codebook").quantize(torch.zeros(4, k), where="w")
