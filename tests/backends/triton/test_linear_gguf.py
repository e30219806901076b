from __future__ import annotations

import pytest
import torch

from lowbit.formats import parse_spec
from tests.support.specs import any_parts
from tests.support.triton_linear import DEVICE, DTYPES, ON_GPU, check_linear, check_properties, require
from tests.support.triton_rows import in_layout, refusal, run

require()
from lowbit.backends.triton import gguf_blocks, gguf_rows, linear_gguf  # noqa: E402  (needs Triton)
from lowbit.backends.triton.device import Target, assume  # noqa: E402
from lowbit.backends.triton.tuning import record  # noqa: E402

SPECS = (*(f"gguf(type={name})" for name in gguf_blocks.TYPES), "gguf(type=NVFP4,global_scale=True)")
LIMIT = {torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 6e-3}


def check(spec: str, n: int, k: int, m: int, dtype: torch.dtype, *, bias: bool = True) -> None:
    """Assert that the product with blocks of any content is that of the decoded weight in float64."""
    fmt = parse_spec(spec)
    parts = any_parts(fmt, (n, k), seed=n + m)
    if fmt.type == "MXFP4":  # whose powers of two reach further than float16
        parts["qdata"][:, :: fmt.block.size] = parts["qdata"][:, :: fmt.block.size] % 8 + 120
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
    weight = fmt.dequantize(parts, (n, k), torch.float32).double()
    size = weight.abs().amax()  # so that no sum leaves the range of float16
    x = (x.double() * min(1.0, 1000.0 / (size.item() * k**0.5))).to(dtype)
    added = torch.randn(n).to(dtype) if bias else None
    wanted = x.double() @ weight.t() + (0 if added is None else added.double())
    moved = None if added is None else added.to(DEVICE)
    found = run("linear", spec, "", fmt, x.to(DEVICE), in_layout(fmt, parts, ""), moved)
    assert found.dtype == dtype
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error <= LIMIT[dtype], (spec, n, k, m, dtype, error)


@pytest.mark.parametrize("spec", SPECS)
def test_product(spec):
    """The product equals that of the decoded weight for odd numbers of rows, of blocks and of tokens."""
    columns = parse_spec(spec).block.columns
    for n, blocks, m in ((1, 1, 3), (70, 2, 1), (20, 3, 9)):
        check(spec, n, blocks * columns, m, torch.float16, bias=m != 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    """Activations of every dtype are multiplied, also those that are left to the decoded weight."""
    for m in (2, linear_gguf.FEW + 1):
        check("gguf(type=Q5_K)", 20, 512, m, dtype)


@pytest.mark.parametrize("spec", ["gguf(type=Q8_0)", "gguf(type=Q4_0)"])
def test_numbers_of_tokens(spec):
    """Every number of tokens gives the same product, on both sides of where the weight is decoded first."""
    for m in (5, 17, linear_gguf.FEW, linear_gguf.FEW + 1):
        check_linear(spec, 20, 128, m, torch.float16, layout="", bias=m % 2 == 0)


def test_split_sums(monkeypatch):
    """With K split over programs the sums of all pieces are added, the bias and the global scale once."""
    monkeypatch.setattr(linear_gguf, "splits_for", lambda *_: 4)
    for spec in ("gguf(type=NVFP4,global_scale=True)", "gguf(type=Q6_K)"):
        for blocks in (2, 5):
            check(spec, 33, blocks * 256, 3, torch.float16)


def test_the_weight_is_read_by_few_tokens_once():
    """One program for all tokens up to the limit; beyond it, and on Turing, the weight is decoded once."""
    fmt = parse_spec("gguf(type=Q4_K)")
    parts = fmt.empty_parts((64, 512), torch.device("meta"))
    for capability, m, name in (
        ((8, 0), 1, "_linear_blocks"), ((9, 0), linear_gguf.FEW, "_linear_blocks"),
        ((9, 0), linear_gguf.FEW + 1, "_decode_blocks"), ((7, 5), 1, "_decode_blocks"),
    ):  # fmt: skip
        x = torch.empty((m, 512), dtype=torch.float16, device="meta")
        with assume(Target("cuda", capability)), record() as launches:
            linear_gguf.linear_gguf(fmt, x, parts, None)
        assert launches[0].kernel.name == name
        if name == "_linear_blocks":
            assert {one.constants["BLOCK_M"] for one in launches[0].configs} == {max(16, m)}


@pytest.mark.parametrize("spec", ["gguf(type=Q8_0)", "gguf(type=Q5_1)"])
def test_properties(spec):
    """Gaps, leading axes and no tokens change nothing, and every call gives the same bits."""
    check_properties(spec, 20, 128, layout="")


def test_refusals(monkeypatch):
    """What cannot be multiplied is refused in words."""
    spec = "gguf(type=Q8_0)"
    fmt = parse_spec(spec)
    parts = in_layout(fmt, any_parts(fmt, (4, 64)), "")
    x = torch.zeros((1, 64), dtype=torch.float16, device=DEVICE)
    gaps = {"qdata": torch.zeros((4, 70), dtype=torch.uint8, device=DEVICE)[:, :68]}
    assert "gaps" in refusal("linear", spec, "", fmt, x, gaps, None)
    assert "x is float64" in refusal("linear", spec, "", fmt, x.double(), parts, None)
    monkeypatch.setattr(gguf_rows.gguf_blocks, "TYPES", ("Q4_0",))
    assert "blocks of Q8_0" in refusal("linear", spec, "", fmt, x, parts, None)


@pytest.mark.skipif(ON_GPU, reason="a GPU rounds bfloat16 correctly")
def test_bfloat16_in_the_interpreter_is_refused():
    """The interpreter's bfloat16 is not the reference's, and it says so."""
    fmt = parse_spec("gguf(type=Q8_0)")
    x = torch.zeros((1, 64), dtype=torch.bfloat16)
    assert "bfloat16" in refusal("linear", "gguf(type=Q8_0)", "", fmt, x, any_parts(fmt, (4, 64)), None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_large(spec, dtype):
    """The shape of a real layer gives the right product, for numbers of tokens on both sides of every crossover."""
    for m in (1, 8, 17, linear_gguf.FEW, 300):
        check(spec, 6144, 3072, m, dtype)
