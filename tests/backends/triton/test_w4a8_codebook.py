from __future__ import annotations

import pytest
import torch

from lowbit.formats import Parts, parse_spec
from tests.support.cpu_linear import activations, relative_error
from tests.support.triton_linear import DEVICE, DTYPES, ON_GPU, check_properties, require
from tests.support.triton_rows import in_layout, refusal, run

require()
from lowbit.backends.triton import codebook_rows, decoded_linear, int8_gemm, linear_w4a8_codebook  # noqa: E402
from lowbit.backends.triton.device import Target, assume  # noqa: E402
from lowbit.backends.triton.quantize_rows import quantize_rows  # noqa: E402
from lowbit.backends.triton.tuning import record  # noqa: E402

INTEGER_SPECS = (
    "w4a8_codebook(rotation=16)", "w4a8_codebook", "w4a8_codebook(rotation=64,codebook=False,group_size=4)",
    "w4a8_codebook(rotation=16,group_size=48)", "w4a8_codebook(bits=6,rotation=64,codebook=False)",
    "w4a8_codebook(bits=6,rotation=16,codebook=False,group_size=32)", "w4a8_codebook(rotation=1024,group_size=8)",
)  # fmt: skip
SPECS = (
    *INTEGER_SPECS[:-1], "w4a8_codebook(rotation=16,codebook=False,correction=True)",
    "w4a8_codebook(correction=True,group_size=8)",
)  # fmt: skip


def parts_of(spec: str, n: int, k: int) -> Parts:
    """Parts with any code, scales of groups from subnormal to those that reach past the largest integer."""
    fmt = parse_spec(spec)
    generator = torch.Generator().manual_seed(n + k)
    parts = fmt.empty_parts((n, k), torch.device("cpu"), torch.float32)
    parts["qdata"] = torch.randint(-128, 128, parts["qdata"].shape, generator=generator, dtype=torch.int8)
    largest = 0x70 if fmt.codebook else 0x60  # 128 times a level of a codebook, 32 times an integer one
    codes = torch.randint(0, largest + 1, parts["s_rel"].shape, generator=generator, dtype=torch.uint8)
    parts["s_rel"] = codes.view(torch.float8_e4m3fn)
    parts["s_channel"] = torch.rand(n, generator=generator) * 0.01
    if fmt.codebook:
        parts["codebook"] = torch.randn(16, generator=generator).sort().values
    if fmt.correction:
        parts["correction"] = (torch.rand(parts["correction"].shape, generator=generator) - 0.5).half()
    return parts


def columns_of(spec: str) -> int:
    """A number of columns that the format holds, odd where it can be."""
    fmt = parse_spec(spec)
    return next(k for k in range(16, 4096, 16) if fmt.check_shape(1, k) is None)


@pytest.mark.parametrize("spec", INTEGER_SPECS)
def test_integers(spec):
    """The int8 values are the reference's, bit for bit, for any rows."""
    fmt = parse_spec(spec)
    for n, times in ((1, 1), (37, 3)):
        k = times * columns_of(spec)
        parts = parts_of(spec, n, k)
        codes = fmt._groups(fmt.unpack(parts["qdata"], k))
        wanted = fmt._codebook(parts).integers(codes, parts["s_rel"].float()).to(torch.int8).flatten(1)
        assert n == 1 or (wanted == 127).any()
        coded = codebook_rows.describe(fmt, in_layout(fmt, parts, ""), k)
        for start, stop in ((0, n), (n // 3, n)):
            out = torch.empty((stop - start, k), dtype=torch.int8, device=DEVICE)
            coded.decode_integers(out, start, stop)
            assert torch.equal(out.cpu(), wanted[start:stop])


@pytest.mark.parametrize("spec", SPECS)
def test_dequantize(spec):
    """The weight is the reference's but for the order of a rotation's sums, for odd numbers of rows."""
    fmt = parse_spec(spec)
    for n, times, dtype in zip((19, 1, 5), (1, 3, 2), DTYPES, strict=False):
        k = times * columns_of(spec)
        parts = parts_of(spec, n, k)
        found = run("dequantize", spec, "", fmt, in_layout(fmt, parts, ""), (n, k), dtype)
        wanted = fmt.dequantize(parts, (n, k), dtype)
        assert found.dtype == dtype
        assert found.shape == wanted.shape
        assert relative_error(found, wanted.double()) <= (1e-6 if dtype == torch.float32 else 1e-4)


def test_factors_of_columns():
    """The effective weight has the pre-quant scale in it."""
    spec = "w4a8_codebook(rotation=64,pre_quant_scale=True)"
    fmt, parts = parse_spec(spec), parts_of("w4a8_codebook(rotation=64)", 5, 128)
    parts["pre_quant_scale"] = torch.rand(128)
    found = run("dequantize", spec, "", fmt, in_layout(fmt, parts, ""), (5, 128), torch.float32)
    assert relative_error(found, fmt.dequantize(parts, (5, 128), torch.float32).double()) <= 1e-6


def test_float32_scales_and_nan():
    """Scales of groups in float32 are read, too, and one that is NaN makes NaN of its rotated group alone."""
    spec = "w4a8_codebook(rotation=64)"
    fmt, parts = parse_spec(spec), parts_of(spec, 3, 192)
    parts["s_rel"] = parts["s_rel"].float() * 1.01
    parts["s_rel"][1, 5] = torch.nan
    found = run("dequantize", spec, "", fmt, in_layout(fmt, parts, ""), (3, 192), torch.float32)
    wanted = fmt.dequantize(parts, (3, 192), torch.float32)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert found.isnan().sum() == 64
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
def test_a_scale_that_is_nan_gives_zeros_to_the_product(bits):
    """Whichever NaN it is: GPUs make theirs of ones, of which the lowest eight are no 0."""
    spec = "w4a8_codebook(rotation=64)"
    fmt, parts = parse_spec(spec), parts_of(spec, 3, 128)
    parts["s_rel"] = parts["s_rel"].float()
    parts["s_rel"].view(torch.int32)[1, 5] = bits
    out = torch.empty((3, 128), dtype=torch.int8, device=DEVICE)
    codebook_rows.describe(fmt, in_layout(fmt, parts, ""), 128).decode_integers(out, 0, 3)
    assert out[0].any()
    assert not out[1, 80:96].any()


@pytest.mark.parametrize("few", [64, 0], ids=["fused", "decoded"])
@pytest.mark.parametrize("spec", INTEGER_SPECS)
def test_linear_of_integers(spec, few, monkeypatch):
    """Both ways give the bits of the exact integer product, scaled: with a bias and without, K split and whole."""
    monkeypatch.setattr(linear_w4a8_codebook, "FEW", few)
    fmt = parse_spec(spec)
    for m, n, times in ((1, 1, 1), (3, 37, 2)):
        k = times * columns_of(spec)
        monkeypatch.setattr(linear_w4a8_codebook, "ELEMENTS", 30 * k)
        monkeypatch.setattr(int8_gemm, "pieces_of", lambda *_, m=m, **__: min(2, m))
        parts, x = parts_of(spec, n, k), activations(m, k, torch.float16)
        bias = torch.randn(n).half() if m == 3 else None
        moved, near = in_layout(fmt, parts, ""), x.to(DEVICE)
        found = run("linear", spec, "", fmt, near, moved, None if bias is None else bias.to(DEVICE))
        codes, row = (part.cpu() for part in quantize_rows(near, rotation=fmt.rotation))
        weight = torch.empty((n, k), dtype=torch.int8, device=DEVICE)
        codebook_rows.describe(fmt, moved, k).decode_integers(weight, 0, n)
        wanted = (codes.double() @ weight.cpu().double().t()).float() * (row * parts["s_channel"])
        wanted = (wanted if bias is None else wanted + bias.float()).half()
        assert torch.equal(found, wanted), (n, k, m)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", [*SPECS, INTEGER_SPECS[-1]])
def test_linear(spec, dtype, monkeypatch):
    """The product is eager's but for single codes of activations that lie between two."""
    monkeypatch.setattr(linear_w4a8_codebook, "FEW", 2)
    fmt, n, k = parse_spec(spec), 21, columns_of(spec)
    parts = fmt.quantize(torch.randn(n, k))
    for m in (2, 5):
        x, bias = activations(m, k, dtype), torch.randn(n).to(dtype)
        found = run("linear", spec, "", fmt, x.to(DEVICE), in_layout(fmt, parts, ""), bias.to(DEVICE))
        assert found.dtype == dtype
        assert relative_error(found, fmt.linear(x, parts, bias).double()) < 3e-3


def test_properties():
    """Gaps, leading axes and no tokens change nothing, and every call gives the same bits."""
    check_properties("w4a8_codebook(rotation=16)", 20, 64, layout="")


@pytest.mark.parametrize("elements", [1 << 26, 4 * 64])
def test_gradient(elements, monkeypatch):
    """The gradient of the input is that of the decoded weight, whether it is decoded at once or in pieces."""
    monkeypatch.setattr(decoded_linear, "ELEMENTS", elements)
    spec = "w4a8_codebook(rotation=64)"
    fmt, parts = parse_spec(spec), parts_of("w4a8_codebook(rotation=64)", 10, 64)
    grad = torch.randn(3, 10).half()
    wanted = grad.double() @ fmt.dequantize(parts, (10, 64), torch.float32).double()
    found = run("linear_input_gradient", spec, "", fmt, grad.to(DEVICE), in_layout(fmt, parts, ""), 64)
    assert relative_error(found, wanted) <= 6e-3


def test_ways():
    """Few tokens are multiplied with the codes; for many the int8 weight is made once."""
    fmt = parse_spec("w4a8_codebook")
    parts = fmt.empty_parts((64, 512), torch.device("meta"))
    for m, name in ((linear_w4a8_codebook.FEW, "_linear_codes"), (linear_w4a8_codebook.FEW + 1, "_decode_integers")):
        x = torch.empty((m, 512), dtype=torch.bfloat16, device="meta")
        with assume(Target("cuda", (9, 0))), record() as launches:
            linear_w4a8_codebook.linear_w4a8_codebook(fmt, x, parts, None)
        assert [launch.kernel.name for launch in launches][:2] == ["_quantize_rows", name]


def test_refusals():
    """What the kernels do not take is refused in words."""
    spec = "w4a8_codebook(rotation=64)"
    fmt, parts = parse_spec(spec), in_layout(parse_spec(spec), parts_of(spec, 4, 128), "")
    x = torch.zeros((1, 128), dtype=torch.float16, device=DEVICE)
    gaps = {**parts, "s_rel": parts["s_rel"].view(torch.uint8).t().contiguous().t().view(torch.float8_e4m3fn)}
    assert "s_rel has gaps" in refusal("dequantize", spec, "", fmt, gaps, (4, 128), torch.float16)
    assert "s_rel has gaps" in refusal("linear", spec, "", fmt, x, gaps, None)
    turned = parse_spec("w4a8_codebook(rotation=1024)")
    assert "groups of 1024 columns" in refusal("dequantize", spec, "", turned, parts, (4, 128), torch.float16)
    assert "the result is float64" in refusal("dequantize", spec, "", fmt, parts, (4, 128), torch.float64)
    assert "x is float64" in refusal("linear", spec, "", fmt, x.double(), parts, None)
    wide = torch.zeros((1, 1 << 17), dtype=torch.float16, device=DEVICE)
    assert "int32" in refusal("linear", spec, "", fmt, wide, parts, None)
    with assume(Target("cuda", (7, 5))):
        assert "7.5" in linear_w4a8_codebook.refuses(fmt, x, parts, None)
        assert "no tensor cores" in codebook_rows.refuses(fmt, parts, torch.float16)


@pytest.mark.skipif(ON_GPU, reason="a GPU rounds bfloat16 correctly")
def test_bfloat16_in_the_interpreter_is_refused():
    """The interpreter's bfloat16 is not the reference's, and it says so."""
    spec = "w4a8_codebook(rotation=64)"
    fmt, parts = parse_spec(spec), parts_of(spec, 4, 64)
    assert "bfloat16" in refusal("dequantize", spec, "", fmt, parts, (4, 64), torch.bfloat16)
    assert "bfloat16" in refusal("linear", spec, "", fmt, torch.zeros((1, 64), dtype=torch.bfloat16), parts, None)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["w4a8_codebook", "w4a8_codebook(bits=6,rotation=64,codebook=False)",
                                  "w4a8_codebook(correction=True)"])  # fmt: skip
def test_large(spec):
    """Shapes of real layers give eager's weight and product, for numbers of tokens on both sides of the crossover."""
    fmt, n, k = parse_spec(spec), 6144, 3072
    parts = parts_of(spec, n, k)
    moved = in_layout(fmt, parts, "")
    found = run("dequantize", spec, "", fmt, moved, (n, k), torch.bfloat16)
    assert relative_error(found, fmt.dequantize(parts, (n, k), torch.bfloat16).double()) <= 1e-4
    for m in (1, 8, 17, linear_w4a8_codebook.FEW, 300, 1500):
        x = activations(m, k, torch.bfloat16)
        found = run("linear", spec, "", fmt, x.to(DEVICE), moved, None)
        assert relative_error(found, fmt.linear(x, parts, None).double()) < 6e-3, m
