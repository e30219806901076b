from __future__ import annotations

import pytest
import torch

from lowbit.formats import Parts, parse_spec
from tests.support.triton_linear import DEVICE, DTYPES, ON_GPU, require
from tests.support.triton_rows import assert_same_bits, in_layout, random_parts, refusal, run

require()
from lowbit.backends.triton import decoded_linear, gguf_blocks, gguf_rows  # noqa: E402  (needs Triton)

SPECS = (*(f"gguf(type={name})" for name in gguf_blocks.TYPES), "gguf(type=NVFP4,global_scale=True)")


def columns_of(spec: str) -> int:
    """The columns of a block."""
    return parse_spec(spec).block.columns


def check(spec: str, n: int, k: int, dtype: torch.dtype) -> None:
    """Assert that blocks of any content decode to the bits of the reference."""
    fmt = parse_spec(spec)
    parts = random_parts(fmt, n, k, seed=n + k)
    found = run("dequantize", spec, "", fmt, in_layout(fmt, parts, ""), (n, k), dtype)
    assert_same_bits(found, fmt.dequantize(parts, (n, k), dtype))


@pytest.mark.parametrize("spec", SPECS)
def test_bits_are_those_of_the_reference(spec):
    """Every code under every header, infinite and subnormal scales too, decodes to ggml's bits."""
    for n, blocks, dtype in zip((37, 1, 130), (3, 1, 2), DTYPES, strict=False):
        check(spec, n, blocks * columns_of(spec), dtype)


@pytest.mark.parametrize("spec", SPECS)
def test_more_units_than_a_program(spec):
    """Blocks of the last programs, the ragged one included, decode to ggml's bits."""
    check(spec, 11, 9 * columns_of(spec) * max(1, 128 // columns_of(spec)), torch.float16)


@pytest.mark.parametrize("spec", SPECS)
def test_blocks_at_odd_addresses(spec):
    """Blocks that begin at any byte of memory decode the same."""
    fmt = parse_spec(spec)
    k = 2 * columns_of(spec)
    parts = random_parts(fmt, 3, k)
    wanted = fmt.dequantize(parts, (3, k), torch.float16)
    codes = parts["qdata"]
    for offset in (1, 2):
        room = torch.zeros(codes.numel() + offset, dtype=torch.uint8, device=DEVICE)
        moved = {**in_layout(fmt, parts, ""), "qdata": room[offset:].view(codes.shape)}
        moved["qdata"].copy_(codes)
        assert_same_bits(run("dequantize", spec, "", fmt, moved, (3, k), torch.float16), wanted)


@pytest.mark.parametrize("spec", ["gguf(type=Q4_K,pre_quant_scale=True)", "gguf(type=Q8_0,pre_quant_scale=True)"])
def test_factors_of_columns(spec):
    """The effective weight has the pre-quant scale in it, also with more columns than a program decodes."""
    for n, k in ((3, 512), (2, 2304)):
        check(spec, n, k, torch.float16)


@pytest.mark.parametrize("spec", SPECS)
def test_embedding(spec):
    """Each index gives the bits of its row, and one that names no row gives NaN."""
    fmt, k = parse_spec(spec), columns_of(spec)
    parts = random_parts(fmt, 23, k)
    table = fmt.dequantize(parts, (23, k), torch.float16)
    packed = in_layout(fmt, parts, "")
    for indices in (torch.tensor([[22, 0, 3], [3, 7, 0]]), torch.tensor(4), torch.empty((0, 3), dtype=torch.int32)):
        found = run("embedding", spec, "", fmt, indices.to(DEVICE), packed, k, torch.float16)
        assert_same_bits(found, table[indices])
    found = run("embedding", spec, "", fmt, torch.tensor([-1, 5, 1 << 40], device=DEVICE), packed, k, torch.float16)
    assert found[[0, 2]].isnan().all()
    assert_same_bits(found[1], table[5])


def test_nothing_to_decode(monkeypatch):
    """A weight without rows is decoded, and looked up, without a launch."""
    monkeypatch.setattr(gguf_rows, "_decode_blocks", lambda *_, **__: pytest.fail("launched"))
    spec = "gguf(type=Q8_0)"
    fmt = parse_spec(spec)
    parts = in_layout(fmt, random_parts(fmt, 0, 64), "")
    assert run("dequantize", spec, "", fmt, parts, (0, 64), torch.float16).shape == (0, 64)
    indices = torch.tensor([0, 3], device=DEVICE)
    assert run("embedding", spec, "", fmt, indices, parts, 64, torch.float16).isnan().all()


@pytest.mark.parametrize("elements", [1 << 26, 3 * 512])
def test_gradient(elements, monkeypatch):
    """The gradient of the input is that of the decoded weight, whether it is decoded at once or in pieces."""
    monkeypatch.setattr(decoded_linear, "ELEMENTS", elements)
    spec = "gguf(type=Q6_K)"
    fmt = parse_spec(spec)
    parts = _finite(random_parts(fmt, 10, 512))
    grad = torch.randn(3, 10).half()
    wanted = grad.double() @ fmt.dequantize(parts, (10, 512), torch.float32).double()
    found = run("linear_input_gradient", spec, "", fmt, grad.to(DEVICE), in_layout(fmt, parts, ""), 512)
    assert (found.double() - wanted).norm() <= 6e-3 * wanted.norm()


def _finite(parts: Parts) -> Parts:
    """Without the bit that makes float16 scales infinite, or large."""
    return {**parts, "qdata": parts["qdata"] & 0xBF}


def test_refusals(monkeypatch):
    """Blocks with gaps, other dtypes and indices, and types that are not known here are refused in words."""
    spec = "gguf(type=Q8_0)"
    fmt = parse_spec(spec)
    parts = in_layout(fmt, random_parts(fmt, 4, 64), "")
    gaps = {"qdata": torch.zeros((4, 70), dtype=torch.uint8, device=DEVICE)[:, :68]}
    indices = torch.zeros(2, dtype=torch.int16, device=DEVICE)
    assert "gaps" in refusal("dequantize", spec, "", fmt, gaps, (4, 64), torch.float16)
    assert "the result is float64" in refusal("dequantize", spec, "", fmt, parts, (4, 64), torch.float64)
    assert "indices are int16" in refusal("embedding", spec, "", fmt, indices, parts, 64, torch.float16)
    assert "x is float64" in refusal(
        "linear_input_gradient", spec, "", fmt, torch.zeros((1, 4), dtype=torch.float64, device=DEVICE), parts, 64
    )
    monkeypatch.setattr(gguf_blocks, "TYPES", ("Q4_0",))
    assert "blocks of Q8_0; the kernel decodes Q4_0" in refusal(
        "dequantize", spec, "", fmt, parts, (4, 64), torch.float16
    )


@pytest.mark.skipif(ON_GPU, reason="a GPU rounds bfloat16 correctly")
def test_bfloat16_in_the_interpreter_is_refused():
    """The interpreter's bfloat16 is not the reference's, and it says so."""
    spec = "gguf(type=Q8_0)"
    fmt = parse_spec(spec)
    assert "bfloat16" in refusal("dequantize", spec, "", fmt, random_parts(fmt, 4, 64), (4, 64), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS)
def test_large(spec):
    """The rows of a real layer decode to ggml's bits in every tile shape's reach, in bfloat16."""
    check(spec, 6001, 3072, torch.bfloat16)


@pytest.mark.gpu
def test_addresses_beyond_32_bits():
    """The last rows of a weight of more than 2**31 bytes are its own."""
    fmt = parse_spec("gguf(type=Q8_0)")
    n, k = 140_000, 16_384
    parts = {"qdata": torch.zeros((n, k // 32 * 34), dtype=torch.uint8, device=DEVICE)}
    parts["qdata"][-1] = random_parts(fmt, 1, k)["qdata"][0].to(DEVICE)
    found = run("dequantize", "gguf(type=Q8_0)", "", fmt, parts, (n, k), torch.float16)
    last = {"qdata": parts["qdata"][-2:].cpu()}
    assert_same_bits(found[-2:], fmt.dequantize(last, (2, k), torch.float16))
