"""gguf on the CPU backend: ggml's values bit for bit, and products of blocks as they lie in the file."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.nn import functional as F

from lowbit.dispatch import preferred_layout, select, use_backend
from lowbit.errors import UnsupportedError
from lowbit.formats import parse_spec
from lowbit.numerics.gguf_blocks import READABLE
from lowbit.ops import generic
from lowbit.tensor import QuantizedTensor
from tests.support.cpu_linear import DTYPES, ROWS, TOKENS, activations, relative_error
from tests.support.cpu_rows import check_embedding, check_plain_linear, decoded, same_bits
from tests.support.specs import any_parts

linear_gguf = pytest.importorskip("lowbit.backends.cpu.linear_gguf", reason="no compiled kernels", exc_type=ImportError)
gguf_rows = importlib.import_module("lowbit.backends.cpu.gguf_rows")
native = importlib.import_module("lowbit.backends.cpu.native")

SPECS = (*(f"gguf(type={name})" for name in READABLE), "gguf(type=NVFP4,global_scale=True)")
EVERY_TYPE = pytest.mark.parametrize("spec", SPECS)


def columns(spec: str, blocks: int) -> int:
    """The columns of so many blocks."""
    return blocks * parse_spec(spec).block.columns


def weight(spec: str, n: int, k: int) -> QuantizedTensor:
    """A weight [n, k] with finite steps of all sizes."""
    fmt = parse_spec(spec)
    generator = torch.Generator().manual_seed(n + k)
    if fmt.encodable and not fmt.pre_quant_scale:
        w = torch.randn(n, k, generator=generator) * torch.exp(torch.randn(n, 1, generator=generator))
        return QuantizedTensor.quantize(w, spec, dtype=torch.float32)
    return QuantizedTensor.from_parts(any_parts(fmt, (n, k), seed=n), spec, (n, k), torch.float32)


def any_bytes(spec: str, n: int, k: int) -> QuantizedTensor:
    """A weight [n, k] of any bytes: with steps that are infinite, NaN and subnormal."""
    fmt = parse_spec(spec)
    parts = fmt.empty_parts((n, k), torch.device("cpu"))
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(0, 256, parts["qdata"].shape, generator=generator, dtype=torch.uint8)
    others = {name: torch.rand(part.shape, generator=generator) for name, part in parts.items() if name != "qdata"}
    return QuantizedTensor.from_parts({**others, "qdata": codes}, spec, (n, k), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_TYPE
def test_every_value_is_the_one_of_the_reference(spec, dtype):
    """Any bytes decode to the reference's bits, for odd numbers of rows and of blocks."""
    for n, blocks in ((1, 1), (16, 9), (35, 3)):
        one = any_bytes(spec, n, columns(spec, blocks))
        assert same_bits(decoded(one, dtype, "cpu"), decoded(one, dtype, "eager")), (n, blocks)


@pytest.mark.parametrize("spec", ["gguf(type=MXFP4)", "gguf(type=NVFP4)"])
def test_every_scale_of_a_byte(spec):
    """All 256 scales decode as the reference does: subnormal ones and the one that is zero, too."""
    fmt = parse_spec(spec)
    codes = any_bytes(spec, 256, columns(spec, 1)).parts["qdata"]
    codes[:, : fmt.block.header_size] = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    one = QuantizedTensor.from_parts({"qdata": codes}, spec, (256, columns(spec, 1)), torch.float32)
    assert same_bits(decoded(one, torch.float32, "cpu"), decoded(one, torch.float32, "eager"))


@pytest.mark.parametrize("spec", ["gguf(type=Q4_K,pre_quant_scale=True)", "gguf(type=Q5_1,pre_quant_scale=True)"])
def test_a_factor_of_columns(spec):
    """A pre-quant scale multiplies what is decoded, before it is rounded."""
    one = any_bytes(spec, 20, columns(spec, 3))
    assert same_bits(decoded(one, torch.bfloat16, "cpu"), decoded(one, torch.bfloat16, "eager"))
    check_embedding(one, decoded(one, torch.float32, "eager"))


@EVERY_TYPE
def test_rows_by_index(spec):
    """Indices of both dtypes and any shape give the rows of the reference."""
    one = any_bytes(spec, 35, columns(spec, 3))
    check_embedding(one, decoded(one, torch.float32, "eager"))
    with use_backend("cpu"), pytest.raises(IndexError, match="35 names no row of a table with 35"):
        F.embedding(torch.tensor([3, 35]), one)


@EVERY_TYPE
def test_rows_by_index_of_packed_blocks(spec):
    """A table that a head shares is packed: its rows are looked up there, and it is not unpacked for that."""
    one = any_bytes(spec, 35, columns(spec, 3))
    packed = one.in_layout("gguf_rows16")
    before = generic.FALLBACKS.total()
    check_embedding(packed, decoded(one, torch.float32, "eager"))
    assert generic.FALLBACKS.total() == before
    for index in (35, -1):
        with use_backend("cpu"), pytest.raises(IndexError, match=f"{index} names no row of a table with 35"):
            F.embedding(torch.tensor([3, index]), packed)


@pytest.mark.parametrize("rows", [1024, 16, 5], ids=["whole", "strips", "too_few"])
@pytest.mark.parametrize("spec", [*SPECS, "gguf(type=Q4_K,pre_quant_scale=True)"])
def test_gradients(spec, rows, monkeypatch):
    """The gradient of the input is the reference's, of plain blocks, those with gaps and packed ones, in pieces."""
    n, k = 35, columns(spec, 3)
    monkeypatch.setattr("lowbit.backends.eager.linear_input_gradient.DECODE_ELEMENTS", rows * k)
    one = weight(spec, n, k)
    spread = one.map_parts(lambda part: torch.stack([part, part], 1)[:, 0] if part.dim() == 2 else part)
    for dtype in DTYPES:
        grad = activations(6, n, torch.float32).mul_(2.0**-10).to(dtype).view(2, 3, n)
        wanted = grad.double() @ decoded(one, torch.float32, "eager").double()
        for layout, of in (("", one), ("", spread), ("gguf_rows16", one.in_layout("gguf_rows16"))):
            chosen = select("linear_input_gradient", "gguf", layout, "cpu", (one.format, grad, of.parts, k))
            assert chosen.name == "cpu:linear_input_gradient_gguf" + ("_rows16" if layout else "")
            with use_backend("cpu"):
                found = generic.linear_input_gradient(grad, of.part_list, k, of.spec)
            assert found.dtype == dtype
            assert found.shape == (2, 3, k)
            assert relative_error(found, wanted) <= (1e-5 if dtype == torch.float32 else chosen.tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_TYPE
def test_products(spec, dtype):
    """The product is the float64 one within the tolerance, for odd numbers of rows and tokens."""
    fmt = parse_spec(spec)
    sizes = [(n, blocks, 3) for n in ROWS for blocks in (1, 9)] + [(35, 5, m) for m in TOKENS]
    for n, blocks, m in sizes:
        one = weight(spec, n, columns(spec, blocks))
        x = activations(m, one.shape[1], torch.float32).mul_(2.0**-10).to(dtype)
        bias = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(dtype) if m % 2 else None
        wanted = x.double() @ decoded(one, torch.float32, "eager").double().t()
        wanted = wanted if bias is None else wanted + bias.double()
        entry = select("linear", "gguf", "", "cpu", (fmt, x, one.parts, bias))
        assert entry.name == "cpu:linear_gguf"
        with use_backend("cpu"), torch.inference_mode():
            found = F.linear(x, one, bias)
        assert found.dtype == dtype
        limit = 1e-5 if dtype == torch.float32 else entry.tolerance
        assert relative_error(found, wanted) <= limit, (n, blocks, m)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_TYPE
def test_products_of_packed_blocks(spec, dtype):
    """Blocks in gguf_rows16 give the bits of those that lie as in the file: in registers for few tokens, or not."""
    fmt = parse_spec(spec)
    sizes = [(n, blocks, 3) for n in ROWS for blocks in (1, 9)] + [(35, 5, m) for m in (*TOKENS, 12, 13)]
    for n, blocks, m in sizes:
        one = weight(spec, n, columns(spec, blocks))
        packed = one.in_layout("gguf_rows16")
        x = activations(m, one.shape[1], dtype)
        x[-1, 5] = torch.inf if m == 4 else x[-1, 5]
        bias = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(dtype) if m % 2 else None
        entry = select("linear", "gguf", "gguf_rows16", "cpu", (fmt, x, packed.parts, bias))
        assert entry.name == "cpu:linear_gguf_rows16"
        with use_backend("cpu"), torch.inference_mode():
            assert same_bits(F.linear(x, packed, bias), F.linear(x, one, bias)), (n, blocks, m)


@EVERY_TYPE
def test_packed_blocks_are_preferred_and_come_back(spec):
    """A linear's weight is packed, an embedding's is not; a packed one has the values and bytes of the plain one."""
    one = any_bytes(spec, 35, columns(spec, 3))
    assert preferred_layout("linear", one.format, *one.matrix, "cpu") == "gguf_rows16"
    assert preferred_layout("embedding", one.format, *one.matrix, "cpu") == ""
    packed = one.in_layout("gguf_rows16")
    whole = any_bytes(spec, 32, columns(spec, 3))
    assert whole.in_layout("gguf_rows16").nbytes_stored() - whole.nbytes_stored() < 2 * 64  # a line a strip
    assert same_bits(decoded(packed, torch.bfloat16, "eager"), decoded(one, torch.bfloat16, "eager"))
    assert same_bits(packed.dequantize(torch.float32), one.dequantize(torch.float32))
    assert torch.equal(packed.in_layout("").parts["qdata"], one.parts["qdata"])


@pytest.mark.parametrize("m", [1, 7])
def test_large_steps_give_no_infinity(m):
    """Steps of which 128 are infinite: a byte's offset is taken off while sums are integers."""
    spec, n, k = "gguf(type=MXFP4)", 16, 64
    codes = any_bytes(spec, n, k).parts["qdata"]
    codes.view(n, 2, -1)[..., 0] = 249
    one = QuantizedTensor.from_parts({"qdata": codes}, spec, (n, k), torch.float32)
    x = activations(m, k, torch.float32).mul_(2.0**-20).bfloat16()
    with use_backend("cpu"), torch.inference_mode():
        found = F.linear(x, one)
        assert same_bits(F.linear(x, one.in_layout("gguf_rows16")), found)
    assert relative_error(found, x.double() @ decoded(one, torch.float32, "eager").double().t()) <= 6e-3


@EVERY_TYPE
def test_properties(spec):
    """Gaps, leading axes, slices of rows, no tokens and the number of threads change nothing."""
    check_plain_linear(weight(spec, 100, columns(spec, 3)))


def test_threads_change_no_value():
    """Decoded values are the same on any number of threads, and those of a slice are those of the whole."""
    one = any_bytes("gguf(type=Q6_K)", 70, 512)
    before = torch.get_num_threads()
    whole = decoded(one, torch.float32, "cpu")
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert same_bits(decoded(one, torch.float32, "cpu"), whole)
    finally:
        torch.set_num_threads(before)
    assert same_bits(decoded(one[9:30], torch.float32, "cpu"), whole[9:30])


def test_every_type_that_is_read_has_a_kernel():
    """The kernels know all types of the format."""
    assert set(gguf_rows.TYPES) == set(READABLE)


def test_a_type_without_a_kernel_is_refused_and_never_read_as_another(monkeypatch):
    """Each kernel names the type and those that it takes; the compiled ones know no number but theirs."""
    one = weight("gguf(type=Q8_0)", 8, 64)
    monkeypatch.setattr(gguf_rows, "TYPES", ("Q4_0", "NVFP4"))
    why = r"blocks of the type Q8_0; the kernels take Q4_0, NVFP4\n"
    with use_backend("cpu"), torch.inference_mode():
        for call in (
            one.dequantize,
            lambda: F.embedding(torch.tensor([3]), one),
            lambda: F.linear(torch.ones(1, 64), one),
        ):
            with pytest.raises(UnsupportedError, match=why):
                call()
    for number in (-1, len(READABLE)):
        with pytest.raises((ValueError, RuntimeError), match=f"no GGUF type has the number {number} here"):
            native.module().dequantize_gguf(number, 0, 0, False, 0, 0, 0, False, 0, 0, 0, 0, 0, 0, 0, 1)


def test_what_it_refuses():
    """float64 is refused in words and left to the reference."""
    one = weight("gguf(type=Q4_0)", 8, 64)
    assert torch.equal(one.dequantize(torch.float64), decoded(one, torch.float64, "eager"))
    x = torch.ones(2, 64, dtype=torch.float64)
    assert "x is float64" in str(linear_gguf.refuses(one.format, x, one.parts, None))
    assert "no columns" in str(linear_gguf.refuses(one.format, torch.ones(2, 0), one.parts, None))
