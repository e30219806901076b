from __future__ import annotations

import pytest
import torch

from tests.support import cuda_simulator
from tests.support.cpu_linear import activations, packed_weight

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import compiler, hopper_check, kernels, linear_words
from lowbit.backends.gpu import Target, assume
from lowbit.formats import parse_spec
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts import words128

BF16, FP16 = torch.bfloat16, torch.float16
# Format, dtype of x, N, K, M, multiprocessors: all tiles, both kinds of scales, K shared out among warps and blocks.
CASES = (
    ("awq_w4a16", BF16, 20, 1152, 16, 132),
    ("awq_w4a16", FP16, 129, 128, 21, 1),
    ("awq_w4a16", BF16, 34, 384, 40, 132),
    ("awq_w4a16(group_size=16)", FP16, 33, 384, 9, 132),
    ("awq_w4a16(group_size=16)", BF16, 20, 128, 70, 132),
    ("awq_w4a16(group_size=32)", BF16, 65, 384, 12, 2),
    ("awq_w4a16(group_size=128)", FP16, 130, 384, 15, 1),
    ("awq_w4a16(group_size=256)", BF16, 131, 512, 34, 2),
    ("wna16", BF16, 17, 2048, 20, 132),
    ("wna16", FP16, 201, 128, 64, 1),
    ("wna16", BF16, 130, 128, 70, 1),
    ("nvfp4", BF16, 36, 384, 10, 132),
    ("nvfp4(global_scale_divides=true)", FP16, 132, 128, 33, 1),
    ("nvfp4", BF16, 18, 384, 3, 132),  # few tokens of a weight that words_gemv does not take
    ("nvfp4(row_global_scale=true)", BF16, 36, 2048, 20, 132),
    ("mxfp4", BF16, 40, 384, 31, 132),
    ("mxfp4", FP16, 36, 384, 13, 132),
)
# Plain bytes: dtype of x and of scales, group, N, K, M.
PLAIN_CASES = (
    (BF16, BF16, 32, 33, 384, 9),
    (FP16, FP16, 64, 34, 256, 30),
    (BF16, torch.float32, 128, 20, 256, 50),
)
ARCHITECTURES = {"sm_80": (8, 0), "sm_90a": (9, 0), "sm_120a": (12, 0)}


@pytest.fixture(autouse=True)
def _not_hopper(monkeypatch):
    """More than 8 tokens are this kernel's everywhere."""
    monkeypatch.setattr(hopper_check, "refuses", lambda _: "it is tried elsewhere")


def operands(spec: str, n: int, k: int, dtype: torch.dtype) -> tuple[Format, Parts, torch.Tensor]:
    """A format, its parts in words128 with scales of 16 bits in `dtype`, and the weight they stand for, float64."""
    fmt = parse_spec(spec)
    packed, _ = packed_weight(spec, n, k, words128.NAME)
    parts = dict(zip(fmt.part_names, packed.part_list, strict=True))
    parts = {name: part.to(dtype) if part.dtype in (BF16, FP16) else part for name, part in parts.items()}
    return fmt, parts, fmt.dequantize(words128.unpack(fmt, parts), (n, k), torch.float32).double()


def check(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """One rounding to the dtype of x, and what sums in float32 may lose."""
    half_ulp = torch.finfo(found.dtype).eps / 2
    atol = 1e-5 * wanted.abs().max().item()
    torch.testing.assert_close(found.double(), wanted, rtol=1.01 * half_ulp, atol=atol)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_product(case, monkeypatch):
    """A simulated GPU gives the product of the dequantized weight, rounded once, for odd rows and tokens."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    spec, dtype, n, k, m, processors = case
    fmt, parts, weight = operands(spec, n, k, dtype)
    x = activations(m, k, dtype)
    bias = torch.randn(n).to(dtype) if n % 2 else None
    with assume(Target("cuda", (9, 0), processors)):
        assert linear_words.refuses(fmt, x, parts, bias) is None
        found = linear_words.linear(fmt, x, parts, bias)
    assert found.shape == (m, n)
    assert found.dtype == dtype
    check(found, x.double() @ weight.t() + (0 if bias is None else bias.double()))


@pytest.mark.parametrize("case", PLAIN_CASES, ids=str)
def test_plain_product(case, monkeypatch):
    """Plain bytes of awq_w4a16 give the same product, with scales of 16 bits or float32."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    dtype, scales, group, n, k, m = case
    fmt, parts, weight = operands(f"awq_w4a16(group_size={group})", n, k, dtype)
    parts = {name: part.to(scales) if part.is_floating_point() else part for name, part in parts.items()}
    plain = words128.unpack(fmt, parts)
    plain = {name: part.contiguous() for name, part in plain.items()}
    x, bias = activations(m, k, dtype), torch.randn(n).to(dtype)
    with assume(Target("cuda", (8, 0))):
        assert linear_words.refuses_plain(fmt, x, plain, bias) is None
        found = linear_words.linear_plain(fmt, x, plain, bias)
    check(found, x.double() @ weight.t() + bias.double())


@pytest.mark.parametrize(("spec", "dtype"), [("awq_w4a16", FP16), ("wna16", BF16), ("nvfp4", BF16), ("mxfp4", FP16)])
def test_every_weight(spec, dtype, monkeypatch):
    """Tokens that are one in a single column give each weight of all 128 columns at its place, rounded once."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    fmt, parts, weight = operands(spec, 40, 128, dtype)
    with assume(Target("cuda", (8, 0), 1)):
        found = linear_words.linear(fmt, torch.eye(128, dtype=dtype), parts, None)
        assert torch.equal(found, weight.t().to(dtype))
        if spec == "awq_w4a16":
            plain = {name: part.contiguous() for name, part in words128.unpack(fmt, parts).items()}
            assert torch.equal(linear_words.linear_plain(fmt, torch.eye(128, dtype=dtype), plain, None), found)


def test_order_of_threads(monkeypatch):
    """The result has the same bits whichever thread runs first, and however late copies land."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    fmt, parts, weight = operands("awq_w4a16", 20, 1152, BF16)
    x, found = activations(16, 1152, BF16), []
    with assume(Target("cuda", (9, 0))):
        for seed in range(6):
            monkeypatch.setenv("LOWBIT_SIMULATOR_SEED", str(seed))
            found.append(linear_words.linear(fmt, x, parts, None))
    assert all(torch.equal(one, found[0]) for one in found)
    check(found[0], x.double() @ weight.t())


def test_not_finite(monkeypatch):
    """A NaN or an infinity in x makes the token's results not finite, and no other token's."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    fmt, parts, _ = operands("awq_w4a16", 20, 1152, BF16)
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = activations(12, 1152, BF16)
        x[3, 1000] = bad
        x[4] = 0
        with assume(Target("cuda", (9, 0))):
            found = linear_words.linear(fmt, x, parts, None)
        assert not found[3].isfinite().any()
        assert found[torch.arange(12) != 3].isfinite().all()
        assert torch.equal(found[4], torch.zeros(20).bfloat16())


def test_scale_codes(monkeypatch):
    """Every scale of nvfp4 and mxfp4 multiplies as what it stands for, NaN and the smallest ones included."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    x = torch.zeros(10, 384, dtype=BF16)
    x[:, 5] = 1
    for spec, codes in (("nvfp4", torch.float8_e4m3fn), ("mxfp4", torch.float8_e8m0fnu)):
        fmt, parts, _ = operands(spec, 256, 384, BF16)
        parts["scale"] = parts["scale"].clone()
        parts["scale"].view(torch.uint8)[:] = torch.arange(256, dtype=torch.uint8)
        parts["qdata"] = torch.full_like(parts["qdata"], 0x11111111)  # 0.5 everywhere
        if spec == "nvfp4":
            parts["global_scale"] = torch.ones_like(parts["global_scale"])
        with assume(Target("cuda", (9, 0))):
            found = linear_words.linear(fmt, x, parts, None)
        scale = torch.arange(256, dtype=torch.uint8).view(codes).double()
        torch.testing.assert_close(found[0].double(), scale / 2, rtol=0, atol=0, equal_nan=True)


def launches(spec: str, dtype: torch.dtype, n: int, m: int, target: Target) -> list[kernels.Launch]:
    """What a linear [m, 3072] x [n, 3072] launches on a GPU."""
    fmt, meta = parse_spec(spec), torch.device("meta")
    dtypes = {name: part.dtype for name, part in fmt.empty_parts((16, 3072), meta, dtype).items()}
    dtypes["qdata"] = torch.int32
    parts = {name: torch.empty(shape, dtype=dtypes[name], device=meta) for name, shape in
             words128.shapes(fmt, n, 3072).items()}  # fmt: skip
    with assume(target), kernels.record() as made:
        linear_words.linear(fmt, torch.empty(m, 3072, dtype=dtype, device=meta), parts, None)
    return made


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_shared_memory(capability):
    """What a block asks for is no more than it may have, whatever the format, the tokens and the rows."""
    limit = 1024 * {(8, 0): 163, (9, 0): 227, (10, 0): 227}.get(capability, 99)
    for spec in ("awq_w4a16", "awq_w4a16(group_size=16)", "awq_w4a16(group_size=256)", "nvfp4", "mxfp4"):
        for m in (9, 17, 33, 65, 130, 1000):
            for n in (96, 3072, 12288):
                first, *rest = launches(spec, BF16, n, m, Target("cuda", capability))
                assert 0 < first.shared <= limit
                assert all(one.name.startswith("lowbit::add_splits") for one in rest)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("spec", "dtype", "n", "m"), [
    ("awq_w4a16", BF16, 12288, 16), ("awq_w4a16(group_size=16)", FP16, 12288, 64), ("wna16", FP16, 12288, 64),
    ("nvfp4", BF16, 12288, 256), ("mxfp4", BF16, 768, 20),
])  # fmt: skip
def test_compiles(spec, dtype, n, m, architecture):
    """What is launched compiles for every architecture without a warning, and keeps to its registers."""
    for launch in launches(spec, dtype, n, m, Target("cuda", ARCHITECTURES[architecture])):
        made = compiler.compile_now(launch.source, launch.name, architecture)
        assert not made.warnings
        assert not made.spills, launch.name
        assert 0 < made.registers <= 255
