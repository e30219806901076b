from __future__ import annotations

import pytest
import torch

from lowbit.formats import parse_spec
from lowbit.numerics import int8_matmul
from lowbit.numerics.rotations import rotate_groups
from tests.support import cuda_simulator
from tests.support.cpu_linear import activations, packed_weight, relative_error

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import compiler, kernels, linear_int8
from lowbit.backends.gpu import Target, assume

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ARCHITECTURES = {"sm_80": (8, 0), "sm_90a": (9, 0), "sm_120a": (12, 0)}
# Rows, columns, tokens, and processors: a GPU with one has many blocks for each.
SHAPES = ((17, 48, 1, 132), (100, 1040, 8, 1), (35, 2064, 3, 132), (1, 16, 5, 132), (64, 5136, 1, 1))


@pytest.fixture(autouse=True)
def _simulated(monkeypatch):
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    with assume(Target("cuda", (9, 0))):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", ["int8", "int8(granularity=tensor)"])
def test_products_are_those_of_the_reference_bit_for_bit(spec, dtype):
    """Codes, integer sums and the roundings behind them are the reference's, whatever the shape."""
    fmt = parse_spec(spec)
    for n, k, m, processors in SHAPES:
        parts = packed_weight(spec, n, k, "")[0].parts
        x, bias = activations(m, k, dtype), torch.randn(n).to(dtype) if m > 1 else None
        with assume(Target("cuda", (9, 0), processors)):
            assert linear_int8.refuses(fmt, x, parts, bias) is None
            found = linear_int8.linear_int8(fmt, x, parts, bias)
        assert torch.equal(found, fmt.linear(x, parts, bias)), (n, k, m)


def test_one_kernel_where_quantizing_is_little_work(monkeypatch):
    """Blocks round the tokens for themselves where they and the tokens are few; either way gives the same bits."""
    fmt = parse_spec("int8")
    parts = packed_weight("int8", 100, 1040, "")[0].parts
    x = activations(4, 1040, torch.bfloat16)
    wanted, seen = fmt.linear(x, parts, None), []

    def launch(source, name, *rest):
        seen.append(name.partition("<")[0].rpartition("::")[2])
        cuda_simulator.launch(source, name, *rest)

    monkeypatch.setattr(kernels, "launch", launch)
    for processors, kernels_wanted in ((132, ["quantize_linear_int8"]), (2, ["quantize_rows_int8", "linear_int8"])):
        with assume(Target("cuda", (9, 0), processors)):
            assert torch.equal(linear_int8.linear_int8(fmt, x, parts, None), wanted)
        assert seen == kernels_wanted
        seen.clear()


@pytest.mark.parametrize("rotation", [16, 64, 256, 1024])
def test_rotation(rotation):
    """The product is the reference's, but for activations that their rotation puts next to a tie."""
    fmt = parse_spec(f"int8(rotation={rotation})")
    parts = packed_weight(f"int8(rotation={rotation})", 20, 1024, "")[0].parts
    x = activations(4, 1024, torch.float32)
    assert relative_error(linear_int8.linear_int8(fmt, x, parts, None), fmt.linear(x, parts, None).double()) <= 3e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_named_op(dtype):
    """int8_linear gives the reference's bits in any dtype of result, with a bias of any dtype."""
    weight, scale = torch.randint(-128, 128, (18, 96), dtype=torch.int8), torch.rand(18, 1).bfloat16()
    x = activations(6, 96, torch.bfloat16).view(2, 3, 96)
    for bias in (None, torch.randn(18), torch.randn(18).half()):
        assert linear_int8.refuses_linear(x, weight, scale, bias, dtype, 0) is None
        found = linear_int8.int8_linear(x, weight, scale, bias, dtype, 0)
        assert found.shape == (2, 3, 18)
        assert torch.equal(found, int8_matmul.int8_linear(x, weight, scale, bias, dtype))


def test_extreme_integers_do_not_overflow():
    """Sums of the largest codes of both signs, -128 of foreign files among them, are exact."""
    n, k = 20, 2048
    codes = torch.where(torch.rand(n, k) < 0.5, -128, 127).to(torch.int8)
    codes[0], codes[1] = 127, -128
    x = torch.where(torch.rand(8, k) < 0.5, -1.0, 1.0)
    x[0], x[1] = 1, -1
    found = linear_int8.int8_linear(x, codes, torch.full((n, 1), 0.5), None, torch.float32, 0)
    wanted = ((x * 127).double() @ codes.double().t()).float() * (torch.tensor(1.0) / 127 * 0.5)
    assert torch.equal(found, wanted)


def test_rows_of_zeros_and_rows_that_are_not_finite():
    """A zero row gives the bias, a tiny one its product, and one with a NaN or an infinity no finite number."""
    fmt, parts = parse_spec("int8"), packed_weight("int8", 20, 96, "")[0].parts
    x = activations(6, 96, torch.float32)
    x[1], x[2] = 0, x[2] * 1e-25
    x[3, 5], x[4, 90], x[5, 7] = float("nan"), float("inf"), float("-inf")
    bias = torch.randn(20)
    found = linear_int8.linear_int8(fmt, x, parts, bias)
    assert torch.equal(found[:3], fmt.linear(x[:3], parts, bias))
    assert torch.equal(found[1], bias)
    assert not found[3:].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rest", ["", ",granularity=tensor", ",rotation=16"])
def test_weights_alone(rest, dtype):
    """With activations=none the weight alone is decoded: the product is that of the activations, rounded once."""
    spec = f"int8(activations=none{rest})"
    fmt = parse_spec(spec)
    for n, k, m, processors in SHAPES:
        packed, weight = packed_weight(spec, n, k, "")
        x, bias = activations(m, k, dtype), torch.randn(n).to(dtype) if m > 1 else None
        with assume(Target("cuda", (9, 0), processors)):
            assert linear_int8.refuses(fmt, x, packed.parts, bias) is None
            found = linear_int8.linear_int8(fmt, x, packed.parts, bias)
        if fmt.rotation:
            x, weight = rotate_groups(x, 16), rotate_groups(weight.float(), 16)
        wanted = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
        half_ulp = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(found.double(), wanted, rtol=1.01 * half_ulp, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_code(dtype):
    """Each of the 256 bytes, wherever it lies in a word, is decoded as the integer that it is."""
    codes = (torch.arange(256).view(256, 1) + torch.arange(16)).to(torch.int8)  # of a byte, modulo 256
    parts = {"qdata": codes, "scale": torch.ones(256, 1)}
    for x in torch.eye(16, dtype=dtype).split(8):
        found = linear_int8.linear_int8(parse_spec("int8(activations=none)"), x, parts, None)
        assert torch.equal(found, x @ codes.to(dtype).t())


def test_shapes():
    """Gaps, odd addresses and leading axes change nothing; no tokens and no rows are shapes like any other."""
    for spec in ("int8", "int8(activations=none)"):
        fmt, parts = parse_spec(spec), packed_weight(spec, 20, 64, "")[0].parts
        x = activations(6, 64, torch.float16)
        wanted = linear_int8.linear_int8(fmt, x, parts, None)
        gaps = torch.stack([x, x], dim=-1).flatten(1)[:, ::2]
        odd = torch.cat([torch.zeros(1).half(), x.flatten()])[1:].view(6, 64)
        for given in (x.view(2, 3, 64), gaps, odd):
            assert torch.equal(linear_int8.linear_int8(fmt, given, parts, None).reshape(6, 20), wanted)
        assert linear_int8.linear_int8(fmt, x[:0], parts, None).shape == (0, 20)
        none = {"qdata": parts["qdata"][:0], "scale": parts["scale"][:0]}
        assert linear_int8.linear_int8(fmt, x, none, None).shape == (6, 0)


def test_refusals():
    """What the kernel cannot take is refused in words that name it."""
    fmt, alone = parse_spec("int8"), parse_spec("int8(activations=none)")
    parts, x = packed_weight("int8", 16, 64, "")[0].parts, activations(1, 64, torch.float32)
    weight, scale = parts["qdata"], parts["scale"]
    assert linear_int8.refuses(fmt, x, parts, None) is None
    assert "9 tokens" in linear_int8.refuses(fmt, x.expand(9, 64), parts, None)
    assert "each block" in linear_int8.refuses(parse_spec("int8(granularity=block)"), x, parts, None)
    assert "x is float32" in linear_int8.refuses(alone, x, parts, None)
    assert "x is float64" in linear_int8.refuses(fmt, x.double(), parts, None)
    assert "bias is float64" in linear_int8.refuses(fmt, x, parts, torch.zeros(16).double())
    assert "meta" in linear_int8.refuses(fmt, x, parts, torch.zeros(16, device="meta"))
    assert "result is float64" in linear_int8.refuses_linear(x, weight, scale, None, torch.float64, 0)
    assert "groups of 4;" in linear_int8.refuses_linear(x, weight, scale, None, torch.float32, 4)
    assert "40 columns" in linear_int8.refuses_linear(x[:, :40], weight[:, :40], scale, None, torch.float32, 0)
    assert "0 columns" in linear_int8.refuses_linear(x[:, :0], weight[:, :0], scale, None, torch.float32, 0)
    many = torch.zeros(16, 1 << 17, dtype=torch.int8, device="meta")
    wide = torch.zeros(1, 1 << 17, device="meta")
    assert "131072 columns" in linear_int8.refuses_linear(wide, many, scale.to("meta"), None, torch.float32, 0)
    gaps = weight.t().contiguous().t()
    assert "gaps" in linear_int8.refuses_linear(x, gaps, scale, None, torch.float32, 0)
    odd = torch.zeros(16 * 64 + 1, dtype=torch.int8)[1:].view(16, 64)
    assert "16 bytes" in linear_int8.refuses_linear(x, odd, scale, None, torch.float32, 0)
    with assume(Target("cuda", (7, 5))):
        assert "7.5" in linear_int8.refuses(fmt, x, parts, None)
    with assume(Target("hip")):
        assert "NVIDIA" in linear_int8.refuses(fmt, x, parts, None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles(architecture, monkeypatch):
    """Every variant of the product compiles without a warning or a spill."""
    monkeypatch.undo()
    meta = torch.device("meta")
    with assume(Target("cuda", ARCHITECTURES[architecture])), kernels.record() as made:
        for spec, n, m, dtype in (
            ("int8", 12288, 8, torch.float32), ("int8", 3072, 1, torch.float32),
            ("int8(rotation=256)", 12288, 1, torch.bfloat16), ("int8(activations=none)", 12288, 1, torch.bfloat16),
            ("int8(activations=none)", 3072, 1, torch.float16),
        ):  # fmt: skip
            fmt = parse_spec(spec)
            parts = fmt.empty_parts((n, 3072), meta, dtype)
            x = torch.empty(m, 3072, dtype=dtype, device=meta)
            assert linear_int8.refuses(fmt, x, parts, None) is None
            linear_int8.linear_int8(fmt, x, parts, None)
    products = {launch for launch in made if launch.source == "linear_int8.cu"}
    assert len(products) == 5
    for launch in products:
        found = compiler.compile_now(launch.source, launch.name, architecture)
        assert not found.warnings
        assert not found.spills, launch.name
