"""Every function of lowbit.integrations.kitchen against comfy_kitchen's eager backend.

In float32 the two agree to the bit, or for products up to the order of summation. In 16 bits comfy_kitchen rounds in
between, so there ours has to be at least as close to what float64 gives.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import lowbit.integrations.kitchen as ours
from lowbit.errors import LowbitError

SHAPES = [(1, 64), (33, 96), (130, 320)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT32 = 4e-7  # of a norm: two orders of summation


@pytest.fixture(scope="module")
def theirs():
    """The package that is being stood in for."""
    return pytest.importorskip("comfy_kitchen")


def gap(a, b):
    """The relative distance of two results."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def equal(ours_, theirs_):
    """Whether results have the same dtypes, shapes and bits."""
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
        for a, b in zip(ours_, theirs_, strict=True)
    )


def _bits(x):
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("code", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8(theirs, shape, code, dtype):
    """Codes are equal for a scale that divides exactly, decoding in float32 always, and with given random bytes."""
    x, scale = torch.randn(shape).to(dtype), torch.tensor(0.25)
    codes = ours.quantize_per_tensor_fp8(x, scale, code)
    rng = torch.randint(0, 256, shape, dtype=torch.uint8)

    assert equal([codes], [theirs.quantize_per_tensor_fp8(x, scale, code)])
    odd = torch.tensor(0.3)
    assert equal(
        [ours.dequantize_per_tensor_fp8(codes, odd, torch.float32)],
        [theirs.dequantize_per_tensor_fp8(codes, odd, torch.float32)],
    )
    assert equal([ours.stochastic_rounding_fp8(x, rng, code)], [theirs.stochastic_rounding_fp8(x, rng.clone(), code)])


def test_fp8_divides_in_float32_where_theirs_multiplies_in_bfloat16(theirs):
    """For bfloat16 and an odd scale our codes are closer to x; theirs differ in some percent of the codes."""
    x, scale = torch.randn(64, 256).bfloat16(), torch.tensor(0.0123)
    errors = [gap(m.quantize_per_tensor_fp8(x, scale).float() * scale, x) for m in (ours, theirs)]

    assert errors[0] < errors[1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("hi_first", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4(theirs, shape, hi_first, dtype):
    """Codes and swizzled scales are equal, padded or not; decoding in float32 too."""
    x, scale = torch.randn(shape).to(dtype), torch.tensor(3.0 / 2688)
    pad = bool(shape[0] % 16)
    mine = ours.quantize_nvfp4(x, scale, pad_16x=pad, hi_first=hi_first)

    assert equal(mine, theirs.quantize_nvfp4(x, scale, pad_16x=pad, hi_first=hi_first))
    args = (mine[0], scale, mine[1], torch.float32, hi_first)
    assert gap(ours.dequantize_nvfp4(*args), theirs.dequantize_nvfp4(*args)) < FLOAT32


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp8(theirs, shape, dtype):
    """Codes and swizzled scales are equal, padded or not; decoding too."""
    x = torch.randn(shape).to(dtype)
    mine = ours.quantize_mxfp8(x, pad_32x=True)

    assert equal(mine, theirs.quantize_mxfp8(x, pad_32x=True))
    assert equal([ours.dequantize_mxfp8(*mine, dtype)], [theirs.dequantize_mxfp8(*mine, dtype)])


def test_block_scaled_products_run_on_a_cpu_and_read_alpha():
    """Both products equal those of the decoded operands; theirs raise on a CPU, and ignore alpha."""
    a, b, bias = torch.randn(48, 64), torch.randn(32, 64), torch.randn(32)
    one = torch.tensor(1e-3)
    (qa, sa), (qb, sb) = ours.quantize_nvfp4(a, one), ours.quantize_nvfp4(b, one)
    left, right = (ours.dequantize_nvfp4(q, one, s, torch.float32) for q, s in ((qa, sa), (qb, sb)))
    args = (qa, qb, one, one, sa, sb, bias)

    assert ours.scaled_mm_nvfp4(*args).dtype == torch.bfloat16
    assert gap(ours.scaled_mm_nvfp4(*args, torch.float32), F.linear(left, right, bias)) < FLOAT32
    doubled = ours.scaled_mm_nvfp4(*args, torch.float32, alpha=2 * one * one)
    assert gap(doubled, 2 * F.linear(left, right) + bias) < FLOAT32
    (qa, sa), (qb, sb) = ours.quantize_mxfp8(a, True), ours.quantize_mxfp8(b)
    left, right = (ours.dequantize_mxfp8(q, s, torch.float32) for q, s in ((qa, sa), (qb, sb)))
    assert gap(ours.scaled_mm_mxfp8(qa, qb, sa, sb, bias, torch.float32), F.linear(left, right, bias)) < FLOAT32


@pytest.mark.parametrize("shape", [(5, 7), (130, 320), (3, 40)])
@pytest.mark.parametrize("flatten", [True, False])
def test_small_helpers(theirs, shape, flatten):
    """Swizzling, nibbles and powers of two as scales are equal on any shape."""
    helpers, scales = theirs.float_utils, torch.randint(1, 255, shape, dtype=torch.uint8)
    blocked = ours.to_blocked(scales, flatten)

    assert equal([blocked], [theirs.to_blocked(scales, flatten)])
    assert equal([ours.from_blocked(blocked, *shape)], [theirs.from_blocked(blocked, *shape)])
    assert equal([ours.swap_nibbles(scales)], [theirs.swap_nibbles(scales)])
    for name in ("e8m0_to_f32", "unpack_uint4", "fp4_x2_to_f32"):
        assert equal([getattr(ours.float_utils, name)(scales)], [getattr(helpers, name)(scales)]), name
    codes = ours.float_utils.unpack_uint4(scales)
    assert equal([ours.float_utils.pack_uint4(codes)], [helpers.pack_uint4(codes)])
    x = torch.rand(shape) * 100
    assert equal([ours.float_utils.f32_to_e8m0(x)], [helpers.f32_to_e8m0(x)])
    with pytest.raises(LowbitError, match="tiles of 128 x 4"):
        ours.from_blocked(blocked, 500, 500)


@pytest.mark.parametrize("shape", [(5,), (7, 33), (2, 3, 64)])
def test_int8_quantizers(theirs, shape):
    """Codes and scales of float32 tensors are equal; with a given scale too."""
    x = torch.randn(shape)

    assert equal(ours.quantize_int8_rowwise(x), theirs.quantize_int8_rowwise(x))
    for scale in (None, "recalculate", 0.05, torch.tensor(0.05)):
        assert equal(ours.quantize_int8_tensorwise(x, scale), theirs.quantize_int8_tensorwise(x, scale))
    codes, scales = ours.quantize_int8_rowwise(x)
    assert equal([ours.dequantize_int8_simple(codes, scales)], [theirs.dequantize_int8_simple(codes, scales)])


def test_int8_of_bfloat16_is_closer_and_never_minus_128(theirs):
    """Theirs divides in bfloat16, which costs a fifth of the squared error and emits -128."""
    x = torch.randn(512, 256).bfloat16()
    (mine, scale), (other, other_scale) = ours.quantize_int8_rowwise(x), theirs.quantize_int8_rowwise(x)

    assert int(mine.min()) == -127
    assert int(other.min()) == -128
    assert gap(mine.float() * scale, x) < 0.95 * gap(other.float() * other_scale, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotation", [0, 16])
def test_int8_linear(theirs, dtype, rotation):
    """The product is that of theirs in float32, and at least as close to the true one in 16 bits."""
    w, x, bias = torch.randn(40, 64), torch.randn(2, 3, 64).to(dtype), torch.randn(40)
    codes, scales = ours.quantize_int8_rowwise(w)
    args = (x, codes, scales, bias.to(dtype), dtype, bool(rotation), rotation or 256)
    mine, other = ours.int8_linear(*args), theirs.int8_linear(*args)
    truth = ours.int8_linear(x.float(), codes, scales, bias.to(dtype).float(), torch.float32, *args[5:])

    assert mine.dtype == other.dtype
    assert mine.shape == other.shape
    assert gap(mine, other) < (FLOAT32 if dtype == torch.float32 else 0.02)
    assert gap(mine, truth) <= gap(other, truth) + FLOAT32
    assert torch.equal(ours.mm_int8(codes, codes.t()), codes.int() @ codes.int().t())


@pytest.mark.parametrize("act", [None, "none", "gelu_tanh", "swiglu", "situ", "rms_norm"])
def test_input_activations_and_residuals(theirs, act):
    """What can come before and after an int8 or W4A8 product is what theirs does; another name is refused."""
    w, x = torch.randn(48, 64), torch.randn(3, 128 if act in ("swiglu", "situ") else 64)
    extra = {"input_act": act, "residual": torch.randn(3, 48), "residual_scale": torch.randn(48)}
    if act == "rms_norm":
        extra |= {"input_act_weight": torch.rand(64), "input_act_eps": 1e-6}
    codes, scales = ours.quantize_int8_rowwise(w)
    packed, s_rel, s_channel, _, codebook = ours.quantize_w4a8_int8_weight(w, 16, 64)
    w4a8 = (x, packed, s_rel, s_channel, codebook, None, torch.randn(48), 16, 64, torch.float32)

    mine, other = (m.int8_linear(x, codes, scales, out_dtype=torch.float32, **extra) for m in (ours, theirs))
    assert gap(mine, other) < 1e-3  # a code may round the other way after a differing last bit
    assert gap(ours.w4a8_int8_linear(*w4a8, **extra), theirs.w4a8_int8_linear(*w4a8, **extra)) < 1e-3
    with pytest.raises(ValueError, match="unsupported input_act"):
        ours.int8_linear(x, codes, scales, input_act="relu")


def test_int8_modulated_linears(theirs):
    """Modulation by one row and a norm before it are what theirs does; two rows are refused."""
    w, x, scale, norm = torch.randn(48, 64), torch.randn(2, 3, 64), torch.randn(64), torch.rand(64)
    weight = ours.quantize_int8_rowwise(w)
    plain = [m.int8_linear_modulated(x, scale, *weight, None, torch.float32) for m in (ours, theirs)]
    normed = [m.int8_linear_rms_modulated(x, norm, 1e-6, scale, *weight, None, torch.float32) for m in (ours, theirs)]

    assert gap(*plain) < 1e-3
    assert gap(*normed) < 1e-3
    with pytest.raises(ValueError, match="one row of 64"):
        ours.int8_linear_modulated(x, torch.randn(2, 64), *weight)


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("pad", [None, 16])
def test_svdquant(theirs, unsigned, pad):
    """Codes and scales are equal in float32, padding to 256 rows included; low-rank activations and products agree."""
    x, smooth, down, up = torch.rand(5, 128), torch.rand(128) + 0.5, torch.randn(128, 8), torch.randn(48, 8)
    wgt, wscales = torch.randint(-128, 128, (48, 64), dtype=torch.int8), torch.rand(2, 48)
    sizes = {} if pad is None else {"pad_size": pad}
    mine, other = (m.quantize_svdquant_w4a4(x, smooth, down, act_unsigned=unsigned, **sizes) for m in (ours, theirs))
    act, ascales, low = mine
    args = (act, wgt, ascales, wscales, low, up, torch.randn(48), unsigned)

    assert mine[0].shape[0] == (256 if pad is None else 16)
    assert equal(mine[:2], other[:2])
    assert gap(low, other[2]) < FLOAT32
    assert gap(ours.scaled_mm_svdquant_w4a4(*args), theirs.scaled_mm_svdquant_w4a4(*args)) < FLOAT32


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_awq(theirs, shape, dtype):
    """Products in the dtype of the scales; x of another dtype is cast to it, as theirs does."""
    x, qweight = torch.randn(shape), torch.randint(-128, 128, (40, 32), dtype=torch.int8)
    scales, zeros, bias = torch.rand(2, 40).to(dtype), torch.randn(2, 40).to(dtype), torch.randn(40).to(dtype)
    mine, other = (m.gemv_awq_w4a16(x, qweight, scales, zeros, bias, 32) for m in (ours, theirs))

    assert mine.dtype == other.dtype == dtype
    assert mine.shape == other.shape
    assert gap(mine, other) < (FLOAT32 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("rotation", [16, 64])
def test_convrot_w4a4(theirs, rotation):
    """Codes, scales and the decoded weight are equal in float32; the product with 4-bit activations too."""
    w, x, bias = torch.randn(40, 128), torch.randn(2, 3, 128), torch.randn(40)
    q, scales = mine = ours.quantize_convrot_w4a4_weight(w, rotation)
    args = (x, q, scales, bias, rotation)

    assert equal(mine, theirs.quantize_convrot_w4a4_weight(w, rotation))
    decoded = [m.dequantize_convrot_w4a4_weight(q, scales, rotation) for m in (ours, theirs)]
    assert gap(*decoded) < FLOAT32
    assert gap(ours.convrot_w4a4_linear(*args), theirs.convrot_w4a4_linear(*args)) < FLOAT32


def test_convrot_w4a4_int8_means_8_bits_everywhere(theirs):
    """Theirs reads linear_dtype="int8" and rounds the input to 4 bits on a CPU: ten times the error of ours."""
    w, x = torch.randn(40, 128), torch.randn(8, 128)
    q, scales = ours.quantize_convrot_w4a4_weight(w, 64)
    truth = F.linear(x, ours.dequantize_convrot_w4a4_weight(q, scales, 64))
    mine, other = (gap(m.convrot_w4a4_linear(x, q, scales, None, 64, 64, "int8"), truth) for m in (ours, theirs))

    assert mine < 0.015
    assert other > 0.1


@pytest.mark.parametrize("options", [{}, {"codebook": False}, {"symmetric": False}, {"bits": 6}, {"group_size": 8}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_w4a8(theirs, options, dtype):
    """Weights of either decode alike in float32, products agree, and ours lose less of the weight."""
    w, x, bias = torch.randn(48, 128).to(dtype), torch.randn(2, 3, 128).to(dtype), torch.randn(48).to(dtype)
    group = options.get("group_size", 16)
    mine, other = (m.quantize_w4a8_int8_weight(w, convrot_groupsize=64, **options) for m in (ours, theirs))
    errors = []
    for q, s_rel, s_channel, correction, codebook in (mine, other):
        stored = (q, s_rel, s_channel, codebook, correction)
        decoded = [m.dequantize_w4a8_int8_weight(*stored, group, 64, torch.float32) for m in (ours, theirs)]
        assert gap(*decoded) < FLOAT32
        errors.append(gap(decoded[0], w))
        outs = [m.w4a8_int8_linear(x, *stored, bias, group, 64, dtype) for m in (ours, theirs)]
        assert gap(*outs) < (1e-3 if dtype == torch.float32 else 0.02)

    assert [None if a is None else (a.dtype, a.shape) for a in mine] == [
        None if b is None else (b.dtype, b.shape) for b in other
    ]
    assert errors[0] < errors[1]


def test_w4a8_keeps_a_given_codebook_and_scale_dtype(theirs):
    """A codebook that is passed in is used and returned as it is; float32 scales lose less than theirs do."""
    w, table = torch.randn(48, 128), torch.linspace(-1, 1, 16)
    q, s_rel, s_channel, _, codebook = ours.quantize_w4a8_int8_weight(w, 16, 64, codebook_tensor=table)
    wide = [m.quantize_w4a8_int8_weight(w, 16, 64, scale_dtype=torch.float32) for m in (ours, theirs)]
    errors = [gap(ours.dequantize_w4a8_int8_weight(*p[:3], p[4], None, 16, 64, torch.float32), w) for p in wide]

    assert torch.equal(codebook, table)
    assert gap(ours.dequantize_w4a8_int8_weight(q, s_rel, s_channel, codebook, None, 16, 64, torch.float32), w) < 0.09
    assert wide[0][1].dtype == torch.float32
    assert errors[0] < errors[1]
