"""W8A8 in float8: activations rounded on the fly to eager's codes, products of codes with scales of rows or blocks."""

from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import use_backend
from lowbit.formats import parse_spec
from lowbit.formats.granular import Granular
from lowbit.numerics.floats import from_fp8
from lowbit.numerics.fp8_matmul import quantize_rows_fp8
from lowbit.ops import linear
from tests.support.cpu_linear import activations, relative_error
from tests.support.triton_linear import DEVICE, DTYPES, ROWS, TOKENS, require

require()

from lowbit.backends.triton import fp8_gemm, linear_fp8_activations  # noqa: E402
from lowbit.backends.triton.device import Target, assume, target_of  # noqa: E402
from lowbit.backends.triton.quantize_rows_fp8 import quantize  # noqa: E402
from lowbit.backends.triton.tuning import record  # noqa: E402

FIELDS = ("", "granularity=row,", "granularity=block,", "granularity=block,block_size=32x64,",
          "granularity=block,block_size=20x36,", "granularity=block,block_size=7x200,")  # fmt: skip
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 3e-3, torch.float32: 2e-6}
# What it costs that tensor cores cut the terms of a sum off at 14 bits or so: a model of them gives 3e-4, with 13 6e-4.
NARROW = 1e-3


def eager_codes(x: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [M, K] and scales [blocks, M] by the reference."""
    pieces = [quantize_rows_fp8(piece) for piece in x.split(columns, dim=1)]
    return torch.cat([codes.view(torch.uint8) for codes, _ in pieces], 1), torch.cat([s for _, s in pieces], 1).t()


def check_codes(x: torch.Tensor, columns: int) -> None:
    """Assert that the kernel's codes and scales are those of the reference, bit for bit."""
    codes, scale = quantize(x.to(DEVICE), columns)
    wanted, wanted_scale = eager_codes(x, columns)
    assert torch.equal(codes.cpu().view(torch.uint8), wanted), (tuple(x.shape), columns, x.dtype)
    assert torch.equal(scale.cpu(), wanted_scale)


def weight(fields: str, n: int, k: int) -> tuple[Granular, dict[str, torch.Tensor], torch.Tensor]:
    """The format, the parts of a random weight on the device, and what they stand for in float64."""
    fmt = parse_spec(f"fp8_e4m3({fields}activations=fp8)")
    assert isinstance(fmt, Granular)
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(7919 * n + k)) * torch.linspace(0.1, 4, k)
    parts = fmt.quantize(w)
    return fmt, {name: part.to(DEVICE) for name, part in parts.items()}, fmt.dequantize(parts, (n, k), torch.float64)


def cuts_off(target: Target) -> bool:
    """Whether codes are multiplied by tensor cores that keep few bits of a sum."""
    return fp8_gemm.multiplies_e4m3(target) and target.capability[0] not in fp8_gemm._FULL_SUMS


def check_linear(fields: str, n: int, k: int, m: int, dtype: torch.dtype, *, bias: bool = True) -> None:
    """Assert that the product is that of the rounded activations and the decoded weight, in float64."""
    fmt, parts, w = weight(fields, n, k)
    x = activations(m, k, dtype)
    columns = fmt.block_size[1] if fmt.granularity == "block" else k
    codes, scale = eager_codes(x, columns)
    spread = scale.t().double().repeat_interleave(min(columns, k), dim=1)[:, :k]
    wanted = (from_fp8(codes.view(torch.float8_e4m3fn)).double() * spread) @ w.t()
    added = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(dtype) if bias else None
    if added is not None:
        wanted = wanted + added.double()
        added = added.to(DEVICE)
    x = x.to(DEVICE)
    assert linear_fp8_activations.refuses(fmt, x, parts, added) is None
    found = linear_fp8_activations.linear(fmt, x, parts, added)
    assert found.dtype == dtype
    assert found.shape == (m, n)
    limit = TOLERANCE[dtype] + (NARROW if cuts_off(target_of(DEVICE)) else 0.0)
    assert relative_error(found.cpu(), wanted) <= limit, (fields, n, k, m, dtype)


def test_which_gpus_keep_few_bits():
    """Ada, Hopper and Blackwell for desktops do; Ampere multiplies float16, and tensor memory holds whole sums."""
    found = [cuts_off(Target("cuda", one)) for one in ((8, 6), (8, 9), (9, 0), (10, 0), (12, 0))]
    assert found == [False, True, True, False, True]
    assert not cuts_off(Target("interpreter"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("columns", "k"), [(1, 5), (36, 300), (128, 384), (128, 100), (300, 300), (3000, 3000)])
def test_codes_are_those_of_the_reference(columns, k, dtype):
    """Codes and scales equal the reference's bit for bit, for any number of rows and ragged blocks of columns."""
    for m in (1, 3, 70):
        check_codes(activations(m, k, dtype), columns)


def test_codes_of_every_exponent_and_of_ties():
    """Quotients at and beside every border between two codes, subnormal ones too, round as the reference rounds."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (values[1:] + values[:-1]) / 2
    edges = torch.cat([values, ties, ties * (1 + 2**-23), ties * (1 - 2**-23)])
    row = torch.cat([edges, -edges])
    check_codes(torch.stack([row, row * 3, row / 3, row * 1.7e-30, row * 1e-36, row * 7e35]), row.numel())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, which interprets
def test_codes_of_what_is_not_finite():
    """A NaN or an infinity makes the scale of the reference and codes that are all NaN, and leaves other rows alone."""
    x = torch.randn(5, 40)
    x[0, 3], x[1, 39], x[2, 0], x[3] = torch.nan, torch.inf, -torch.inf, 0.0
    codes, scale = quantize(x.to(DEVICE), 40)
    wanted, wanted_scale = eager_codes(x, 40)
    assert torch.equal(scale.cpu().nan_to_num(nan=-1.0), wanted_scale.nan_to_num(nan=-1.0))
    assert bool(from_fp8(codes.cpu())[:3].isnan().all())
    assert torch.equal(codes.cpu().view(torch.uint8)[3:], wanted[3:])


def test_rows_longer_than_a_program_keeps():
    """A row that is read twice has the codes of the reference, its ragged end included."""
    check_codes(activations(2, 20000, torch.float16), 20000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fields", FIELDS)
def test_product(fields, dtype):
    """The product equals that of the rounded operands for every granularity, odd numbers of rows, tokens, columns."""
    columns = (120, 144, 37, 72) if "x" in fields else (300, 384, 37, 256)
    for n, k in zip(ROWS, columns, strict=True):
        check_linear(fields, n, k, 3, dtype)
    for m in TOKENS[::3]:
        check_linear(fields, 35, columns[1], m, dtype, bias=m % 2 == 0)


def test_many_columns_are_split_and_repeat():
    """Sums that are split over programs are right, and have the same bits at every call."""
    check_linear("granularity=row,", 40, 1000, 2, torch.float16)
    fmt, parts, _ = weight("granularity=block,", 40, 1000)
    x = activations(2, 1000, torch.float16).to(DEVICE)
    first = linear_fp8_activations.linear(fmt, x, parts, None)
    assert torch.equal(linear_fp8_activations.linear(fmt, x, parts, None), first)


def test_properties():
    """Gaps in x or the bias, leading axes, no tokens and no rows change nothing; parts with gaps are refused."""
    fmt, parts, _ = weight("granularity=row,", 100, 128)
    run = linear_fp8_activations.linear
    for m in (1, 40):
        x = activations(m, 128, torch.float16).to(DEVICE)
        whole = run(fmt, x, parts, None)
        gaps = activations(m, 256, torch.float16).to(DEVICE)
        gaps[:, ::2] = x
        assert torch.equal(run(fmt, gaps[:, ::2], parts, None), whole)
        assert torch.equal(run(fmt, x.view(1, m, 1, 128), parts, None), whole.view(1, m, 1, 100))
    assert torch.equal(run(fmt, x[0], parts, None), run(fmt, x[:1], parts, None)[0])
    assert run(fmt, x[:0], parts, None).shape == (0, 100)
    none = {"qdata": parts["qdata"][:0], "scale": parts["scale"][:0]}
    assert run(fmt, x, none, None).shape == (40, 0)
    bias = torch.randn(200, device=DEVICE).half()
    assert torch.equal(run(fmt, x, parts, bias[::2]), run(fmt, x, parts, bias[::2].contiguous()))
    gaps = {**parts, "qdata": parts["qdata"].t().contiguous().t()}
    assert "gaps" in str(linear_fp8_activations.refuses(fmt, x, gaps, None))


def test_the_format_asks_for_it():
    """A linear of a weight in fp8_e4m3 with activations=fp8 runs here, and one without is not rounded."""
    fmt, parts, w = weight("granularity=row,", 40, 128)
    x = activations(5, 128, torch.float16).to(DEVICE)
    with use_backend("triton"):
        rounded = linear(x, list(parts.values()), None, fmt.spec)
        kept = linear(x, list(parts.values()), None, "fp8_e4m3(granularity=row)")
    assert torch.equal(rounded, linear_fp8_activations.linear(fmt, x, parts, None))
    exact = x.cpu().double() @ w.t()
    assert relative_error(kept.cpu(), exact) < 1e-3
    assert 1e-2 < relative_error(rounded.cpu(), exact) < 4e-2


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, which interprets
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("fields", ["granularity=row,", "granularity=block,"])
def test_what_is_not_finite_makes_its_row_nan(fields, bad):
    """A NaN or an infinity in a row of x makes that row of the result NaN, and no other; a NaN weight its column."""
    fmt, parts, _ = weight(fields, 20, 100)
    x = torch.randn(3, 100)
    x[1, 5] = bad
    found = linear_fp8_activations.linear(fmt, x.to(DEVICE), parts, None).cpu()
    assert bool(found[1].isnan().all())
    assert bool(found[[0, 2]].isfinite().all())
    parts["qdata"].view(torch.uint8)[7, 3] = 255
    found = linear_fp8_activations.linear(fmt, x.to(DEVICE), parts, None).cpu()
    assert bool(found[:, 7].isnan().all())
    assert bool(found[0, torch.arange(20) != 7].isfinite().all())


def test_every_code_of_the_weight():
    """Each finite code is multiplied as what it stands for, subnormals and both signs included."""
    fmt, parts, _ = weight("", 256, 64)
    every = torch.arange(256, dtype=torch.uint8)
    parts["qdata"].view(torch.uint8).zero_()
    parts["qdata"].view(torch.uint8)[:, 2] = every.to(DEVICE)
    parts["scale"].fill_(0.5)
    x = torch.zeros(3, 64)
    x[:, 2] = 2.0
    found = linear_fp8_activations.linear(fmt, x.to(DEVICE), parts, None).cpu()
    wanted = from_fp8(every.view(torch.float8_e4m3fn)).expand(3, 256)
    assert torch.allclose(found, wanted, rtol=1e-6, atol=0, equal_nan=True)


def test_a_tile_shape_is_chosen_for_each_size_of_blocks():
    """What was fastest with steps of 32 columns is not taken for steps of 128, for which it may not fit."""
    keys = set()
    for block in (32, 128):
        fmt = parse_spec(f"fp8_e4m3(granularity=block,block_size={block}x{block},activations=fp8)")
        x = torch.empty(16, 4096, device="meta")
        parts = fmt.empty_parts((256, 4096), x.device, x.dtype)
        with assume(Target("cuda", (8, 9))), record() as launches:
            linear_fp8_activations.linear(fmt, x, parts, None)
        keys |= {
            tuple(str(one.arguments[name]) for name in one.kernel.key if name != "out")
            for one in launches
            if one.kernel.name == "_fp8_gemm"
        }
    assert len(keys) == 2


def test_pytorchs_product_is_refused_in_words():
    """What PyTorch's product of scaled codes does not take is said, whatever the device."""
    fmt, parts, _ = weight("granularity=row,", 40, 64)
    x = torch.zeros(2, 64, dtype=torch.bfloat16, device=DEVICE)
    refuses = linear_fp8_activations.refuses_scaled
    with assume(Target("cuda", (8, 6))):
        assert "does not multiply" in str(refuses(fmt, x, parts, None))
    with assume(Target("cuda", (9, 0))):
        assert "multiples of 16" in str(refuses(fmt, x, parts, None))
        assert "have to be bfloat16" in str(refuses(fmt, x.float(), parts, None))
        blocks, parts, _ = weight("granularity=block,", 48, 64)
        assert "scales of blocks" in str(refuses(blocks, x, parts, None))
        tensor, parts, _ = weight("", 48, 64)
        assert refuses(tensor, x, parts, None) is None


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [128, 3072, 18432])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_many_codes(columns, dtype):
    """Tens of millions of codes are those of the reference on a CPU, bit for bit."""
    for seed in range(3):
        check_codes(activations(700, 18432, dtype, seed=seed), columns)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", FIELDS[:3])
def test_large(fields, dtype):
    """Shapes of real layers give the right product, for numbers of tokens on both sides of every crossover."""
    for m in (1, 7, 16, 33, 300, 1500):
        check_linear(fields, 3072, 12288, m, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("fields", FIELDS[:2])
def test_pytorchs_product(fields):
    """PyTorch's product of scaled codes is as near to the float64 product as the kernel's own, bias included."""
    fmt, parts, _ = weight(fields, 3072, 3072)
    x = activations(64, 3072, torch.bfloat16).to(DEVICE)
    bias = torch.randn(3072, device=DEVICE).bfloat16()
    if why := linear_fp8_activations.refuses_scaled(fmt, x, parts, bias):
        pytest.skip(why)
    codes, scale = quantize(x, 3072)
    own = torch.empty((64, 3072), dtype=torch.float32, device=DEVICE)
    fp8_gemm.product(codes, scale, parts["qdata"], parts["scale"], None, bias, own)
    found = linear_fp8_activations.scaled(codes, scale, parts["qdata"], parts["scale"], bias)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.cpu(), own.cpu().double()) <= TOLERANCE[torch.bfloat16]
